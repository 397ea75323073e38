"""Text is data: it never becomes a control token, and is cut only where it must be.

    python -m pytest tests/test_tokenizer.py
    MINICLS_SHARED=DIR python -m pytest tests/test_tokenizer.py     # also with the published tokenizers

Everything is exact.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minicls.config import UserError
from minicls.tokenizer import Tokenizer, bert_rows, load_tokenizer, train_bert_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONTROL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"word{i}" for i in range(1000)]
LINES = [" ".join(WORDS), "[SEP] [CLS] [MASK] [PAD] and some more words, for the counts", "the cat sat", "the dog"]


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return train_bert_tokenizer(LINES, vocab_size=2000)


def added_ids(tokenizer: Tokenizer) -> set[int]:
    return {token["id"] for token in json.loads(tokenizer.json_text)["added_tokens"]}


@pytest.mark.parametrize(
    ("name", "fold"),
    # bert-base-chinese knows no upper-case letters: they are [UNK], the one control token that stands for text.
    [("tiny", str.lower), ("bert-base-cased", str), ("bert-base-uncased", str.lower), ("bert-base-chinese", str.lower)],
)
def test_bert_control_tokens_in_a_text_stay_text(name, fold, tiny, request):
    tokenizer = tiny if name == "tiny" else load_tokenizer(request.getfixturevalue("shared") / "tokenizers" / name)
    text = "[SEP] [CLS] [MASK] [PAD]"
    (ids,) = tokenizer.encode([text])
    assert not (added_ids(tokenizer) - {*tokenizer.control_ids(["[UNK]"])}) & set(ids)
    (ids,) = tokenizer.encode([fold(text)])
    assert not added_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids).replace(" ", "") == fold(text).replace(" ", "")
    ((first, *middle, last),), cut = bert_rows(tokenizer, [fold(text)], 512)
    assert [first, last] == tokenizer.control_ids(["[CLS]", "[SEP]"]) and middle == ids and cut == 0


@pytest.fixture(scope="module")
def qwen(shared) -> Tokenizer:
    return load_tokenizer(shared / "tokenizers" / "Qwen3-0.6B")


QWEN_CONTROL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<|fim_prefix|>"]


@pytest.mark.parametrize("token", QWEN_CONTROL)
def test_qwen_control_tokens_in_a_text_stay_text(qwen, token):
    added = added_ids(qwen)
    assert qwen.control_ids([token])[0] in added
    texts = [token, f"before{token}after", f"\n{token}\n\n", f" {token}" * 3]
    for text, ids in zip(texts, qwen.encode(texts), strict=True):
        assert ids and not added & set(ids)
        assert qwen.decode(ids) == text
    assert qwen.decode(qwen.control_ids([token])) == token  # put in by id, it is itself


def test_qwen_answer_has_the_published_ids(qwen):
    assert qwen.control_ids(["<think>", "</think>", "<|im_end|>"]) == [151667, 151668, 151645]
    assert qwen.encode(["\n\n", "A", "B", "C", "D", " A"]) == [[271], [32], [33], [34], [35], [362]]
    assert len(qwen) == 151_669


# Rows for BERT.


def cut_oracle(ids: list[int], max_length: int, head: int) -> list[int]:
    tail = max_length - 2 - head
    return ids[:head] + (ids[-tail:] if tail else [])


@pytest.mark.parametrize(
    ("max_length", "long_text", "head"),
    [(512, "head", 510), (512, "head-tail", 128), (12, "head", 10), (12, "head-tail", 3), (3, "head", 1), (3, "head-tail", 0)],
)
def test_a_long_text_keeps_its_head_or_head_and_tail(tiny, max_length, long_text, head):
    (long,) = tiny.encode([LINES[0]])
    assert len(long) == len(WORDS)
    fits, over = " ".join(WORDS[: max_length - 2]), " ".join(WORDS[: max_length - 1])
    rows, cut = bert_rows(tiny, [LINES[0], fits, over, ""], max_length, long_text)
    cls, sep = tiny.control_ids(["[CLS]", "[SEP]"])
    assert rows == [
        [cls, *cut_oracle(long, max_length, head), sep],
        [cls, *long[: max_length - 2], sep],
        [cls, *cut_oracle(long[: max_length - 1], max_length, head), sep],
        [cls, sep],
    ]
    assert cut == 2 and len(rows[0]) == len(rows[1]) == len(rows[2]) == max_length


def test_no_text_changes_another(tiny):
    alone = [tiny.encode([text])[0] for text in LINES]
    assert tiny.encode(LINES) == alone
    assert tiny.encode([]) == [] and tiny.encode([""]) == [[]]
    assert bert_rows(tiny, [], 512) == ([], 0)


def test_more_texts_than_a_chunk_keep_their_order(tiny, monkeypatch):
    monkeypatch.setattr("minicls.tokenizer.CHUNK", 3)
    assert tiny.encode(WORDS[:10]) == [tiny.control_ids([word]) for word in WORDS[:10]]


# The tokenizer of `--model tiny`.


def test_training_gives_the_same_bytes_in_every_process():
    code = (
        "import hashlib; from minicls.tokenizer import train_bert_tokenizer as train;"
        "texts = [f'Text {i % 7} on {i * i} caf\\u00e9s, \\u4e2d\\u6587 {chr(97 + i % 26) * 3}' for i in range(200)];"
        "print(hashlib.sha256(train(texts, 150).json_text.encode()).hexdigest())"
    )
    digests = {
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("vocab_size", [5, 40, 2000])
def test_training_keeps_to_the_vocabulary_size(vocab_size):
    tokenizer = train_bert_tokenizer(LINES, vocab_size)
    assert tokenizer.control_ids(CONTROL) == [0, 1, 2, 3, 4]
    assert len(tokenizer) == vocab_size if vocab_size < 1000 else 1000 < len(tokenizer) <= vocab_size


def test_training_covers_every_word_of_its_texts(tiny):
    assert 1 not in {i for ids in tiny.encode(LINES) for i in ids}  # [UNK]
    assert tiny.decode(tiny.encode(["The cat SAT"])[0]) == "the cat sat"
    assert len(tiny.encode(["the cat"])[0]) == 2


# Files.


def test_save_and_load_give_the_same_tokenizer(tiny, tmp_path):
    tiny.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.json_text == tiny.json_text and loaded.config == tiny.config and len(loaded) == len(tiny)
    assert loaded.encode(LINES) == tiny.encode(LINES)
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == tiny.json_text


def test_transformers_reads_what_is_saved(tiny, tmp_path):
    import transformers

    tiny.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.convert_tokens_to_ids(t) for t in CONTROL] == [0, 1, 2, 3, 4]
    assert (theirs.cls_token, theirs.sep_token, theirs.pad_token, theirs.model_max_length) == ("[CLS]", "[SEP]", "[PAD]", 512)
    assert theirs("the dog sat", add_special_tokens=False)["input_ids"] == tiny.encode(["the dog sat"])[0]


def test_a_file_s_own_truncation_and_padding_have_no_effect(tiny, tmp_path):
    tiny.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))  # as sentence-transformers' files have them
    spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    spec["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    file.write_text(json.dumps(spec), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(LINES) == tiny.encode(LINES)
    assert loaded.json_text == file.read_text(encoding="utf-8")  # and the file is handed on as it came


def test_no_config_file_is_no_mistake(tiny, tmp_path):
    tiny.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).config == {}


def test_a_missing_control_token_is_named(tiny):
    with pytest.raises(UserError, match=r"--model: .*lacks <\|im_end\|>, <think>;"):
        tiny.control_ids(["[CLS]", "<|im_end|>", "<think>"])
