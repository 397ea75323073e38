"""Reading data sets, choosing rows, and packing them, against plain oracles.

    python -m pytest tests/test_data.py

Everything is exact and seeded: no tolerance but the one written with the synthetic texts, no chance of a false failure.
"""

import csv
import fnmatch
import gzip
import io
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from minicls.batch import length_batches, pack, step_rows
from minicls.config import UserError
from minicls.data import Data, Split, describe, load_data, read_rows, split_data, stratified_rows, synthetic

# What a file format could bend: separators, quotes, line ends of every kind, white space, characters that only
# str.splitlines takes for line ends, text that looks like a header, a number, a control token or nothing.
TEXTS = [
    "plain",
    "comma, comma",
    'say "hi"',
    '"',
    "two\nlines",
    "CR\r\nLF\n",
    " spaces kept\t",
    "",
    "NEL\x85 LS\u2028 PS\u2029 VT\x0b FS\x1c.",
]
TEXTS += [
    "zero\0byte",
    "中文, 😀 e\u0301",
    "\\n \\",
    "text,label",
    "007",
    "NaN",
    "[SEP] <think>",
    "#36;",
    "{}",
    "x" * 200_000,
]
NAMES = ("World", "Sports", "Sci/Tech")
ROWS = [(text, NAMES[i % 3]) for i, text in enumerate(TEXTS)]


def as_csv(rows, end="\n", bom="", between="", columns=("text", "label"), **options) -> bytes:
    lines = []
    for row in [columns, *rows]:
        csv.writer(line := io.StringIO(), lineterminator=end, **options).writerow(row)
        lines.append(line.getvalue())
    return (bom + between.join(lines)).encode()


def as_jsonl(rows, end="\n", bom="", **options) -> bytes:
    return (bom + "".join(json.dumps({"text": t, "label": x}, **options) + end for t, x in rows)).encode()


def as_parquet(rows, metadata=None, **types) -> bytes:
    columns = {
        name: pa.array(values, types.get(name))
        for name, values in zip(("text", "label"), zip(*rows, strict=True), strict=True)
    }
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), out := io.BytesIO())
    return out.getvalue()


FILES = {  # each holds ROWS
    "parquet": ("parquet", as_parquet(ROWS)),
    "parquet of other string types": (
        "parquet",
        as_parquet(ROWS, text=pa.large_string(), label=pa.dictionary(pa.int8(), pa.string())),
    ),
    "csv": ("csv", as_csv(ROWS)),
    "csv, all quoted": ("csv", as_csv(ROWS, quoting=csv.QUOTE_ALL)),
    "csv, CRLF": ("csv", as_csv(ROWS, end="\r\n")),
    "csv, BOM": ("csv", as_csv(ROWS, bom="\ufeff")),
    "csv, empty lines": ("csv", as_csv(ROWS, between="\n\r\n") + b"\n\n"),
    "csv, more columns": ("csv", as_csv([(x, i, t) for i, (t, x) in enumerate(ROWS)], columns=("label", "id", "text"))),
    "csv, no last line end": ("csv", as_csv(ROWS)[:-1]),
    "csv, semicolons": ("csv", as_csv(ROWS, delimiter=";")),
    "csv, tabs": ("csv", as_csv(ROWS, delimiter="\t")),
    "csv, upper case": ("CSV", as_csv(ROWS)),
    "csv, packed": ("csv.gz", gzip.compress(as_csv(ROWS))),
    "tsv": ("tsv", as_csv(ROWS, delimiter="\t")),
    "tsv, packed": ("tsv.gz", gzip.compress(as_csv(ROWS, delimiter="\t"))),
    "tsv with semicolons": ("tsv", as_csv(ROWS, delimiter=";")),
    "json array": ("json", b" \n" + json.dumps([{"text": t, "label": x} for t, x in ROWS], indent=2).encode()),
    "json array, packed, BOM": (
        "json.gz",
        gzip.compress(b"\xef\xbb\xbf" + json.dumps([{"text": t, "label": x} for t, x in ROWS]).encode()),
    ),
    "json of lines": ("json", as_jsonl(ROWS)),
    "jsonl, packed": ("jsonl.gz", gzip.compress(as_jsonl(ROWS))),
    "jsonl": ("jsonl", as_jsonl(ROWS, ensure_ascii=False)),
    "jsonl, escaped": ("jsonl", as_jsonl(ROWS)),
    "jsonl, CRLF, BOM, empty lines": ("jsonl", as_jsonl(ROWS, end="\r\n \n\n", bom="\ufeff", ensure_ascii=False)),
}


def write(folder, train: bytes, kind: str, test: bytes | None = None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"train.{kind}").write_bytes(train)
    (folder / f"test.{kind}").write_bytes(train if test is None else test)
    return folder


