"""Pictures of a run, loss and accuracy curves and the confusion matrix, and of several side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minicls import metrics
from minicls.logger import read_metrics


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt

    return plt


def plot_curves(run_dir: Path) -> Path:
    """curves.png out of metrics.jsonl: losses on the left, accuracy and F1 on the right, over steps."""
    plt = _pyplot()
    events = read_metrics(run_dir)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    train = [e for e in events if e["event"] == "train"]
    for name, color, label in (("loss", "0.7", "train"), ("answer_loss", "tab:green", "train, the letter alone")):
        if train and name in train[0]:
            left.plot([e["step"] for e in train], [e[name] for e in train], color=color, label=label, linewidth=1)
    for split, color in (("validation", "tab:orange"), ("test", "tab:blue")):
        evals = [e for e in events if e["event"] == "eval" and e["split"] == split]
        steps = [e["step"] for e in evals]
        if evals:
            left.plot(steps, [e["loss"] for e in evals], "o-", color=color, label=split, markersize=4)
            right.plot(steps, [e["accuracy"] for e in evals], "o-", color=color, label=f"{split} accuracy", markersize=4)
            right.plot(steps, [e["f1"] for e in evals], "x--", color=color, label=f"{split} macro F1", markersize=5)
    left.set(xlabel="step", ylabel="cross-entropy, nats", title="Loss", ylim=(0, None))
    right.set(xlabel="step", title="Accuracy and macro F1")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(run_dir / "curves.png", dpi=120)
    plt.close(figure)
    return run_dir / "curves.png"


def plot_confusion(confusion: Sequence[Sequence[int]], label_names: Sequence[str], run_dir: Path) -> Path:
    """confusion.png: a picture of a (C, C) confusion matrix; shade is the share of the true class, so that small classes show."""
    plt = _pyplot()
    counts = np.asarray(confusion)
    C = len(counts)
    size = min(20.0, 3.0 + 0.5 * C)
    figure, axes = plt.subplots(figsize=(size + 1.0, size), layout="constrained")
    image = axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    small = 9 if C <= 10 else 6 if C <= 30 else 4
    axes.set_xticks(range(C), label_names, rotation=90 if C > 4 else 0, fontsize=small)
    axes.set_yticks(range(C), label_names, fontsize=small)
    axes.set(xlabel="predicted", ylabel="true", title=f"Test rows: {counts.sum():,}")
    if C <= 30:
        for i, j in np.argwhere(counts):
            dark = counts[i, j] > 0.5 * counts[i].sum()
            axes.text(j, i, counts[i, j], ha="center", va="center", color="white" if dark else "black", fontsize=small)
    figure.savefig(run_dir / "confusion.png", dpi=120)
    plt.close(figure)
    return run_dir / "confusion.png"


def plot_rps(rows: Sequence[dict], output_dir: Path) -> Path:
    """rps.png: requests per second of bench.json's valid rows as bars, a panel for each mode, a colour for each engine."""
    plt = _pyplot()
    rows = [row for row in rows if row["status"] == "ok"]
    modes, engines = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "engine"))
    tallest = max([sum(row["mode"] == mode for row in rows) for mode in modes], default=1)
    size = (5.5 * max(1, len(modes)), 1.5 + 0.4 * tallest)
    figure, panels = plt.subplots(1, max(1, len(modes)), figsize=size, layout="constrained", squeeze=False)
    for axes, mode in zip(panels[0], modes, strict=False):
        shown = [row for row in rows if row["mode"] == mode][::-1]  # the first on top
        rates = [row["requests_per_second"] for row in shown]
        bars = axes.barh(range(len(shown)), rates, color=[f"C{engines.index(row['engine'])}" for row in shown])
        axes.bar_label(bars, [f"{rate:.3g}" for rate in rates], padding=3, fontsize=8)
        names = [f"{row['model']}, {row['engine']}, {row['method']}" for row in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=8)
        axes.set(xlabel="requests per second", title=mode)
        axes.margins(x=0.15)
    figure.savefig(output_dir / "rps.png", dpi=120)
    plt.close(figure)
    return output_dir / "rps.png"


def plot_learning_curves(curves: dict[str, Sequence[tuple[int, float, float, float, int]]], file: Path) -> None:
    """Accuracy over training rows: of each name, points (rows, accuracy, low, high, seeds); those of one seed are hollow."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5 + 0.25 * len(curves)), layout="constrained")
    for i, (name, points) in enumerate(curves.items()):
        rows, accuracy, low, high, seeds = np.array(points, float).T
        rows = rows * 1.025 ** (i - (len(curves) - 1) / 2)  # beside each other, or bars of equal sizes would hide each other
        bars = np.maximum(0, [accuracy - low, high - accuracy])  # a percentile interval need not hold the figure of a few rows
        color = f"C{i}"
        axes.plot(rows, accuracy, color=color, label=name)
        axes.errorbar(rows, accuracy, bars, fmt="none", ecolor=color, capsize=3)
        axes.scatter(rows, accuracy, s=28, zorder=3, edgecolors=color, facecolors=["white" if n == 1 else color for n in seeds])
    axes.set(xscale="log", xlabel="training rows", ylabel="accuracy on test, 95 % interval", title="What more labels buy")
    ticks = []
    for size in sorted({point[0] for points in curves.values() for point in points}):
        ticks += [size] if not ticks or size > 1.4 * ticks[-1] else []  # labels of nearer ones would overlap
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if any(point[4] == 1 for points in curves.values() for point in points):
        axes.text(0.99, 0.02, "hollow: one seed, interval of test rows only", transform=axes.transAxes, ha="right", fontsize=8)
    figure.legend(loc="outside lower center", fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_deploy(rows: Sequence[dict], file: Path) -> None:
    """Accuracy over requests per second of bench.json's valid rows: a panel for each mode, a colour for each model."""
    plt = _pyplot()
    rows = [row for row in rows if row["status"] == "ok" and row.get("accuracy") is not None]
    models, modes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "mode"))
    size = (max(7.0, 5.0 * len(modes)), 6.0)
    figure, panels = plt.subplots(1, max(1, len(modes)), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, mode in zip(panels[0], modes or [""], strict=True):
        for row in (row for row in rows if row["mode"] == mode):
            x, y, color = row["requests_per_second"], row["accuracy"], f"C{models.index(row['model'])}"
            low, high = metrics.accuracy_interval(y, row["num_requests"]) if row.get("num_requests") else (y, y)
            axes.errorbar(x, y, [[y - low], [high - y]], fmt="o", color=color, capsize=3)
            name = f"{row['engine']}, {row['method']}"
            style = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8, "color": color}
            axes.annotate(name, (x, high), xytext=(0, 5), textcoords="offset points", **style)
        axes.set(xscale="log", xlabel="requests per second", title=mode)
        axes.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    bottom, top = panels[0, 0].get_ylim()
    panels[0, 0].set(ylabel="accuracy, 95 % interval", ylim=(bottom, top + 0.5 * (top - bottom)))  # room for the names
    panels[0, 0].set_yticks([tick for tick in panels[0, 0].get_yticks() if bottom <= tick <= 1])
    for i, model in enumerate(models):
        panels[0, 0].plot([], [], "o", color=f"C{i}", label=model)
    if models:
        panels[0, 0].legend(loc="upper left")
    figure.savefig(file, dpi=120)
    plt.close(figure)
