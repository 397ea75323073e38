"""`python -m minicls predict`.   python -m pytest tests/test_predict.py"""

import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY
from runs import SCRIPTS, interrupt_at, train

import minicls
from minicls import weights
from minicls.__main__ import main
from minicls.config import UserError
from minicls.data import load_data, split_data


def lines(capsys, *argv) -> list[str]:
    capsys.readouterr()  # drops the output of a fixture's training
    main(["predict", *map(str, argv), "--device", "cpu"])
    return capsys.readouterr().out.rstrip("\n").split("\n")


@pytest.fixture(scope="module")
def linear_runs(tmp_path_factory) -> Path:
    """Runs of train_qwen.py --head linear, two steps long: of the bare text, and of a question other than the usual one."""
    import train_qwen

    folder = tmp_path_factory.mktemp("linear")
    flags = {"text": [], "prompt": ["--linear-input", "prompt", "--prompt", "published-zh"]}
    for name, more in flags.items():
        argv = [*TINY, "--head", "linear", *more, "--dtype", "fp32", "--max-steps", "2", "--max-train-rows", "64"]
        train_qwen.main([*argv, "--output-dir", str(folder / name)])
    return folder


@pytest.mark.parametrize("run", ["bert", "qwen", "linear text", "linear prompt"])
def test_predicts_what_the_run_predicted(run, tmp_path, capsys, request):
    """The run's own test texts give the labels and probabilities of its predictions.parquet, whatever the batch."""
    kind, *name = run.split()
    run_dir = request.getfixturevalue("linear_runs") / name[0] if name else request.getfixturevalue(f"{kind}_run")
    test = split_data(load_data("synthetic"), max_eval_rows=100).test
    file = tmp_path / "news.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in test.texts))
    rows = [json.loads(line) for line in lines(capsys, run_dir, file, "--format", "jsonl")]
    saved = pq.read_table(run_dir / "predictions.parquet").to_pydict()
    assert [row["text"] for row in rows] == test.texts
    names = list(rows[0]["probabilities"])
    assert names == ["World", "Sports", "Business", "Sci/Tech"]
    assert [names.index(row["label"]) for row in rows] == saved["prediction"]
    expected = np.stack([saved[f"probability_{c}"] for c in range(4)], axis=1)
    # fp32 probabilities as stored; batches of another composition round differently.
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], expected, atol=1e-6)


def test_perplexities_are_those_of_the_options(qwen_run, bert_run, capsys):
    """Shares of 1 / perplexity are the probabilities, where an option is one token; a linear head has none."""
    (row,) = map(json.loads, lines(capsys, qwen_run, "Shares fell.", "--format", "jsonl"))
    likelihoods = 1 / np.array([*row["perplexities"].values()])
    assert likelihoods.sum() < 1  # the letters are only some of all tokens
    np.testing.assert_allclose(likelihoods / likelihoods.sum(), [*row["probabilities"].values()], rtol=1e-5)
    (row,) = map(json.loads, lines(capsys, bert_run, "Shares fell.", "--format", "jsonl"))
    assert "perplexities" not in row


@pytest.mark.parametrize("name", ["text", "prompt"])
def test_a_checkpoint_is_asked_as_its_run(name, linear_runs, capsys):
    run_dir = linear_runs / name
    (*_, newest) = sorted((run_dir / "checkpoints").iterdir())
    assert lines(capsys, newest, "Shares fell.") == lines(capsys, run_dir, "Shares fell.")
    # vLLM takes all such files for weights, so the optimizer's is in a folder.
    assert [file.name for file in newest.glob("*.safetensors")] == ["model.safetensors"]


def test_texts_files_and_standard_input_agree(bert_run, tmp_path, capsys, monkeypatch):
    texts = ["Shares fell.", "the striker, again"]
    (tmp_path / "a.csv").write_text('text,other\nShares fell.,1\n"the striker, again",2\n')
    (tmp_path / "b.txt").write_text("\n".join(texts) + "\n")
    wanted = lines(capsys, bert_run, *texts)
    assert wanted[0].split()[:2] == ["label", "probability"] and len(wanted) == 3
    assert lines(capsys, bert_run, tmp_path / "a.csv") == wanted
    assert lines(capsys, bert_run, tmp_path / "b.txt") == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts) + "\n"))
    assert lines(capsys, bert_run) == wanted