@pytest.mark.parametrize("place", [".", "data"])
@pytest.mark.parametrize("form", FILES)
def test_every_format_gives_the_same_rows_verbatim(tmp_path, form, place):
    kind, content = FILES[form]
    write(tmp_path / place, content, kind)
    (tmp_path / "labels.txt").write_text("\n".join(NAMES) + "\n")
    data = load_data(str(tmp_path))
    assert data.label_names == NAMES and data.revision is None
    for split in (data.train, data.test):
        assert split.texts == TEXTS
        assert [NAMES[i] for i in split.labels] == [name for _, name in ROWS]
        assert split.labels.dtype == np.int64
    assert [
        text for text, _ in read_rows(tmp_path / place / f"train.{kind}", "text")
    ] == TEXTS  # as `predict` reads the same files


def test_txt_holds_a_text_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\nNEL\x85LS\u2028\n last ".encode())
    assert [text for text, _ in read_rows(tmp_path / "a.txt", "text")] == ["one", "", "NEL\x85LS\u2028", " last "]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_shards_follow_each_other_by_name(tmp_path, kind):
    encode = {"parquet": as_parquet, "csv": as_csv, "jsonl": as_jsonl}[kind]
    for i in (2, 0, 1):
        (tmp_path / f"train-0000{i}-of-00003.{kind}").write_bytes(encode([(f"{i} a", "x"), (f"{i} b", "y")]))
    (tmp_path / f"test-00000-of-00001.{kind}").write_bytes(encode([("t", "y")]))
    (tmp_path / f"unsupervised.{kind}").write_bytes(b"no split of ours")
    data = load_data(str(tmp_path))
    assert data.train.texts == ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b"] and data.test.texts == ["t"]


# As the documentation of `datasets` lists them; a keyword ends at one of - . _, a space or a digit.
KEYWORDS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "dev", "val"],
    "test": ["test", "testing"],
}
FILE_NAMES = [
    "train.csv",
    "train-00000-of-00002.csv",
    "train_partial.csv",
    "train 1.csv",
    "train1.csv",
    "train.old.csv",
]
FILE_NAMES += [
    "Train.CSV",
    "TRAIN.csv",
    "training.csv",
    "trainers.csv",
    "trainer_log.csv",
    "trainset.csv",
    "train(1).csv",
    "train+.csv",
]
FILE_NAMES += [
    "test.csv",
    "testing.csv",
    "test_2.csv",
    "testimonials.csv",
    "tests.csv",
    "tester-1.csv",
    "my_test.csv",
    "contest.csv",
]
FILE_NAMES += [
    "validation.csv",
    "valid.csv",
    "val.csv",
    "dev.csv",
    "dev-1.csv",
    "validate.csv",
    "value.csv",
    "devices.csv",
    "evil.csv",
]


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_file_is_part_of_the_split_that_its_name_begins_with(tmp_path, name):
    splits = [
        s for s, words in KEYWORDS.items() if any(fnmatch.fnmatchcase(name.lower(), f"{w}[-._ 0-9]*") for w in words)
    ]
    for split in {"train", "test"} - {*splits}:
        (tmp_path / f"{split}.csv").write_bytes(as_csv([(f"{split} {x}", x) for x in "ab"]))
    (tmp_path / name).write_bytes(as_csv([(f"{name} {x}", x) for x in "ab"]))
    data = load_data(str(tmp_path))
    read = {
        "train": data.train.texts,
        "test": data.test.texts,
        "validation": data.validation.texts if data.validation else [],
    }
    assert [split for split in ("train", "validation", "test") if f"{name} a" in read[split]] == splits
    lines = describe(data)
    if splits:
        assert f"{splits[0]}: {name} (2 rows)" in lines
    else:
        assert f"not read: {name} (its name begins with none of train, test, validation)" in lines


def test_other_files_are_named_with_the_reason(tmp_path):
    write(tmp_path, as_csv([("a", "x"), ("b", "y")]), "csv", as_csv([("c", "x")]))
    (tmp_path / "train").mkdir()
    for name in (
        "train.xlsx",
        "test.txt",
        "eval.csv",
        ".hidden.csv",
        "README.md",
        "train.parquet.gz",
        "train.pkl",
        "labels.txt",
    ):
        (tmp_path / name).write_bytes(b"x\ny\n" if name == "labels.txt" else b"x")
    assert [line for line in describe(load_data(str(tmp_path))) if line.startswith("not read")] == [
        "not read: eval.csv (may be test or validation; rename it), test.txt (no columns; write a CSV with a header), train (a folder), "
        "train.parquet.gz (packed; unpack it), train.pkl (nothing is unpickled; write it as parquet), "
        "train.xlsx (a spreadsheet; save it as CSV in UTF-8)"
    ]


