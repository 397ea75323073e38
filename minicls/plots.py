"""Pictures of a run: loss and accuracy curves, the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
