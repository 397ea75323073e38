"""Tables out of result files.   python -m pytest tests/test_report.py      (a run's own files: tests/test_train.py)

Figures are those of the files, digit by digit; comparisons are reckoned again, with scipy where it has them.
"""

import hashlib
import json
import re
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import binomtest

from minicls import comparison, metrics, plots
from minicls.__main__ import main
from minicls.checkpoint import open_run
from minicls.comparison import PUBLISHED
from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS, Data, Split
from minicls.logger import read_metrics
from minicls.results import advice, steps, summary, table, write_results
from results.readme import results_table
from results.thin import thin_run


def cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def read_table(text: str) -> list[dict[str, str]]:
    """The first Markdown table of a text."""
    header, _, *lines = (line for line in re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE).group().splitlines())
    return [dict(zip(cells(header), cells(line), strict=True)) for line in lines]


def read_sections(file: Path) -> dict[str, str]:
    """The sections of a report.md by their titles."""
    _, *parts = re.split(r"^## ", file.read_text(), flags=re.MULTILINE)
    return dict(part.split("\n", 1) for part in parts)


def report(out: Path, *args) -> dict[str, str]:
    main(["report", *map(str, args), "--out", str(out)])
    return read_sections(out / "report.md")


def found(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def columns(run: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(run / "predictions.parquet")
    return {name: table[name].to_numpy().copy() for name in table.column_names}  # ours to change


def copy_run(
    run: Path, folder: Path, results: dict | None = None, num_train_rows: int | None = None, **settings
) -> Path:
    """The kept form of a run, with other settings and results."""
    folder.mkdir(parents=True)
    for name in ("run.json", "results.json", "metrics.jsonl", "predictions.parquet"):
        shutil.copy(run / name, folder)
    info = json.loads((folder / "run.json").read_text())
    info["settings"] |= settings
    info["num_train_rows"] = num_train_rows or info["num_train_rows"]
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "results.json").write_text(json.dumps(found(folder) | (results or {})))
    return folder


# A run's own files.

STATE = {"step": 4, "train_seconds": 0.0, "eval_seconds": 0.0, "evaluations": 0, "samples": 0, "tokens": 0}
STATE |= {"best_on_validation": None, "best_on_test": None}
TRAIN = '{"event": "train", "step": %d, "loss": %f, "peak_memory_bytes": 1}\n'


class Words:
    def encode(self, texts):
        return [text.split() for text in texts]


def write_three(
    run_dir: Path, labels: list[int], predictions: list[int], names=("x", "y", "z"), train=(1, 1, 0)
) -> dict:
    """results.json of a run on these test rows."""
    train, test = (
        Split([f"text {row}" for row in range(len(of))], np.array(of), 7 + np.arange(len(of))) for of in (train, labels)
    )
    logits = torch.from_numpy(4.0 * np.eye(len(names))[predictions]).float()
    data = Data(train, test, names, validation=train)
    of_splits = {"test": logits, "validation": logits[:3]}
    return write_results(run_dir, data, Words(), of_splits, STATE, torch.device("cpu"))


def test_predictions_of_both_splits_name_their_rows_and_classes(tmp_path):
    """The row is that of the file, and the schema names the classes where `datasets` and `load_data` look for them."""
    write_three(tmp_path, [2, 0, 1, 1], [2, 0, 1, 0])
    for file, labels in (("predictions", [2, 0, 1, 1]), ("validation", [1, 1, 0])):
        table = pq.read_table(tmp_path / f"{file}.parquet")
        assert table.column_names == [
            "row",
            "label",
            "prediction",
            "num_tokens",
            "text_hash",
            *(f"probability_{c}" for c in range(3)),
        ]
        assert (
            table["row"].to_pylist() == [7 + row for row in range(len(labels))] and table["label"].to_pylist() == labels
        )
        digests = [hashlib.sha256(f"text {row}".encode()).digest() for row in range(len(labels))]
        assert table["text_hash"].to_pylist() == [struct.unpack("<i", digest[:4])[0] for digest in digests]
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert [*features] == table.column_names and features["probability_0"] == {"dtype": "float32", "_type": "Value"}
        assert features["label"] == features["prediction"] == {"names": ["x", "y", "z"], "_type": "ClassLabel"}


def test_the_constant_answer_is_the_commonest_class_of_train(tmp_path):
    """Of train y, y, x it is y, with one of four test rows; its F1 is 2 / 5, over the classes x, y and z that occur."""
    results = write_three(tmp_path, [2, 0, 1, 2], [2, 0, 1, 0])
    assert (results["majority_class"], results["majority_accuracy"]) == ("y", 0.25)
    assert results["majority_f1"] == pytest.approx(2 / 5 / 3, abs=1e-12)
    assert [of["support"] for of in results["per_class"].values()] == [1, 1, 2]
    assert "accuracy 0.7500 (always answering y: 0.2500)" in summary(results)


def test_a_constant_answer_counted_by_hand(tmp_path):
    """3, 6 and 1 rows; always the second: accuracy 6/10, its F1 12/16, the others' 0."""
    labels = [0] * 3 + [1] * 6 + [2]
    results = write_three(tmp_path, labels, labels)
    assert (results["majority_accuracy"], results["majority_f1"]) == pytest.approx((0.6, 0.75 / 3), abs=1e-12)
    results = write_three(tmp_path, [0] * 3, [0] * 3, ("x", "y"), train=(1, 1, 1))
    assert (results["majority_accuracy"], results["majority_f1"]) == (0.0, 0.0)


def test_classes_without_test_rows_are_named(tmp_path):
    names = tuple(f"c{i}" for i in range(15))
    results = write_three(tmp_path, [0, 1, 1], [0, 1, 2], names)
    assert results["absent_classes"] == [*names[2:]] and results["macro_classes"] == 3
    assert results["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3, abs=1e-12)
    said = "macro means are over 3 of 15 classes; no test rows of c2, c3, c4, c5, c6, c7, c8, c9, c10, c11 and 3 more; "
    assert said + "1 of them predicted, which counts as 0" in summary(results)
    assert "macro means" not in summary(write_three(tmp_path, [0, 1, 2], [0, 1, 2]))


def test_a_run_that_learned_nothing_says_which_flags_to_change(tmp_path):
    labels = [0, 1] * 50
    learned = write_three(tmp_path, labels, labels, ("a", "b"))
    assert advice(learned) == []
    guessed = write_three(tmp_path, labels, [1] * 100, ("a", "b"))
    assert advice(guessed) == [
        "note: no better than always answering b (accuracy 0.5000, macro F1 0.3333), within the interval"
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(TRAIN % pair for pair in enumerate((9, 0.7, 0.68, 0.7, 0.68, 0.69)))
    )
    trained = write_three(tmp_path, labels, labels, ("a", "b"))
    note, flags = advice(trained)
    assert (
        note
        == "note: the mean of the last training losses, 0.690, is not clearly below ln 2 = 0.693, the loss of guessing"
    )
    assert all(
        flag in flags for flag in ("--learning-rate", "--epochs", "--warmup-ratio", "python -m minicls baseline")
    )
    assert summary(trained).endswith(f"{note}\n{flags}")


def test_a_rare_class_that_is_often_right_is_no_constant_answer(tmp_path):
    """Accuracy 0.97 where always "no" has 0.96, but half of the rare rows are right: macro F1 tells them apart."""
    labels, predictions = [0] * 960 + [1] * 40, [0] * 955 + [1] * 5 + [1] * 15 + [0] * 25
    results = write_three(tmp_path, labels, predictions, ("no", "yes"), (0, 0, 1))
    low, _ = metrics.accuracy_interval(results["accuracy"], 1000)
    assert low < results["majority_accuracy"] == 0.96 and advice(results) == []


def test_the_best_step_on_test_is_told_where_a_published_table_has_one(tmp_path):
    results = write_three(tmp_path, [0, 1, 2], [0, 1, 2]) | {
        "best_step_on_test": 2,
        "best_f1_on_test": 0.9,
        "evaluations": 3,
    }
    assert "best step" not in summary(results)
    scores = results["per_class"]["x"]
    results |= {"per_class": dict.fromkeys(AG_NEWS_LABELS, scores)}
    assert "best step on test: 2 with F1 0.9000 (the published protocol" in summary(results)
    assert "best step" not in summary(results | {"evaluations": 1}) and "best step" not in summary(
        results | {"best_step_on_test": 0}
    )


@pytest.mark.parametrize("broken", ["{", "5", "[1]", '{"event": "eval"}', '{"event": "eval", "step": "x"}', "\udcff"])
def test_a_broken_line_of_metrics_leaves_the_others(broken, tmp_path):
    lines = [TRAIN % (step, 1.0) for step in (1, 2, 3)]
    text = lines[0] + broken + "\n" + lines[1] + lines[2][:-5]
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert [event["step"] for event in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("held_out", [True, False])
def test_temperature_is_fitted_on_validation_and_used_on_test(held_out, tmp_path):
    rng = np.random.default_rng(0)
    splits = [Split(["a b c"] * n, rng.integers(0, 3, n), np.arange(n)) for n in (300, 200)]
    logits = [torch.from_numpy(8 * (np.eye(3)[s.labels] * 0.5 + rng.normal(size=(len(s), 3)))).float() for s in splits]
    data = Data(splits[1], splits[0], ("x", "y", "z"), validation=splits[1] if held_out else None)

    of_splits = {"test": logits[0]} | ({"validation": logits[1]} if held_out else {})
    results = write_results(tmp_path, data, Words(), of_splits, STATE, torch.device("cpu"))
    assert results == found(tmp_path) and columns(tmp_path)["num_tokens"].tolist() == [3] * 300
    if not held_out:
        assert results["temperature"] is results["calibration_error_scaled"] is None
        return
    temperature = metrics.fit_temperature(logits[1].double().numpy(), splits[1].labels)
    probabilities = (logits[0].double() / temperature).softmax(1).numpy()
    assert results["temperature"] == temperature > 2
    assert results["calibration_error_scaled"] == metrics.calibration_error(probabilities, splits[0].labels)
    assert results["calibration_error_scaled"] < 0.5 * results["calibration_error"]  # these logits are far too sure


@pytest.mark.parametrize("name", ["bert_run", "qwen_run"])
def test_steps_have_the_published_columns(name, request):
    run = request.getfixturevalue(name)
    rows = read_table(table(steps(run)))
    tests = [e for e in read_metrics(run) if e["event"] == "eval"]
    train = [e for e in read_metrics(run) if e["event"] == "train"]
    assert [e["step"] for e in train] == [10, 16]
    assert [row["step"] for row in rows] == ["8", "16"] == [str(e["step"]) for e in tests]
    assert [row["F1"] for row in rows] == [f"{e['f1']:.4f}" for e in tests]
    assert [row["test loss"] for row in rows] == [f"{e['loss']:.4f}" for e in tests]
    # No step was logged up to the first evaluation; the second follows two.
    assert [row["training loss"] for row in rows] == ["-", f"{(train[0]['loss'] + train[1]['loss']) / 2:.4f}"]
    assert ("letter loss" in rows[0]) == (name == "qwen_run")
    if name == "qwen_run":
        assert rows[1]["letter loss"] == f"{(train[0]['answer_loss'] + train[1]['answer_loss']) / 2:.4f}"


# The report.


def test_two_runs_and_all_their_figures(bert_run, qwen_run, tmp_path, capsys):
    sections = report(tmp_path / "out", bert_run, qwen_run)
    printed = capsys.readouterr().out
    assert printed.endswith(f"report: {tmp_path / 'out' / 'report.md'}\n")
    assert read_table(printed) == read_table(sections["Headlines"])
    runs, tables = (
        (bert_run, qwen_run),
        {title: read_table(body) for title, body in sections.items() if "| --- |" in body},
    )
    for i, (run, head) in enumerate(zip(runs, ("linear", "options"), strict=True)):
        row, of_run = tables["Headlines"][i], found(run)
        assert (row["run"], row["model"], row["head"], row["steps"]) == (str(run), "tiny", head, "16 of 16")
        interval = f"{of_run['f1']:.4f} ({of_run['f1_low']:.4f} to {of_run['f1_high']:.4f})"
        assert row["macro F1 (95 % interval)"] == interval
        assert row["accuracy"] == f"{of_run['accuracy']:.4f}"
        assert (row["test rows"], row["constant answer"]) == ("100", f"{of_run['majority_accuracy']:.4f}")
        assert [row["training, s"], row["evaluation, s"]] == [
            f"{of_run[f'{what}_seconds']:.0f}" for what in ("train", "eval")
        ]
        row = tables["How the step was chosen"][i]
        assert (row["headline"], row["step"], row["macro F1 (95 % interval)"]) == ("last step", "16", interval)
        wilson = binomtest(round(100 * of_run["accuracy"]), 100).proportion_ci(method="wilson")
        assert row["accuracy (95 % interval)"] == f"{of_run['accuracy']:.4f} ({wilson.low:.4f} to {wilson.high:.4f})"
        assert "best on test: step" not in row  # the published protocol, where nothing was published
        row = tables["What was run"][i]
        assert (row["data"], row["training rows"], row["test rows"], row["dtype"]) == (
            "synthetic",
            "256",
            "100",
            "fp32",
        )
        name = row["run"]
        assert str(run).endswith(name)
        scores = [f"{c['f1']:.4f} ({c['precision']:.4f}, {c['recall']:.4f})" for c in of_run["per_class"].values()]
        assert [row[name] for row in tables["Classes"]] == scores
        support = [(str(i), label, str(sum(of_run["confusion"][i]))) for i, label in enumerate(AG_NEWS_LABELS)]
        assert [(row[""], row["class"], row["test rows"]) for row in tables["Classes"]] == support
        confusion = read_table(sections["Confusion"].split(f"### {name}\n")[1])
        assert [[int(row[c]) for c in AG_NEWS_LABELS] for row in confusion] == of_run["confusion"]
        row = tables["Calibration"][i]
        assert [*row.values()] == [
            name,
            f"{of_run['calibration_error']:.4f}",
            "-",
            "-",
        ]  # no validation rows were held out
        row = tables["Cost"][i]
        assert float(row["s per evaluation"]) == pytest.approx(of_run["eval_seconds"] / 2, abs=0.06)
    ratio = cells(sections["Cost"].strip().splitlines()[-1])[3]
    assert ratio == f"{found(qwen_run)['train_seconds'] / found(bert_run)['train_seconds']:.2f}"

    (row,) = tables["Pairwise comparison"]
    left, right = columns(bert_run), columns(qwen_run)
    a, b = left["label"] == left["prediction"], right["label"] == right["prediction"]
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    assert (row["only a right"], row["only b right"]) == (str(only_a), str(only_b))
    assert row["McNemar's p"] == f"{binomtest(only_a, only_a + only_b).pvalue:.2g}"
    p = row["McNemar's p"]
    said = f"accuracy differs by {row['accuracy, a - b']}, McNemar's p {p}"
    assert f"{row['a']} against {row['b']}: {row['better']} is better; {said}\n" in printed
    assert row["accuracy, a - b"].startswith(f"{a.mean() - b.mean():+.4f} (")
    assert row["macro F1, a - b"].startswith(f"{found(bert_run)['f1'] - found(qwen_run)['f1']:+.4f} (")

    assert sum(int(row["rows"]) for row in tables["Length"]) == 100
    for row in tables["Length"]:
        low, high = map(int, row["tokens"].split(" to "))
        inside = (left["num_tokens"] >= low) & (left["num_tokens"] <= high)
        assert inside.sum() == int(row["rows"])
        for cell, right_ones in zip([*row.values()][2:], (a, b), strict=True):
            assert cell.startswith(f"{right_ones[inside].mean():.4f} (")
    for i, run in enumerate(runs, start=1):
        assert f"(curves-{i}.png)" in sections["Curves"]
        assert (tmp_path / "out" / f"curves-{i}.png").read_bytes() == (run / "curves.png").read_bytes()
    # Synthetic texts are not AG News; neither model was tried twice; nothing was served.
    assert sections.keys().isdisjoint(
        {"Against the published tables", "Settings and seeds", "Training rows", "Which one to deploy"}
    )


def test_real_predictions_beside_the_published_tables(bert_run, qwen_run, shared, tmp_path):
    """Three models of the outside world on AG News' test rows, as if they were runs of ours."""
    table = pq.read_table(shared / "data" / "ag_news" / "published_test_predictions.parquet")
    labels = table["label"].to_numpy()
    for name, like in (("distilbert", bert_run), ("linear_svc", bert_run), ("llama31_8b_sft", qwen_run)):
        confusion = metrics.confusion_matrix(labels, table[name].to_numpy(), 4)
        low, high = metrics.f1_interval(confusion, resamples=500)
        results = metrics.classification_metrics(confusion) | {"f1_low": low, "f1_high": high, "num_test_rows": 7600}
        run = copy_run(
            like,
            tmp_path / name,
            results | {"confusion": confusion.tolist()},
            data="fancyzhx/ag_news",
            model="Qwen3-0.6B" if like is qwen_run else name,
        )
        pq.write_table(
            pa.table({"row": range(7600), "label": labels, "prediction": table[name]}), run / "predictions.parquet"
        )
    names = ("distilbert", "linear_svc", "llama31_8b_sft")
    sections = report(tmp_path / "out", *(tmp_path / name for name in names))
    assert [row["accuracy"] for row in read_table(sections["Headlines"])] == ["0.9422", "0.9234", "0.9543"]
    pairs = {(row["a"], row["b"]): row for row in read_table(sections["Pairwise comparison"])}
    better = {pair: row["better"] for pair, row in pairs.items()}
    assert better == {names[:2]: names[0], (names[0], names[2]): names[2], names[1:]: names[2]}
    assert pairs[names[:2]]["accuracy, a - b"].startswith("+0.0188 (+0.01")
    assert "Length" not in sections  # these files have no num_tokens
    chosen = read_table(sections["How the step was chosen"])
    assert [row["run"] for row in chosen] == [*names, "published BERT", "published Qwen3"]
    assert [row["best on test: step"] for row in chosen[:2]] == [str(found(bert_run)["best_step_on_test"])] * 2
    assert (chosen[3]["accuracy (95 % interval)"], chosen[3]["best on test: step"]) == (
        "0.9442 (0.9388 to 0.9491)",
        "3752",
    )
    for name, kind in zip(names, ("BERT", "BERT", "Qwen3"), strict=True):
        rows = read_table(sections["Against the published tables"].split(f"### {name}\n")[1])
        published = [row for row in rows if row["published step"] != "-"]
        for column, values in PUBLISHED[kind].items():
            assert [float(row[f"published {column}"]) for row in published] == [*values]
        # Ours were evaluated in the middle and at the end; BERT's published table ends before the end.
        ours = [(row["share"], row["step"], row["published step"]) for row in rows if row["step"] != "-"]
        middle = "4690" if kind == "BERT" else "-"
        assert ours == [("0.50", "8", middle), ("1.00", "16", "-" if kind == "BERT" else "1250")]


def test_equal_and_hardly_different_predictions_have_no_winner(bert_run, tmp_path):
    twin, near = (copy_run(bert_run, tmp_path / name) for name in ("twin", "near"))
    table = columns(near)
    wrong = np.flatnonzero(table["label"] != table["prediction"])[:3]  # three rows better: p is 0.25
    table["prediction"][wrong] = table["label"][wrong]
    pq.write_table(pa.table(table), near / "predictions.parquet")
    rows = read_table(report(tmp_path / "out", bert_run, twin, near)["Pairwise comparison"])
    assert [(row["McNemar's p"], row["better"]) for row in rows] == [
        ("1", "neither"),
        ("0.25", "neither"),
        ("0.25", "neither"),
    ]


def test_seeds_are_folded_and_every_cell_is_told(bert_run, tmp_path):
    """Two learning rates by three seeds; the better one on validation is the worse one on test."""
    f1 = {"1e-4": (0.80, 0.81, 0.85), "3e-4": (0.70, 0.72, 0.71)}
    validation = {"1e-4": (0.6, 0.7, 0.8), "3e-4": (0.8, 0.9, 0.7)}
    for rate, values in f1.items():
        for seed, value in enumerate(values):
            scores = {"f1": value, "accuracy": value, "f1_low": value - 0.01, "f1_high": value + 0.02}
            run = copy_run(
                bert_run, tmp_path / "grid" / f"lr{rate}-seed{seed}", scores, learning_rate=float(rate), seed=seed
            )
            event = {"event": "eval", "split": "validation", "step": 16, "f1": validation[rate][seed]}
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(event) + "\n")
    runs = sorted((tmp_path / "grid").iterdir())
    sections = report(tmp_path / "out", *runs, runs[0])  # one of them named twice
    rows = read_table(sections["Headlines"])
    assert [row["run"] for row in rows] == [f"{tmp_path}/grid/lr{rate}-seed* (3 runs)" for rate in f1]
    spread = [f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" for values in f1.values()]
    assert spread[1] == "0.7100 ± 0.0100" and [row["accuracy"] for row in rows] == spread
    assert rows[1]["macro F1 (95 % interval)"] == "0.7100 ± 0.0100 (0.7000 to 0.7300)"
    grid = read_table(sections["Settings and seeds"])
    assert [row["learning_rate"] for row in grid] == ["0.0001", "0.0003"]
    for row, rate in zip(grid, f1, strict=True):
        cells_of_row = [row[f"seed {seed}: validation / test"] for seed in range(3)]
        assert cells_of_row == [f"{v:.4f} / {t:.4f}" for v, t in zip(validation[rate], f1[rate], strict=True)]
    assert [(row["validation"], row["test"]) for row in grid] == [
        ("0.7000 ± 0.1000", spread[0]),
        ("0.8000 ± 0.1000", spread[1]),
    ]
    assert [row[""] for row in grid] == ["", "chosen"]
    assert len(read_table(sections["Pairwise comparison"])) == 15
    _, _, *lines = results_table(runs).splitlines()
    assert [cells(line)[0] for line in lines] == ["lr1e-4-seed* (3 runs)", "lr3e-4-seed* (3 runs)"]
    assert not (tmp_path / "out" / "rows.png").exists()


def curve_run(
    like: Path, folder: Path, right: np.ndarray, num_train_rows: int, seed: int = 1, rows=None, **settings
) -> Path:
    """A run trained on so many rows whose predictions are right where `right` is; `rows`: which of the file's rows it
    tested."""
    run = copy_run(like, folder, num_train_rows=num_train_rows, max_train_rows=num_train_rows, seed=seed, **settings)
    rows = np.arange(len(right)) if rows is None else rows
    labels = rows % 4
    columns = {
        "row": rows,
        "label": labels,
        "prediction": np.where(right[rows], labels, (labels + 1) % 4),
        "text_hash": rows * 7,
    }
    pq.write_table(pa.table(columns), run / "predictions.parquet")
    info = json.loads((run / "run.json").read_text())
    info["data_fingerprint"] = {"train": f"{num_train_rows} {seed}", "test": f"{len(rows)}"}
    (run / "run.json").write_text(json.dumps(info))
    (run / "results.json").write_text(json.dumps(found(run) | {"num_test_rows": len(rows)}))
    return run


def first(share: float, n: int = 2000) -> np.ndarray:
    """So large a share of n rows is right, spread evenly."""
    return np.argsort(np.random.default_rng(0).permutation(n)) < round(share * n)


def write_curves(bert_run, qwen_run, folder, seeds=(1, 2, 3)) -> list[Path]:
    """BERT is at 0.8 everywhere, Qwen3 at 0.6, 0.75 and 0.9: they cross a third of the way from 1,000 to 10,000 rows.
    The rates go with the rows."""
    runs = []
    for size, share in ((100, 0.6), (1000, 0.75), (10_000, 0.9)):
        for seed in seeds:
            rate = {"learning_rate": 1e-3 / size, "epochs": 1000 / size}
            runs.append(curve_run(bert_run, folder / f"b{size}-{seed}", first(0.8), size, seed, **rate))
            runs.append(curve_run(qwen_run, folder / f"q{size}-{seed}", first(share), size, seed, **rate))
    return runs


def test_learning_curves_and_where_they_cross(bert_run, qwen_run, tmp_path):
    sections = report(tmp_path / "out", *write_curves(bert_run, qwen_run, tmp_path))
    body = sections["Training rows"]
    points = read_table(body)
    assert [(row["model"], row["training rows"], row["seeds"]) for row in points] == [
        (model, size, "3")
        for model in ("BERT (tiny), linear", "Qwen3 (tiny), options")
        for size in ("100", "1,000", "10,000")
    ]
    assert [row["accuracy (95 % interval)"][:6] for row in points] == ["0.8000"] * 3 + ["0.6000", "0.7500", "0.9000"]
    assert {(row["test rows"], row["the interval covers"]) for row in points} == {("2,000", "seeds and test rows")}
    (cross,) = read_table(body.split("| the interval covers |")[1].split("\n\n", 1)[1])
    assert cross["sizes that both have"] == "100, 1,000, 10,000"
    assert cross["they cross at, rows"] == f"{10 ** (3 + 1 / 3):,.0f}; from there on Qwen3 (tiny), options is ahead"
    low, high = (float(end.replace(",", "")) for end in cross["95 % interval"].split(" to "))
    # D at 1,000 rows is 0.05 of 2,000: its standard error is 0.0049, so it is 0.04 to 0.06, and -0.11 to -0.09 at 10,000.
    assert 10 ** (3 + 0.04 / 0.15) < low < 10 ** (3 + 0.05 / 0.15) < high < 10 ** (3 + 0.06 / 0.15)
    assert cross["replicates without a crossing"] == "0.0%"
    assert "(rows.png)" in body and (tmp_path / "out" / "rows.png").stat().st_size > 5000
    # The seeds of one size are one line, though each has drawn training rows of its own.
    assert len(read_table(sections["Headlines"])) == 6


def test_curves_that_do_not_cross_say_so(bert_run, qwen_run, tmp_path):
    runs = [curve_run(bert_run, tmp_path / f"b{size}", first(0.9), size) for size in (100, 1000)]
    runs += [
        curve_run(qwen_run, tmp_path / f"q{size}", first(share), size) for size, share in ((100, 0.5), (1000, 0.895))
    ]
    body = report(tmp_path / "out", *runs)["Training rows"]
    assert {row["the interval covers"] for row in read_table(body)} == {"test rows only"}
    (cross,) = read_table(body.split("| the interval covers |")[1].split("\n\n", 1)[1])
    assert cross["they cross at, rows"] == "nowhere: BERT (tiny), linear is ahead from 100 to 1,000"
    # 10 rows right for BERT alone, none for Qwen3 alone: a resample has none of them with a chance of e^-10.
    assert cross["replicates without a crossing"] == "100.0%" and cross["95 % interval"] == "-"


def test_a_crossing_that_may_be_beyond_the_sizes_is_open(bert_run, qwen_run, tmp_path):
    """At 1,000 rows Qwen3 is right in 12 rows that BERT is not, and BERT in 10: D is 0.001 +- 0.0023, of either
    sign."""
    bert, qwen = first(0.9), first(0.9)
    qwen[np.flatnonzero(bert)[:10]] = False
    qwen[np.flatnonzero(~bert)[:12]] = True
    runs = [curve_run(bert_run, tmp_path / f"b{size}", bert, size) for size in (100, 1000)]
    runs += [
        curve_run(qwen_run, tmp_path / f"q{size}", right, size) for size, right in ((100, first(0.5)), (1000, qwen))
    ]
    body = report(tmp_path / "out", *runs)["Training rows"]
    (cross,) = read_table(body.split("| the interval covers |")[1].split("\n\n", 1)[1])
    assert cross["they cross at, rows"].endswith("from there on Qwen3 (tiny), options is ahead")
    assert cross["95 % interval"].endswith(" to open above 1,000")
    without = float(cross["replicates without a crossing"].removesuffix("%")) / 100
    assert without == pytest.approx(0.37, abs=0.05)  # P(Poisson(12) <= Poisson(10)), 0.37


def test_what_makes_a_model_of_its_own(bert_run, qwen_run, tmp_path):
    """The schedule goes with the rows unless one size has two of it; a prompt never does; an absent setting is an unset
    one."""
    rates = [
        curve_run(bert_run, tmp_path / f"b{size}-{rate}", first(0.8), size, learning_rate=rate)
        for size in (10, 99)
        for rate in (1, 2)
    ]
    prompts = [
        curve_run(qwen_run, tmp_path / f"q{size}-{p}", first(0.8), size, epochs=size, prompt=p)
        for size in (10, 99)
        for p in ("x", "y")
    ]
    old = curve_run(qwen_run, tmp_path / "old", first(0.8), 500, prompt="x")
    info = json.loads((old / "run.json").read_text())
    del info["settings"]["compile"]
    (old / "run.json").write_text(json.dumps(info))
    zero_shot = curve_run(qwen_run, tmp_path / "zero", first(0.8), 700, prompt="x")
    info = json.loads((zero_shot / "run.json").read_text())
    (zero_shot / "run.json").write_text(json.dumps(info | {"total_steps": 0}))
    assert comparison.learning_curves(comparison.open_runs([*rates, *prompts, old, zero_shot])) == {
        **{f"BERT (tiny), linear, learning_rate {rate}": {10: [f"b10-{rate}"], 99: [f"b99-{rate}"]} for rate in (1, 2)},
        "Qwen3 (tiny), options, prompt x": {10: ["q10-x"], 99: ["q99-x"], 500: ["old"]},
        "Qwen3 (tiny), options, prompt y": {10: ["q10-y"], 99: ["q99-y"]},
    }


def test_runs_with_parts_of_the_test_rows_are_compared_on_those_all_have(bert_run, qwen_run, tmp_path, capsys):
    part = np.arange(0, 2000, 3)
    runs = [curve_run(bert_run, tmp_path / f"b{size}", first(0.8), size) for size in (100, 1000)]
    runs += [curve_run(qwen_run, tmp_path / f"q{size}", first(0.7), size, rows=part[::-1]) for size in (100, 1000)]
    sections = report(tmp_path / "out", *runs)
    note = "The runs have different parts of the same test rows; comparisons use the 667 rows that all have."
    assert (
        note in sections["Pairwise comparison"]
        and note in sections["Training rows"]
        and note in capsys.readouterr().out.splitlines()
    )
    assert [row["test rows"] for row in read_table(sections["Headlines"])] == ["2,000", "2,000", "667", "667"]
    pair = read_table(sections["Pairwise comparison"])[1]
    assert (pair["only a right"], pair["only b right"]) == (str((first(0.8) & ~first(0.7))[part].sum()), "0")
    points = read_table(sections["Training rows"])
    assert [row["accuracy (95 % interval)"][:6] for row in points] == [
        f"{first(x)[part].mean():.4f}" for x in (0.8, 0.8, 0.7, 0.7)
    ]


@pytest.mark.parametrize(
    "change", ["a row of another text", "another label", "a row that the larger has not", "no hashes"]
)
def test_other_rows_are_refused(change, bert_run, qwen_run, tmp_path):
    large = curve_run(bert_run, tmp_path / "large", first(0.8), 100)
    small = curve_run(qwen_run, tmp_path / "small", first(0.8), 100, rows=np.arange(50))
    table = columns(small)
    if change == "no hashes":
        del table["text_hash"]
    elif change == "a row that the larger has not":
        table["row"][3] = 5000
    else:
        table["label" if change == "another label" else "text_hash"][3] += 1
    pq.write_table(pa.table(table), small / "predictions.parquet")
    with pytest.raises(UserError, match=r"(other|different) test rows.*; test (both|them) on the same rows"):
        report(tmp_path / "out", large, small)
    assert not (tmp_path / "out").exists()


BENCH = {
    "model": "bert",
    "engine": "minicls",
    "engine_version": "0.1.0",
    "method": "classify",
    "mode": "offline",
    "dtype": "fp32",
}
BENCH |= {"device": "cpu", "requests_per_second": 61.234, "latency_p50_ms": 15.5, "num_requests": 100, "accuracy": 0.9}
BENCH |= {"agreement": 1.0, "status": "ok", "reason": None}
LACKING = {
    "requests_per_second": None,
    "latency_p50_ms": None,
    "accuracy": None,
    "status": "not run",
    "reason": "no vllm",
}


def test_requests_beside_accuracy(bert_run, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps([BENCH, BENCH | LACKING]))
    first, second = read_table(
        report(tmp_path / "out", bert_run, "--bench", tmp_path / "bench.json")["Which one to deploy"]
    )
    assert (first["engine"], first["requests/s"], first["accuracy"], first["status"]) == (
        "minicls 0.1.0",
        "61.23",
        "0.9000",
        "ok",
    )
    assert (second["requests/s"], second["status"]) == ("-", "not run: no vllm")
    assert (tmp_path / "out" / "deploy.png").stat().st_size > 5000


@pytest.mark.parametrize(("accuracy", "n"), [(1.0, 10), (0.0, 27), (1.0, 25)])
def test_all_right_and_all_wrong_have_an_interval_to_draw(accuracy, n, bert_run, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps([BENCH | {"accuracy": accuracy, "num_requests": n}]))
    report(tmp_path / "out", bert_run, "--bench", tmp_path / "bench.json")


def test_what_is_kept_of_runs_will_do(bert_run, qwen_run, tmp_path):
    """Without predictions and metrics, all that results.json holds is told, and what is left out."""
    runs = [copy_run(run, tmp_path / name, data="ag_news") for run, name in ((bert_run, "bert"), (qwen_run, "qwen"))]
    for run in runs:
        (run / "predictions.parquet").unlink()
        (run / "metrics.jsonl").unlink()
        old = found(run)
        for key in ("majority_accuracy", "macro_classes", "absent_classes"):
            del old[key]  # as in files from before they were kept
        for scores in old["per_class"].values():
            del scores["support"]
        (run / "results.json").write_text(json.dumps(old))
    sections = report(tmp_path / "out", *runs)
    assert "Left out, without predictions.parquet: bert, qwen." in sections["Pairwise comparison"]
    assert len(read_table(sections["Headlines"])) == 2 and "Length" not in sections
    assert [row["temperature"] for row in read_table(sections["Calibration"])] == ["-", "-"]


def test_thin_runs_give_the_same_report(bert_run, qwen_run, tmp_path):
    whole = [copy_run(run, tmp_path / "whole" / name) for run, name in ((bert_run, "bert"), (qwen_run, "qwen"))]
    thin = [tmp_path / "thin" / run.name for run in whole]
    for run, small in zip(whole, thin, strict=True):
        thin_run(run, small)
        thin_run(small, small)  # in place, again
        table, full = pq.read_table(small / "predictions.parquet"), columns(run)
        assert {*table.column_names} == {"row", "label", "prediction", "probability", "text_hash", "num_tokens"}
        probabilities = np.stack([full[f"probability_{c}"] for c in range(4)], axis=1)
        assert table["probability"].to_numpy() == pytest.approx(probabilities.max(1), abs=6e-3)  # two decimals
    of_whole, of_thin = (report(tmp_path / name, *runs) for name, runs in (("a", whole), ("b", thin)))
    assert of_whole.keys() == of_thin.keys()
    differ = {title for title in of_whole if of_whole[title] != of_thin[title]}
    assert differ == {"Headlines"}  # it names the directories


# Mistakes.


def test_other_test_rows_are_no_comparison(bert_run, tmp_path):
    other = copy_run(bert_run, tmp_path / "other")
    info = json.loads((other / "run.json").read_text())
    info["data_fingerprint"]["test"] = "0" * 64
    (other / "run.json").write_text(json.dumps(info))
    table = columns(other)  # other texts, with the same labels
    pq.write_table(pa.table(table | {"text_hash": table["text_hash"] + 1}), other / "predictions.parquet")
    with pytest.raises(UserError, match=f"{other}: other test rows than {bert_run}"):
        report(tmp_path / "out", bert_run, other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "model_type", "family"),
    [
        ("Qwen/Qwen3-0.6B", None, "Qwen3"),
        ("models/qwen3-small", None, "Qwen3"),
        ("Qwen2.5-0.5B-Instruct", None, "decoder"),
        ("base", None, "decoder"),  # unknown, so not compared
        ("base", "qwen3", "Qwen3"),
        ("Qwen2.5-0.5B", "qwen2", "decoder"),
        ("smol-from-qwen3", "llama", "decoder"),
    ],
)
def test_only_a_qwen3_is_compared_with_the_published_one(model, model_type, family, qwen_run, tmp_path):
    run = copy_run(qwen_run, tmp_path / "run", model=model, data="fancyzhx/ag_news")
    info = json.loads((run / "run.json").read_text())
    assert info.pop("model_type") == "qwen3"
    (run / "run.json").write_text(json.dumps(info | ({"model_type": model_type} if model_type else {})))
    assert comparison.describe_model(open_run(run)).family == family
    sections = report(tmp_path / "out", run)
    assert ("Against the published tables" in sections) == (family == "Qwen3")
    assert ("published Qwen3" in sections["How the step was chosen"]) == (family == "Qwen3")


def test_other_class_names_are_no_comparison(bert_run, tmp_path):
    other = copy_run(bert_run, tmp_path / "other", {"per_class": {name: {"f1": 1.0} for name in "abcd"}})
    with pytest.raises(UserError, match=f"{other}: other class names than {bert_run}"):
        report(tmp_path / "out", bert_run, other)


def test_an_unfinished_run_is_named(bert_run, tmp_path):
    copy = copy_run(bert_run, tmp_path / "copy")
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match=f"{copy}: no finished run"):
        report(tmp_path / "out", bert_run, copy)
    with pytest.raises(UserError, match=f"{tmp_path / 'none'}: no finished run"):
        report(tmp_path / "out", tmp_path / "none")


def test_reports_of_the_same_second_have_directories_of_their_own(bert_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    for _ in range(2):
        main(["report", str(bert_run)])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("report: ")]
    assert said == [f"report: runs/report-now{number}/report.md" for number in ("", "-2")]
    assert all(Path(line.removeprefix("report: ")).is_file() for line in said)


def test_files_in_the_way_or_broken(bert_run, tmp_path):
    with pytest.raises(UserError, match=f"--out: {bert_run} is not empty; name a new directory$"):
        report(bert_run, bert_run)
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "out"):
        with pytest.raises(UserError, match=rf"--out: cannot write to {out} \(.*\); name another directory"):
            report(out, bert_run)
    # Only a training script can resume.
    with pytest.raises(UserError, match=f"--output-dir: {bert_run} is not empty; name a new directory$"):
        main(["evaluate", str(bert_run), "--data", "synthetic", "--device", "cpu", "--output-dir", str(bert_run)])
    broken = copy_run(bert_run, tmp_path / "broken")
    (broken / "predictions.parquet").write_text("PAR1")
    with pytest.raises(UserError, match=r"predictions.parquet: not a readable parquet file"):
        report(tmp_path / "out", bert_run, broken)
    for text in ("{", "[1]", '{"task": "score"}', '[{"model": "bert"}]'):
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(UserError, match=r"--bench: .*bench.json is no result of bench.py"):
            report(tmp_path / "out", bert_run, "--bench", tmp_path / "bench.json")
    assert not (tmp_path / "out").exists()