@pytest.mark.parametrize("other", ["train_old.csv", "train copy.csv", "train-2.csv"])
def test_copies_of_a_split_are_refused_and_a_few_repeated_texts_are_counted(tmp_path, other):
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(10)]
    write(tmp_path, as_csv(rows), "csv", as_csv([("new", "a")]))
    (tmp_path / other).write_bytes(as_csv([(f"text {i + 8}", "a") for i in range(6)]))  # two of six
    data = load_data(str(tmp_path))
    assert len(data.train) == 16
    first, second = sorted(["train.csv", other])
    sizes = {"train.csv": 10, other: 6}
    assert f"train: {first} ({sizes[first]} rows), {second} ({sizes[second]} rows)" in describe(data)
    assert f"warning: 2 of the {sizes[second]} texts in {second} are also in {first}" in describe(data)
    (tmp_path / other).write_bytes(as_csv([(f"text {i + 7}", "a") for i in range(6)]))  # three of six
    with pytest.raises(
        UserError, match=rf"3 of the {sizes[second]} texts in {second} are also in {first}.*; .*move it away"
    ):
        load_data(str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_columns_have_the_names_given(tmp_path, kind):
    rows = [{"text": "no", "label": 7, "body": "yes", "class": c} for c in "ab"]
    encode = {
        "parquet": lambda: pq.write_table(pa.Table.from_pylist(rows), out := io.BytesIO()) or out.getvalue(),
        "csv": lambda: as_csv([r.values() for r in rows], columns=list(rows[0])),
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    }[kind]
    data = load_data(str(write(tmp_path, encode(), kind)), text_column="body", label_column="class")
    assert data.train.texts == ["yes", "yes"] and data.label_names == ("a", "b")


HUGGINGFACE = {
    "huggingface": json.dumps({"info": {"features": {"label": {"names": ["M0", "M1"], "_type": "ClassLabel"}}}})
}
CARD = """---
license: other
dataset_info:
{dash} features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': C0
          '1': C1
---
# A data set
"""


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["flag", "labels.txt", "metadata", "card"], ("F0", "F1")),
        (["labels.txt", "metadata", "card"], ("L0", "L 1")),
        (["metadata", "card"], ("M0", "M1")),
        (["card"], ("C0", "C1")),
        (["card with configs"], ("C0", "C1")),
        (["README"], ("0", "1")),
        (["README with half a head"], ("0", "1")),
        (["other metadata"], ("0", "1")),
        ([], ("0", "1")),
    ],
    ids=str,
)
def test_class_names_come_from_the_first_source_there_is(tmp_path, sources, names):
    metadata = HUGGINGFACE if "metadata" in sources else {"huggingface": "{}"} if "other metadata" in sources else None
    write(tmp_path, as_parquet([("a", 0), ("b", 1), ("c", 1)], metadata), "parquet")
    cards = {
        "card": CARD.format(dash=" "),
        "card with configs": CARD.format(dash="-"),
        "README": "# Mine\n\n---\nlabel: x\n",
    }
    cards |= {"README with half a head": "---\ndataset_info: [\n"}
    for source in cards.keys() & set(sources):
        (tmp_path / "README.md").write_text(cards[source])
    if "labels.txt" in sources:
        (tmp_path / "labels.txt").write_text("L0\nL 1\n")
    data = load_data(str(tmp_path), label_names=("F0", "F1") if "flag" in sources else None)
    assert data.label_names == names and data.train.labels.tolist() == [0, 1, 1]


def card(*infos: tuple[str | None, str], configs: str = "", column: str = "label") -> str:
    """A dataset card; each info is a config's name and what stands under `names:`, block or flow."""
    lines = ["---", configs.strip("\n"), "dataset_info:"]
    for name, names in infos:
        lines += [f"- config_name: {name}", "  features:"] if name else ["- features:"]
        lines += [f"  - name: {column}", "    dtype:", "      class_label:", f"        names: {names}"]
    return "\n".join([*filter(None, lines), "---", "# Mine", ""])


