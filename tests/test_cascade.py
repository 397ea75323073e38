"""A cascade of two runs: curve, threshold, report, `predict --then`.   python -m pytest tests/test_cascade.py"""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from test_report import read_sections, read_table

import train_bert
from minicls.__main__ import main
from minicls.cascade import Answers, Cascade, choose_threshold, defer, deferral_curve, validation_answers
from minicls.config import UserError
from minicls.predict import Classifier
from results.thin import thin_predictions, thin_run


def random_answers(rng: np.random.Generator, n: int, levels: int) -> Answers:
    """Predictions of 4 classes that are right more often than by chance; confidences with many ties."""
    labels = rng.integers(0, 4, n)
    small, large = (np.where(rng.random(n) < p, labels, rng.integers(0, 4, n)) for p in (0.6, 0.8))
    return Answers(labels, small, large, rng.integers(1, levels + 1, n) / levels)


def brute_force(answers: Answers, threshold: float) -> tuple[int, int]:
    """Rows that the cascade answers right; deferred rows that only one model answers right."""
    right = differing = 0
    for label, small, large, confidence in zip(*answers, strict=True):
        if confidence <= threshold:
            right += large == label
            differing += (small == label) != (large == label)
        else:
            right += small == label
    return right, differing


@pytest.mark.parametrize("levels", [3, 50, 10_000])
def test_curve_and_threshold_are_those_of_a_loop_over_rows(levels):
    for seed in range(10):
        answers = random_answers(np.random.default_rng(seed), 60, levels)
        thresholds, right, differing = deferral_curve(answers)
        assert thresholds.tolist() == [0, *sorted({*answers.confidence.tolist()})]
        expected = [brute_force(answers, threshold) for threshold in thresholds]
        assert [*zip(right.tolist(), differing.tolist(), strict=True)] == expected
        assert right[0] == (answers.small == answers.labels).sum()
        assert right[-1] == (answers.large == answers.labels).sum()
        for threshold, (count, _) in zip(thresholds, expected, strict=True):
            assert (answers.cascade(threshold) == answers.labels).sum() == count
        # The rule: the lowest that loses no more than one standard error of the difference to the best.
        best = max(range(len(expected)), key=lambda i: (expected[i][0], -i))
        kept = [
            threshold
            for threshold, (count, d) in zip(thresholds, expected, strict=True)
            if expected[best][0] - count <= math.sqrt(abs(expected[best][1] - d))
        ]
        assert choose_threshold(answers) == kept[0]


def test_thresholds_of_plain_cases():
    n = 1000
    labels, confidence = np.zeros(n, int), np.arange(1, n + 1) / n
    unsure = np.where(confidence <= 0.3, 1, 0)  # wrong up to 0.3, right above
    always, never = np.zeros(n, int), np.ones(n, int)
    threshold = choose_threshold(Answers(labels, unsure, always, confidence))
    # 300 rows gain; the rule gives up d of them as long as d <= sqrt(d): one.
    assert threshold == pytest.approx(0.299)
    assert choose_threshold(Answers(labels, always, never, confidence)) == 0  # nothing is deferred
    assert choose_threshold(Answers(labels, always, always, confidence)) == 0
    assert choose_threshold(Answers(labels, never, always, confidence)) > 0.99


@pytest.fixture(scope="module")
def pair_of_runs(tmp_path_factory) -> tuple[Path, Path]:
    """A run that learned little and one that learned more, with the same validation rows."""
    folder = tmp_path_factory.mktemp("cascade")
    for name, steps in (("small", "6"), ("large", "24")):
        flags = ["--validation-size", "120", "--max-steps", steps, "--dtype", "fp32", "--eval-every", "0"]
        train_bert.main([*TINY, *flags, "--output-dir", str(folder / name)])
    return folder / "small", folder / "large"


