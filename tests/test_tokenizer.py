"""Text is data: it never becomes a control token, and is cut only where it must be.

    python -m pytest tests/test_tokenizer.py
    MINICLS_SHARED=DIR python -m pytest tests/test_tokenizer.py     # also with the published tokenizers

Everything is exact.
"""

import json
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase

import pytest
from tokenizers import AddedToken

from minicls.config import UserError
from minicls.data import synthetic
from minicls.tiny import QWEN_CONTROL_TOKENS, train_bert_tokenizer, train_qwen_tokenizer
from minicls.tokenizer import Tokenizer, bert_rows, load_tokenizer, text_rows

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
    [
        (512, "head", 510),
        (512, "head-tail", 128),
        (12, "head", 10),
        (12, "head-tail", 3),
        (3, "head", 1),
        (3, "head-tail", 0),
    ],
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
        f"import hashlib; from minicls.tiny import train_{kind}_tokenizer as train;"
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
    assert tiny.config.items() <= loaded.config.items() and len(loaded) == len(tiny)
    assert loaded.encode(LINES) == tiny.encode(LINES)
    files = [(tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")]
    loaded.save(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")] == files


def test_transformers_reads_what_is_saved(tiny, tmp_path):
    import transformers

    tiny.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs.convert_tokens_to_ids(t) for t in CONTROL] == [0, 1, 2, 3, 4]
    assert (theirs.cls_token, theirs.sep_token, theirs.pad_token, theirs.model_max_length) == (
        "[CLS]",
        "[SEP]",
        "[PAD]",
        512,
    )
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
    assert loaded.config.items() <= load_tokenizer(tmp_path / "saved").config.items()
    assert tiny_qwen.config.items() <= load_tokenizer(old).config.items()
    (new / "tokenizer_config.json").unlink()
    assert load_tokenizer(new).config == {"chat_template": template}


def test_a_file_s_own_truncation_and_padding_have_no_effect(tiny, tmp_path):
    tiny.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))  # as in sentence-transformers' files
    spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    spec["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    file.write_text(json.dumps(spec), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(LINES) == tiny.encode(LINES)
    (tmp_path / "saved").mkdir()
    loaded.save(tmp_path / "saved")  # nor on whoever reads what we write
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None and saved["padding"] is None


def test_no_config_file_is_no_mistake(tiny, tmp_path):
    tiny.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).config == {}


def test_a_missing_control_token_is_named(tiny):
    with pytest.raises(UserError, match=r"--model: .*lacks <\|im_end\|>, <think>;"):
        tiny.control_ids(["[CLS]", "<|im_end|>", "<think>"])


# transformers reads a directory that we write, and gives the ids that training used. Every case is a field or a file that
# transformers builds a tokenizer from. `change(tokenizer.json, tokenizer_config.json)` edits a directory like a published one.

PARTS = [
    *(
        "Ünïcödé Café",
        "cafe\u0301 n\u0303",
        "中文、日本語",
        "한국어",
        "😀👩\u200d👧",
        "ﬁ ℌ İstanbul straße",
        "\u00a0\ufffd\x00a",
    ),
    *("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "<|im_end|>", "<think>", "</think>\n\n", "<|endoftext|>", "<s>"),
    *("", " ", "  ", "\n\n", "\t", "12345 3.14", "it's", "The Cat SAT", "the dog", "word7 Word8"),
    *("covidword", "CovidWord", " COVIDWORD.", "xcovidwordx", "super" * 30),
]


def nasty_texts() -> list[str]:
    rng = random.Random(0)
    mixed = ["".join(rng.choice(PARTS) + rng.choice(["", " "]) for _ in range(rng.randint(2, 7))) for _ in range(200)]
    return [*PARTS, *mixed, "the cat " * 400]


def published(name: str, folder: Path) -> Path:
    """A directory as the hub has it, with a small vocabulary that keeps case and accents apart."""
    import transformers

    characters = sorted(
        {c for text in PARTS for c in text if not c.isspace() and c.isprintable()} | set("abcdefghijklmnopqrstuvwxyz")
    )
    words = ["the", "The", "cat", "Cat", "cafe", "Cafe", "café", "Café", "word7", "it"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters), *words]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(vocab))}
    theirs = transformers.BertTokenizer(vocab=vocab, do_lower_case=name == "uncased", model_max_length=512)
    if name == "words":  # special: false, as add_tokens makes them
        theirs.add_tokens(
            ["covidword", "中文", AddedToken("Cat", single_word=True), AddedToken("dog", lstrip=True, normalized=False)]
        )
    theirs.save_pretrained(folder)
    return folder


