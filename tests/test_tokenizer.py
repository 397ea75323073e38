"""Text is data: it never becomes a control token, and is cut only where it must be.

    python -m pytest tests/test_tokenizer.py
    MINICLS_SHARED=DIR python -m pytest tests/test_tokenizer.py     # also with the published tokenizers

Everything is exact.
"""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from string import ascii_uppercase

import pytest

from minicls.config import UserError
from minicls.data import synthetic
from minicls.tokenizer import (
    QWEN_CONTROL_TOKENS,
    Tokenizer,
    bert_rows,
    load_tokenizer,
    text_rows,
    train_bert_tokenizer,
    train_qwen_tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent
CONTROL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"word{i}" for i in range(1000)]
LINES = [" ".join(WORDS), "[SEP] [CLS] [MASK] [PAD] and some more words, for the counts", "the cat sat", "the dog"]


ANY_TEXTS = [  # whatever a tokenizer was trained on, all of it comes back
    "",
    " two  blanks, a tab\tand\r\nlines\n\n\n",
    "Ünïcödé — 中文、日本語 한국어 हिन्दी עברית",
    "😀👩\u200d👩\u200d👧 \u0000\u0007\ufffd\U0010ffff",
    "".join(map(chr, range(1, 0x250))),
]


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return train_bert_tokenizer(LINES, vocab_size=2000)


@pytest.fixture(scope="module")
def tiny_qwen() -> Tokenizer:
    return train_qwen_tokenizer([f"{line}\n\nA" for line in LINES], vocab_size=600)


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


QWEN_CONTROL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<|fim_prefix|>"]


@pytest.mark.parametrize("token", QWEN_CONTROL_TOKENS)
def test_control_tokens_in_a_text_stay_text_with_the_tiny_tokenizer(tiny_qwen, token):
    texts = [token, f"before{token}after", f"\n{token}\n\n", f" {token}" * 3]
    for text, ids in zip(texts, tiny_qwen.encode(texts), strict=True):
        assert ids and not added_ids(tiny_qwen) & set(ids) and tiny_qwen.decode(ids) == text
    assert tiny_qwen.decode(tiny_qwen.control_ids([token])) == token


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


# Rows for Qwen3's linear head.


def test_text_rows_hold_the_text_and_nothing_else(tiny_qwen):
    texts = [LINES[0], "", "the cat", "<|im_end|>", " "]
    (end,) = tiny_qwen.control_ids(["<|im_end|>"])
    encoded = tiny_qwen.encode(texts)
    assert encoded[1] == [] and len(encoded[2]) == 2
    assert text_rows(tiny_qwen, texts, 10_000) == ([encoded[0], [end], *encoded[2:]], 0)
    rows, cut = text_rows(tiny_qwen, texts, len(encoded[3]))
    assert rows == [encoded[0][: len(encoded[3])], [end], *encoded[2:]] and cut == 1
    assert text_rows(tiny_qwen, texts, 1) == ([encoded[0][:1], [end], *(ids[:1] for ids in encoded[2:])], 3)
    assert text_rows(tiny_qwen, [], 5) == ([], 0)


def test_text_rows_need_the_token_of_an_empty_text(tiny):
    with pytest.raises(UserError, match=r"--model: .*lacks <\|im_end\|>;"):
        text_rows(tiny, ["text"], 5)


def test_the_head_of_a_text(tiny_qwen):
    """It covers whole tokens and whole letters, also where they are several characters or bytes."""
    text = "the cat cafe\u0301 中ok"
    assert tiny_qwen.decode(tiny_qwen.encode(["e\u0301"])[0]) == "é"
    assert len(tiny_qwen.encode(["é"])[0]) == 2 and len(tiny_qwen.encode(["中"])[0]) == 3
    heads = [tiny_qwen.head(text, n) for n in range(-1, len(tiny_qwen.encode([text])[0]) + 2)]
    assert heads[:4] == ["", "", "the", "the cat"]
    assert heads[-3:-1] == [text[:-1] if len(tiny_qwen.encode(["ok"])[0]) == 2 else "the cat cafe\u0301 中", text]
    assert heads[-1] == text
    for n, head in enumerate(heads, start=-1):
        assert text.startswith(head) and len(tiny_qwen.encode([head])[0]) <= max(n, 0)
        assert not head.endswith("cafe")  # the accent cut off
    assert heads == sorted(heads, key=len)
    assert tiny_qwen.head("", 0) == tiny_qwen.head("", 3) == tiny_qwen.head(" ", 0) == ""