TWO = [("one", "['p', 'q']"), ("two", "['r', 's']")]
CARDS = {  # what `datasets` makes of it: the names, or an error. It reads a name as YAML and writes it as text, and so takes `no` for False;
    # here it is the text that stands there.
    "list": (card((None, "[neg, pos]")), ("neg", "pos")),
    "mapping": (card((None, "{'1': pos, '0': neg}")), ("neg", "pos")),
    "mapping, numbers": (card((None, "{1: pos, 0: neg}")), ("neg", "pos")),
    "mapping of more than ten": (card((None, str({str(i): f"n{i}" for i in range(12)}))), tuple(f"n{i}" for i in range(12))),
    "booleans": (card((None, "{'0': no, '1': yes}")), ("no", "yes")),
    "more booleans": (card((None, "[off, On]")), ("off", "On")),
    "numbers": (card((None, "[1.50, 007]")), ("1.50", "007")),
    "null and a date": (card((None, "[null, 2020-01-01]")), ("null", "2020-01-01")),
    "quotes and Chinese": (card((None, '["体育: 1", \'财经 \']')), ("体育: 1", "财经 ")),
    "CRLF": (card((None, "[neg, pos]")).replace("\n", "\r\n"), ("neg", "pos")),
    "the only config": (card(TWO[0]), ("p", "q")),
    "config called default": (card(TWO[0], ("default", "[x, y]")), ("x", "y")),
    "config called default, in configs": (card(TWO[0], ("default", "[x, y]"), configs="configs:\n- config_name: one\n- config_name: default"), ("x", "y")),
    "config marked default": (card(*TWO, configs="configs:\n- config_name: one\n- config_name: two\n  default: true"), ("r", "s")),
    "config marked with yes": (card(*TWO, configs="configs:\n- config_name: one\n  default: yes\n- config_name: two"), ("p", "q")),
    "one config of several infos": (card(*TWO, configs="configs:\n- config_name: two"), ("r", "s")),
    "no info of the default config": (card(TWO[0], configs="configs:\n- config_name: three"), ("0", "1")),
    "all configs alike": (card(TWO[0], ("two", "{'0': p, '1': q}")), ("p", "q")),
    "another column": (card((None, "[neg, pos]"), column="topic"), ("0", "1")),
    "no features": ("---\ndataset_info:\n  splits: []\n---\n", ("0", "1")),
    "a head of another kind": ("---\n- a\n- b\n---\n", ("0", "1")),
    "broken, but without classes": ("---\nlicense: [\n---\n", ("0", "1")),
    "several configs": (card(*TWO), "config one and .*, config two do not .*--label-names or labels.txt"),
    "several, one without names": (card(TWO[0], ("two", "")).replace("names: \n", "names: []\n").replace("names: []", "num_classes: 2"), "class names"),
    "two default configs": (card(*TWO, configs="configs:\n- config_name: default\n- config_name: two\n  default: true"), "default and two are both"),
    "a gap": (card((None, "{'0': neg, '2': pos}")), "none for index 1 of 2; number them"),
    "from one on": (card((None, "{'1': neg, '2': pos}")), "none for index 0"),
    "keys are no indices": (card((None, "{neg: 0, pos: 1}")), "none for index 0"),
    "a text": (card((None, "neg pos")), "neither a list of names nor"),
    "a list in a list": (card((None, "[[neg, pos]]")), "neither a list of names nor"),
    "nothing": (card((None, "")), "neither a list of names nor"),
    "one name": (card((None, "[neg]")), "'neg' are not two or more"),
    "a name twice": (card((None, "[neg, neg]")), "different names"),
    "an empty name": (card((None, "[neg, '']")), "different names"),
    "features are a mapping": ("---\ndataset_info:\n  features:\n    label:\n      class_label: {names: [a, b]}\n---\n", "features is not a list"),
    "info is a text": ("---\ndataset_info: class_label\n---\n", "dataset_info is not a list"),
    "configs are a text": ("---\nconfigs: mine\n---\n", "configs is not a list"),
    "broken": ("---\nclass_label: [\n---\n", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", CARDS)
def test_class_names_of_a_card_are_those_of_the_default_config_as_text(tmp_path, case):
    content, expected = CARDS[case]
    names = expected if isinstance(expected, tuple) else "ab"
    write(tmp_path, as_csv([(f"text {i}", i) for i in range(len(names))]), "csv")
    (tmp_path / "README.md").write_bytes(content.encode())
    if expected is names:
        assert load_data(str(tmp_path)).label_names == expected
    else:
        with pytest.raises(UserError, match=rf"README.md\W.*{expected}") as error:
            load_data(str(tmp_path))
        assert "; " in str(error.value) and "\n" not in str(error.value)
        if "name" in expected and "configs" not in expected:  # another source of names is a way around them
            assert load_data(str(tmp_path), label_names=("a", "b")).label_names == ("a", "b")


def test_parquet_files_must_agree_about_the_class_names(tmp_path):
    metadata = [
        {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}
        for names in (["neg", "pos"], ["pos", "neg"])
    ]
    rows = [("a", 0), ("b", 1)]
    write(tmp_path, as_parquet(rows, metadata[0]), "parquet", as_parquet(rows, metadata[1]))
    with pytest.raises(
        UserError, match=r"train.parquet and .*test.parquet do not have the same class names; .*--label-names"
    ):
        load_data(str(tmp_path))
    write(tmp_path, as_parquet(rows, metadata[0]), "parquet", as_parquet(rows))
    assert load_data(str(tmp_path)).label_names == ("neg", "pos")


DATA_FILES = {  # what a card's default config says: the files of train and test that `datasets` reads
    "[{split: train, path: b/train.csv}, {split: test, path: b/test.csv}]": ("b/train.csv", "b/test.csv"),
    "[{split: train, path: [b/*.csv]}, {split: test, path: ./test.csv}]": ("b/test.csv, b/train.csv", "test.csv"),
    "{train: b/train.csv, test: test.csv, extra: b/test.csv}": ("b/train.csv", "test.csv"),
    "[{split: train, path: 'b/**'}, {split: test, path: test.csv}]": ("b/test.csv, b/train.csv", "test.csv"),
    "": ("train.csv", "test.csv"),
    "[{split: train, path: c/train.csv}, {split: test, path: test.csv}]": "no readable file matches .* train split, c/train.csv",
    "[{split: train, path: train.csv}]": "no test split .*test.csv .README.md's data_files do not name it.*; .*--test-size",
    "b/train.csv": "no test split",
    "[{split: train, path: train.csv}, {split: train, path: b/train.csv}]": "name the train split twice",
    "[{split: validation, path: train.csv}, {split: dev, path: b/train.csv}]": "name the validation split twice",
    "[{path: train.csv}]": "not as `datasets` writes them",
    "[[train.csv]]": "not as `datasets` writes them",
    "[{split: train, path: ../train.csv}]": "../train.csv, which is outside",
    "[{split: train, path: 'https://host/train.csv'}]": "https://host/train.csv, which is outside",
}


@pytest.mark.parametrize("data_files", DATA_FILES)
def test_a_card_says_which_files_are_the_splits(tmp_path, data_files):
    for folder in (tmp_path, tmp_path / "b"):
        rows = [[(f"{folder.name} {split} {x}", x) for x in "xy"] for split in ("train", "test")]
        write(folder, as_csv(rows[0]), "csv", as_csv(rows[1]))
    head = "configs:\n- config_name: one\n  data_files: none.csv\n- config_name: two\n  default: true\n"
    head += f"  data_files: {data_files}\n" if data_files else ""
    (tmp_path / "README.md").write_text(f"---\n{head}---\n")
    expected = DATA_FILES[data_files]
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            load_data(str(tmp_path))
        return
    lines = describe(load_data(str(tmp_path)))
    for split, files in zip(("train", "test"), expected, strict=True):
        assert f"{split}: " + ", ".join(f"{file} (2 rows)" for file in files.split(", ")) in lines


def test_a_card_may_name_a_folder(tmp_path):
    write(tmp_path, as_csv([("a", "x"), ("b", "y")]), "csv")
    write(tmp_path / "b" / "data", as_csv([("c", "x"), ("d", "y")]), "csv")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_dir: ./b\n---\n")
    assert load_data(str(tmp_path)).train.texts == ["c", "d"]


@pytest.mark.parametrize(
    ("labels", "given", "names", "indices"),
    [
        (["b", "a", "b"], None, ("a", "b"), [1, 0, 1]),
        ([*range(1, 13)], None, tuple(map(str, range(1, 13))), [*range(12)]),  # not 1 10 11 12 2 ...
        ([5, 3, 5], None, ("3", "5"), [1, 0, 1]),
        ([1, 2], ("2", "1"), ("2", "1"), [1, 0]),  # names come before indices
        ([0, 1], ("1", "2"), ("1", "2"), [0, 1]),  # but 0 is no name here, so these are indices
        (["02", "01"], ("1", "2"), ("1", "2"), [1, 0]),
        ([1, 0], ("no", "yes"), ("no", "yes"), [1, 0]),
        (["yes", "no"], ("no", "yes"), ("no", "yes"), [1, 0]),
        (["yes", 0], ("no", "yes"), ("no", "yes"), [1, 0]),
        ([1.0, 0.0], ("no", "yes"), ("no", "yes"), [1, 0]),  # what pandas makes of a column that once had a hole
        ([True, False], None, ("False", "True"), [1, 0]),
        (["中", "文"], None, ("中", "文"), [0, 1]),
    ],
    ids=str,
)
def test_labels_are_names_or_indices(tmp_path, labels, given, names, indices):
    kinds = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}
    if len({type(label) for label in labels}) > 1:
        del kinds["parquet"]  # a parquet column has one type
    for kind, encode in kinds.items():
        folder = write(tmp_path / kind, encode([(f"text {i}", label) for i, label in enumerate(labels)]), kind)
        if kind == "csv" and float in map(type, labels):
            continue  # "1.0" in a CSV is a name
        data = load_data(str(folder), label_names=given)
        assert (data.label_names, data.train.labels.tolist()) == (names, indices), kind


FORMATS = {"parquet": as_parquet, "csv": as_csv, "jsonl": as_jsonl}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("names", [None, ("None", "a", "b"), ("nan", "None", "a", "b")], ids=str)
def test_a_class_may_be_called_none_but_a_label_that_no_class_has_is_an_error(tmp_path, kind, names):
    train = [("t", "None"), ("u", "a"), ("v", "b")]
    data = load_data(str(write(tmp_path / "good", FORMATS[kind](train), kind, FORMATS[kind](train))), label_names=names)
    assert [data.label_names[i] for i in data.test.labels] == ["None", "a", "b"]
    unknown = [("typo!", "'typo!'"), ("none", "'none'"), ("A", "'A'")]
    for i, (label, message) in enumerate([*((empty, "label is empty") for empty in (None, "", " ")), *unknown]):
        folder = write(tmp_path / str(i), FORMATS[kind](train), kind, FORMATS[kind]([*train, ("w", label)]))
        place = {"parquet": "test.parquet, row 3", "csv": "test.csv, line 5", "jsonl": "test.jsonl, line 4"}[kind]
        with pytest.raises(UserError, match=f"{place}: .*{message}"):
            load_data(str(folder), label_names=names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [], {}, ["a"]], ids=str)
