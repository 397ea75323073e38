"""Finished runs side by side: `python -m minicls report`.

A run is a run directory or what is kept of one: run.json, results.json, metrics.jsonl and, for comparisons row by row,
predictions.parquet. A table is a function from runs, by their names, to Markdown.
"""

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minicls import metrics, plots
from minicls.checkpoint import Run, open_run
from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS
from minicls.logger import read_metrics
from minicls.results import (
    absent_line,
    f1_with_interval,
    fold,
    folded,
    interval,
    kind,
    markdown,
    script,
    short_names,
    spread,
    steps,
)

# The published experiment on AG News, one RTX 3090: steps of the whole run, columns of its table, best on test (step, F1).
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


NEEDED = {
    "accuracy",
    "f1",
    "f1_low",
    "f1_high",
    "num_test_rows",
    "per_class",
    "confusion",
    "headline_step",
    "final_step",
    "device",
}
NEEDED |= {"best_step_on_validation", "best_step_on_test", "best_f1_on_test", "train_seconds", "eval_seconds"}
NEEDED |= {"samples_per_second", "peak_memory_bytes"}


def open_runs(run_dirs: Sequence[Path]) -> dict[str, Run]:
    """Finished runs by their short names. Raises UserError where one is not, or has other classes than the first."""
    run_dirs = [*{path.resolve(): path for path in run_dirs}.values()]  # named twice, it is not two seeds
    runs = {}
    for name, run_dir in zip(short_names(run_dirs), run_dirs, strict=True):
        try:
            run = runs[name] = open_run(run_dir)
        except (OSError, ValueError) as error:
            raise UserError(f"{run_dir}: no finished run ({error}); train it to the end first") from None
        if run.results is None:
            raise UserError(f"{run_dir}: no finished run (no results.json); train it to the end first")
        if missing := sorted(NEEDED - run.results.keys()):
            raise UserError(
                f"{run_dir / 'results.json'}: no {missing[0]} in it; restore the file or train the run again"
            )
        first = next(iter(runs.values()))
        if [*run.results["per_class"]] != [*first.results["per_class"]]:
            raise UserError(f"{run_dir}: other class names than {first.dir}; give both the same --label-names")
    return runs


def predictions(run: Run) -> dict[str, np.ndarray] | None:
    """The columns of predictions.parquet that hold values, (n,) each; None where the file was not kept."""
    import pyarrow.parquet as pq

    file = run.dir / "predictions.parquet"
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not a readable parquet file ({error}); run --eval-only --resume {run.dir} again"
        ) from None
    return {name: table[name].to_numpy() for name in table.column_names if not table[name].null_count}


def common_predictions(runs: dict[str, Run]) -> dict[str, dict[str, np.ndarray]]:
    """The columns of each predictions.parquet that was kept, for the test rows that all runs have, in one order.

    Runs of one test fingerprint have the same rows. Of others, the fewest rows must be among those of every run: each
    with the same number in the file, the same text (by its hash) and the same label. Raises UserError where they are
    not: other data.
    """
    found = {name: columns for name, run in runs.items() if (columns := predictions(run))}
    first, *others = runs.values()
    tests = {name: run.info["data_fingerprint"]["test"] for name, run in runs.items()}
    for run in others if len({*tests.values()}) > 1 else ():
        if run.info["data_fingerprint"]["test"] != first.info["data_fingerprint"]["test"]:
            other = f"{run.dir}: other test rows than {first.dir}"
            break
    else:
        return found
    if any("text_hash" not in found.get(name, ()) for name in runs):
        raise UserError(
            f"{other}, and not every predictions.parquet has text_hash to tell which are the same; test both on the same"
        )
    keys = {
        name: [*zip(columns["row"].tolist(), columns["text_hash"].tolist(), strict=True)]
        for name, columns in found.items()
    }
    fewest = min(keys, key=lambda name: len(keys[name]))
    common = {}
    for name, columns in found.items():
        place = {key: i for i, key in enumerate(keys[name])}
        at = [place.get(key, -1) for key in keys[fewest]]
        if -1 in at or (columns["label"][at] != found[fewest]["label"]).any():
            raise UserError(
                f"{runs[name].dir}: other test rows than {runs[fewest].dir}, so there is nothing to compare; test both on the same"
            )
        common[name] = {column: values[at] for column, values in columns.items()}
    return common