DAMAGED = [
    (name, text) for name in ("run", "results") for text in ("{", "[]", "5", "{}", '{"final_step": 3}', "\ufeff")
]


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_damaged_files_are_told_in_one_line(name, text, bert_run, tmp_path):
    broken = copy_run(bert_run, tmp_path / "broken")
    (broken / f"{name}.json").write_text(text)
    with pytest.raises(UserError, match=rf"broken/{name}\.json: (not readable|no \w+ in it)"):
        report(tmp_path / "out", bert_run, broken)
    assert not (tmp_path / "out").exists()


def test_one_run_alone_is_told_what_to_compare_it_with(bert_run, tmp_path):
    sections = report(tmp_path / "out", bert_run)
    assert (
        "`python -m minicls baseline`" in sections["Pairwise comparison"] and len(read_table(sections["Classes"])) == 4
    )


def test_a_p_value_below_all_floats_is_no_zero(bert_run, qwen_run, tmp_path):
    """2,000 rows right for one alone: p is 2^-1999."""
    runs = [curve_run(like, tmp_path / name, first(x), 9) for like, name, x in ((bert_run, "a", 1), (qwen_run, "b", 0))]
    (row,) = read_table(report(tmp_path / "out", *runs)["Pairwise comparison"])
    assert (row["McNemar's p"], row["better"]) == ("<1e-300", "a")