def test_a_value_that_is_no_label_is_an_error(tmp_path, value):
    write(tmp_path, as_jsonl([("t", "None"), ("u", "a")]), "jsonl", as_jsonl([("t", "None"), ("w", value)]))
    with pytest.raises(UserError, match=r"test.jsonl, line 2: (the label is empty|label .* is neither)"):
        load_data(str(tmp_path))


def test_a_whole_number_is_the_same_label_however_it_is_written(tmp_path):
    # pandas writes 3 as 3.0 where the column had a hole once: in one file, and not in the other.
    write(
        tmp_path, as_jsonl([("a", 1.0), ("b", 3.0), ("c", 10)]), "jsonl", as_jsonl([("d", 3), ("e", "10"), ("f", 1.0)])
    )
    data = load_data(str(tmp_path))
    assert data.label_names == ("1", "3", "10") and data.test.labels.tolist() == [1, 2, 0]


def test_a_class_without_training_rows_is_a_class_where_names_say_so(tmp_path):
    data = load_data(
        str(write(tmp_path, as_csv([("a", 0), ("b", 2)]), "csv", as_csv([("c", 1)]))), label_names=("x", "y", "z")
    )
    assert data.train.labels.tolist() == [0, 2] and data.test.labels.tolist() == [1]


def test_the_shared_data_sets_load(shared):
    data = load_data(str(shared / "data" / "ag_news"))
    assert data.label_names == ("World", "Sports", "Business", "Sci/Tech")
    assert len(data.train) >= 63_629 and np.bincount(data.test.labels).tolist() == [1900] * 4
    data = load_data(str(shared / "data" / "20newsgroups"))
    assert (len(data.train), len(data.test), len(data.label_names)) == (11_314, 7_532, 20)
    assert data.train.texts.count("") + data.test.texts.count("") > 0  # empty texts are rows like any other