def test_a_line_of_standard_input_is_a_text_whatever_it_looks_like(bert_run, tmp_path, capsys, monkeypatch):
    """It may come from anybody: no file is opened, and only a line feed ends a text."""
    file = tmp_path / "secret.txt"
    file.write_text("not to be read\n")
    texts = [str(file), "All figures are in table.csv", "one\u2028text\x0c of\x85 a line"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    assert [json.loads(line)["text"] for line in lines(capsys, bert_run, "--format", "jsonl")] == texts


def test_text_files_of_other_systems(bert_run, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"Shares fell.\r\nthe striker\r\n")
    rows = lines(capsys, bert_run, tmp_path / "a.txt", "--format", "jsonl")
    assert [json.loads(row)["text"] for row in rows] == ["Shares fell.", "the striker"]


@pytest.mark.parametrize("argument", [True, False])
def test_texts_that_are_no_text(argument, bert_run, monkeypatch):
    """Python hands bytes that are not UTF-8 on as halves of characters, or refuses them."""
    with pytest.raises(
        UserError, match=r"FILE\|TEXT: the text is not valid Unicode" if argument else "standard input: not utf-8"
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc \xff\n"), "utf-8"))
        main(["predict", str(bert_run), *(["abc \udcff"] if argument else [])])


# minicls.json: how a model directory is asked, wherever it is.

QUESTION = "{options}\n{text}\n?"
ASKED = {  # name: (script's name, flags)
    "options first": ("qwen", ["--prompt", "options-first", "--normalize", "sum", "--max-length", "160"]),
    "a file": ("qwen", ["--prompt", "question.txt", "--train-on", "letter", "--think-in", "prompt", "--dtype", "bf16"]),
    "linear": ("qwen", ["--head", "linear", "--linear-input", "prompt", "--prompt", "published-zh"]),
    "head and tail": ("bert", ["--long-text", "head-tail", "--max-length", "14"]),
}


@pytest.fixture(scope="module")
def asked_runs(tmp_path_factory) -> dict[str, Path]:
    """A run of each kind, two steps long with a checkpoint at both, and its own question."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "question.txt").write_text(QUESTION)
    for name, (script, flags) in ASKED.items():
        given = [str(folder / flag) if flag.endswith(".txt") else flag for flag in flags]
        given += ["--max-steps", "2", "--save-every", "1", "--max-eval-rows", "24"]
        train(folder / name, *given, *([] if "--dtype" in given else ["--dtype", "fp32"]), script=SCRIPTS[script])
    (folder / "question.txt").unlink()
    return {name: folder / name for name in ASKED}


@pytest.mark.parametrize("name", ASKED)
def test_what_minicls_json_says(name, asked_runs):
    """In the run directory and in every checkpoint, the same."""
    run, (script, flags) = asked_runs[name], ASKED[name]
    (asked,) = {file.read_text() for file in (run / "minicls.json", *run.glob("checkpoints/*/minicls.json"))}
    asked, given = json.loads(asked), dict(zip(flags[::2], flags[1::2], strict=True))
    assert len([*run.glob("checkpoints/*/minicls.json")]) == 2
    expected = {"script": f"train_{script}", "label_names": ["World", "Sports", "Business", "Sci/Tech"]}
    expected |= {"max_length": int(given.get("--max-length", 512)), "dtype": given.get("--dtype", "fp32")}
    if script == "bert":
        assert asked == expected | {"head": "linear", "long_text": "head-tail"}
        return
    expected |= {"head": given.get("--head", "options"), "linear_input": given.get("--linear-input", "text")}
    expected |= {"normalize": given.get("--normalize", "mean"), "train_on": given.get("--train-on", "response")}
    expected |= {"think_in": given.get("--think-in", "response")}
    chat = {"before": "<|im_start|>user\n", "after": "<|im_end|>\n<|im_start|>assistant\n", "ending": "<|im_end|>\n"}
    chat |= {"think": "<think>\n\n</think>\n\n", "gap": "", "strips": False}
    template = asked.pop("template")
    assert asked == expected | {"chat": chat} and len(template) == 2
    if name == "a file":  # no /no_think is added to it
        assert template == ["A. World\nB. Sports\nC. Business\nD. Science/Technology\n", "\n?"]


def assert_predicts_as_the_run(directory: Path, run: Path) -> None:
    texts = split_data(load_data("synthetic"), max_eval_rows=24).test.texts
    saved = pq.read_table(run / "predictions.parquet").to_pydict()
    expected = np.stack([saved[f"probability_{c}"] for c in range(4)], axis=1)
    found = [list(p.probabilities.values()) for p in minicls.Classifier(directory, "cpu").predict(texts)]
    # bf16 rounds batches of another composition otherwise, in its third digit.
    bf16 = json.loads((run / "run.json").read_text())["settings"]["dtype"] == "bf16"
    np.testing.assert_allclose(found, expected, atol=2e-3 if bf16 else 1e-6)


@pytest.mark.parametrize("name", ASKED)
def test_a_checkpoint_copied_alone_is_asked_as_its_run(name, asked_runs, tmp_path):
    newest = asked_runs[name] / "checkpoints" / "step-000002"
    assert_predicts_as_the_run(shutil.copytree(newest, tmp_path / "elsewhere"), asked_runs[name])


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "\ufffd{"])
def test_a_broken_minicls_json(content, bert_run, tmp_path):
    copy = shutil.copytree(bert_run, tmp_path / "run")
    (copy / "minicls.json").write_text(content)
    with pytest.raises(
        UserError, match=r"^[^\n]*minicls.json: not readable .*; restore it, or copy the whole model directory again$"
    ):
        main(["predict", str(copy), "Shares fell."])


@pytest.mark.parametrize("chat", [{"start": "a"}, [1], "text"])
def test_a_minicls_json_with_no_chat_format(chat, qwen_run, tmp_path):
    copy = shutil.copytree(qwen_run, tmp_path / "run")
    asked = json.loads((copy / "minicls.json").read_text())
    (copy / "minicls.json").write_text(json.dumps(asked | {"chat": chat}))
    with pytest.raises(
        UserError, match=r"^[^\n]*run: its chat format is not valid .*; copy the whole model directory again$"
    ):
        minicls.Classifier(copy, "cpu")


def test_a_minicls_json_of_other_classes(bert_run, tmp_path):
    copy = shutil.copytree(bert_run, tmp_path / "run")
    asked = json.loads((copy / "minicls.json").read_text())
    (copy / "minicls.json").write_text(json.dumps(asked | {"label_names": asked["label_names"][::-1]}))
    with pytest.raises(
        UserError, match=r"^[^\n]*run: minicls.json and config.json name different classes; copy the whole .* again$"
    ):
        minicls.Classifier(copy, "cpu")


@pytest.mark.parametrize("argv", [["RUN"], ["RUN", "empty.csv"], ["RUN", "empty.txt"]])
def test_nothing_to_classify(argv, bert_run, tmp_path, monkeypatch):
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="nothing to classify"):
        main(["predict", *(str(bert_run) if a == "RUN" else a for a in argv)])


def test_a_reader_that_has_enough_is_no_error(bert_run):
    """Like `| head -1`: the pipe closes before everything is written."""
    command = [sys.executable, "-m", "minicls", "predict", str(bert_run), "Shares fell.", "--threads", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["nowhere", "a text"], ["nowhere", "no such run"]),
        (["nowhere", "missing.csv"], ["nowhere: no such run"]),  # before the inputs are read
        (["RUN", "missing.csv", "--then", "nowhere"], ["nowhere: no such run"]),
        (["RUN", "--format", "xml"], ["--format", "xml"]),
        (["RUN", "a text", "--threads", "0"], ["--threads", "0"]),
        (["RUN", "a text", "--device", "tpu"], ["--device", "tpu"]),
    ],
)
def test_mistakes(argv, parts, bert_run):
    with pytest.raises(UserError) as error:
        main(["predict", *(str(bert_run) if a == "RUN" else a for a in argv)])
    assert all(part in str(error.value) for part in parts)


def test_untrained_model_and_missing_column(bert_run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        main(["predict", str(tmp_path), "a text"])
    (tmp_path / "a.csv").write_text("body\nhello\n")
    with pytest.raises(UserError, match="--text-column"):
        main(["predict", str(bert_run), str(tmp_path / "a.csv")])


# Input files, and flags in any place.


def test_flags_stand_in_any_place(bert_run, tmp_path, capsys):
    file = tmp_path / "a.csv"
    file.write_text("text\nShares fell.\n")
    wanted = lines(capsys, bert_run, file, "the striker", "--format", "jsonl", "--threads", "1")
    assert len(wanted) == 2
    for argv in (
        [bert_run, "--format", "jsonl", file, "the striker"],
        ["--format", "jsonl", bert_run, file, "--threads", "1", "the striker"],
        ["--threads", "1", bert_run, "--format", "jsonl", file, "--text-column", "text", "the striker"],
        [bert_run, "--format", "jsonl", file, "--threads=1", "the striker"],
    ):
        assert lines(capsys, *argv) == wanted
    main(["predict", str(bert_run), "--device", "cpu", "--format", "jsonl", "--", "--dashes"])
    assert json.loads(capsys.readouterr().out)["text"] == "--dashes"


def test_report_s_runs_stand_on_both_sides_of_a_flag(bert_run, qwen_run, tmp_path, capsys):
    main(["report", str(bert_run), "--out", str(tmp_path / "report"), str(qwen_run)])
    out = capsys.readouterr().out
    assert (
        all(run.parent.name.rstrip("0123456789") in out for run in (bert_run, qwen_run))
        and (tmp_path / "report").is_dir()
    )


@pytest.mark.parametrize(
    "argv", [["--formt", "jsonl", "RUN", "x"], ["RUN", "x", "--formt", "jsonl"], ["RUN", "x", "--formt=jsonl", "y"]]
)
def test_an_unknown_flag_is_named_wherever_it_stands(argv, bert_run):
    with pytest.raises(UserError, match=r"unknown flag --formt; did you mean --format\?"):
        main(["predict", *(str(bert_run) if a == "RUN" else a for a in argv)])


CSV = "text,note\nShares fell.,1\n"
FILES = {
    "NEWS.CSV": CSV,
    "news.Tsv": CSV.replace(",", "\t"),
    "semicolons.csv": CSV.replace(",", ";"),
    "news.csv.gz": gzip.compress(CSV.encode()),
    "news.JSONL.GZ": gzip.compress(b'{"text": "Shares fell.", "note": "1"}\n'),
    "news.json": '[{"text": "Shares fell.", "note": "1"}]',
    "news.jsonl": '\n{"text": "Shares fell.", "note": "1"}\n',
    "bom.csv": "\ufeff" + CSV,
    "a b/news,2024.csv": CSV,
}


@pytest.mark.parametrize("name", FILES)
def test_an_existing_path_is_a_file_and_its_columns_are_kept(name, bert_run, tmp_path, capsys):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    content = FILES[name]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (row,) = map(json.loads, lines(capsys, bert_run, file, "--format", "jsonl"))
    assert (row["text"], row["note"]) == ("Shares fell.", "1")


@pytest.mark.parametrize("name", ["LINES.TXT", "no_suffix", "lines.txt"])
def test_a_file_without_columns_has_a_text_a_line(name, bert_run, tmp_path, capsys, monkeypatch):
    (tmp_path / name).write_text("Shares fell.\nthe striker\n")
    monkeypatch.chdir(tmp_path)
    assert [json.loads(line)["text"] for line in lines(capsys, bert_run, name, "--format", "jsonl")] == [
        "Shares fell.",
        "the striker",
    ]


@pytest.mark.parametrize("name", ["news.xlsx", "news.PKL", "folder", "folder.csv", "news.zip", "news.md"])
def test_a_file_of_another_format_is_refused(name, bert_run, tmp_path, monkeypatch):
    (tmp_path / name).mkdir() if name.startswith("folder") else (tmp_path / name).write_bytes(b"text\nhello\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=name):
        main(["predict", str(bert_run), name])


@pytest.mark.parametrize(
    "name",
    [
        "missing.CSV",
        "my missing.csv",
        "missing.csv.gz",
        "missing.tsv",
        "news/missing",
        "./missing",
        "/no/where",
        "~x/y",
    ],
)
def test_what_has_the_name_of_a_file_has_to_exist(name, bert_run):
    with pytest.raises(UserError, match=rf"^{name}: no such file"):
        main(["predict", str(bert_run), name])


@pytest.mark.parametrize(
    "text",
    [
        "win/loss for the team",
        "苹果/华为发布新手机",
        "the end.",
        "x" * 5000,
        "a\nb.csv",
        "profit (and/or loss)",
        "a\0b",
    ],
)
def test_any_other_argument_is_a_text(text, bert_run, capsys):
    (row,) = map(json.loads, lines(capsys, bert_run, text, "--format", "jsonl"))
    assert row["text"] == text


def test_standard_input_has_a_place_among_the_inputs(bert_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\n-\n"))
    rows = [json.loads(line)["text"] for line in lines(capsys, bert_run, "one", "-", "four", "--format", "jsonl")]
    assert rows == ["one", "two", "-", "four"]


# The output.


@pytest.fixture(scope="module")
def table_file(tmp_path_factory) -> Path:
    """Rows whose columns have names that the output has too."""
    file = tmp_path_factory.mktemp("inputs") / "news.csv"
    rows = [
        ("id", "text", "label"),
        *((i, text, "gold") for i, text in enumerate(load_data("synthetic").test.texts[:20])),
    ]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def flat(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    if file.suffix == ".csv":
        return [*csv.DictReader(file.open(newline=""))]
    return [*map(json.loads, file.read_text().splitlines())]


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("top_k", [None, 1, 3, 9])
def test_a_table_s_columns_and_the_predictions_are_written(form, top_k, bert_run, table_file, tmp_path, capsys):
    flags = ["--top-k", top_k] if top_k else []
    names, expected = ["World", "Sports", "Business", "Sci/Tech"], []
    for line in lines(capsys, bert_run, table_file, "--format", "jsonl"):
        row = json.loads(line)
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        values = [row["label"], ranked[0][1]]
        assert row["label"] == ranked[0][0] and row["input_label"] == "gold"
        values += (
            [x for pair in ranked[1:top_k] for x in pair] if top_k else [row["probabilities"][name] for name in names]
        )
        expected.append([row["id"], row["text"], "gold", *values])
    out = tmp_path / f"out.{form}"
    assert lines(capsys, bert_run, table_file, "--out", out, *flags) == [f"predictions: {out}"]
    rows = flat(out)
    later = [f"{part}_{rank}" for rank in range(2, min(top_k or 1, 4) + 1) for part in ("label", "probability")]
    later = later if top_k else [f"probability_{name}" for name in names]
    assert [*rows[0]] == ["id", "text", "input_label", "label", "probability", *later]
    as_text = [[str(value) for value in row.values()] for row in rows]
    assert as_text == [[str(value) for value in row] for row in expected]
    assert [*tmp_path.iterdir()] == [out]


def test_top_k_limits_the_other_formats(bert_run, table_file, capsys):
    (everything, *_), (two, *_) = (
        [json.loads(line)["probabilities"] for line in lines(capsys, bert_run, table_file, "--format", "jsonl", *flags)]
        for flags in ([], ["--top-k", 2])
    )
    assert [*two.items()] == sorted(everything.items(), key=lambda item: -item[1])[:2]
    header, first, *_ = lines(capsys, bert_run, table_file, "--top-k", 2)
    assert header.split() == ["label", "probability", "label", "2", "text"]
    (best, p), (second, q) = two.items()
    assert first.split()[:4] == [best, f"{p:.4f}", second, f"{q:.4f}"]


def test_files_of_several_kinds_in_one_csv(bert_run, table_file, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "one\ntwo", "tags": ["a", "b"]}) + "\n")
    rows = [
        *csv.DictReader(io.StringIO("\n".join(lines(capsys, bert_run, table_file, more, "a text", "--format", "csv"))))
    ]
    assert len(rows) == 22 and [*rows[0]][:4] == ["id", "text", "input_label", "tags"]
    assert (rows[20]["id"], rows[20]["text"], json.loads(rows[20]["tags"])) == ("", "one\ntwo", ["a", "b"])
    assert rows[21]["text"] == "a text" and rows[21]["label"] in ("World", "Sports", "Business", "Sci/Tech")


def test_a_parquet_file_keeps_its_types(bert_run, tmp_path, capsys):
    table = pa.table(
        {"text": ["Shares fell.", "They won."], "size": [1, 2], "when": pa.array([0, 1], pa.timestamp("s"))}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    lines(capsys, bert_run, tmp_path / "a.parquet", "--out", tmp_path / "b.parquet")
    written = pq.read_table(tmp_path / "b.parquet")
    assert (
        written.column("size").to_pylist() == [1, 2]
        and written.column("when").to_pylist() == table.column("when").to_pylist()
    )
    assert "1970-01-01 00:00:01" in lines(capsys, bert_run, tmp_path / "a.parquet", "--format", "jsonl")[1]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_predicted_file_can_be_predicted_again(form, bert_run, table_file, tmp_path, capsys):
    """No column is lost: neither the labels of the first file nor the first prediction."""
    first, second = tmp_path / f"first.{form}", tmp_path / f"second.{form}"
    lines(capsys, bert_run, table_file, "--out", first)
    lines(capsys, bert_run, first, "--out", second)
    for once, twice in zip(flat(first), flat(second), strict=True):
        assert twice["input_label"] == once["input_label"] == "gold"
        assert twice["input_input_label"] == twice["label"] == once["label"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_half_a_character_in_another_column_is_written_as_its_escape(form, bert_run, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "Shares fell.", "id": "\\ud800"}\n')
    out = tmp_path / f"b.{form}"
    lines(capsys, bert_run, tmp_path / "a.jsonl", "--out", out)
    assert flat(out)[0]["id"] == {"csv": "\\ud800", "jsonl": "\ud800"}[form]


def test_half_a_character_does_not_fit_parquet(bert_run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Shares fell.", "id": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"--out: the input's columns do not fit parquet"):
        main(["predict", str(bert_run), str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "b.parquet")])


def test_a_cascade_s_threshold_is_found_before_a_model_is_loaded(bert_run, monkeypatch):
    monkeypatch.setattr(weights, "build_model", None)
    with pytest.raises(UserError, match=r"no validation\.parquet"):
        main(["predict", str(bert_run), "Shares fell.", "--then", str(bert_run)])


def test_another_question_than_in_training_is_said(qwen_run, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\nShares fell.,bad\nThey won.,good\n")
    note = "note: the model is asked another question than in training"
    for data, said in ((str(tmp_path), True), ("synthetic", False)):
        flags = ["--data", data, "--max-eval-rows", "2", "--output-dir", str(tmp_path / f"run-{said}")]
        main(["evaluate", str(qwen_run), *flags])
        assert (note in capsys.readouterr().out) == said


def test_columns_that_do_not_fit_parquet_leave_no_file(bert_run, tmp_path):
    """JSON allows a number in one row and a text in the next."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": 1}\n{"text": "b", "x": "two"}\n')
    with pytest.raises(UserError, match=r"--out: the input's columns do not fit parquet"):
        main(["predict", str(bert_run), str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "b.parquet")])
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_chunks_change_nothing(bert_run, table_file, capsys, monkeypatch):
    whole = [json.loads(line) for line in lines(capsys, bert_run, table_file, "--format", "jsonl")]
    monkeypatch.setattr("minicls.predict.CHUNK", 3)
    chunked = [json.loads(line) for line in lines(capsys, bert_run, table_file, "--format", "jsonl")]
    assert [row["id"] for row in chunked] == [row["id"] for row in whole]
    probabilities = [[[*row["probabilities"].values()] for row in rows] for rows in (whole, chunked)]
    np.testing.assert_allclose(*probabilities, atol=1e-6)  # batches of another composition round differently


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--out", "taken.csv"], "--out: taken.csv exists"),
        (["--out", "nowhere/a.csv"], "--out: nowhere/a.csv is in a directory that does not exist"),
        (["--out", "a.xlsx"], "--out: a.xlsx is not"),
        (["--format", "parquet"], "--format: parquet"),
        (["--top-k", "0"], "--top-k: 0"),
    ],
)
def test_mistakes_about_the_output(flags, named, bert_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.csv").touch()
    with pytest.raises(UserError, match=named):
        main(["predict", str(bert_run), "Shares fell.", *flags])
    assert [file.name for file in tmp_path.iterdir()] == ["taken.csv"]


# In Python.


def test_a_classifier_in_a_notebook(bert_run):
    texts = ["Shares fell.", "", "They won."]
    classifier = minicls.Classifier(str(bert_run), "cpu")
    predictions = classifier.predict(texts)
    scores = classifier.scores(texts)
    for (label, probability, probabilities), row in zip(predictions, scores.softmax(1).tolist(), strict=True):
        assert [*probabilities] == classifier.label_names and [*probabilities.values()] == row
        assert probability == max(row) and label == classifier.label_names[row.index(max(row))]
    for same in (tuple(texts), np.array(texts), iter(texts)):
        assert classifier.predict(same) == predictions
    assert classifier.predict([]) == []
    assert minicls.Classifier(bert_run, torch.device("cpu")).predict(texts) == predictions
    assert minicls.Classifier(bert_run).predict(texts) == predictions
    assert not any(parameter.requires_grad for parameter in classifier.model.parameters())


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ("Shares fell.", r"'Shares fell.' is one text, not a list"),
        (["a", None], r"texts\[1\]: the text is None"),
        (["a", "b", float("nan")], r"texts\[2\]: the text is nan"),
        (["\ud83d"], r"texts\[0\]: the text is not valid Unicode"),
        ([["a"]], r"texts\[0\]: the text is \['a'\]"),
    ],
)
@pytest.mark.parametrize("method", ["predict", "scores"])
def test_what_is_no_list_of_texts_is_named(texts, named, method, bert_run, qwen_run):
    for run in (bert_run, qwen_run):
        with pytest.raises(UserError, match=named):
            getattr(minicls.Classifier(run, "cpu"), method)(texts)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), "tpu", "meta"])