def common_note(runs: dict[str, Run], found: dict[str, dict[str, np.ndarray]]) -> str | None:
    """Says that the runs do not have the same test rows, and how many all have; None where they are the same."""
    if len({run.info["data_fingerprint"]["test"] for run in runs.values()}) == 1:
        return None
    number = len(next(iter(found.values()))["label"])
    return (
        "The runs have different parts of the same test rows: row by row and over training rows, "
        f"the {number:,} that all have count."
    )


def hardware(run: Run) -> str:
    """Where a run was trained, and where it was scored if that is another place."""
    trained, scored = run.info["device"], run.results["device"]
    return trained if scored == trained else f"{trained}; scored on {scored}"


def validation_f1(run: Run) -> float | None:
    """Macro F1 of the headline step on the validation rows."""
    step = run.results["headline_step"]
    found = [e["f1"] for e in read_metrics(run.dir) if e.get("split") == "validation" and e["step"] == step]
    return found[0] if found else None


def published_kind(run: Run) -> str | None:
    """Which published table a run is set against; None where it was not on AG News."""
    if tuple(run.results["per_class"]) != AG_NEWS_LABELS or run.info["settings"]["data"] == "synthetic":
        return None
    return kind(run)[0] if kind(run)[0] in PUBLISHED else None


def published_table(run: Run) -> str | None:
    """The published table next to a run's own, line by line where the same share of the training is done; None if
    nowhere."""
    if (published := published_kind(run)) is None:
        return None
    columns, (header, ours) = PUBLISHED[published], steps(run.dir)
    theirs = [(values[0], values) for values in zip(*columns.values(), strict=True)]
    shares: dict[float, tuple[list, list]] = {}
    for side, (total, lines) in enumerate([(PUBLISHED_STEPS[published], theirs), (run.info["total_steps"], ours)]):
        for step, values in lines:
            shares.setdefault(round(step / max(1, total), 2), ([], []))[side].append(values)
    if not any(all(sides) for sides in shares.values()):
        return None
    empty = [None] * len(columns), [None] * len(header)
    rows = [
        [f"{share:.2f}", *(left or empty[0]), *(right or empty[1])]
        for share, sides in sorted(shares.items())
        for left, right in itertools.zip_longest(*sides)
    ]
    return markdown(["share", *(f"published {name}" for name in columns), *header], rows)


