"""Pictures of a run (loss and accuracy curves, the confusion matrix) and of several runs together."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minicls import metrics, results
from minicls.logger import read_metrics
from minicls.results import plain, shown

MAX_CLASSES = 100  # in a confusion matrix; if there are more, those with most mistakes are shown


def _use_font(texts: Sequence[str]) -> bool:
    """Adds a font for the characters that matplotlib's own lacks; returns whether an installed one has them all."""
    import matplotlib
    from matplotlib import font_manager

    def lacking(font_file: str, characters: set[str]) -> set[str]:
        font = font_manager.get_font(font_file)
        return {character for character in characters if not font.get_char_index(ord(character))}

    families = matplotlib.rcParamsDefault["font.family"]
    default = font_manager.findfont(font_manager.FontProperties(family=families))
    needed = lacking(default, set("".join(texts)))
    # The Last Resort font has every character, as a box.
    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
    fonts.sort(key=lambda font: (font.style != "normal", font.weight != 400))
    name = next((font.name for font in fonts if needed and not lacking(font.fname, needed)), None)
    matplotlib.rcParams["font.family"] = [*families, *([name] if name else [])]
    return bool(name or not needed)


def _figure(width: float, height: float, **grid):
    """A figure of width x height inches, and its axes. It is not pyplot's, so it needs neither closing nor a window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def plot_curves(run_dir: Path) -> Path:
    """curves.png from metrics.jsonl: losses on the left, accuracy and F1 on the right, over steps."""
    figure, (left, right) = _figure(11, 4, ncols=2)
    events = read_metrics(run_dir)

    def draw(axes, split: str | None, key: str, style: str, **options) -> None:
        """A line of the evaluations of a split, or of the training (None)."""
        points = [(event["step"], event[key]) for event in events if event.get("split") == split and key in event]
        if points:
            axes.plot(*zip(*points, strict=True), style, **options)

    draw(left, None, "loss", "-", color="0.7", label="train", linewidth=1)
    draw(left, None, "answer_loss", "-", color="tab:green", label="train, the letter alone", linewidth=1)
    for split, color in (("validation", "tab:orange"), ("test", "tab:blue")):
        draw(left, split, "loss", "o-", color=color, label=split, markersize=4)
        draw(right, split, "accuracy", "o-", color=color, label=f"{split} accuracy", markersize=4)
        draw(right, split, "f1", "x--", color=color, label=f"{split} macro F1", markersize=4)
    # Headroom, because a flat loss would hide in the frame; no scores above 1.
    left.set(xlabel="step", ylabel="cross-entropy, nats", title="Loss", ylim=(0, 1.05 * left.get_ylim()[1]))
    right.set(xlabel="step", title="Accuracy and macro F1", ylim=(None, min(1.02, right.get_ylim()[1])))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend()
    figure.savefig(run_dir / "curves.png", dpi=120)
    return run_dir / "curves.png"


def plot_confusion(confusion: Sequence[Sequence[int]], label_names: Sequence[str], run_dir: Path) -> Path:
    """confusion.png from a (C, C) confusion matrix, shaded by the share of the true class, so that small classes show.

    Of more than MAX_CLASSES classes it shows those with most mistakes, and all others merged. Where no installed font
    has the characters of the names, their indices stand for them, and a printed line says so.
    """
    counts = np.asarray(confusion)
    names = [name if len(name) <= 28 else f"{name[:27]}…" for name in map(shown, label_names)]
    if not _use_font(names):
        legend = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20])) + ", …" * (len(names) > 20)
        problem = "no installed font has the characters of all class names"
        print(f"{problem}, so confusion.png shows their indices: {legend}")
        names = [str(i) for i in range(len(names))]
    title = f"Test rows: {counts.sum():,}"
    if len(counts) > MAX_CLASSES:
        mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        kept = np.sort(np.argsort(-mistakes, kind="stable")[: MAX_CLASSES // 2])
        title += f"; the {len(kept)} classes with most mistakes, and the {len(counts) - len(kept)} others"
        group = np.zeros((len(counts), len(kept) + 1), counts.dtype)  # (C, the kept ones and all others)
        group[kept, np.arange(len(kept))] = 1
        group[:, -1] = 1 - group.sum(1)
        counts, names = group.T @ counts @ group, [*(names[i] for i in kept), "all others"]
    C = len(counts)
    cell, points = (0.62, 9) if C <= 10 else (0.4, 8) if C <= 30 else (0.22, 7)  # inches; font size
    longest = max(map(len, names)) * points / 72 * 0.6  # inches
    size = 2.0 + max(cell * C, 2.5)
    figure, axes = _figure(size + longest + 1.0, size + longest * 0.9)
    image = axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    slanted = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if longest > 0.9 * size / C else {}
    axes.set_xticks(range(C), names, fontsize=points, **slanted)
    axes.set_yticks(range(C), names, fontsize=points)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    for i, j in np.argwhere(counts):
        color = "white" if counts[i, j] > 0.5 * counts[i].sum() else "black"
        fontsize = points if C <= 30 else 5
        axes.text(j, i, counts[i, j], ha="center", va="center", color=color, fontsize=fontsize)
    figure.savefig(run_dir / "confusion.png", dpi=120, bbox_inches="tight")  # crop to the matrix and its labels
    return run_dir / "confusion.png"


def plot_requests(rows: Sequence[dict], file: Path) -> Path:
    """The valid rows of a bench.json: accuracy with its 95 % interval, where there is any, and requests per second in a
    panel for each mode. A line for each model, engine and method; a colour for each model."""
    from matplotlib.ticker import MaxNLocator

    rows = [row | {"name": "{model}, {engine}, {method}".format(**row)} for row in rows if row["status"] == "ok"]
    _use_font([row["model"] for row in rows])
    names, models, modes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "model", "mode"))
    scored = any(row["accuracy"] is not None for row in rows)
    titles = ["accuracy, 95 % interval"] * scored + [f"requests per second, {mode}" for mode in modes]
    longest = max(map(len, names), default=0) * 0.065  # inches, at 8 points
    panels, height = max(1, len(titles)), 1.2 + 0.3 * len(names)
    figure, axes = _figure(longest + 3.2 * panels, height, ncols=panels, sharey=True, squeeze=False)
    for row in rows:
        place, color = names.index(row["name"]), f"C{models.index(row['model'])}"
        if row["accuracy"] is not None:
            accuracy, (low, high) = row["accuracy"], metrics.accuracy_interval(row["accuracy"], row["num_requests"])
            bars = [[accuracy - low], [high - accuracy]]
            axes[0, 0].errorbar(accuracy, place, xerr=bars, fmt="o", color=color, capsize=3)
        panel = axes[0, scored + modes.index(row["mode"])]
        bar = panel.barh(place, row["requests_per_second"], color=color)
        panel.bar_label(bar, [plain(row["requests_per_second"])], padding=3, fontsize=8)
        panel.margins(x=0.25)  # room for the figures
    for panel, title in zip(axes[0], titles, strict=False):
        panel.set_title(title, fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter("{x:,g}")
    if scored:
        low, high = axes[0, 0].get_xlim()
        axes[0, 0].set_xlim(max(0.0, low), min(1.0, high))
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].invert_yaxis()  # the first on top
    figure.savefig(file, dpi=120)
    return file


def plot_learning_curves(curves: dict[str, dict[int, tuple]], file: Path, dpi: int = 120) -> None:
    """Accuracy over training rows: by label {rows: (accuracy, low, high, seeds)}; a single seed is hollow."""
    _use_font([*curves])
    figure, axes = _figure(8, 5 + 0.25 * len(curves))
    for i, (label, points) in enumerate(curves.items()):
        color = f"C{i}"
        rows, (accuracy, low, high, seeds) = np.array([*points], float), np.array([*points.values()], float).T
        rows = rows * 1.025 ** (i - (len(curves) - 1) / 2)  # spread, or bars of equal sizes would hide each other
        bars = np.maximum(0, [accuracy - low, high - accuracy])  # a percentile interval of few rows may exclude it
        faces = ["white" if n == 1 else color for n in seeds]
        axes.plot(rows, accuracy, color=color, label=label)
        axes.errorbar(rows, accuracy, bars, fmt="none", ecolor=color, capsize=3)
        axes.scatter(rows, accuracy, s=28, zorder=3, edgecolors=color, facecolors=faces)
    axes.set(
        xscale="log", xlabel="training rows", ylabel="accuracy on test, 95 % interval", title="What more labels buy"
    )
    ticks = []
    for size in sorted({*itertools.chain(*curves.values())}):
        ticks += [size] if not ticks or size > 1.4 * ticks[-1] else []  # labels of nearer ones would overlap
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if any(seeds == 1 for points in curves.values() for *_, seeds in points.values()):
        note = "hollow: one seed, interval of test rows only"
        axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", fontsize=8)
    figure.legend(loc="outside lower center", fontsize=9)
    figure.savefig(file, dpi=dpi)


def plot_deferral(curve: Sequence[tuple], chosen: float, file: Path) -> None:
    """A cascade's accuracy by the share of deferred texts: points (share, accuracy, low, high), from 0 to 1.

    chosen: the threshold's share.
    """
    figure, axes = _figure(7, 4.5)
    share, accuracy, low, high = np.array(curve).T
    axes.plot(share, accuracy, marker="o", markersize=4, label="least confident first")
    axes.fill_between(share, low, high, alpha=0.15, label="95 % interval")
    axes.plot([0, 1], accuracy[[0, -1]], linestyle="--", color="grey", label="at random (expected)")
    axes.axvline(chosen, color="C1", linewidth=1, label="threshold chosen on validation rows")
    axes.set(xlabel="share of texts deferred to the large model", ylabel="accuracy on test", xlim=(0, 1))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(file, dpi=120)


def finish(run_dir: Path, *outcome) -> str:
    """Writes a finished run's results and pictures; returns its tables, its headline, and where the pictures are.

    `outcome`: the further arguments of `results.write_results`.
    """
    written = results.write_results(run_dir, *outcome)
    lines = [results.table(results.steps(run_dir)), results.summary(written), f"curves: {plot_curves(run_dir)}"]
    picture = plot_confusion(written["confusion"], [*written["per_class"]], run_dir)
    return "\n".join([*lines, f"confusion matrix: {picture}"])