def edited(folder: Path, change: Callable[[dict, dict], object], model_type: str) -> Path:
    """The directory after a change; a config that is emptied is a config that is not there."""
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    spec, config = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    change(spec, config)
    for file, values in zip(files, (spec, config), strict=True):
        file.write_text(json.dumps(values), encoding="utf-8")
    if not config:
        files[1].unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def set_normalizer(**fields) -> Callable:
    return lambda spec, config: spec["normalizer"].update(fields)


def set_config(**fields) -> Callable:
    return lambda spec, config: config.update(fields)


def unmark_control_tokens(spec: dict, config: dict) -> None:
    for token in spec["added_tokens"]:
        token["special"] = False


BERT_FILES = {
    "as it is": lambda spec, config: None,
    "no config": lambda spec, config: config.clear(),
    "lower case against it": lambda spec, config: config.update(do_lower_case=not config["do_lower_case"]),
    "strips accents": set_config(strip_accents=True),
    "keeps accents": set_config(strip_accents=False),
    "accents against it": lambda spec, config: (
        spec["normalizer"].update(strip_accents=False),
        config.update(strip_accents=None),
    ),
    "Chinese as words": set_config(tokenize_chinese_chars=False),
    "accents in tokenizer.json alone": lambda spec, config: (
        set_normalizer(strip_accents=True)(spec, config),
        config.pop("strip_accents"),
    ),
    "dirty text": set_normalizer(clean_text=False),
    "BertTokenizerFast": set_config(tokenizer_class="BertTokenizerFast"),
    "DistilBertTokenizer": set_config(tokenizer_class="DistilBertTokenizer"),
    "no class": lambda spec, config: config.pop("tokenizer_class"),
    "null class": set_config(tokenizer_class=None),
    "an unknown class": set_config(tokenizer_class="HouseTokenizer"),
    "verbatim, lower case against it": lambda spec, config: config.update(
        tokenizer_class="PreTrainedTokenizerFast", do_lower_case=not config["do_lower_case"]
    ),
    "no post-processor": lambda spec, config: spec.update(post_processor=None),
    "another post-processor": lambda spec, config: spec.update(
        post_processor={"type": "BertProcessing", "sep": ["[MASK]", 4], "cls": ["[PAD]", 0]}
    ),
    "control tokens not special": unmark_control_tokens,
    "no added tokens": lambda spec, config: spec.update(added_tokens=[t for t in spec["added_tokens"] if t["id"] > 4]),
    "other names": set_config(cls_token="<s>", sep_token="</s>", pad_token="<pad>"),
    "left": set_config(truncation_side="left", padding_side="left"),
    "no limit": lambda spec, config: config.pop("model_max_length"),
    "short words": lambda spec, config: spec["model"].update(max_input_chars_per_word=5),
    "tokens as objects": set_config(cls_token={"content": "[CLS]", "special": True}, extra_special_tokens=["[SEP]"]),
    "v4": set_config(
        added_tokens_decoder={
            "5": {
                "content": "!",
                "special": True,
                "normalized": False,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
            }
        }
    ),
}


@pytest.mark.parametrize("vocabulary", ["cased", "uncased", "words"])
@pytest.mark.parametrize("case", BERT_FILES)
def test_transformers_reads_a_bert_export_as_training_did(case, vocabulary, tmp_path):
    import transformers

    source, run_dir = edited(published(vocabulary, tmp_path / "source"), BERT_FILES[case], "bert"), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps({"model_type": "bert"}))
    ours, texts = load_tokenizer(source), nasty_texts()
    ours.save(run_dir, text_length=200)
    rows, cut = bert_rows(ours, texts, 200)
    assert cut and len({tuple(row) for row in rows}) > 150
    theirs = transformers.AutoTokenizer.from_pretrained(run_dir)
    assert theirs(texts, truncation=True)["input_ids"] == rows
    assert theirs.padding_side == "right" and theirs.pad_token == "[PAD]"
    assert bert_rows(load_tokenizer(run_dir), texts, 200) == (rows, cut)
    if vocabulary == "words":
        assert {*ours.control_ids(["covidword", "中文", "dog"])} <= {i for row in rows for i in row}
    # The source, too, is read as transformers reads it, wherever it says how.
    if case in (
        "as it is",
        "lower case against it",
        "strips accents",
        "keeps accents",
        "accents against it",
        "Chinese as words",
    ):
        source_tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        assert source_tokenizer(texts, truncation=True, max_length=200, split_special_tokens=True)["input_ids"] == rows


@pytest.mark.parametrize("name", ["bert-base-cased", "bert-base-uncased", "bert-base-chinese", "Qwen3-0.6B"])
def test_transformers_reads_a_published_tokenizer_s_export_as_training_did(name, shared, tmp_path):
    import transformers

    ours, texts = load_tokenizer(shared / "tokenizers" / name), nasty_texts()
    ours.save(tmp_path, text_length=100)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert" if name.startswith("bert") else "qwen3"}))
    rows = bert_rows(ours, texts, 100)[0] if name.startswith("bert") else [ids[:100] for ids in ours.encode(texts)]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=True)["input_ids"] == rows