# Synthetic texts.


def test_synthetic_texts_are_the_same_in_every_process():
    fingerprint = synthetic().fingerprint()
    assert fingerprint.pop("label_names")
    assert fingerprint == {
        "train": "a0020b31706a73be7dce83f745ec7e89e1a911ec5a6a0a663c04f9f6225f6223",
        "test": "0ced54394e99d23946317ac2d37db9d195f65427f99b7aac2ce986471d007b54",
    }


def test_synthetic_texts_are_balanced_and_learnable_but_not_perfectly():
    data = synthetic()
    assert (len(data.train), len(data.test), data.label_names) == (
        4000,
        1000,
        ("World", "Sports", "Business", "Sci/Tech"),
    )
    for split in (data.train, data.test):
        # A class's share is 0.25 with a standard error of 0.014 on 1,000 rows; seeded, so this cannot fail by chance.
        assert np.abs(np.bincount(split.labels) / len(split) - 0.25).max() < 0.05
    assert not set(data.train.texts) & set(data.test.texts)
    words = CountVectorizer().fit(data.train.texts)
    model = MultinomialNB().fit(words.transform(data.train.texts), data.train.labels)
    # One label in twenty is wrong in three of four cases: nothing can pass 0.9625, give or take 0.006 on 1,000 rows.
    assert 0.8 < model.score(words.transform(data.test.texts), data.test.labels) < 0.98


# Choosing rows.


def make_split(counts, seed=0) -> Split:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return Split(
        [f"text {i} of class {c}" for i, c in enumerate(labels)], labels.astype(np.int64), np.arange(len(labels))
    )


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda t, x: (t, x), True),
        (lambda t, x: ([t[0], t[1] + " ", t[2]], x), False),
        (lambda t, x: (t, [x[0], 0, x[2]]), False),
        (lambda t, x: (t[::-1], x[::-1]), False),
        (lambda t, x: (t[:2], x[:2]), False),
        (lambda t, x: ([*t, ""], [*x, 0]), False),
        (lambda t, x: (["a", "bc", "d"], x), False),  # the same characters, cut elsewhere
        (lambda t, x: (["ab", "c", "D"], x), False),
    ],
)
def test_fingerprint_changes_with_any_change(change, same):
    texts, labels = ["ab", "c", "d"], [0, 1, 0]
    changed, changed_labels = change(texts, labels)
    fingerprint = Split(texts, np.array(labels), np.arange(len(labels))).fingerprint()
    assert (Split(changed, np.array(changed_labels), np.arange(len(changed))).fingerprint() == fingerprint) is same
    data = Data(
        Split(texts, np.array(labels), np.arange(len(labels))),
        Split(changed, np.array(changed_labels), np.arange(len(changed))),
        ("a", "b"),
    )
    assert data.fingerprint()["train"] == fingerprint and len(fingerprint) == 64


@pytest.mark.parametrize("counts", [[25, 25, 25, 25], [90, 9, 1], [50, 0, 50], [7, 5, 3, 1], [100]], ids=str)
def test_stratified_rows_keep_size_proportions_and_nesting(counts):
    split = make_split(counts)
    before = Counter()
    for size in range(len(split) + 1):
        rows = stratified_rows(split, size)
        assert len(rows) == len(set(rows.tolist())) == size and (np.diff(rows) > 0).all() and rows.dtype == np.int64
        chosen = np.bincount(split.labels[rows], minlength=len(counts))
        assert np.abs(chosen - np.array(counts) * size / len(split)).max() < 1
        # A smaller choice is part of the larger one, up to one row a class (the largest remainder can move).
        texts = Counter(split.texts[row] for row in rows)
        assert max(Counter(split.labels[split.texts.index(t)] for t in before - texts).values(), default=0) <= 1
        before = texts