def columns(file: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(file)
    return {name: table[name].to_numpy() for name in table.column_names}


def expected_cascade(small: Path, large: Path, threshold: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes, and which rows the small model answers, from the files alone."""
    of_small, of_large = columns(small / name), columns(large / name)
    confidence = np.stack([of_small[f"probability_{c}"] for c in range(4)]).max(0)
    return np.where(confidence <= threshold, of_large["prediction"], of_small["prediction"]), confidence > threshold


def test_the_report_says_what_a_cascade_brings(pair_of_runs, tmp_path):
    small, large = pair_of_runs
    rows = [
        {"model": f"bert: {run}", "engine": "minicls", "mode": mode, "method": "classify", "status": status}
        | {"requests_per_second": rate, "num_requests": 8, "accuracy": None}
        for run, mode, status, rate in [
            ("small", "offline", "ok", 50.0),
            ("small", "offline", "invalid", 500.0),
            ("small", "single", "ok", 999.0),
            ("large", "offline", "ok", 10.0),
            ("another", "offline", "ok", 2000.0),
        ]
    ]
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    main(["report", "--cascade", str(small), str(large), "--bench", str(tmp_path / "bench.json"), "--out", str(out)])
    body = read_sections(out / "report.md")["Cascade"]
    first, pairs, curve = (read_table(part) for part in body.split("\n\n") if part.startswith("|"))
    threshold = choose_threshold(validation_answers(small, large))
    labels = columns(small / "predictions.parquet")["label"]
    predicted, stays = expected_cascade(small, large, threshold, "predictions.parquet")
    accuracy = {run.name: json.loads((run / "results.json").read_text())["accuracy"] for run in pair_of_runs}
    cells = [row["test accuracy (95 % interval)"].split(" ")[0] for row in first]
    share = 1 - stays.mean()
    random = (1 - share) * accuracy["small"] + share * accuracy["large"]
    expected = [accuracy["small"], accuracy["large"], (predicted == labels).mean(), random]
    assert cells == [f"{value:.4f}" for value in expected]
    assert [row["deferred"] for row in first] == ["0.0%", "100.0%", f"{share:.1%}", f"{share:.1%}"]
    seconds = [row["seconds per 1,000 texts"] for row in first]
    assert seconds == ["20.0", "100.0", *[f"{20 + 100 * share:.1f}"] * 2]
    assert [(row["a"], row["b"]) for row in pairs] == [("both", "small"), ("both", "large")]
    of_small = columns(small / "predictions.parquet")["prediction"]
    assert int(pairs[0]["only a right"]) == ((predicted == labels) & (of_small != labels)).sum()
    wrong = stays & (of_small != labels)
    same = wrong & (of_small == columns(large / "predictions.parquet")["prediction"])
    assert f"Of the {wrong.sum():,} wrong answers that stay" in body and f"gives the same in {same.sum():,}:" in body
    assert [curve[0]["deferred"], curve[-1]["deferred"]] == ["0.0%", "100.0%"]
    assert curve[0]["test accuracy (95 % interval)"].startswith(f"{accuracy['small']:.4f}")
    assert curve[-1]["test accuracy (95 % interval)"].startswith(f"{accuracy['large']:.4f}")
    assert (out / "cascade.png").stat().st_size > 5000


BENCH = {"engine": "minicls", "mode": "offline", "method": "classify", "status": "ok"}
BENCH |= {"num_requests": 8, "accuracy": None}


@pytest.mark.parametrize(
    ("names", "large", "rates", "expected"),
    [
        ("seed42 seed42", ("train_qwen", "options"), {"bert: seed42": 50, "qwen: seed42": 5}, ["20.0", "200.0"]),
        ("seed42 seed42", ("train_qwen", "linear"), {"bert: seed42": 50, "qwen: seed42": 5}, ["20.0", "-"]),
        ("seed42 seed42", ("train_qwen", "linear"), {"qwen-linear: seed42": 5}, ["-", "200.0"]),
        ("seed42 seed42", ("evaluate", "linear"), {"bert: seed42": 50, "qwen-linear: seed42": 5}, ["20.0", "200.0"]),
        ("seed42 seed42", ("train_bert", None), {"bert: seed42": 50}, ["-", "-"]),  # which of the two?
        ("seed42 seed42", ("baseline", None), {"bert: seed42": 50, "qwen-linear: seed42": 5}, ["20.0", "-"]),
        ("bert qwen", ("train_qwen", "options"), {"bert": 50, "qwen": 5}, ["20.0", "200.0"]),
        ("qwen bert", ("train_qwen", "options"), {"bert: qwen": 50, "qwen: bert": 5}, ["20.0", "200.0"]),
        ("qwen bert", ("train_qwen", "options"), {"bert": 50, "qwen": 5}, ["-", "-"]),
    ],
)
def test_a_cascade_takes_the_requests_of_its_own_two_models(names, large, rates, expected, pair_of_runs, tmp_path):
    """bench.py names a model by its flag and the last part of its path, which two runs may have in common."""
    runs = [tmp_path / side / name for side, name in zip(("s", "l"), names.split(), strict=True)]
    for run, copy in zip(pair_of_runs, runs, strict=True):
        thin_run(run, copy)
        thin_predictions(run / "validation.parquet", copy / "validation.parquet", 3, True)
    info = json.loads((runs[1] / "run.json").read_text())
    script, head = large
    model_types = {"train_qwen": "qwen3", "evaluate": "llama", "train_bert": "bert", "baseline": None}
    info |= {"script": script, "model_type": model_types[script]}
    info["settings"] |= {"head": head} if head else {}
    (runs[1] / "run.json").write_text(json.dumps(info))
    rows = [BENCH | {"model": model, "requests_per_second": rate} for model, rate in rates.items()]
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    main(["report", "--cascade", *map(str, runs), "--bench", str(tmp_path / "bench.json"), "--out", str(out)])
    small_alone, large_alone, both, _ = read_table(read_sections(out / "report.md")["Cascade"])
    assert [row["seconds per 1,000 texts"] for row in (small_alone, large_alone)] == expected
    assert (both["seconds per 1,000 texts"] == "-") == ("-" in expected)


def test_thin_runs_give_the_same_section_but_for_rounding(pair_of_runs, tmp_path):
    thin = [tmp_path / run.name for run in pair_of_runs]
    for run, copy in zip(pair_of_runs, thin, strict=True):
        thin_run(run, copy)
        for name in ("validation.parquet", "predictions.parquet"):  # tiny runs' confidences differ by less than 0.01
            thin_predictions(run / name, copy / name, 9, True)
    thresholds = [choose_threshold(validation_answers(*runs)) for runs in (pair_of_runs, thin)]
    assert thresholds[0] == pytest.approx(thresholds[1], abs=1e-6)
    sections = []
    for name, runs in (("whole", pair_of_runs), ("thin", thin)):
        main(["report", "--cascade", *map(str, runs), "--out", str(tmp_path / f"report-{name}")])
        sections.append(read_sections(tmp_path / f"report-{name}" / "report.md")["Cascade"])
    assert sections[0] == sections[1]


@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 1.0])
def test_predict_then_answers_as_the_two_runs_together(threshold, pair_of_runs, tmp_path, capsys):
    small, large = pair_of_runs
    from minicls.data import load_data, split_data

    test = split_data(load_data("synthetic"), max_eval_rows=100).test
    file = tmp_path / "news.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in test.texts))
    flags = [] if threshold is None else ["--threshold", str(threshold)]
    capsys.readouterr()
    main(["predict", str(small), str(file), "--then", str(large), *flags, "--format", "jsonl", "--device", "cpu"])
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    names = [*rows[0]["probabilities"]]
    chosen = choose_threshold(validation_answers(small, large)) if threshold is None else threshold
    predicted, stays = expected_cascade(small, large, chosen, "predictions.parquet")
    assert [names.index(row["label"]) for row in rows] == predicted.tolist()
    probabilities = {run: columns(run / "predictions.parquet") for run in pair_of_runs}
    for i, row in enumerate(rows):
        source = probabilities[small if stays[i] else large]
        expected = [source[f"probability_{c}"][i] for c in range(4)]
        assert [*row["probabilities"].values()] == pytest.approx(expected, abs=1e-6)
    assert f"{(~stays).sum():,} of 100 texts were deferred to" in printed.err


def test_the_large_model_is_asked_about_no_other_texts_than_the_unsure_ones():
    asked = []

    def large(texts: list[str]) -> torch.Tensor:
        asked.append(texts)
        return torch.tensor([[0.1, 0.9]] * len(texts)).log()

    scores = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]).log()
    assert defer(scores, 0.5, ["a", "b", "c"], large) == 0 and asked == []
    assert defer(scores, 0.75, ["a", "b", "c"], large) == 2 and asked == [["b", "c"]]
    assert torch.allclose(scores.exp(), torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.1, 0.9]]))


def test_mistakes(pair_of_runs, bert_run, tmp_path):
    small = str(pair_of_runs[0])
    out = ["--out", str(tmp_path / "out")]
    for argv, part in (
        (["predict", small, "text", "--threshold", "0.5"], "--threshold: 0.5 is for --then"),
        (["predict", small, "text", "--then", small, "--threshold", "60"], "--threshold: 60.0 is too large"),
        (["predict", small, "text", "--then", small, "--threshold", "nan"], "--threshold: nan is not a finite number"),
        (["report", "--cascade", small, small, *out], "is given twice"),
        (["predict", small, "text", "--then", str(tmp_path / "no")], "no such run directory"),
        (["predict", small, "text", "--then", str(bert_run)], "--validation-size, or pass --threshold"),
        (["report", "--cascade", small, str(bert_run), *out], "no validation.parquet; train with --validation-size"),
        (["report", *out], "the following arguments are required: RUN"),
        (["report", "--cascade", small], "--cascade"),
    ):
        with pytest.raises(UserError) as error:
            main(argv)
        assert part in str(error.value) and (argv[0] != "report" or "--threshold" not in str(error.value))
    assert not (tmp_path / "out").exists()
    first, second = Classifier(pair_of_runs[0], "cpu"), Classifier(pair_of_runs[1], "cpu")
    second.label_names = ["x", *second.label_names[1:]]
    with pytest.raises(UserError, match="--then: its classes"):
        Cascade(first, second, 0.5)


def test_other_validation_rows_are_no_pair(pair_of_runs, tmp_path):
    small, large = pair_of_runs
    table = pq.read_table(large / "validation.parquet")
    other = tmp_path / "other"
    other.mkdir()
    rows = pa.array(table["row"].to_numpy() + 1)
    pq.write_table(table.set_column(table.column_names.index("row"), "row", rows), other / "validation.parquet")
    with pytest.raises(UserError, match="other validation rows"):
        validation_answers(small, other)