# Names and pictures.


def test_names_with_line_breaks_and_blanks_stand_on_one_line(bert_run, tmp_path):
    names = ["good\nnews", "good ", "a | b", "体育"]
    of_class = dict(zip(names, found(bert_run)["per_class"].values(), strict=True))
    table = read_table(
        report(tmp_path / "out", copy_run(bert_run, tmp_path / "run", {"per_class": of_class}))["Classes"]
    )
    assert [row["class"] for row in table] == [r"'good\nnews'", "'good '", "a | b", "体育"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test writes; warnings, such as that of a glyph that no font has, are errors."""
    from matplotlib.figure import Figure

    written, savefig = [], Figure.savefig

    def save(figure, *args, **options):
        written.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield written


def boxes(figure, texts) -> np.ndarray:
    """The extents of texts in pixels, (n, 4): x0, y0, x1, y1."""
    figure.draw_without_rendering()
    return np.array([text.get_window_extent().extents for text in texts])


@pytest.mark.parametrize(("C", "shown"), [(2, 2), (20, 20), (77, 77), (1000, 51)])
def test_class_names_of_a_confusion_matrix_do_not_overlap(C, shown, figures, tmp_path):
    confusion = np.diag(np.arange(C) + 1)
    confusion[C // 2, 0] = 9
    plots.plot_confusion(confusion, [f"a name of {i}, {'x' * 40}" for i in range(C)], tmp_path)
    axes = figures[0].axes[0]
    texts = axes.get_yticklabels()
    assert len(texts) == shown and (tmp_path / "confusion.png").stat().st_size > 5000
    _, y0, _, y1 = boxes(figures[0], texts).T
    assert (y1[1:] <= y0[:-1] + 1).all()  # each below the one before
    (turn,) = {text.get_rotation() for text in axes.get_xticklabels()}
    spacing = np.diff(boxes(figures[0], axes.get_xticklabels())[:, 2])
    assert (spacing * np.sin(np.radians(turn)) >= (y1 - y0)[0] * 0.9).all()  # slanted lines of text, side by side
    if C == 1000:
        assert axes.get_yticklabels()[-1].get_text() == "all others"
        assert any(text.get_text().startswith("a name of 500,") for text in texts)  # it has most mistakes
        assert sum(int(text.get_text()) for text in axes.texts) == confusion.sum()


def make_font(file: Path, characters: str) -> None:
    """A font of squares."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for move, *at in ((pen.moveTo, 0, 0), (pen.lineTo, 0, 800), (pen.lineTo, 800, 800), (pen.lineTo, 800, 0)):
        move(tuple(at))
    pen.closePath()
    square, font = pen.glyph(), FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(character): "square" for character in characters})
    font.setupGlyf({".notdef": square, "square": square})
    font.setupHorizontalMetrics({".notdef": (900, 0), "square": (900, 0)})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(file)


