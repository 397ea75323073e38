"""A user's mistake is one line that names the flag or file, the value and the remedy, and leaves nothing behind.

    python -m pytest tests/test_errors.py

Every case is a working call of train_bert.py with one thing wrong. As tests often run as root, whom no permission stops, a
path below a file stands in for one that cannot be written.
"""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import minicls.__main__
import train_bert
from minicls import weights
from minicls.config import UserError
from minicls.data import load_data
from minicls.tiny import train_bert_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CSV = "text,label\n" + "".join(f"text {i},{'good' if i % 2 else 'bad'}\n" for i in range(8))  # rows in lines 2 to 9
SIZES = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
TRAIN = [
    "--max-steps",
    "2",
    "--global-batch-size",
    "4",
    "--max-length",
    "16",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--dtype",
    "fp32",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The files of a working call: `data/` of two classes, `model/` trained on them, `run/` stopped between its steps."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        (folder / "data" / f"{split}.csv").write_text(CSV)
    tokenizer = train_bert_tokenizer([CSV], 100)
    config = (
        SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 32} | weights.label_config(["bad", "good"])
    )
    model, _, _ = weights.build_model(weights.BERT, config, None, 0, torch.device("cpu"))
    weights.save_model(model, config, tokenizer, folder / "model")
    flags = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--save-every", "1"]
    train_bert.main([*TRAIN, *flags, "--output-dir", str(folder / "run")])
    (folder / "run" / "results.json").unlink()
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000002")
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """The working directory, with a copy of the files for the case to damage."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check(here: Path, argv: list[str], parts: list[str], script: ModuleType = train_bert) -> None:
    """Asserts that the call is refused in one line that holds the parts, and that no file or directory came or went."""
    before = listing(here)
    with pytest.raises(UserError) as error:
        script.main(argv)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and "; " in message  # the fault; the remedy
    assert [part for part in parts if part not in message] == []
    assert listing(here) == before


def call(*flags: str) -> list[str]:
    """A working call; flags given here come last and win."""
    return [*TRAIN, "--model", "model", "--data", "data", "--output-dir", "out", *flags]


def test_the_call_that_the_cases_spoil_works(here):
    train_bert.main(call())
    assert (here / "out" / "results.json").is_file()


def test_a_run_says_what_it_read_and_chooses_its_step_on_validation_files(here, capsys):
    (here / "data" / "val_1.csv").write_text(CSV.replace("text ", "validation text "))
    (here / "data" / "trainer_log.csv").write_text(CSV)
    train_bert.main(call("--eval-every", "1"))
    assert capsys.readouterr().out.splitlines()[:6] == [
        "train: train.csv (8 rows)",
        "test: test.csv (8 rows)",
        "validation: val_1.csv (8 rows)",
        "not read: trainer_log.csv (its name begins with none of train, test, validation)",
        "2 classes, training rows of each: bad 4, good 4",
        "warning: 8 of the 8 test texts also occur in train; a score on them says nothing about new texts",
    ]
    results = json.loads((here / "out" / "results.json").read_text())
    assert results["best_step_on_validation"] in (1, 2)


def test_a_file_without_a_test_split_and_shares(here):
    (here / "data" / "test.csv").unlink()
    train_bert.main(call("--test-size", "0.25", "--validation-size", "0.25"))
    assert json.loads((here / "out" / "results.json").read_text())["num_test_rows"] == 2
    info = json.loads((here / "out" / "run.json").read_text())
    assert info["num_train_rows"] == 4  # 8, less 2, less a quarter of 6
    (here / "out" / "results.json").unlink()
    train_bert.main(["--resume", "out"])  # the same rows are held out again


def test_a_batch_of_more_rows_than_there_are_takes_them_all_at_no_cost(here, monkeypatch):
    micro_batches = []
    seed = train_bert.checkpoint.seed_everything
    monkeypatch.setattr(
        train_bert.checkpoint, "seed_everything", lambda *args: micro_batches.append(args) or seed(*args)
    )
    weights = {}
    for size in ("8", "3000"):
        micro_batches.clear()
        train_bert.main(call("--global-batch-size", size, "--micro-batch-size", "1", "--output-dir", size))
        assert len(micro_batches) == 2 * 8  # steps and rows
        weights[size] = (here / size / "model.safetensors").read_bytes()
    assert weights["8"] == weights["3000"]


# Flags.

FLAGS = {  # flags -> parts of the message
    "--model no/such-model": ["--model", "no/such-model", "hub", "network", "--model DIR"],
    "--model ./nowhere": ["--model", "./nowhere", "directory", "hub", "check the name"],
    "--model /nowhere/at/all": ["--model", "/nowhere/at/all", "existing directory or a hub id"],
    "--model ~no-such-user/x": ["--model", "no directory ~no-such-user/x", "existing directory"],
    "--model data/train.csv/": ["--model", "data/train.csv/", "existing directory"],
    "--data no/such-data": ["--data", "no/such-data", "hub", "network", "--data DIR"],
    "--data ./nowhere": ["--data", "./nowhere", "directory", "hub", "check the name"],
    "--data /nowhere/at/all": ["--data", "/nowhere/at/all", "existing directory or a hub id"],
    "--data ~no-such-user/x": ["--data", "no directory ~no-such-user/x", "existing directory"],
    "--data model": ["model", "no train split", "train.csv, .tsv", "not counted: config.json", "add one"],
    "--text-column body": ["train.csv", "'body'", "text, label", "--text-column"],
    "--label-column class": ["train.csv", "'class'", "text, label", "--label-column"],
    "--label-names good": ["--label-names", "'good'", "two or more"],
    "--label-names good good": ["--label-names", "'good' is given twice", "once"],
    "--label-names good fine": ["train.csv", "line 2", "'bad'", "good, fine", "--label-names"],
    "--global-batch-size 6 --micro-batch-size 4": ["--global-batch-size", "6", "--micro-batch-size", "4", "change"],
    "--max-length 33": ["--max-length", "33", "32", "pass less"],
    "--max-length 2": ["--max-length", "2", "at least 3"],
    "--validation-size 8": ["--validation-size", "8", "pass less"],
    "--validation-size 9": ["--validation-size", "9", "8", "pass less"],
    "--validation-size 0.99": ["--validation-size", "8", "pass less"],
    "--validation-size 2.5": ["--validation-size", "2.5", "whole number", "fraction below 1"],
    "--validation-size inf": ["--validation-size", "inf", "finite"],
    "--test-size 4": ["--test-size", "data has a test split (test.csv)", "leave the flag out"],
    "--data synthetic --test-size 4": ["--test-size", "synthetic", "leave the flag out"],
    "--data synthetic --label-names a b": ["--label-names", "synthetic", "leave the flag out"],
    "--data synthetic --text-column title": ["--text-column", "synthetic", "leave the flag out"],
    "--data synthetic --label-column y": ["--label-column", "synthetic", "leave the flag out"],
    "--validation-size -1": ["--validation-size", "-1", "at least 0"],
    "--device tpu": ["--device", "'tpu'", "cpu, cuda or cuda:N"],
    "--device nonsense": ["--device", "'nonsense'", "cpu, cuda or cuda:N"],
    "--device meta": ["--device", "'meta'", "cpu, cuda or cuda:N"],
    "--device cuda": ["--device", "'cuda'", "pass cpu"],  # conftest hides what CUDA devices there are
    "--device cuda:1": ["--device", "'cuda:1'", "pass cpu"],
    "--output-dir model": ["--output-dir", "model", "not empty", "new directory", "--resume"],
    "--output-dir data/train.csv": ["--output-dir", "data/train.csv", "another directory"],
    "--output-dir data/train.csv/out": ["--output-dir", "data/train.csv/out", "another directory"],
    "--output-dir /proc/nowhere/out": ["--output-dir", "/proc/nowhere/out", "another directory"],
    "--learning-rate nan": ["--learning-rate", "nan"],
    "--learning-rate -1": ["--learning-rate", "-1", "at least 0"],
    "--epochs nan": ["--epochs", "nan"],
    "--eval-every inf": ["--eval-every", "inf"],
    "--eval-every 1.5": ["--eval-every", "1.5", "whole number", "below 1"],
    "--save-every inf": ["--save-every", "inf"],
    "--warmup-ratio 1.5": ["--warmup-ratio", "1.5", "at most 1"],
    "--warmup-ratio nan": ["--warmup-ratio", "nan"],
    "--weight-decay -0.1": ["--weight-decay", "-0.1", "at least 0"],
    "--max-steps 0": ["--max-steps", "0", "at least 1"],
    "--max-train-rows 0": ["--max-train-rows", "0", "at least 1"],
    "--threads 0": ["--threads", "0", "at least 1"],
    "--seed -1": ["--seed", "-1", "at least 0"],
    "--dtype fp16": ["--dtype", "'fp16'", "bf16", "fp32"],
    "--max-step 3": ["--max-step", "--max-steps"],
    "--resume nowhere": ["nowhere", "no such run directory", "check the path"],
    "--resume data": ["data/run.json", "not readable", "run directory"],
    "--resume data/train.csv": ["data/train.csv", "no such run directory", "check the path"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags, here):
    check(here, call(*flags.split()), FLAGS[flags])


def test_every_seed_from_zero_on_is_taken(here):
    train_bert.main(call("--init", "random", "--seed", "1700000000000000000"))  # a clock's nanoseconds
    assert (here / "out" / "results.json").is_file()


def test_endless_epochs(here):
    argv = call("--epochs", "inf")
    del argv[argv.index("--max-steps") : argv.index("--max-steps") + 2]
    check(here, argv, ["--epochs", "inf"])


def test_a_file_is_no_directory(here):
    check(here, call("--model", str(here / "data" / "train.csv")), ["--model", "train.csv", "existing directory"])
    check(
        here,
        call("--data", "data/train.csv"),
        ["--data: data/train.csv is a file", "pass the directory", "--data data"],
    )


def test_a_run_on_resume_takes_no_other_settings(here):
    check(here, ["--resume", "run", "--learning-rate", "1"], ["--learning-rate", "run/run.json", "leave the flag out"])


# Data files.


def parquet(columns: dict) -> bytes:
    pq.write_table(pa.table(columns), out := pa.BufferOutputStream())
    return out.getvalue().to_pybytes()


def not_utf8(*values: bytes) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())  # arrow itself does not look


def twice() -> bytes:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([0]), pa.array([1])], names=["text", "label", "label"])
    pq.write_table(table, out := pa.BufferOutputStream())
    return out.getvalue().to_pybytes()


GOOD = parquet({"text": ["a", "b"], "label": ["bad", "good"]})
DATA = {  # the fault: (file, content, parts of the message); other files of the split are taken away
    "empty csv": ("train.csv", b"", ["train.csv", "empty", "header"]),
    "header only": ("train.csv", b"text,label\n", ["train.csv", "no rows", "train row"]),
    "header only, test": ("test.csv", b"text,label\n", ["test.csv", "no rows", "test row"]),
    "empty jsonl": ("train.jsonl", b"\n", ["train.jsonl", "no rows"]),
    "empty parquet": ("train.parquet", b"", ["train.parquet", "not a readable parquet file", "write it again"]),
    "parquet without rows": ("train.parquet", parquet({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), ["no rows"]),
    "no format of ours": ("train.txt", b"a\n", ["data", "no train split", "not counted: train.txt (no columns", "add one"]),
    "torn parquet": ("train.parquet", GOOD[:-20], ["train.parquet", "not a readable parquet file", "write it again"]),
    "scribbled parquet": ("train.parquet", GOOD[:4] + b"\xff" * 40 + GOOD[44:], ["train.parquet", "not a readable parquet file"]),
    "csv named parquet": ("train.parquet", CSV.encode(), ["train.parquet", "not a readable parquet file"]),
    "parquet named csv": ("train.csv", GOOD, ["train.csv", "a parquet file, not text", "suffix"]),
    "spreadsheet named csv": ("train.csv", b"PK\3\4" + bytes(40), ["train.csv", "spreadsheet", "save it as CSV"]),
    "torn gzip": ("train.csv.gz", gzip.compress(CSV.encode())[:-9], ["train.csv.gz", "not a readable gzip file", "write it again"]),
    "gzip by name alone": ("train.csv.gz", b"\x1f\x8bno", ["train.csv.gz", "not a readable gzip file", "write it again"]),
    "other columns": ("train.parquet", parquet({"sentence": ["a"], "label": [0]}), ["train.parquet", "'text'", "sentence", "--text-column"]),
    "other columns in a row": ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": "b"}\n', ["line 2", "'label'", "--label-column"]),
    "no header": ("train.csv", b"Works well,good\nBroke,bad\n", ["train.csv", "'text'", "Works well, good", "first line must name the columns"]),
    "a blank in the header": ("train.csv", b"text, label\na,good\n", ["train.csv", "no column 'label' among text, ' label'; name the right one with --label-column"]),
    "columns with other names": ("train.csv", b"Text;label\na;good\n", ["train.csv", "'text'", "Text, label", "--text-column"]),
    "separated by bars": ("train.csv", b"text|label\na|good\n", ["train.csv", "'text'", "text|label", "--text-column"]),
    "semicolons below commas": ("train.csv", b"text,label\na;good\n", ["train.csv, line 2", "1 fields", "2"]),
    "a comma or a semicolon": ("train.csv", b"text,label,x;text;label\na,b\n", ["train.csv", "separated by ',' and ';'", "keep one"]),
    "a column twice": ("train.csv", b"text,label,text\na,good,b\n", ["train.csv", "2 columns", "'text'", "rename"]),
    "a parquet column twice": ("train.parquet", twice(), ["train.parquet", "2 columns", "'label'", "rename"]),
    "text is no text": ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": 3, "label": 1}', ["train.jsonl, line 2", "3", "fix"]),
    "text is null": ("train.parquet", parquet({"text": ["a", None], "label": [0, 1]}), ["train.parquet, row 1", "None", "fix"]),
    "empty label": ("train.csv", CSV.encode() + b"more,\n", ["train.csv, line 10", "label is empty", "drop the row"]),
    "label not a number": ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": "b", "label": NaN}', ["train.jsonl, line 2", "label is empty"]),
    "null label": ("train.parquet", parquet({"text": ["a", "b"], "label": [0, None]}), ["train.parquet, row 1", "label is empty"]),
    "list of labels": ("train.jsonl", b'{"text": "a", "label": ["good", "bad"]}', ["train.jsonl, line 1", "['good', 'bad']"]),
    "label only in test": ("test.csv", CSV.encode() + b"more,ugly\n", ["test.csv, line 10", "'ugly'", "bad, good", "fix"]),
    "latin-1": ("train.csv", CSV.encode() + "café,good\n".encode("latin-1"), ["train.csv, line 10", "UTF-8", "WINDOWS-1252", "convert"]),
    "utf-16": ("train.csv", CSV.encode("utf-16"), ["train.csv, line 1", "UTF-8", "UTF-16", "convert"]),
    "utf-16 without a mark": ("train.csv", CSV.encode("utf-16-le"), ["train.csv, line 1", "UTF-8", "UTF-16LE", "convert"]),
    "test without labels": ("test.csv", b"text,id\na,1\n", ["test.csv", "'label'", "--label-column", "minicls predict"]),
    "test with empty labels": ("test.csv", b"text,label\na,\nb, \n", ["test.csv, line 2", "no test row has a label", "minicls predict"]),
    "test with labels of -1": ("test.csv", b"text,label\na,-1\nb,-1\n", ["test.csv, line 2", "-1", "minicls predict"]),
    "one class": ("train.csv", b"text,label\na,good\nb,good\n", ["data", "'label'", "all 'good'", "two classes or more"]),
    "no test split": ("test.xlsx", b"PK\3\4", ["data", "no test split", "test.xlsx (a spreadsheet", "--test-size 0.2"]),
    "columns of a data frame": ("train.json", b'{"text": {"0": "a"}, "label": {"0": "good"}}', ["train.json, line 1", "{'0': 'a'}", "fix"]),
    "json over several lines": ("train.json", b'{\n"text": "a",\n"label": "good"}', ["train.json, line 1", "not valid JSON", "array of objects"]),
    "broken array": ("train.json", b'[{"text": "a", "label": "bad"},', ["train.json", "not valid JSON", "fix the row"]),
    "array of lists": ("train.json", b'[["a", "good"]]', ["train.json, item 1", "not a JSON object"]),
    "array of texts": ("train.json", b'["a", "good"]', ["train.json, item 1", "not a JSON object"]),
    "array with a column missing": ("train.json", b'[{"text": "a", "label": 0}, {"text": "b"}]', ["train.json, item 2", "'label'"]),
    "broken text in UTF-8": ("train.csv", ("text,label\n股票下跌,财经\n" * 3).encode() + b"\xe8\x82,x\n", ["train.csv, line 7", "most of the file is", "drop the row"]),
    "latin-1 jsonl": ("train.jsonl", b'{"text": "a", "label": 0}\n{"text": "\xe9", "label": 1}', ["train.jsonl, line 2", "UTF-8", "convert"]),
    "text not UTF-8 in parquet": ("train.parquet", parquet({"text": not_utf8(b"a", b"\xff"), "label": [0, 1]}), ["row 1", "UTF-8", "convert"]),
    "label not UTF-8 in parquet": ("train.parquet", parquet({"text": ["a", "b"], "label": not_utf8(b"a", b"\xff")}), ["row 1", "UTF-8"]),
    "half a character": ("train.jsonl", b'{"text": "a", "label": "bad"}\n{"text": "\\ud83d", "label": "good"}', ["train.jsonl, line 2", "fix"]),
    "field too many": ("train.csv", CSV.encode() + b"one, two,good\n", ["train.csv, line 10", "3 fields", "2", "quote"]),
    "field too few, after a long row": ("train.csv", b'text,label\n"two\nlines",good\nalone\n', ["train.csv, line 4", "1 fields", "2"]),
    "unclosed quote": ("train.csv", CSV.encode() + b'"open,good\nnext,bad\n', ["train.csv, line 10", "not valid CSV", "quote"]),
    "text after a quote": ("train.csv", CSV.encode() + b'"a"b,good\n', ["train.csv, line 10", "not valid CSV", "quote"]),
    "quote in the header": ("train.csv", b'"text,label\na,good\nb","bad"\nc,bad\n', ["train.csv", "'text'", "--text-column"]),
    "broken json": ("train.jsonl", b'{"text": "a", "label": 0}\n\n{"text": "b", "label": \n', ["train.jsonl, line 3", "not valid JSON", "fix"]),
    "json array": ("train.jsonl", b'[{"text": "a", "label": 0}]\n', ["train.jsonl", "name it .json", "one object a line"]),
    "labels.txt of one class": ("labels.txt", b"good\n", ["labels.txt", "'good'", "two or more"]),
    "labels.txt with a name twice": ("labels.txt", b"bad\ngood\nbad\n", ["labels.txt", "'bad good bad'", "different"]),
    "labels.txt with a blank line": ("labels.txt", b"bad\n\ngood\n", ["labels.txt", "'bad  good'", "different"]),
    "labels.txt without bad": ("labels.txt", b"good\nfine\n", ["train.csv, line 2", "'bad'", "good, fine", "labels.txt"]),
    "labels.txt not UTF-8": ("labels.txt", b"good\nb\xe4d\n", ["labels.txt, line 2", "UTF-8", "convert"]),
}  # fmt: skip


def test_blank_lines_at_the_end_of_labels_are_no_class(here):
    (here / "data" / "labels.txt").write_bytes(b"bad\r\ngood\r\n\n")
    assert load_data(str(here / "data")).label_names == ("bad", "good")


@pytest.mark.parametrize("case", DATA)
def test_data(case, here):
    name, content, parts = DATA[case]
    for file in (here / "data").glob(name.split(".")[0] + ".*"):
        file.unlink()
    (here / "data" / name).write_bytes(content)
    check(here, call(), parts)


@pytest.mark.parametrize(
    ("labels", "names", "parts"),
    [
        ([0, 1, 2], "bad good", ["line 4", "'2'", "bad, good"]),
        ([0, 1, -1], "bad good", ["line 4", "'-1'", "bad, good"]),
        ([0, 1, 0.5], "bad good", ["line 4", "'0.5'", "bad, good"]),
        ([1, 2, 3], "a b c", ["line 4", "'3'", "a, b, c"]),  # counted from 1
        ([1, 2, 3], "1 2", ["line 4", "'3'", "1, 2"]),  # 1 and 2 are the names: the third row is the wrong one
    ],
    ids=str,
)
def test_labels_outside_the_classes(labels, names, parts, here):
    (here / "data" / "train.csv").write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    (here / "data" / "test.csv").write_text(f"text,label\na,{labels[0]}\n")
    check(here, call("--label-names", *names.split()), ["train.csv", *parts, "--label-names"])


def test_a_label_that_only_the_test_rows_have(here):
    (here / "data" / "train.csv").write_text("text,label\na,1\nb,2\nc,3\n")
    (here / "data" / "test.csv").write_text("text,label\na,1\nb,0\n")
    check(here, call(), ["test.csv", "line 3", "'0'", "1, 2, 3"])


CHINESE = "text,label\n" + "股票下跌，投资者担心。,财经\n球队获胜 3:0,体育\n" * 3
FRENCH = "text,label\nLe résumé de l'élève était très détaillé à Noël,éducation\n“quoted” – or not,good\n" * 2


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (CHINESE, "gb18030"),
        (CHINESE, "gbk"),
        (CHINESE, "utf-16"),
        (CHINESE, "utf-16-le"),
        (CHINESE, "utf-16-be"),
        (FRENCH, "utf-16-be"),
        (FRENCH, "cp1252"),
    ],
)
@pytest.mark.parametrize("name", ["train.csv", "train it's.csv", "train.csv.gz"])
def test_the_command_that_an_encoding_error_names_makes_the_file_readable(content, encoding, name, here):
    (here / "data" / "train.csv").unlink()
    (here / "data" / "test.csv").write_text(content, encoding="utf-8")
    file, pack = here / "data" / name, gzip.compress if name.endswith("gz") else bytes
    file.write_bytes(pack(content.encode(encoding)))
    with pytest.raises(UserError, match="not UTF-8") as error:
        load_data("data")
    subprocess.run(str(error.value).split("convert it: ")[1], shell=True, check=True)
    assert load_data("data").train.texts == load_data("data").test.texts


def test_an_encoding_that_nothing_tells_is_not_guessed(here):
    (here / "data" / "train.csv").write_bytes("text,label\nПривет как дела,хорошо\n".encode("cp1251"))
    check(here, call(), ["train.csv, line 2", "not UTF-8", "editor shows the encoding", "iconv -f E "])


@pytest.mark.parametrize(
    "other",
    ["Train.csv", "training.csv", "train.tsv", "train.csv.gz", "train.jsonl", "train-more.parquet", "data/train.csv"],
)
def test_two_kinds_of_one_split(other, here):
    (here / "data" / "data").mkdir()
    (here / "data" / other).write_bytes(b"x")
    check(here, call(), ["data", "train.csv", Path(other).name, "keep one"])


# Model directories.


def change(path: str, drop: str | None = None, **values) -> Callable[[], None]:
    """Sets keys of a JSON file, or drops one."""

    def spoil() -> None:
        content = json.loads(Path(path).read_text()) | values
        Path(path).write_text(json.dumps({k: v for k, v in content.items() if k != drop}))

    return spoil


def write(path: str, content: bytes) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(content) and None


def remove(path: str) -> Callable[[], None]:
    return lambda: Path(path).unlink()


def rename(path: str, name: str) -> Callable[[], None]:
    return lambda: Path(path).rename(Path(path).with_name(name)) and None


def cut(path: str, size: int) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size]) and None


def tensors(edit: Callable[[dict], object], path: str = "model/model.safetensors") -> Callable[[], None]:
    def spoil() -> None:
        content = load_file(path)
        edit(content)
        save_file(content, path)

    return spoil


def shards(index: bytes) -> Callable[[], None]:
    def spoil() -> None:
        rename("model/model.safetensors", "model-00001-of-00002.safetensors")()
        write(f"model/{weights.INDEX}", index)()

    return spoil


def tokenizer_without(token: str) -> Callable[[], None]:
    return lambda: (
        Path("model/tokenizer.json").write_text(Path("model/tokenizer.json").read_text().replace(token, "[OTHER]"))
        and None
    )


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
MODEL = {  # the fault: (a function that causes it, parts of the message)
    "no config": (remove("model/config.json"), ["model/config.json", "Hugging Face layout"]),
    "broken config": (write("model/config.json", b"{"), ["model/config.json", "not readable", "pass a directory"]),
    "config is a list": (write("model/config.json", b"[]"), ["model", "pass"]),
    "another architecture": (change("model/config.json", model_type="qwen3"), ["model: this is a qwen3 model", "bert", "pass another"]),
    "no architecture": (change("model/config.json", drop="model_type"), ["model: its config.json has no model_type", "bert", "pass another"]),
    "another activation": (change("model/config.json", hidden_act="relu"), ["model: its config.json", "'relu'", "'gelu'", "pass another"]),
    "odd heads": (change("model/config.json", num_attention_heads=3), ["model: its config.json", "8", "3", "pass another"]),
    "a size in words": (change("model/config.json", hidden_size="big"), ["model: its config.json", "pass another"]),
    "no weights": (remove("model/model.safetensors"), ["model", "no model.safetensors", "pass a directory"]),
    "pickled weights": (rename("model/model.safetensors", "pytorch_model.bin"), ["model", "pytorch_model.bin", "save_pretrained"]),
    "empty weights": (write("model/model.safetensors", b""), ["model/model.safetensors", "not a readable", "again"]),
    "torn weights": (cut("model/model.safetensors", 2000), ["model/model.safetensors", "not a readable", "again"]),
    "weights are text": (write("model/model.safetensors", b"version https://git-lfs\n" * 5), ["model/model.safetensors", "not a readable"]),
    "a shard missing": (
        shards(b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'),
        ["model/model-00002-of-00002.safetensors", "not a readable", "No such file", "again"],
    ),
    "broken index": (shards(b"{"), [f"model/{weights.INDEX}", "not readable", "again"]),
    "index without a map": (shards(b"{}"), [f"model/{weights.INDEX}", "not readable", "again"]),
    "a tensor missing": (tensors(lambda t: t.pop(QUERY)), ["model", QUERY, "missing", "complete weights"]),
    "a tensor of another shape": (
        tensors(lambda t: t.update({QUERY: torch.zeros(4, 8)})),
        ["model/model.safetensors", QUERY, "(4, 8)", "(8, 8)", "config.json"],
    ),
    "a tensor too many": (tensors(lambda t: t.update({"lm_head.weight": torch.zeros(2)})), ["model", "lm_head.weight", "architecture"]),
    "config of another size": (change("model/config.json", hidden_size=16), ["model/model.safetensors", "shape", "config.json"]),
    "weights of more classes": (
        tensors(lambda t: t.update({"classifier.weight": torch.zeros(3, 8), "classifier.bias": torch.zeros(3)})),
        ["model/model.safetensors", "classifier.", "3", "2", "number of classes"],
    ),
    "no tokenizer": (remove("model/tokenizer.json"), ["model", "no tokenizer.json", "save_pretrained"]),
    "broken tokenizer": (write("model/tokenizer.json", b"{"), ["model/tokenizer.json", "not a readable tokenizer", "again"]),
    "tokenizer of nothing": (write("model/tokenizer.json", b"{}"), ["model/tokenizer.json", "not a readable tokenizer", "again"]),
    "tokenizer is a list": (write("model/tokenizer.json", b"[]"), ["model/tokenizer.json", "not a readable tokenizer", "again"]),
    "tokenizer of another kind": (change("model/tokenizer.json", model={"type": "Odd"}), ["model/tokenizer.json", "not a readable tokenizer"]),
    "broken tokenizer_config": (write("model/tokenizer_config.json", b"{"), ["model/tokenizer_config.json: not readable", "again"]),
    "template not UTF-8": (write("model/chat_template.jinja", b"\xff"), ["model/chat_template.jinja", "not a readable", "again"]),
    "tokenizer without [SEP]": (tokenizer_without("[SEP]"), ["model: its tokenizer lacks [SEP]", "tokenizer of this kind of model"]),
    "embedding of another size": (
        tensors(lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.zeros(9, 8)})),
        ["model/model.safetensors", "word_embeddings", "(9, 8)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODEL)
def test_model(case, here):
    spoil, parts = MODEL[case]
    spoil()
    check(here, call(), parts)


@pytest.mark.parametrize("command", ["predict model text", "baseline --features model --max-length 16 --data data"])
@pytest.mark.parametrize("case", ["another activation", "odd heads", "tokenizer without [SEP]"])
def test_other_commands_name_the_model_and_no_flag_that_they_lack(case, command, here):
    MODEL[case][0]()
    with pytest.raises(UserError, match=r"^model: its (config.json|tokenizer) "):
        minicls.__main__.main([*command.split(), "--device", "cpu", "--threads", "1"])


def test_a_tokenizer_larger_than_the_embedding(here):
    size = json.loads((here / "model" / "config.json").read_text())["vocab_size"]
    tensors(lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.zeros(9, 8)}))()
    change("model/config.json", vocab_size=9)()
    check(here, call(), ["model: its tokenizer", str(size), "9", "files that fit"])


EVALUATE = ["evaluate", "--data", "data", "--output-dir", "out", "--device", "cpu", "--threads", "1", "--model"]


def test_evaluating_on_other_classes(here):
    change("model/config.json", **weights.label_config(["cat", "dog"]))()
    check(
        here,
        [*EVALUATE, "model"],
        ["--data", "model", "bad, good", "train it on them", "--label-names"],
        minicls.__main__,
    )


def test_evaluating_on_classes_in_another_order(here):
    argv = [*EVALUATE, "model", "--label-names", "good", "bad"]
    check(here, argv, ["--data", "model", "good, bad", "train it on them", "--label-names"], minicls.__main__)


def test_evaluating_a_model_without_a_head(here):
    tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("classifier")])()
    check(here, [*EVALUATE, "model"], ["model", "holds no trained classifier"], minicls.__main__)


@pytest.mark.parametrize("flag", ["--prompt", "--normalize"])
def test_evaluating_a_linear_head_with_a_question_s_flag(flag, here):
    argv = [*EVALUATE, "model", flag, "published" if flag == "--prompt" else "sum"]
    check(here, argv, [flag, "model", "does not answer with options"], minicls.__main__)


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_baseline_s_run_has_no_model(command, here):
    minicls.__main__.main(["baseline", "--data", "data", "--output-dir", "baseline", "--threads", "1"])
    argv = [command, "baseline", *(["a text"] if command == "predict" else [])]
    check(here, argv, ["baseline", "without a model", "training run"], minicls.__main__)


def test_evaluating_nothing(here):
    check(here, ["evaluate"], ["MODEL", "none given", "name a run directory"], minicls.__main__)


# Runs to resume.

CHECKPOINT = "run/checkpoints/step-000001"
RUN = {
    "no run.json": (remove("run/run.json"), ["run/run.json", "run directory"]),
    "broken run.json": (cut("run/run.json", 100), ["run/run.json", "not readable"]),
    "settings of another script": (change("run/run.json", settings={"head": "options"}), ["run/run.json", "head", "resume it with the script"]),
    "other rows": (write("data/train.csv", CSV.replace("text 3", "text three").encode()), ["--data", "data", "run", "new run"]),
    "a validation split more": (write("data/dev.csv", CSV.encode()), ["--data", "data", "run", "rows or classes", "new run"]),
    "no data": (lambda: shutil.rmtree("data"), ["--data", "data"]),
    "no state.json": (remove(f"{CHECKPOINT}/resume/state.json"), [CHECKPOINT, "not a complete checkpoint", "delete it"]),
    "torn state.json": (cut(f"{CHECKPOINT}/resume/state.json", 10), [CHECKPOINT, "not a complete checkpoint", "delete it"]),
    "no optimizer": (remove(f"{CHECKPOINT}/resume/optimizer.safetensors"), [CHECKPOINT, "not a complete checkpoint", "delete it"]),
    "torn optimizer": (cut(f"{CHECKPOINT}/resume/optimizer.safetensors", 1000), [CHECKPOINT, "not a complete checkpoint", "delete it"]),
    "a moment missing": (
        tensors(lambda t: t.pop(f"exp_avg.{QUERY}"), f"{CHECKPOINT}/resume/optimizer.safetensors"),
        [CHECKPOINT, "not a complete checkpoint", "delete it"],
    ),
    "torn weights": (cut(f"{CHECKPOINT}/model.safetensors", 2000), [f"{CHECKPOINT}/model.safetensors", "not a readable"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RUN)
def test_resume(case, here):
    spoil, parts = RUN[case]
    change(
        "run/run.json",
        settings=json.loads(Path("run/run.json").read_text())["settings"] | {"data": "data", "model": "model"},
    )()
    spoil()
    check(here, ["--resume", "run"], parts)


def test_evaluating_a_run_whose_newest_checkpoint_is_torn(here):
    cut(f"{CHECKPOINT}/resume/state.json", 10)()
    argv = ["evaluate", "run", "--device", "cpu", "--threads", "1"]
    check(here, argv, [f"{CHECKPOINT}/resume/state.json", "not readable", "delete this checkpoint"], minicls.__main__)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoints(here):
    with pytest.raises(UserError, match=r"--learning-rate: .*(nan|inf).*1e\+38.*fp32.*out"):
        argv = ["--learning-rate", "1e38", "--max-steps", "9", "--save-every", "1", "--eval-every", "0"]
        train_bert.main(call(*argv, "--output-dir", str(here / "out")))
    assert (here / "out" / "checkpoints" / "step-000001" / "resume" / "state.json").is_file()
    assert not (here / "out" / "results.json").exists()


# The same from outside.


@pytest.mark.parametrize(
    ("flags", "last_line"),
    [
        (
            ["--data", "/nowhere/x"],
            "error: --data: no directory /nowhere/x; pass an existing directory or a hub id such as org/name",
        ),
        (["--epoch", "1"], "error: unknown flag --epoch; did you mean --epochs?"),
    ],
)
def test_the_script_exits_with_2_and_the_line_without_a_traceback(flags, last_line, here):
    command = [sys.executable, str(ROOT / "train_bert.py"), *call(*flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == last_line
    assert "Traceback" not in done.stderr and not (here / "out").exists()