def test_stratified_rows_do_not_depend_on_the_order_of_the_file():
    split = make_split([30, 20, 10])
    split.texts[:12] = ["the same text"] * 12  # with duplicates, in several classes
    shuffled = split.select(np.random.default_rng(1).permutation(len(split)))
    for size in (1, 7, 30, 59):
        first, second = (
            Counter((s.texts[r], int(s.labels[r])) for r in stratified_rows(s, size)) for s in (split, shuffled)
        )
        assert first == second and first.total() == size


def test_split_data_holds_out_then_cuts():
    data = Data(make_split([60, 40]), make_split([10, 10], seed=1), ("a", "b"), "commit")
    whole = split_data(data)
    assert whole.validation is None and [*whole.splits] == ["train", "test"]
    assert whole.fingerprint() == data.fingerprint()

    rest = split_data(data, validation_size=10)
    validation = rest.validation
    assert [*rest.splits] == ["train", "validation", "test"] and [*rest.eval_splits] == ["validation", "test"]
    assert np.bincount(validation.labels).tolist() == [6, 4] and np.bincount(rest.train.labels).tolist() == [54, 36]
    assert not set(rest.train.texts) & set(validation.texts)
    assert rest.train.texts == [t for t in data.train.texts if t not in set(validation.texts)]  # in the file's order
    assert (rest.label_names, rest.revision, rest.test) == (data.label_names, data.revision, data.test)

    cut = split_data(data, validation_size=10, max_train_rows=20, max_eval_rows=4)
    assert (
        cut.validation.fingerprint() == validation.fingerprint()
    )  # cutting the training rows leaves the held-out ones alone
    assert np.bincount(cut.train.labels).tolist() == [12, 8] and np.bincount(cut.test.labels).tolist() == [2, 2]
    assert set(cut.train.texts) <= set(rest.train.texts)
    assert split_data(data, max_train_rows=1000, max_eval_rows=1000).fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("size", "rows"), [(10, 10), (0.1, 10), (0.07, 7), (0.001, 1), (0.101, 11), (99, 99), (0.985, 99)]
)
def test_a_share_below_one_is_rounded_up(size, rows):
    data = Data(make_split([60, 40]), make_split([10, 10], seed=1), ("a", "b"))
    rest = split_data(data, validation_size=size)
    assert (len(rest.validation), len(rest.train)) == (rows, 100 - rows)