def confusion_table(run: Run) -> str:
    """True class down, predicted class across; of more than 20 classes, the ten commonest mistakes."""
    names, confusion = [*run.results["per_class"]], np.array(run.results["confusion"])
    if len(names) <= 20:
        return markdown(
            ["true \\ predicted", *names], [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
        )
    mistakes = confusion - np.diag(confusion.diagonal())
    pairs = [divmod(cell, len(names)) for cell in np.argsort(-mistakes.flatten(), kind="stable")[:10]]
    return markdown(["true", "predicted", "rows"], [[names[i], names[j], confusion[i, j]] for i, j in pairs])


def runs_table(runs: dict[str, Run]) -> str:
    """The headlines, a line for each run, the seeds of a setting folded into one."""
    header = ["run", "model", "head", "steps", "test rows", "accuracy", "constant answer", "macro F1 (95 % interval)"]
    header += ["training, s", "evaluation, s"]
    rows = []
    for group in fold(runs.values()):
        name, accuracy, f1 = folded(group, [str(run.dir) for run in group])
        reached = " ".join(
            dict.fromkeys(
                f"{run.results['headline_step']} of {run.results['final_step']}"
                for run in group
                if run.results["final_step"]
            )
        )
        seconds = [spread([run.results[f"{what}_seconds"] for run in group], 0) for what in ("train", "eval")]
        s, head = group[0].info["settings"], kind(group[0])[2]
        scores = [f"{group[0].results['num_test_rows']:,}", accuracy, constant_answer(group), f1]
        rows.append([name, s.get("model") or s["features"], head, reached or None, *scores, *seconds])
    return markdown(header, rows)


def constant_answer(group: Sequence[Run]) -> str | None:
    """Accuracy of always answering the class with most training rows; None where the results are from before it was
    kept."""
    values = [run.results.get("majority_accuracy") for run in group]
    return None if None in values else spread(values)


def about_table(runs: dict[str, Run]) -> str:
    header = ["run", "data", "training rows", "test rows", "dtype", "seed", "hardware", "minicls", "torch"]
    rows = []
    for name, run in runs.items():
        s, versions = run.info["settings"], run.info["versions"]
        counts = f"{run.info['num_train_rows']:,}", f"{run.results['num_test_rows']:,}"
        rows.append(
            [name, s["data"], *counts, s["dtype"], s["seed"], hardware(run), versions["minicls"], versions["torch"]]
        )
    return markdown(header, rows)


def best_on_test(run: Run) -> tuple[int, float] | None:
    """Step and macro F1 of the published protocol, for runs that are set against a published table; None for any other,
    where the best of several tries on the test rows would only mislead, and where there was no choice."""
    several = run.results.get("evaluations", 2) > 1 and run.results["best_step_on_test"]
    return (
        (run.results["best_step_on_test"], run.results["best_f1_on_test"]) if several and published_kind(run) else None
    )


def selection_table(runs: dict[str, Run]) -> str:
    """What no look at the test rows has chosen; for AG News also the published protocol, the best of the steps on the
    test rows."""
    header = ["run", "headline", "step", "accuracy (95 % interval)", "constant answer", "macro F1 (95 % interval)"]
    rows, published = [], set()
    for name, run in runs.items():
        found = run.results
        chosen = "last step" if found["best_step_on_validation"] is None else "best on validation"
        chosen = (
            "C by validation" if script(run) == "baseline" else chosen if run.info["total_steps"] else "not trained"
        )
        accuracy = interval(found["accuracy"], *metrics.accuracy_interval(found["accuracy"], found["num_test_rows"]))
        best = best_on_test(run) or (None, None)
        rows.append(
            [
                name,
                chosen,
                found["headline_step"] or None,
                accuracy,
                constant_answer([run]),
                f1_with_interval(found),
                *best,
            ]
        )
        published |= {published_kind(run)} - {None}
    for name in sorted(published):
        last = {column: values[-1] for column, values in PUBLISHED[name].items()}
        accuracy = interval(last["accuracy"], *metrics.accuracy_interval(last["accuracy"], 7600))
        rows.append(
            [
                f"published {name}",
                "last of its table",
                last["step"],
                accuracy,
                0.25,
                last.get("F1"),
                *PUBLISHED_BEST[name],
            ]
        )
    if published:
        return markdown([*header, "best on test: step", "macro F1"], rows)
    return markdown(header, [row[:-2] for row in rows])


def compare_pairs(runs: dict[str, Run], found: dict[str, dict[str, np.ndarray]]) -> list[dict]:
    """Every two runs, row by row. One is better where McNemar's test and both intervals of a - b agree on it."""
    pairs = []
    for (a, left), (b, right) in itertools.combinations(found.items(), 2):
        labels, both = left["label"], (left["prediction"], right["prediction"])
        only_a, only_b, p = metrics.mcnemar(labels, *both)
        differences = metrics.paired_bootstrap(labels, *both, len(runs[a].results["per_class"])).values()
        signs = {np.sign(low) if low * high > 0 else 0 for _, low, high in differences}
        better = {1: a, -1: b}.get(*signs) if p < 0.05 and len(signs) == 1 else None
        accuracy, f1 = (f"{value:+.4f} ({low:+.4f} to {high:+.4f})" for value, low, high in differences)
        p_value = f"{p:.2g}" if p else "<1e-300"
        pairs.append(
            {"a": a, "b": b, "only": (only_a, only_b), "p": p_value, "accuracy": accuracy, "f1": f1, "better": better}
        )
    return pairs


def comparison_table(pairs: list[dict], num_runs: int) -> str:
    header = ["a", "b", "only a right", "only b right", "McNemar's p", "accuracy, a - b", "macro F1, a - b", "better"]
    rows = [[o["a"], o["b"], *o["only"], o["p"], o["accuracy"], o["f1"], o["better"] or "neither"] for o in pairs]
    if rows:
        return markdown(header, rows)
    if num_runs == 1:
        return "One run alone. Name another one, too: `python -m minicls baseline` with the same --data makes one in seconds."
    return "No two of these runs have a predictions.parquet to compare."


def verdicts(pairs: list[dict]) -> str:
    """What came out, a line for each pair."""
    lines = [
        f"{o['a']} against {o['b']}: {o['better'] or 'neither'} is better; accuracy differs by {o['accuracy']}, McNemar's p {o['p']}"
        for o in pairs
    ]
    return "\n".join(lines[:10] + [f"and {len(lines) - 10} more pairs, in the report"] * (len(lines) > 10))


def per_class_table(runs: dict[str, Run]) -> str:
    """The classes by their indices, which pictures without a font for the names show; test rows of each, as the runs
    have them."""
    classes = next(iter(runs.values())).results["per_class"]
    support = [np.sum(run.results["confusion"], axis=1) for run in runs.values()]
    rows = []
    for i, name in enumerate(classes):
        scores = [run.results["per_class"][name] for run in runs.values()]
        cells = [f"{one['f1']:.4f} ({one['precision']:.4f}, {one['recall']:.4f})" for one in scores]
        rows.append([i, name, " / ".join(dict.fromkeys(f"{rows_of[i]:,}" for rows_of in support)), *cells])
    return markdown(["", "class", "test rows", *runs], rows)


def calibration_table(runs: dict[str, Run]) -> str:
    keys = ("calibration_error", "temperature", "calibration_error_scaled")
    header = ["run", "calibration error", "temperature", "calibration error at it"]
    return markdown(header, [[name, *(run.results.get(key) for key in keys)] for name, run in runs.items()])


def cost_table(runs: dict[str, Run]) -> str:
    """Training and scoring apart; the ratios are to the first run's times."""
    header = ["run", "hardware", "training, s", "ratio", "rows/s", "evaluations", "s each", "ratio", "memory, GiB"]
    rows, first = [], None
    for name, run in runs.items():
        found = run.results
        evaluations = found.get("evaluations")
        each = found["eval_seconds"] / evaluations if evaluations else None
        first = first or (found["train_seconds"], each)
        ratios = [
            f"{value / base:.2f}" if value is not None and base else None
            for value, base in zip((found["train_seconds"], each), first, strict=True)
        ]
        rate, memory = found["samples_per_second"], found["peak_memory_bytes"]
        rows.append(
            [name, hardware(run), f"{found['train_seconds']:.0f}", ratios[0], rate and f"{rate:.1f}", evaluations]
        )
        rows[-1] += [each and f"{each:.1f}", ratios[1], memory and f"{memory / 2**30:.1f}"]
    return markdown(header, rows)


def _label(kind: tuple[str, str, str]) -> str:
    return "{} ({}), {}".format(*kind)


def grid_tables(runs: dict[str, Run]) -> list[str]:
    """For each model and head that was tried more than once: every setting by every seed, and what validation
    chooses."""
    tables = []
    for tried in dict.fromkeys(map(kind, runs.values())):
        groups = fold(run for run in runs.values() if kind(run) == tried)
        if sum(map(len, groups)) < 2:
            continue
        settings = [group[0].info["settings"] for group in groups]
        names = (name for name in settings[0] if name not in ("seed", "output_dir"))
        varied = [name for name in names if len({str(s.get(name)) for s in settings}) > 1]
        seeds = sorted({run.info["settings"]["seed"] for group in groups for run in group})
        scores = [[validation_f1(run) for run in group] for group in groups]
        means = [None if None in values else float(np.mean(values)) for values in scores]
        chosen = max(means) if None not in means and len(groups) > 1 else None
        rows = []
        for group, s, values, mean in zip(groups, settings, scores, means, strict=True):
            cells = {seed: [] for seed in seeds}
            for run, value in zip(group, values, strict=True):
                cells[run.info["settings"]["seed"]].append(
                    f"{'-' if value is None else f'{value:.4f}'} / {run.results['f1']:.4f}"
                )
            row = [str(s.get(name)) for name in varied] + ["; ".join(cell) or None for cell in cells.values()]
            row += [None if mean is None else spread(values), spread([run.results["f1"] for run in group])]
            rows.append([*row, "chosen" if mean is not None and mean == chosen else ""])
        header = [*varied, *(f"seed {seed}: validation / test" for seed in seeds), "validation", "test", ""]
        tables.append(f"{_label(tried)}:\n\n{markdown(header, rows)}")
    return tables


def length_table(found: dict[str, dict[str, np.ndarray]]) -> str | None:
    """Accuracy by length of the text; all runs in the buckets of the first, whose tokens are counted."""
    lengths = next((columns["num_tokens"] for columns in found.values() if "num_tokens" in columns), None)
    if lengths is None:
        return None
    buckets = np.ceil(np.log2(np.maximum(lengths, 16))).astype(int)  # (2^(k-1), 2^k]; all up to 16 together
    rows = []
    for k in np.unique(buckets):
        inside = buckets == k
        right = [(columns["label"] == columns["prediction"])[inside].mean() for columns in found.values()]
        cells = [interval(accuracy, *metrics.accuracy_interval(accuracy, inside.sum())) for accuracy in right]
        rows.append([f"{2 ** (k - 1) + 1 if k > 4 else 0} to {2**k}", inside.sum(), *cells])
    return markdown(["tokens", "rows", *found], rows)


# Settings that never make another model of a run: where and when it is written down, where it runs, which rows there are.
ASIDE = (
    "output_dir",
    "seed",
    "resume",
    "eval_only",
    "data",
    "max_train_rows",
    "max_eval_rows",
    "test_size",
    "micro_batch_size",
)
ASIDE += (
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "device",
    "threads",
    "compile",
    "activation_checkpointing",
)
# Settings that may go with the number of training rows, as smaller data wants more epochs.
SCHEDULE = (
    "epochs",
    "max_steps",
    "global_batch_size",
    "learning_rate",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
)
SCHEDULE += ("validation_size", "patience")


@dataclass(frozen=True)
class Curve:
    """Accuracy over training rows: of each number of rows, ascending, the runs by their names, which differ in their
    seeds."""

    label: str
    sizes: dict[int, list[str]]


def learning_curves(runs: dict[str, Run]) -> list[Curve]:
    """The models that were trained on several numbers of rows.

    Runs are of one model where script, model, head and all settings agree but these: the seed, the rows, the machine,
    how often something is written (ASIDE), and the schedule (SCHEDULE), which may go with the number of rows. Where
    runs of the same number of rows differ in a setting of the schedule, a grid of learning rates for one, that setting
    tells models apart, too. A setting that an older run does not have counts as not set, like None, 0 or "none". A
    label names what its curve does not share with another of the same kind. Models that were only evaluated have no
    curve.
    """

    def settings(run: Run, names: Sequence[str]) -> dict[str, str]:
        values = {name: run.info["settings"].get(name) for name in names}
        return {name: str(value) for name, value in values.items() if value and value != "none"}

    recipes: dict[tuple, list[str]] = {}
    for name, run in runs.items():
        if run.info["settings"].get("eval_only") or (run.info["total_steps"] == 0 and script(run) != "baseline"):
            continue
        others = sorted(run.info["settings"].keys() - {*ASIDE, *SCHEDULE, "model", "features"})
        recipes.setdefault((kind(run), *settings(run, others).items()), []).append(name)
    models: dict[tuple, dict[int, list[str]]] = {}
    for recipe, names in recipes.items():
        of_size: dict[int, list[Run]] = {}
        for name in names:
            of_size.setdefault(runs[name].info["num_train_rows"], []).append(runs[name])
        apart = [
            s
            for s in SCHEDULE
            if any(len({str(settings(run, [s])) for run in group}) > 1 for group in of_size.values())
        ]
        for name in names:
            sizes = models.setdefault((*recipe, *settings(runs[name], apart).items()), {})
            sizes.setdefault(runs[name].info["num_train_rows"], []).append(name)
    models = {model: dict(sorted(sizes.items())) for model, sizes in models.items() if len(sizes) > 1}
    curves = []
    for model, sizes in models.items():
        alike = [{*other[1:]} for other in models if other[0] == model[0]]
        own = [f"{name} {value}" for name, value in model[1:] if not all((name, value) in other for other in alike)]
        curves.append(Curve(", ".join([_label(model[0]), *own]), sizes))
    labels = [curve.label for curve in curves]
    # What differs may be that a setting is not set.
    return [
        replace(c, label=f"{c.label} ({i + 1})" if labels.count(c.label) > 1 else c.label) for i, c in enumerate(curves)
    ]


def curve_section(runs: dict[str, Run], found: dict[str, dict[str, np.ndarray]]) -> tuple[str | None, dict]:
    """Tables of the learning curves and of where they cross, and the points to draw: by label, (rows, accuracy, low,
    high, seeds)."""
    curves = learning_curves({name: run for name, run in runs.items() if name in found})
    if not curves:
        return None, {}
    names = [name for curve in curves for group in curve.sizes.values() for name in group]
    right = np.stack([found[name]["label"] == found[name]["prediction"] for name in names])
    places = [(curve.label, size) for curve in curves for size in curve.sizes]
    groups = [[names.index(name) for name in group] for curve in curves for group in curve.sizes.values()]
    means, replicates = metrics.resampled_accuracies(right, groups)
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    points: dict[str, list[tuple]] = {}
    for i, (label, size) in enumerate(places):
        points.setdefault(label, []).append((size, means[i], low[i], high[i], len(groups[i])))
    rows = [
        [
            label,
            f"{size:,}",
            f"{right.shape[1]:,}",
            seeds,
            interval(*accuracy),
            "test rows only" if seeds == 1 else "seeds and test rows",
        ]
        for label, values in points.items()
        for size, *accuracy, seeds in values
    ]
    header = ["model", "training rows", "test rows", "seeds", "accuracy (95 % interval)", "the interval covers"]
    parts, lines = [markdown(header, rows)], []
    for a, b in itertools.combinations(curves, 2):
        shared = sorted(a.sizes.keys() & b.sizes.keys())
        if len(shared) > 1:
            at = [[places.index((curve.label, size)) for size in shared] for curve in (a, b)]
            cross = metrics.crossing(shared, *(means[i] for i in at), *(replicates[:, i] for i in at))
            lines.append([a.label, b.label, *_crossing_cells(cross, shared, (a.label, b.label))])
    if lines:
        header = [
            "a",
            "b",
            "sizes that both have",
            "they cross at, rows",
            "95 % interval",
            "replicates without a crossing",
        ]
        parts.append(markdown(header, lines))
    return "\n\n".join(parts), points


def _crossing_cells(cross: dict, sizes: Sequence[int], names: tuple[str, str]) -> list[str]:
    ahead = {1: f"{names[0]} is ahead", -1: f"{names[1]} is ahead", 0: "neither is ahead"}[cross["later"]]
    if cross["rows"] is None:
        where = f"nowhere: {ahead} from {sizes[0]:,} to {sizes[-1]:,}"
    else:
        where = f"{cross['rows']:,.0f}; from there on {ahead}"
    if math.isnan(cross["low"]):
        bounds = "-"
    else:
        ends = {-math.inf: f"open below {sizes[0]:,}", math.inf: f"open above {sizes[-1]:,}"}
        bounds = " to ".join(ends.get(end, f"{end:,.0f}") for end in (cross["low"], cross["high"]))
        if cross["low"] == cross["high"] and math.isinf(cross["low"]):  # so few replicates cross
            bounds = f"all {ends[cross['low']].removeprefix('open ')}"
    return [", ".join(f"{size:,}" for size in sizes), where, bounds, f"{cross['without']:.1%}"]


def read_bench(file: Path) -> list[dict]:
    """The rows of a bench.json."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        needed = ("model", "engine", "method", "mode", "status", "requests_per_second", "num_requests", "accuracy")
        _ = [row[key] for row in rows for key in needed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--bench: {file} is no result of bench.py ({error}); pass its bench.json") from None
    return rows


def _rate(row: dict) -> str | None:
    return f"{row['requests_per_second']:.2f}" if row["requests_per_second"] else None


def _latencies(row: dict) -> str | None:
    latencies = [row.get(f"latency_p{percentile}_ms") for percentile in (50, 90, 99)]
    shown = [f"{latency:,.0f}" if latency >= 100 else f"{latency:.1f}" for latency in latencies if latency is not None]
    return " / ".join(shown) or None


BENCH_COLUMNS = {
    "model": lambda row: row["model"],
    "engine": lambda row: f"{row['engine']} {row.get('engine_version') or ''}".strip(),
    "method": lambda row: row["method"],
    "mode": lambda row: row["mode"],
    "dtype": lambda row: row.get("dtype"),
    "hardware": lambda row: row.get("device"),
    "requests/s": _rate,
    "latency p50 / p90 / p99, ms": _latencies,
    "in time": lambda row: None if row.get("slo_attainment") is None else f"{row['slo_attainment']:.1%}",
    "tokens/s": lambda row: row.get("input_tokens_per_second") and f"{row['input_tokens_per_second']:,.0f}",
    "peak GiB": lambda row: row.get("peak_memory_bytes") and f"{row['peak_memory_bytes'] / 2**30:.2f}",
    "requests": lambda row: row["num_requests"],
    "accuracy": lambda row: row["accuracy"],
    "agreement": lambda row: row.get("agreement"),
    "status": lambda row: f"{row['status']}: {row['reason']}" if row.get("reason") else row["status"],
}


def bench_table(rows: Sequence[dict]) -> str:
    """Markdown of the rows of a bench.json, without the columns in which no row has a value."""
    columns = {header: [cell(row) for row in rows] for header, cell in BENCH_COLUMNS.items()}
    columns = {header: cells for header, cells in columns.items() if any(cell is not None for cell in cells)}
    return markdown([*columns], zip(*columns.values(), strict=True))


def write_report(runs: dict[str, Run], bench: Sequence[dict], out: Path) -> str:
    """Writes report.md and its pictures into the new or empty directory `out`; returns what to print: the essence, and
    where it is."""
    found = common_predictions(runs)
    compared = compare_pairs(runs, found)
    published = [f"### {name}\n\n{table}" for name, run in runs.items() if (table := published_table(run))]
    left_out = [name for name in runs if name not in found]
    note = common_note(runs, found)
    absent = {name: line for name, run in runs.items() if (line := absent_line(run.results))}
    pictures = {name: run.dir / "curves.png" for name, run in runs.items() if (run.dir / "curves.png").is_file()}
    curves, points = curve_section(runs, found)
    pairs = math.comb(len(found), 2)
    sections = [
        (
            "Headlines",
            "Scores on the test rows; runs that differ in their seed alone are one line, mean ± standard deviation, and the "
            "interval is then the mean of theirs: more seeds do not make the test rows more. The constant answer is the "
            "accuracy of always naming the class that has most training rows."
            + "".join(f" {name}: {line}." for name, line in absent.items()),
            runs_table(runs),
        ),
        ("What was run", "", about_table(runs)),
        (
            "How the step was chosen",
            "The headline is free of selection on the test rows: the last step's, or with validation rows the step's best on those."
            + " The best step on test, the published protocol, is chosen on the rows it is scored on: not an estimate of anything."
            * any(map(published_kind, runs.values())),
            selection_table(runs),
        ),
        (
            "Against the published tables",
            "One RTX 3090, AG News' 120,000 training and 7,600 test rows; what BERT's table calls validation are the test rows. "
            "Lines meet where the same share of the training is done; our training loss is the mean of the steps logged since "
            "the line before.",
            "\n\n".join(published),
        ),
        (
            "Two by two",
            "The same test rows, paired: exact McNemar test, and 95 % intervals of the difference from 10,000 resamples of "
            "the rows (seeded). Better is said where all three agree."
            * bool(pairs)
            + f" Of {pairs} pairs that are equal, one in twenty would look so by chance." * (pairs > 5)
            + f" {note}" * bool(note)
            + f" Left out, without predictions.parquet: {', '.join(left_out)}." * bool(left_out),
            comparison_table(compared, len(runs)),
        ),
        (
            "Settings and seeds",
            "Macro F1 on the validation rows and on the test rows, of every run; chosen is the best mean on validation.",
            "\n\n".join(grid_tables(runs)),
        ),
        (
            "Training rows",
            "Mean accuracy over the seeds of each number of training rows, all on the same test rows. 95 % intervals from "
            "10,000 replicates (seeded), each a draw of the test rows, the same for all, and of every point's seeds; a point "
            "with one seed is drawn hollow. Curves cross where their difference, linear in the logarithm of the rows, changes "
            "sign for the last time; replicates that do not cross lie beyond the sizes, and more than 2.5 % of them on one "
            "side leave that end of the interval open." + f" {note}" * bool(note),
            curves and f"{curves}\n\n![accuracy over training rows](rows.png)",
        ),
        (
            "Length",
            "Accuracy by length of the text, with 95 % intervals (Wilson), in tokens of the first run that has them, before "
            "any cut.",
            length_table(found),
        ),
        ("Classes", "Macro F1 is the mean over these of F1. In brackets: precision, recall.", per_class_table(runs)),
        (
            "Confusion",
            "True class down, predicted class across.",
            "\n\n".join(f"### {name}\n\n{confusion_table(run)}" for name, run in runs.items()),
        ),
        (
            "Curves",
            "Loss and scores over the steps.",
            "\n\n".join(
                f"### {name}\n\n![loss and scores over steps](curves-{i}.png)"
                for i, name in enumerate(pictures, start=1)
            ),
        ),
        (
            "Calibration",
            "Expected calibration error over 15 bins, as the run is and with all logits divided by the temperature that fits "
            "its validation rows best; no validation rows, no temperature.",
            calibration_table(runs),
        ),
        (
            "Cost",
            "Training and scoring apart; an evaluation scores the test rows, and the validation rows where there are any. "
            "Times compare only where the hardware is the same and nothing else ran on it.",
            cost_table(runs),
        ),
        (
            "Which one to deploy",
            "Requests per second against accuracy on the same requests, with its 95 % interval (Wilson); up and to the right is better.",
            bench and f"{bench_table(bench)}\n\n![accuracy over requests per second](deploy.png)",
        ),
    ]
    parts = [part for title, note, body in sections if body for part in (f"## {title}", note, body) if part]
    out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures.values(), start=1):
        shutil.copyfile(picture, out / f"curves-{i}.png")
    if points:
        plots.plot_learning_curves(points, out / "rows.png")
    if bench:
        plots.plot_requests(bench, out / "deploy.png")
    (out / "report.md").write_text("\n\n".join(["# Report", *parts]) + "\n", encoding="utf-8")
    said = [
        runs_table(runs),
        note,
        verdicts(compared) or comparison_table(compared, len(runs)),
        f"report: {out / 'report.md'}",
    ]
    return "\n".join(filter(None, said))
