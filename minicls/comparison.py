"""Compares finished runs: `python -m minicls report`. docs/report.md explains the report.

A run is a run directory or the part of it that was kept: run.json, results.json, metrics.jsonl and, for comparisons row
by row, predictions.parquet, as written or as results/thin.py reduces it. A table is a list of rows, {header: cell}.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minicls import cascade, metrics, plots
from minicls.checkpoint import Run, new_run_dir, open_run
from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS
from minicls.logger import read_metrics
from minicls.results import (
    absent_classes_note,
    figure,
    interval,
    read_predictions,
    scores_by_class,
    spread,
    steps,
    table,
)

# The published experiment on AG News, one RTX 3090: all steps, the columns of its table, the best on test (step, F1).
PUBLISHED_STEPS = {"BERT": 9375, "Qwen3": 1250}
PUBLISHED = {
    "BERT": {
        "step": (938, 1876, 2814, 3752, 4690, 5628, 6566, 7504, 8442),
        "test loss": (0.1956, 0.1795, 0.1864, 0.1690, 0.1769, 0.1773, 0.1946, 0.1914, 0.1944),
        "accuracy": (0.9347, 0.9383, 0.9367, 0.9455, 0.9454, 0.9457, 0.9428, 0.9441, 0.9442),
        "F1": (0.9348, 0.9384, 0.9367, 0.9456, 0.9454, 0.9456, 0.9428, 0.9441, 0.9442),
    },
    "Qwen3": {
        "step": (250, 500, 750, 1000, 1250),
        "training loss": (0.026, 0.027, 0.022, 0.022, 0.023),
        "accuracy": (0.912, 0.924, 0.937, 0.941, 0.940),
    },
}
PUBLISHED_BEST = {"BERT": (3752, 0.945572), "Qwen3": (1000, 0.941)}
# The fields of results.json that a report needs.
REQUIRED = {
    "accuracy", "f1", "f1_low", "f1_high", "num_test_rows", "per_class", "confusion", "headline_step", "final_step",
    "best_step_on_validation", "best_step_on_test", "best_f1_on_test", "train_seconds", "eval_seconds", "evaluations",
    "calibration_error", "temperature", "calibration_error_scaled", "samples_per_second", "peak_memory_bytes", "device",
}  # fmt: skip
# Settings that do not tell models apart: where a run is written and computed, how often, and on which rows.
BOOKKEEPING = {
    "output_dir", "seed", "data", "max_train_rows", "max_eval_rows", "test_size", "device", "micro_batch_size",
    "eval_every", "save_every", "keep_checkpoints", "log_every", "threads", "compile", "activation_checkpointing",
}  # fmt: skip
# Settings that may depend on the number of training rows, as less data needs more epochs.
SCHEDULE = (
    "epochs", "max_steps", "global_batch_size", "learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm",
    "validation_size", "patience",
)  # fmt: skip
Predictions = dict[str, dict[str, np.ndarray]]  # by run: the columns of predictions.parquet, (n,) each


# Reading runs.


def open_runs(run_dirs: Sequence[Path]) -> dict[str, Run]:
    """Finished runs by their short names. Raises UserError for one that is unfinished or has other classes."""
    run_dirs = [*{path.resolve(): path for path in run_dirs}.values()]  # a run named twice is not two seeds
    runs = {}
    for name, run_dir in zip(short_names(run_dirs), run_dirs, strict=True):
        if absent := [file for file in ("run.json", "results.json") if not (run_dir / file).is_file()]:
            remedy = f"finish it with --resume {run_dir}" if run_dir.is_dir() else "check the path"
            raise UserError(f"{run_dir}: no finished run, as it has no {absent[0]}; {remedy}")
        run = runs[name] = open_run(run_dir)
        results, classes = run.results, [*run.results.get("per_class", ())]
        # A reduced run has only the names of its classes: its predictions give the confusion matrix.
        if classes and "confusion" not in results and (predicted := read_predictions(run_dir / "predictions.parquet")):
            confusion = metrics.confusion_matrix(predicted["label"], predicted["prediction"], len(classes))
            results["confusion"] = confusion.tolist()
        if missing := sorted(REQUIRED - results.keys()):
            remedy = "restore the file or train the run again"
            raise UserError(f"{run_dir / 'results.json'}: no {missing[0]} in it; {remedy}")
        results["per_class"] = scores_by_class(np.array(results["confusion"]), classes)
        first = next(iter(runs.values()))
        if classes != [*first.results["per_class"]]:
            raise UserError(f"{run_dir}: other class names than {first.dir}; give both the same --label-names")
    return runs


def short_names(run_dirs: Sequence[Path]) -> list[str]:
    """The directories' paths relative to the deepest folder that contains them all."""
    paths = [path.absolute() for path in run_dirs]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def same_test_rows(runs: dict[str, Run]) -> bool:
    return len({run.info["data_fingerprint"]["test"] for run in runs.values()}) == 1