def test_the_head_of_a_text_that_starts_in_blanks(tiny):
    assert [tiny.head("  the  cat ", n) for n in range(3)] == ["", "  the  ", "  the  cat "]


# The tokenizers of `--model tiny`.


@pytest.mark.parametrize("kind", ["bert", "qwen"])
def test_training_gives_the_same_bytes_in_every_process(kind):
    code = (
        f"import hashlib; from minicls.tokenizer import train_{kind}_tokenizer as train;"
        "texts = [f'Text {i % 7} on {i * i} caf\\u00e9s, \\u4e2d\\u6587 {chr(97 + i % 26) * 3}' for i in range(200)];"
        "print(hashlib.sha256(train(texts, 350).json_text.encode()).hexdigest())"
    )
    digests = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": threads},
        )
        for seed, parallel, threads in (("1", "false", "1"), ("2", "true", "2"), ("3", "true", "5"))
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


@pytest.mark.parametrize("vocab_size", [0, 261, 300])
def test_training_a_qwen_tokenizer_keeps_to_the_vocabulary_size(vocab_size):
    """It never has less than all bytes and the control tokens, which come last."""
    tokenizer = train_qwen_tokenizer([*synthetic(100, 1).train.texts, "中文"], vocab_size)
    size = max(vocab_size, 256 + 5)
    assert len(tokenizer) == size
    assert tokenizer.control_ids(QWEN_CONTROL_TOKENS) == [*range(size - 5, size)]
    assert tokenizer.decode(tokenizer.encode(["中文"])[0]) == "中文"


def test_a_qwen_tokenizer_s_merges_end_with_its_texts():
    assert len(train_qwen_tokenizer(["ab ab"], 1000)) == 256 + 2 + 5  # `ab` and ` ab`


@pytest.mark.parametrize("texts", [LINES, [], [""], ["中"]], ids=["words", "none", "empty", "one character"])
def test_a_qwen_tokenizer_has_every_byte(texts):
    tokenizer = train_qwen_tokenizer(texts, vocab_size=400)
    for text, ids in zip(ANY_TEXTS, tokenizer.encode(ANY_TEXTS), strict=True):
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(len(ids) == 1 for ids in tokenizer.encode([*ascii_uppercase, "\n", " "]))
    blank, *letters = tokenizer.encode(["\n\n", *(f"\n\n{letter}" for letter in ascii_uppercase)])
    assert letters == [blank + ids for ids in tokenizer.encode(ascii_uppercase)]


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


def test_transformers_reads_what_a_qwen_tokenizer_saves(tiny_qwen, tmp_path):
    import transformers

    tiny_qwen.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token, theirs.pad_token, theirs.model_max_length) == ("<|im_end|>", "<|endoftext|>", 4096)
    assert theirs.convert_tokens_to_ids([*QWEN_CONTROL_TOKENS]) == tiny_qwen.control_ids(QWEN_CONTROL_TOKENS)
    texts = [*ANY_TEXTS, *LINES, "cafe\u0301"]
    ours = tiny_qwen.encode(texts)
    assert [theirs(text, add_special_tokens=False)["input_ids"] for text in texts] == ours
    assert [theirs.decode(ids) for ids in ours] == [tiny_qwen.decode(ids) for ids in ours]
    # Theirs finds control tokens in a text; that is how its chat template puts them in.
    assert theirs("a<think>", add_special_tokens=False)["input_ids"][-1:] == tiny_qwen.control_ids(["<think>"])


def test_a_chat_template_in_a_file_of_its_own_is_kept(tiny_qwen, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        tiny_qwen.save(folder)
    template = "{{ messages }}中\n"
    config = {name: value for name, value in tiny_qwen.config.items() if name != "chat_template"}
    (new / "tokenizer_config.json").write_text(json.dumps(config))
    (new / "chat_template.jinja").write_text(template, encoding="utf-8")
    loaded = load_tokenizer(new)
    assert loaded.config == config | {"chat_template": template}
    (tmp_path / "saved").mkdir()
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").config == loaded.config
    assert load_tokenizer(old).config == tiny_qwen.config
    (new / "tokenizer_config.json").unlink()
    assert load_tokenizer(new).config == {"chat_template": template}


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
