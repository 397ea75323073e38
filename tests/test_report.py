"""Tables out of result files.   python -m pytest tests/test_report.py      (a run's own files: tests/test_train.py)

Figures are those of the files, digit by digit.
"""

import json
import shutil

import pytest

from minicls.__main__ import main
from minicls.config import UserError
from minicls.logger import read_metrics
from minicls.report import results_table, steps_table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_side_by_side(bert_run, qwen_run, capsys):
    main(["report", str(bert_run), str(qwen_run)])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for run, line, head in zip((bert_run, qwen_run), lines, ("linear", "options"), strict=True):
        row, found = dict(zip(cells(header), cells(line), strict=True)), json.loads((run / "results.json").read_text())
        assert (row["run"], row["model"], row["head"], row["steps"]) == (str(run), "tiny", head, "16 of 16")
        assert row["macro F1 (95 % interval)"] == f"{found['f1']:.4f} ({found['f1_low']:.4f} to {found['f1_high']:.4f})"
        assert row["accuracy"] == f"{found['accuracy']:.4f}"
        assert [row["training, s"], row["evaluation, s"]] == [f"{found[f'{what}_seconds']:.0f}" for what in ("train", "eval")]


def test_other_test_rows_are_no_comparison(bert_run, tmp_path):
    other = shutil.copytree(bert_run, tmp_path / "other")
    info = json.loads((other / "run.json").read_text())
    info["data_fingerprint"]["test"] = "0" * 64
    (other / "run.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=f"{other}: other test rows than {bert_run}"):
        main(["report", str(bert_run), str(other)])


def test_an_unfinished_run_is_named(bert_run, tmp_path):
    copy = shutil.copytree(bert_run, tmp_path / "copy")
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match=f"{copy}: no finished run"):
        main(["report", str(bert_run), str(copy)])


@pytest.mark.parametrize("name", ["bert_run", "qwen_run"])
def test_steps_have_the_published_columns(name, request):
    run = request.getfixturevalue(name)
    header, _, *lines = steps_table(run).splitlines()
    rows = [dict(zip(cells(header), cells(line), strict=True)) for line in lines]
    tests = [e for e in read_metrics(run) if e["event"] == "eval"]
    train = [e for e in read_metrics(run) if e["event"] == "train"]
    assert [e["step"] for e in train] == [10, 16]
    assert [row["step"] for row in rows] == ["8", "16"] == [str(e["step"]) for e in tests]
    assert [row["F1"] for row in rows] == [f"{e['f1']:.4f}" for e in tests]
    assert [row["test loss"] for row in rows] == [f"{e['loss']:.4f}" for e in tests]
    # No step was logged up to the first evaluation; the second follows two.
    assert [row["training loss"] for row in rows] == ["-", f"{(train[0]['loss'] + train[1]['loss']) / 2:.4f}"]
    assert ("of the letter" in rows[0]) == (name == "qwen_run")
    if name == "qwen_run":
        assert rows[1]["of the letter"] == f"{(train[0]['answer_loss'] + train[1]['answer_loss']) / 2:.4f}"


def test_committed_results_with_a_peer_beside_them(bert_run, tmp_path):
    folder = tmp_path / "some-run"
    folder.mkdir()
    for file in ("run.json", "results.json"):
        shutil.copy(bert_run / file, folder)
    peer = {"accuracy": 0.5, "f1": 0.4, "f1_low": 0.3, "f1_high": 0.45, "num_test_rows": 100, "train_seconds": 7.4}
    (folder / "hf_trainer.json").write_text(json.dumps(peer))
    _, _, ours, theirs = results_table([folder]).splitlines()
    assert cells(ours)[:5] == ["some-run", "tiny", "linear", "256", "100"]
    assert cells(theirs) == ["some-run, HF Trainer", "tiny", "linear", "256", "100", "0.5000", "0.4000 (0.3000 to 0.4500)", "7"]