def common_predictions(runs: dict[str, Run]) -> Predictions:
    """The predictions that were kept, for the test rows that all runs have, in one order.

    Runs with the same test fingerprint have the same rows. Otherwise the rows of the smallest test set must occur in
    every run's, with the same number in the file, the same text (by its hash) and the same label; UserError if not.
    """
    files = {name: read_predictions(run.dir / "predictions.parquet") for name, run in runs.items()}
    predicted = {name: columns for name, columns in files.items() if columns}
    if same_test_rows(runs):
        return predicted
    for name, run in runs.items():
        if "text_hash" not in predicted.get(name, ()):
            need = "no predictions.parquet with text_hash, which is needed because the runs have different test rows"
            raise UserError(f"{run.dir}: {need}; test them on the same rows")
    fewest = min(predicted, key=lambda name: len(predicted[name]["row"]))
    common = {}
    for name, columns in predicted.items():
        _, index, _ = np.intersect1d(columns["row"], predicted[fewest]["row"], return_indices=True)
        common[name] = {column: values[index] for column, values in columns.items()}
    for name, columns in common.items():
        if any(not np.array_equal(columns[key], common[fewest][key]) for key in ("row", "text_hash", "label")):
            differ = f"{runs[name].dir}: other test rows than {runs[fewest].dir}"
            raise UserError(f"{differ}, so there is nothing to compare; test both on the same rows")
    return common


# Properties of a run.


class Model(NamedTuple):
    """The model that a run trained."""

    family: str  # BERT, Qwen3, decoder (any other) or baseline
    name: str  # that of the model directory, or the baseline's features
    head: str

    def __str__(self) -> str:
        return f"{self.family} ({self.name}), {self.head}"


def describe_model(run: Run) -> Model:
    s, script = run.info["settings"], run.info["script"]
    name = Path(s.get("model") or s["features"]).name
    if script == "baseline":
        return Model("baseline", name, "logistic regression")
    # The oldest runs do not name their type.
    guess = "bert" if script == "train_bert" else "qwen3" * ("qwen3" in name.lower() or name == "tiny")
    model_type = run.info.get("model_type", guess)
    return Model({"bert": "BERT", "qwen3": "Qwen3"}.get(model_type, "decoder"), name, s.get("head", "linear"))


def hardware(run: Run) -> str:
    """The device of the training, and that of the final test if it is another."""
    trained, scored = run.info["device"], run.results["device"]
    return trained if scored == trained else f"{trained}; scored on {scored}"


def validation_f1(run: Run) -> float | None:
    """Macro F1 of the headline step on the validation rows."""
    step = run.results["headline_step"]
    events = (event for event in read_metrics(run.dir) if event.get("split") == "validation")
    return next((event["f1"] for event in events if event["step"] == step), None)


def published_family(run: Run) -> str | None:
    """The published table that a run is compared with; None for a run on other data than AG News."""
    if tuple(run.results["per_class"]) != AG_NEWS_LABELS or run.info["settings"]["data"] == "synthetic":
        return None
    family = describe_model(run).family
    return family if family in PUBLISHED else None


def group_by(items: Iterable, key: Callable) -> dict:
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def comparable(settings: dict, name: str) -> object:
    """A setting's value; None for a flag that is unset, or that a script does not have.

    Soft labels are a file of their own for each seed's sample, so only their presence counts.
    """
    value = settings.get(name)
    value = bool(value) if name == "soft_labels" else value
    return None if value is False else value


def fold(runs: Iterable[Run]) -> list[list[Run]]:
    """Groups the runs of one setting: only seed, directory and the training rows that the seed draws differ."""

    def setting(run: Run) -> str:
        settings = {name: value for name, value in run.info["settings"].items() if name not in ("seed", "output_dir")}
        settings |= {"soft_labels": comparable(settings, "soft_labels")}
        drawn = {"train": run.info["num_train_rows"], "soft_labels": None} if settings.get("max_train_rows") else {}
        return json.dumps([settings, run.info["data_fingerprint"] | drawn], sort_keys=True)

    return [*group_by(runs, setting).values()]