@pytest.mark.parametrize("installed", [True, False])
def test_chinese_class_names_are_drawn_or_numbered(installed, figures, tmp_path, monkeypatch, capsys):
    from matplotlib import font_manager

    names = ["\U0002a6d6育", "finance"]  # the first character is in no font of matplotlib's own, nor in most others
    fonts = [font for font in font_manager.fontManager.ttflist if font.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    if installed:
        make_font(tmp_path / "squares.ttf", names[0])
        font_manager.fontManager.addfont(tmp_path / "squares.ttf")
    plots.plot_confusion([[3, 1], [0, 2]], names, tmp_path)
    labels = [text.get_text() for text in figures[0].axes[0].get_xticklabels()]
    printed = capsys.readouterr().out
    assert labels == (names if installed else ["0", "1"])
    said = "no installed font has the characters of all class names, so confusion.png shows their indices: 0 \U0002a6d6育, 1 finance\n"
    assert printed == ("" if installed else said)


def served(**values) -> dict:
    return BENCH | {"model": "m" * 30} | values


def test_rates_are_plain_numbers_inside_their_axes(figures, tmp_path):
    rates = {"a": 1138.4, "b": 99.96, "c": 0.1234, "d": 61_234.5}
    rows = [
        served(engine=engine, requests_per_second=rate, mode=mode, accuracy=None)
        for engine, rate in rates.items()
        for mode in ("single", "offline")
    ]
    plots.plot_requests(rows, tmp_path / "rps.png")
    assert len(figures[0].axes) == 2
    for axes in figures[0].axes:
        assert [text.get_text() for text in axes.texts] == ["1,138", "100", "0.123", "61,234"]
        assert (boxes(figures[0], axes.texts)[:, 2] < axes.get_window_extent().x1).all()


def test_accuracy_is_never_above_one(figures, tmp_path):
    rows = [
        served(engine=engine, accuracy=accuracy, requests_per_second=3, num_requests=20)
        for engine, accuracy in (("a", 1.0), ("b", 0.98), ("c", 0.9))
    ]
    plots.plot_requests(rows, tmp_path / "deploy.png")
    axes = figures[0].axes[0]
    assert axes.get_title() == "accuracy, 95 % interval" and axes.get_xlim()[1] <= 1.0
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == [f"{'m' * 30}, {engine}, classify" for engine in "abc"]


# Tables of the README.


def test_committed_results_with_a_peer_beside_them(bert_run, tmp_path):
    folder = tmp_path / "some-run"
    folder.mkdir()
    for file in ("run.json", "results.json"):
        shutil.copy(bert_run / file, folder)
    peer = {"accuracy": 0.5, "f1": 0.4, "f1_low": 0.3, "f1_high": 0.45, "num_test_rows": 100, "train_seconds": 7.4}
    (folder / "hf_trainer.json").write_text(json.dumps(peer))
    _, _, ours, theirs = results_table([folder]).splitlines()
    assert cells(ours)[:5] == ["some-run", "tiny", "linear", "256", "100"]
    assert cells(theirs) == [
        "some-run, HF Trainer",
        "tiny",
        "linear",
        "256",
        "100",
        "0.5000",
        "0.4000 (0.3000 to 0.4500)",
        "7",
    ]


def test_committed_results_in_groups(bert_run, qwen_run, tmp_path):
    seeds = [
        copy_run(bert_run, tmp_path / "grid" / f"seed{seed}", {"f1": 0.5 + seed / 10}, seed=seed) for seed in (1, 2)
    ]
    rows = read_table(results_table([copy_run(qwen_run, tmp_path / "alone"), *seeds]))
    assert [row["result"] for row in rows] == ["alone", "grid/seed* (2 runs)"]
    assert rows[1]["macro F1 (95 % interval)"].startswith("0.6500 ± 0.0707 (")