@pytest.mark.parametrize("size", [20, 0.2])
def test_a_test_split_is_held_out_of_the_training_rows(tmp_path, size):
    texts = [(f"text {i}", "ab"[i % 5 < 2]) for i in range(100)]  # 60 of a, 40 of b
    for folder, rows in (("one", texts), ("other", texts[::-1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.csv").write_bytes(as_csv(rows))
    data = load_data(str(tmp_path / "one"), test_size=size)
    assert np.bincount(data.train.labels).tolist() == [48, 32] and np.bincount(data.test.labels).tolist() == [12, 8]
    for split in (data.train, data.test):
        assert split.texts == [f"text {row}" for row in split.rows]  # rows are numbered as in the file
    assert sorted([*data.train.rows, *data.test.rows]) == [*range(100)]
    assert set(load_data(str(tmp_path / "other"), test_size=size).test.texts) == set(
        data.test.texts
    )  # whatever the order
    assert "test: 20 of the training rows, held out by --test-size" in describe(data)
    rest = split_data(data, validation_size=0.25)
    assert (len(rest.train), len(rest.validation), rest.test) == (60, 20, data.test)


def test_validation_files_are_the_validation_split(tmp_path):
    write(tmp_path, as_csv([(f"text {i}", i % 2) for i in range(10)]), "csv", as_csv([("t", 0)]))
    (tmp_path / "dev.csv").write_bytes(as_csv([(f"dev {i}", i % 2) for i in range(6)]))
    data = split_data(load_data(str(tmp_path)))
    assert data.validation.texts == [f"dev {i}" for i in range(6)] and len(data.train) == 10
    assert "validation: dev.csv (6 rows)" in describe(data)
    cut = split_data(load_data(str(tmp_path)), max_eval_rows=4)
    assert np.bincount(cut.validation.labels).tolist() == [2, 2]
    with pytest.raises(UserError, match="--validation-size: the data has a validation split; leave the flag out"):
        split_data(data, validation_size=2)
    (tmp_path / "dev.csv").write_bytes(as_csv([("dev", 2)]))
    with pytest.raises(UserError, match=r"dev.csv, line 2: label '2' is none of the 2 classes"):
        load_data(str(tmp_path))


def test_a_fingerprint_matches_the_same_rows_and_classes():
    splits = make_split([3, 3]), make_split([2, 2], seed=1)
    data = Data(*splits, ("a", "b"))
    saved = json.loads(json.dumps(data.fingerprint()))
    assert data.differences(saved) == []
    assert Data(*splits, ("b", "a")).differences(saved) == ["label_names"]
    assert Data(*splits[::-1], ("a", "b")).differences(saved) == ["test", "train"]
    validated = Data(*splits, ("a", "b"), validation=splits[1])
    assert validated.differences(saved) == data.differences(validated.fingerprint()) == ["validation"]


# The lines about the data at the start of a run.


def described(
    train: list[tuple[str, str]], test: list[tuple[str, str]], validation: list[tuple[str, str]] = (), names=None
):
    names = names or sorted({label for _, label in train})
    splits = [Split([t for t, _ in rows], np.array([names.index(x) for _, x in rows], np.int64), np.arange(len(rows)))
              for rows in (train, test, validation)]  # fmt: skip
    return describe(Data(*splits[:2], tuple(names), validation=splits[2] if validation else None))


def rows_of(**counts: int) -> list[tuple[str, str]]:
    return [(f"{name} {i}", name) for name, count in counts.items() for i in range(count)]


def test_a_run_tells_its_classes_and_their_rows():
    assert described(rows_of(a=5, b=3), [("t", "a")]) == ["2 classes, training rows of each: a 5, b 3"]
    many = described(rows_of(**{f"n{i:02}": 20 + (i * 7) % 12 for i in range(12)}), [("t", "n00")])
    assert many == ["12 classes, training rows of each: 20 to 31, the fewest n00 20, n07 21, n02 22, n09 23, n04 24"]


def test_a_run_warns_of_what_looks_wrong_with_its_classes():
    lines = described(rows_of(a=5, b=2, c=1), [("t", "a")], names=["a", "b", "c", "d"])
    assert lines[1:] == ["warning: 3 of 4 classes with two training rows or fewer: 'b', 'c', 'd'"]
    ids = described(rows_of(**{f"id{i}": 1 for i in range(300)}), [("t", "id0")])
    assert ids[1:] == ["warning: 300 classes for 300 training rows; is --label-column the right one?"]
    alike = [(f"{name} {i}", name) for name in ("good", "Good", "good ", "bad", "b ad") for i in range(3)]
    assert described(alike, [("t", "bad")])[1:] == [
        "warning: the classes 'Good', 'good', 'good ' differ only in case or spaces; are they the same?"
    ]
    broken = described([(f"{name} {i}", name) for name in ("good\nnews", "bad") for i in range(3)], [("t", "bad")])
    assert broken == [
        "2 classes, training rows of each: bad 3, good news 3",
        r"warning: class names with line breaks: 'good\nnews'",
    ]


def test_a_run_warns_of_texts_in_two_splits():
    train, test = rows_of(a=3, b=3), [("a 0", "a"), ("a 0", "b"), ("b 2", "b"), ("new", "a")]
    assert described(train, test, [("new", "a"), ("b 1", "b")])[1:] == [
        "warning: 3 of the 4 test texts also occur in train; a score on them says nothing about new texts",
        "warning: 1 of the 2 validation texts also occur in train; a score on them says nothing about new texts",
        "warning: 1 of the 4 test texts also occur in validation; a score on them says nothing about new texts",
    ]


@pytest.mark.parametrize(("num_rows", "batch"), [(10, 3), (12, 3), (5, 8), (7, 1), (1, 1)])
def test_step_rows_walk_through_a_new_permutation_each_epoch(num_rows, batch):
    per_epoch = -(-num_rows // batch)
    epochs = []
    for epoch in range(3):
        windows = [step_rows(epoch * per_epoch + i, num_rows, batch, seed=7) for i in range(per_epoch)]
        assert [len(w) for w in windows[:-1]] == [batch] * (per_epoch - 1)
        assert len(windows[-1]) == num_rows - batch * (per_epoch - 1)
        epochs.append(np.concatenate(windows).tolist())
        assert sorted(epochs[-1]) == [*range(num_rows)]
    if num_rows > 4:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0] != [*range(num_rows)]
        assert any(
            step_rows(i, num_rows, batch, 8).tolist() != step_rows(i, num_rows, batch, 7).tolist()
            for i in range(per_epoch)
        )


# Packing.


def test_pack_puts_rows_end_to_end():
    batch = pack([[5, 6, 7], [8], [9, 10]])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.max_seqlen == 3 and type(batch.max_seqlen) is int
    assert [x.dtype for x in batch[:3]] == [torch.int64, torch.int64, torch.int32]


@pytest.mark.parametrize("max_tokens", [1, 10, 33, 1000])
def test_length_batches_take_each_row_once_by_length_and_fill_up(max_tokens):
    lengths = np.random.default_rng(0).integers(1, 20, 60)
    rows = [[0] * n for n in lengths]
    batches = length_batches(rows, max_tokens)
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == [*range(60)] and (np.diff(lengths[order]) >= 0).all()
    for i, batch in enumerate(batches):  # each row has the room of the longest
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= max_tokens
        if i + 1 < len(batches):  # the next row would not have fitted
            assert (len(batch) + 1) * lengths[batches[i + 1][0]] > max_tokens