def group_name(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{os.path.commonprefix([*names])}* ({len(names)} runs)"  # noqa: RUF071


def over_seeds(group: Sequence[Run], key: str, digits: int = 4) -> str | None:
    """A figure of results.json, or the mean over the seeds ± standard deviation; None if one of them lacks it."""
    values = [run.results.get(key) for run in group]
    return None if None in values else spread(values, digits)


def f1_with_interval(group: Sequence[Run]) -> str:
    """Macro F1 over the seeds, and the mean of their intervals: more seeds do not add test rows."""
    low, high = (np.mean([run.results[key] for run in group]) for key in ("f1_low", "f1_high"))
    return f"{over_seeds(group, 'f1')} ({low:.4f} to {high:.4f})"


def wilson(accuracy: float, num_rows: int) -> str:
    """Accuracy with Wilson's interval."""
    return interval(accuracy, *metrics.accuracy_interval(accuracy, num_rows))


# Tables.


def runs_table(runs: dict[str, Run]) -> str:
    """The headlines, one line for each setting."""
    rows = []
    for group in fold(runs.values()):
        s, trained = group[0].info["settings"], [run for run in group if run.results["final_step"]]
        reached = dict.fromkeys(f"{run.results['headline_step']} of {run.info['total_steps']}" for run in trained)
        row = {"run": group_name([str(run.dir) for run in group]), "model": s.get("model") or s["features"]}
        row |= {"head": describe_model(group[0]).head, "steps": " ".join(reached) or None}
        row |= {"test rows": f"{group[0].results['num_test_rows']:,}", "accuracy": over_seeds(group, "accuracy")}
        row |= {"constant answer": over_seeds(group, "majority_accuracy")}
        row |= {"macro F1 (95 % interval)": f1_with_interval(group)}
        row |= {"training, s": over_seeds(group, "train_seconds", 0)}
        rows.append(row | {"evaluation, s": over_seeds(group, "eval_seconds", 0)})
    return table(rows)


def about_table(runs: dict[str, Run]) -> str:
    rows = []
    for name, run in runs.items():
        info, s = run.info, run.info["settings"]
        row = {"run": name, "data": s["data"], "training rows": f"{info['num_train_rows']:,}"}
        row |= {"test rows": f"{run.results['num_test_rows']:,}", "dtype": s["dtype"], "seed": s["seed"]}
        rows.append(row | {"hardware": hardware(run)} | {lib: info["versions"][lib] for lib in ("minicls", "torch")})
    return table(rows)


def selection_table(runs: dict[str, Run]) -> str:
    """The headlines, not selected on the test rows; for AG News also the published protocol, the best step on test."""
    families = sorted({published_family(run) for run in runs.values()} - {None})
    rows = []
    for name, run in runs.items():
        results = run.results
        chosen = "last step" if results["best_step_on_validation"] is None else "best on validation"
        chosen = chosen if run.info["total_steps"] else "not trained"
        row = {"run": name, "headline": "C by validation" if run.info["script"] == "baseline" else chosen}
        row |= {"step": results["headline_step"] or None}
        row |= {"accuracy (95 % interval)": wilson(results["accuracy"], results["num_test_rows"])}
        row |= {"constant answer": over_seeds([run], "majority_accuracy")}
        row |= {"macro F1 (95 % interval)": f1_with_interval([run])}
        # The best of several tries on the test rows would mislead where nothing was published, and one is no choice.
        step = results["best_step_on_test"] if published_family(run) and results["evaluations"] > 1 else None
        best = {"best on test: step": step or None, "macro F1": results["best_f1_on_test"] if step else None}
        rows.append(row | (best if families else {}))
    for family in families:
        last = {column: values[-1] for column, values in PUBLISHED[family].items()}
        accuracy = wilson(last["accuracy"], 7600)
        values = f"published {family}", "last of its table", last["step"], accuracy, 0.25, last.get("F1")
        rows.append(dict(zip(rows[0], [*values, *PUBLISHED_BEST[family]], strict=True)))
    return table(rows)


def published_table(run: Run) -> str | None:
    """The published table next to a run's own, joined at equal shares of the training; None without any in common."""
    if (family := published_family(run)) is None:
        return None
    header = [f"published {name}" for name in PUBLISHED[family]]
    theirs = [dict(zip(header, values, strict=True)) for values in zip(*PUBLISHED[family].values(), strict=True)]
    ours, total = steps(run.dir), max(1, run.info["total_steps"])
    left = group_by(theirs, lambda row: round(row["published step"] / PUBLISHED_STEPS[family], 2))
    right = group_by(ours, lambda row: round(row["step"] / total, 2))
    if not left.keys() & right.keys():
        return None
    blank = dict.fromkeys([*theirs[0], *ours[0]])
    return table(
        {"share": f"{share:.2f}"} | blank | published | own
        for share in sorted(left.keys() | right.keys())
        for published, own in itertools.zip_longest(left.get(share, ()), right.get(share, ()), fillvalue={})
    )


def compare_pairs(predicted: Predictions) -> list[dict]:
    """Every two runs, row by row. One is better if McNemar's test and both intervals of a - b agree on it."""
    pairs = []
    for (a, left), (b, right) in itertools.combinations(predicted.items(), 2):
        labels, both = left["label"], (left["prediction"], right["prediction"])
        only_a, only_b, p = metrics.mcnemar(labels, *both)
        differences = metrics.paired_bootstrap(labels, *both).values()
        signs = {np.sign(low) if low * high > 0 else 0 for _, low, high in differences}
        better = {1: a, -1: b}.get(*signs) if p < 0.05 and len(signs) == 1 else None
        accuracy, f1 = (interval(*difference, sign="+") for difference in differences)
        pair = {"a": a, "b": b, "only a right": only_a, "only b right": only_b}
        pair |= {"McNemar's p": f"{p:.2g}" if p else "<1e-300", "accuracy, a - b": accuracy, "macro F1, a - b": f1}
        pairs.append(pair | {"better": better or "neither"})
    return pairs


def verdicts(pairs: list[dict]) -> str:
    """One line per pair, with its outcome."""
    lines = []
    for pair in pairs[:10]:
        difference = f"accuracy differs by {pair['accuracy, a - b']}, McNemar's p " + pair["McNemar's p"]
        lines.append(f"{pair['a']} against {pair['b']}: {pair['better']} is better; {difference}")
    return "\n".join(lines + [f"and {len(pairs) - 10} more pairs, in the report"] * (len(pairs) > 10))


def grid_tables(runs: dict[str, Run]) -> list[str]:
    """For each model that was trained more than once: every setting by every seed, and validation's choice."""
    tables = []
    for model, tried in group_by(runs.values(), describe_model).items():
        if len(tried) < 2:
            continue
        groups = fold(tried)
        settings = [group[0].info["settings"] for group in groups]
        names = dict.fromkeys(name for s in settings for name in s if name not in ("seed", "output_dir"))
        varied = [name for name in names if len({str(comparable(s, name)) for s in settings}) > 1]
        scores = [[validation_f1(run) for run in group] for group in groups]
        means = [None if None in values else float(np.mean(values)) for values in scores]
        best = max(means) if None not in means and len(groups) > 1 else None
        rows = []
        for group, s, values, mean in zip(groups, settings, scores, means, strict=True):
            row = {name: str(comparable(s, name)) for name in varied}
            for seed in sorted({run.info["settings"]["seed"] for run in tried}):
                scored = [pair for pair in zip(group, values, strict=True) if pair[0].info["settings"]["seed"] == seed]
                cells = [f"{figure(value, '.4f') or '-'} / {run.results['f1']:.4f}" for run, value in scored]
                row[f"seed {seed}: validation / test"] = "; ".join(cells) or None
            row |= {"validation": None if mean is None else spread(values), "test": over_seeds(group, "f1")}
            rows.append(row | {"": "chosen" * (mean is not None and mean == best)})
        tables.append(f"{model}:\n\n{table(rows)}")
    return tables


def length_table(predicted: Predictions) -> str | None:
    """Accuracy by length of the text, in tokens of the first run that has them."""
    lengths = next((columns["num_tokens"] for columns in predicted.values() if "num_tokens" in columns), None)
    if lengths is None:
        return None
    exponents = np.ceil(np.log2(np.maximum(lengths, 16))).astype(int)  # k: 2^(k-1) < length <= 2^k; up to 16 together
    rows = []
    for k in np.unique(exponents):
        inside = exponents == k
        row = {"tokens": f"{2 ** (k - 1) + 1 if k > 4 else 0} to {2**k}", "rows": inside.sum()}
        right = {name: (c["label"] == c["prediction"])[inside].mean() for name, c in predicted.items()}
        rows.append(row | {name: wilson(accuracy, inside.sum()) for name, accuracy in right.items()})
    return table(rows)


def per_class_table(runs: dict[str, Run]) -> str:
    """F1 (precision, recall) by class. The index is what pictures show if no font has the characters of the names."""
    rows = []
    for i, name in enumerate(next(iter(runs.values())).results["per_class"]):
        scores = {run: runs[run].results["per_class"][name] for run in runs}
        cells = {run: f"{s['f1']:.4f} ({s['precision']:.4f}, {s['recall']:.4f})" for run, s in scores.items()}
        counts = " / ".join(dict.fromkeys(f"{s['support']:,}" for s in scores.values()))
        rows.append({"": i, "class": name, "test rows": counts} | cells)
    return table(rows)


def confusion_table(run: Run) -> str:
    """True class down, predicted class across; of more than 20 classes, the ten commonest mistakes."""
    names, confusion = [*run.results["per_class"]], np.array(run.results["confusion"])
    if len(names) <= 20:
        rows = zip(names, confusion.tolist(), strict=True)
        return table({"true \\ predicted": name} | dict(zip(names, row, strict=True)) for name, row in rows)
    mistakes = confusion - np.diag(confusion.diagonal())
    pairs = [divmod(cell, len(names)) for cell in np.argsort(-mistakes.flatten(), kind="stable")[:10]]
    return table({"true": names[i], "predicted": names[j], "rows": confusion[i, j]} for i, j in pairs)


def calibration_table(runs: dict[str, Run]) -> str:
    keys = {"calibration error": "calibration_error", "temperature": "temperature"}
    keys["calibration error after scaling"] = "calibration_error_scaled"
    rows = [{"run": name} | {header: run.results[key] for header, key in keys.items()} for name, run in runs.items()]
    return table(rows)


def cost_table(runs: dict[str, Run]) -> str:
    """Training and scoring apart; the ratios are to the first run's times."""
    first, rows = None, []
    for name, run in runs.items():
        results, memory = run.results, run.results["peak_memory_bytes"]
        times = results["train_seconds"], results["eval_seconds"] / results["evaluations"]
        first = first or times
        ratios = [f"{seconds / base:.2f}" if base else None for seconds, base in zip(times, first, strict=True)]
        row = {"run": name, "hardware": hardware(run), "training, s": f"{times[0]:.0f}", "training ratio": ratios[0]}
        row |= {"rows/s": figure(results["samples_per_second"], ".1f"), "evaluations": results["evaluations"]}
        row |= {"s per evaluation": f"{times[1]:.1f}", "evaluation ratio": ratios[1]}
        rows.append(row | {"memory, GiB": memory and f"{memory / 2**30:.1f}"})
    return table(rows)


# Learning curves.


def learning_curves(runs: dict[str, Run]) -> dict[str, dict[int, list[str]]]:
    """The models trained on several numbers of rows: label -> {rows, ascending: names of the runs, one per seed}.

    Runs belong to one model if script, model, head and all settings outside BOOKKEEPING and SCHEDULE agree. A setting
    of SCHEDULE may change with the number of rows; where it differs between runs of the same size (a grid of learning
    rates), it tells models apart as well. A setting that a run lacks counts as unset, like None, 0 and "none". A label
    names the settings that a curve does not share with all others of its model. Untrained models are left out.
    """

    def size(name: str) -> int:
        return runs[name].info["num_train_rows"]

    def values(name: str, settings: Iterable[str]) -> tuple[tuple[str, str], ...]:
        by_name = {setting: comparable(runs[name].info["settings"], setting) for setting in settings}
        return tuple((setting, str(value)) for setting, value in by_name.items() if value and value != "none")

    def recipe(name: str) -> tuple:
        settings = runs[name].info["settings"].keys() - {*BOOKKEEPING, *SCHEDULE, "model", "features"}
        return describe_model(runs[name]), *values(name, sorted(settings))

    trained = [name for name, run in runs.items() if run.info["total_steps"] or run.info["script"] == "baseline"]
    models = {}  # (model, *settings) -> its curve
    for key, names in group_by(trained, recipe).items():
        same_size = group_by(names, size).values()
        differs = [s for s in SCHEDULE if any(len({values(name, [s]) for name in group}) > 1 for group in same_size)]
        for schedule, members in group_by(names, lambda name, differs=differs: values(name, differs)).items():
            if len(sizes := group_by(members, size)) > 1:
                models[*key, *schedule] = dict(sorted(sizes.items()))
    curves = {}
    for (model, *settings), sizes in models.items():
        related = [other[1:] for other in models if other[0] == model]
        differing = [" ".join(setting) for setting in settings if not all(setting in other for other in related)]
        curves[", ".join([str(model), *differing])] = sizes
    return curves


def curve_section(runs: dict[str, Run], predicted: Predictions) -> tuple[str | None, dict[str, dict[int, tuple]]]:
    """Tables of the learning curves and of their crossings, and the curves to draw.

    Those are label -> {training rows: (mean accuracy, low, high, number of seeds)}, with 95 % intervals.
    """
    curves = learning_curves({name: run for name, run in runs.items() if name in predicted})
    if not curves:
        return None, {}
    groups = {(label, size): names for label, sizes in curves.items() for size, names in sizes.items()}
    right = {name: columns["label"] == columns["prediction"] for name, columns in predicted.items()}
    means, replicates = metrics.resampled_accuracies([[right[name] for name in names] for names in groups.values()])
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    points, rows, crossings = {label: {} for label in curves}, [], []
    for (label, size), names, *accuracy in zip(groups, groups.values(), means, low, high, strict=True):
        points[label][size] = *accuracy, len(names)
        row = {"model": label, "training rows": f"{size:,}", "test rows": f"{len(right[names[0]]):,}"}
        row |= {"seeds": len(names), "accuracy (95 % interval)": interval(*accuracy)}
        rows.append(row | {"the interval covers": "test rows only" if len(names) == 1 else "seeds and test rows"})
    for a, b in itertools.combinations(curves, 2):
        shared = sorted(curves[a].keys() & curves[b].keys())
        if len(shared) > 1:
            at_a, at_b = ([[*groups].index((label, size)) for size in shared] for label in (a, b))
            cross = metrics.crossing(shared, means[at_a] - means[at_b], replicates[:, at_a] - replicates[:, at_b])
            crossings.append(_crossing_row(cross, shared, a, b))
    return "\n\n".join(map(table, filter(None, [rows, crossings]))), points


def _crossing_row(cross: dict, sizes: Sequence[int], a: str, b: str) -> dict:
    ahead = {1: f"{a} is ahead", -1: f"{b} is ahead", 0: "neither is ahead"}[cross["later"]]
    where = f"nowhere: {ahead} from {sizes[0]:,} to {sizes[-1]:,}"
    if cross["rows"] is not None:
        where = f"{cross['rows']:,.0f}; from there on {ahead}"
    low, high = cross["low"], cross["high"]
    beyond = {-math.inf: f"below {sizes[0]:,}", math.inf: f"above {sizes[-1]:,}"}
    bounds = " to ".join(f"open {beyond[end]}" if end in beyond else f"{end:,.0f}" for end in (low, high))
    if low == high and low in beyond:  # few replicates cross, and all on one side
        bounds = f"all {beyond[low]}"
    row = {"a": a, "b": b, "sizes that both have": ", ".join(f"{size:,}" for size in sizes)}
    row |= {"they cross at, rows": where, "95 % interval": "-" if math.isnan(low) else bounds}
    return row | {"replicates without a crossing": f"{cross['without']:.1%}"}


# A cascade of two runs.


class CascadeOfRuns(NamedTuple):
    """Two runs' answers for their validation rows, by which the threshold was chosen, and for their test rows."""

    validation: cascade.Answers
    test: cascade.Answers
    threshold: float

    @property
    def deferred(self) -> float:
        """The share of the test rows that the large model answers."""
        return self.test.share_deferred(self.threshold)

    def pairs(self) -> list[dict]:
        """The cascade against each model alone."""
        answers = {"both": self.test.cascade(self.threshold), "small": self.test.small, "large": self.test.large}
        labels = {"label": self.test.labels}
        return compare_pairs({name: labels | {"prediction": classes} for name, classes in answers.items()})[:2]

    def kept_errors(self) -> tuple[int, int]:
        """The number of wrong answers that stay with the small model, and of those that the large one gives as well."""
        stay = (self.test.small != self.test.labels) & (self.test.confidence > self.threshold)
        return stay.sum(), (stay & (self.test.small == self.test.large)).sum()

    def curve(self) -> list[tuple[float, float, float, float]]:
        """(share of texts deferred, accuracy, low, high), from nothing deferred to everything."""
        quantiles = 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7
        thresholds = np.quantile(self.validation.confidence, quantiles, method="lower")
        points = [(self.test.share_deferred(at), self.test.accuracy(at)) for at in (0, *dict.fromkeys(thresholds), 1)]
        return [(*point, *metrics.accuracy_interval(point[1], len(self.test.labels))) for point in points]


def cascade_of_runs(small: Run, large: Run) -> CascadeOfRuns:
    """Chooses the threshold on the validation rows. Raises UserError unless both have the same rows."""
    validation = cascade.validation_answers(small.dir, large.dir, hint="")
    predicted = common_predictions({"small": small, "large": large})
    if len(predicted) < 2:
        raise UserError(f"--cascade: {small.dir} and {large.dir} need a predictions.parquet each; evaluate them again")
    return CascadeOfRuns(validation, cascade.pair(**predicted), cascade.choose_threshold(validation))


def cascade_section(pair: dict[str, Run], both: CascadeOfRuns, bench: Sequence[dict], out: Path) -> str:
    """Tables of a cascade of the small and the large run; writes cascade.png into the directory `out`."""
    (small, large), test, curve = pair, both.test, both.curve()
    names = [_bench_name(run) for run in pair.values()]  # rows with a name of both may be either's
    seconds = [_seconds_per_text(name, bench) if names.count(name) == 1 else None for name in names]
    seconds.append(None if None in seconds else seconds[0] + both.deferred * seconds[1])
    # A threshold of 0 defers nothing, and 1 everything: the models alone.
    answers = {f"small: {small}": 0, f"large: {large}": 1, f"both, threshold {both.threshold:.3f}": both.threshold}
    rows, points = [], []
    for (name, threshold), per_text in zip(answers.items(), seconds, strict=True):
        row = {"answers": name, "deferred": f"{test.share_deferred(threshold):.1%}"}
        row |= {"validation accuracy": both.validation.accuracy(threshold)}
        row |= {"test accuracy (95 % interval)": wilson(test.accuracy(threshold), len(test.labels))}
        rows.append(row | {"seconds per 1,000 texts": per_text and f"{1000 * per_text:.1f}"})
    rows.append(rows[-1] | {"answers": "both, as many deferred at random", "validation accuracy": None})
    rows[-1]["test accuracy (95 % interval)"] = f"{test.at_random(both.deferred):.4f} (expected)"
    stay, same = both.kept_errors()
    note = f"Of the {stay:,} wrong answers that stay with the small model, the large one gives the same in {same:,}"
    for deferred, *accuracy in curve:
        point = {"deferred": f"{deferred:.1%}", "test accuracy (95 % interval)": interval(*accuracy)}
        points.append(point | {"at random (expected)": test.at_random(deferred)})
    plots.plot_deferral(curve, both.deferred, out / "cascade.png")
    picture = "![accuracy by share of texts deferred](cascade.png)"
    parts = table(rows), table(both.pairs()), f"{note}: no threshold repairs these.", table(points), picture
    return "\n\n".join(parts)


def _bench_name(run: Run) -> str:
    """The name that bench.py gives the run's model: its flag and its directory, or one if they are equal."""
    model, name = describe_model(run), run.dir.name
    flag = "bert" if model.family == "BERT" else {"options": "qwen", "linear": "qwen-linear"}.get(model.head)
    return name if name == flag else f"{flag}: {name}"


def _seconds_per_text(model: str, bench: Sequence[dict]) -> float | None:
    """Seconds per text in bench.py's fastest valid offline row of minicls for a model; None without one."""
    wanted = model, "minicls", "offline", "ok"
    rows = [row for row in bench if (row["model"], row["engine"], row["mode"], row["status"]) == wanted]
    return 1 / max(row["requests_per_second"] for row in rows) if rows else None


# The report.


def read_bench(file: Path) -> list[dict]:
    """The rows of a bench.json."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        needed = ("model", "engine", "method", "mode", "status", "requests_per_second", "num_requests", "accuracy")
        _ = [row[key] for row in rows for key in needed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--bench: {file} is no result of bench.py ({error}); pass its bench.json") from None
    return rows


def bench_table(rows: Sequence[dict]) -> str:
    """Markdown of the rows of a bench.json, without the columns in which no row has a value."""
    lines = []
    for row in rows:
        latencies = [row.get(f"latency_p{percentile}_ms") for percentile in (50, 90, 99)]
        latencies = [figure(ms, ",.0f" if ms >= 100 else ".1f") for ms in latencies if ms is not None]
        memory = row.get("peak_memory_bytes")
        line = {"model": row["model"], "engine": f"{row['engine']} {row.get('engine_version') or ''}".strip()}
        line |= {"method": row["method"], "mode": row["mode"], "dtype": row.get("dtype")}
        line |= {"hardware": row.get("device"), "requests/s": figure(row["requests_per_second"], ".2f")}
        line |= {"latency p50 / p90 / p99, ms": " / ".join(latencies) or None}
        line |= {"in time": figure(row.get("slo_attainment"), ".1%")}
        line |= {"tokens/s": figure(row.get("input_tokens_per_second"), ",.0f")}
        line |= {"peak GiB": figure(memory and memory / 2**30, ".2f"), "requests": row["num_requests"]}
        line |= {"accuracy": row["accuracy"], "agreement": row.get("agreement")}
        line |= {"changed answers": row.get("changed_answers")}
        status = f"{row['status']}: {row['reason']}" if row.get("reason") else row["status"]
        lines.append(line | {"status": status})
    return table(lines, empty_columns=False)


def write_report(
    runs: dict[str, Run], bench: Sequence[dict], out: Path | None, small_and_large: Sequence[str] | None = None
) -> str:
    """Writes report.md and its pictures into a new or empty directory; returns a summary to print.

    out: the directory, by default runs/report-<time>; small_and_large: names of two runs to join in a cascade.
    """

    def by_run(bodies: dict[str, str | None]) -> str:
        return "\n\n".join(f"### {name}\n\n{body}" for name, body in bodies.items() if body)

    parts = ["# Report"]

    def add(title: str, body: str | None, *notes: str | None) -> None:
        """A section, with a sentence or more under its title; docs/report.md has more."""
        if body:
            parts.extend(filter(None, [f"## {title}", " ".join(filter(None, notes)), body]))

    # Runs that cannot be compared are refused before anything is written.
    predicted = common_predictions(runs)
    pair = {name: runs[name] for name in small_and_large or ()}
    both = cascade_of_runs(*pair.values()) if pair else None
    out = new_run_dir(out, "report", "--out")
    fewest = min((len(columns["row"]) for columns in predicted.values()), default=0)
    common = f"comparisons use the {fewest:,} rows that all have."
    rows_note = None if same_test_rows(runs) else f"The runs have different parts of the same test rows; {common}"

    headlines, pairs = runs_table(runs), compare_pairs(predicted)
    alone = "A single run. `python -m minicls baseline` with the same --data makes one to compare with in seconds."
    none = "No two of these runs have a predictions.parquet to compare."
    compared = table(pairs) or (alone if len(runs) == 1 else none)
    absent = [f"{name}: {note}." for name, run in runs.items() if (note := absent_classes_note(run.results))]
    seeds = "Test scores, one line for each setting; seeds as mean ± standard deviation."
    add("Headlines", headlines, seeds, *absent)
    add("What was run", about_table(runs))
    unselected = "Headlines are not selected on the test rows; the best step on test is."
    add("How the step was chosen", selection_table(runs), unselected)
    published = by_run({name: published_table(run) for name, run in runs.items()})
    add("Against the published tables", published, "A line joins the steps at the same share of the training.")
    by_chance = f"If all {len(pairs)} pairs were equal, about one in twenty would still look different by chance."
    left_out = ", ".join(name for name in runs if name not in predicted)
    add(
        "Pairwise comparison",
        compared,
        "Paired on the same test rows; a run is called better where the test and both intervals agree.",
        by_chance * (len(pairs) > 5),
        rows_note,
        left_out and f"Left out, without predictions.parquet: {left_out}.",
    )
    choice = "Macro F1 on the validation rows and on the test rows; validation chooses."
    add("Settings and seeds", "\n\n".join(grid_tables(runs)), choice)
    curves, points = curve_section(runs, predicted)
    if points:
        plots.plot_learning_curves(points, out / "rows.png")
        curves += "\n\n![accuracy over training rows](rows.png)"
    add("Training rows", curves, "Mean accuracy over the seeds, all on the same test rows.", rows_note)
    deferral = "The small model answers, and defers to the large one where it is unsure."
    add("Cascade", both and cascade_section(pair, both, bench, out), deferral)
    add("Length", length_table(predicted), "Accuracy by length of the untruncated text, with 95 % intervals.")
    add("Classes", per_class_table(runs), "F1 (precision, recall).")
    confusions = by_run({name: confusion_table(run) for name, run in runs.items()})
    add("Confusion", confusions, "True class down, predicted class across.")
    pictures = [(name, run.dir / "curves.png") for name, run in runs.items() if (run.dir / "curves.png").is_file()]
    images = {}
    for i, (name, picture) in enumerate(pictures, start=1):
        shutil.copyfile(picture, out / f"curves-{i}.png")
        images[name] = f"![loss and scores over steps](curves-{i}.png)"
    add("Curves", by_run(images), "Loss and scores over the steps.")
    scaling = "Expected calibration error over 15 bins, before and after scaling by the temperature."
    add("Calibration", calibration_table(runs), scaling)
    add("Cost", cost_table(runs), "Compare times only on the same, otherwise idle hardware.")
    if bench:
        plots.plot_requests(bench, out / "deploy.png")
        deploy = f"{bench_table(bench)}\n\n![accuracy and requests per second](deploy.png)"
        requests = "Accuracy with its 95 % interval (Wilson) and requests per second, on the same requests."
        add("Which one to deploy", deploy, requests)
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return "\n".join(filter(None, [headlines, rows_note, verdicts(pairs) or compared, f"report: {out / 'report.md'}"]))