def surround(*parts: str, byte_level: bool = False) -> Callable:
    """Sets a post-processor that puts control tokens around a text, "$A"."""

    def change(spec: dict, config: dict) -> None:
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        single = [
            {"Sequence": {"id": "A", "type_id": 0}} if p == "$A" else {"SpecialToken": {"id": p, "type_id": 0}}
            for p in parts
        ]
        special = {p: {"id": p, "ids": [ids[p]], "tokens": [p]} for p in parts if p != "$A"}
        processor = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, *single],
            "special_tokens": special,
        }
        both = {"type": "Sequence", "processors": [BYTE_LEVEL, processor]}
        spec["post_processor"] = both if byte_level else processor

    return change


def digits_first(spec: dict, config: dict) -> None:
    """Like SmolLM2's file."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = [{"type": "Digits", "individual_digits": True}, byte_level]
    spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": parts}, normalizer=None)
    config["tokenizer_class"] = "GPT2Tokenizer"


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
DECODER_FILES = {
    "as it is": ("qwen3", lambda spec, config: None),
    "Qwen2Tokenizer": ("qwen3", set_config(tokenizer_class="Qwen2Tokenizer")),
    "qwen2": ("qwen2", set_config(tokenizer_class="Qwen2Tokenizer")),
    "no config": ("qwen3", lambda spec, config: config.clear()),
    "another normalizer": ("qwen3", lambda spec, config: spec.update(normalizer={"type": "NFKC"})),
    "digits": ("llama", digits_first),
    "a BOS token": ("llama", surround("<think>", "$A")),
    "a BOS token and an EOS token": ("llama", surround("<think>", "$A", "</think>", byte_level=True)),
    "trimmed offsets": ("llama", lambda spec, config: spec.update(post_processor=BYTE_LEVEL | {"trim_offsets": True})),
    "an EOS token": ("llama", surround("$A", "</think>")),
    "add_bos_token": (
        "llama",
        set_config(add_bos_token=True, add_eos_token=True, bos_token="<think>", tokenizer_class="LlamaTokenizer"),
    ),
    "left": ("qwen3", set_config(truncation_side="left", padding_side="left")),
    "a token that is not there": (
        "llama",
        set_config(unk_token="<unk>", additional_special_tokens=["<pad>", "<|im_end|>"]),
    ),
}


@pytest.mark.parametrize("case", DECODER_FILES)
def test_transformers_reads_a_decoder_s_export_as_training_did(case, tiny_qwen, tmp_path):
    """Bare texts, for a linear head. An empty text is one `<|im_end|>` here and nothing there."""
    import transformers

    model_type, change = DECODER_FILES[case]
    source, run_dir = tmp_path / "source", tmp_path / "run"
    for folder in (source, run_dir):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tiny_qwen.save(source)
    ours, texts = load_tokenizer(edited(source, change, model_type)), [text for text in nasty_texts() if text]
    end, pad = ours.control_ids(["<|im_end|>", "<|endoftext|>"])
    ours.save(run_dir, text_length=100, pad_token_id=end)
    rows, cut = text_rows(ours, texts, 100)
    theirs = transformers.AutoTokenizer.from_pretrained(run_dir)
    encoded = theirs(texts, truncation=True)
    assert {row[0] == ours.control_ids(["<think>"])[0] for row in rows} == {"a BOS token" in case}
    assert encoded["input_ids"] == rows and cut and [*encoded] == ["input_ids", "attention_mask"]
    assert theirs.pad_token_id == end and len(theirs) == len(ours)
    again = load_tokenizer(run_dir)
    assert again.encode(texts) == ours.encode(texts) and text_rows(again, texts, 100) == (rows, cut)
    assert [again.head(text, 5) for text in texts] == [ours.head(text, 5) for text in texts]
    # Without text_length the model is asked in its chat format, whose control tokens a rendered text has to become.
    ours.save(run_dir, pad_token_id=pad)
    theirs = transformers.AutoTokenizer.from_pretrained(run_dir)
    chat = "<|im_start|>user\nthe cat 12\n<|im_end|>\n<think>\n\n</think>\n\n"
    start, end, think, no_think = ours.control_ids(["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    turn, newline, blank = ours.encode(["user\nthe cat 12\n", "\n", "\n\n"])
    assert theirs(chat, add_special_tokens=False)["input_ids"] == [
        start,
        *turn,
        end,
        *newline,
        think,
        *blank,
        no_think,
        *blank,
    ]