def test_a_device_that_is_not_there_is_one_line(device, bert_run):
    with pytest.raises(UserError, match=f"--device: '{device}'"):
        minicls.Classifier(bert_run, device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_run_that_is_not_there_is_one_line(device, tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        minicls.Classifier(str(tmp_path / "nowhere"), device)


def test_importing_minicls_takes_no_torch():
    code = "import sys, minicls; assert 'torch' not in sys.modules; from minicls import Classifier; assert Classifier.predict"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="Clasifier"):
        minicls.Clasifier  # noqa: B018


def test_pip_installs_minicls_for_programs_elsewhere(tmp_path):
    """An editable install of a copy, without network: what it imports is the copy, and it needs what requirements.txt lists."""
    copy, prefix = tmp_path / "checkout", tmp_path / "prefix"
    shutil.copytree(ROOT / "minicls", copy / "minicls", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "train_bert.py"):
        shutil.copy(ROOT / name, copy)
    offline = [
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--prefix",
        prefix,
    ]
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "-e", copy], check=True)
    (packages,) = prefix.glob("lib/python*/site-packages")
    code = "import site, sys; site.addsitedir(sys.argv[1]); import minicls, importlib.metadata as m; print(minicls.__file__)"
    code += "; print(m.version('minicls')); print(*m.requires('minicls'), sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, packages]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    file, version, *needed = done.stdout.splitlines()
    assert (Path(file), version) == (copy / "minicls" / "__init__.py", minicls.__version__)
    wanted = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
    assert sorted(needed) == sorted(wanted)


def test_an_unfinished_run_names_its_newest_checkpoint(tmp_path, capsys):
    flags = ["--max-steps", "8", "--eval-every", "0", "--save-every", "2", "--dtype", "fp32"]
    with interrupt_at(5), pytest.raises(SystemExit):
        train(tmp_path / "run", *flags)
    with pytest.raises(UserError, match=r"not finished; pass its newest checkpoint, .*step-000005, or"):
        main(["predict", str(tmp_path / "run"), "Shares fell."])
    assert len(lines(capsys, tmp_path / "run" / "checkpoints" / "step-000005", "Shares fell.")) == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"not finished; it has no checkpoint yet: .*--resume"):
        main(["predict", str(tmp_path / "run"), "Shares fell."])


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "minicls", "predict", "nowhere", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "error: nowhere: no such run directory; check the path\n"
