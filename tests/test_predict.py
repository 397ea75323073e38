"""`python -m minicls predict`.   python -m pytest tests/test_predict.py"""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TINY

from minicls.__main__ import main
from minicls.config import UserError
from minicls.data import load_data, split_data


def lines(capsys, *argv) -> list[str]:
    capsys.readouterr()  # what a fixture's training printed
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
    test = split_data(load_data("synthetic"), max_eval_rows=100)[0].test
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
    assert likelihoods.sum() < 1  # of all tokens, the letters are some
    np.testing.assert_allclose(likelihoods / likelihoods.sum(), [*row["probabilities"].values()], rtol=1e-5)
    (row,) = map(json.loads, lines(capsys, bert_run, "Shares fell.", "--format", "jsonl"))
    assert "perplexities" not in row


@pytest.mark.parametrize("name", ["text", "prompt"])
def test_a_checkpoint_is_asked_as_its_run(name, linear_runs, capsys):
    run_dir = linear_runs / name
    (*_, newest) = sorted((run_dir / "checkpoints").iterdir())
    assert lines(capsys, newest, "Shares fell.") == lines(capsys, run_dir, "Shares fell.")


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
    with pytest.raises(UserError, match=r"FILE\|TEXT: the text is no valid Unicode" if argument else "standard input: not utf-8"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc \xff\n"), "utf-8"))
        main(["predict", str(bert_run), *(["abc \udcff"] if argument else [])])


def test_a_broken_run_json(bert_run, tmp_path):
    copy = shutil.copytree(bert_run, tmp_path / "run")
    (copy / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json: not readable"):
        main(["predict", str(copy), "Shares fell."])


@pytest.mark.parametrize("argv", [["RUN"], ["RUN", "empty.csv"], ["RUN", "empty.txt"]])
def test_nothing_to_classify(argv, bert_run, tmp_path, monkeypatch):
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="nothing to classify"):
        main(["predict", *(str(bert_run) if a == "RUN" else a for a in argv)])


def test_a_reader_that_has_enough_is_no_error(bert_run):
    """As `| head -1`: the pipe closes before all is written."""
    command = [sys.executable, "-m", "minicls", "predict", str(bert_run), "Shares fell.", "--threads", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["nowhere", "a text"], ["nowhere", "no such run"]),
        (["RUN", "missing.csv"], ["missing.csv", "no such file"]),
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


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "minicls", "predict", "nowhere", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: nowhere: no such run directory; check the path\n"
