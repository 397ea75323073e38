"""Pictures of a run (loss and accuracy curves, the confusion matrix) and of several runs together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minicls import metrics
from minicls.logger import read_metrics
from minicls.results import shown

MAX_CLASSES = 100  # that a confusion matrix shows one by one; of more, those with most mistakes


def _pyplot(texts: Sequence[str] = ()):
    """pyplot with a font for the characters of these texts, and whether an installed font has them all."""
    import matplotlib

    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    def has(path: str, characters: set[str]) -> bool:
        font = font_manager.get_font(path)
        return all(font.get_char_index(ord(character)) for character in characters)

    families = matplotlib.rcParamsDefault["font.family"]
    default = font_manager.findfont(font_manager.FontProperties(family=families))
    lacking = {character for character in set("".join(texts)) if not has(default, {character})}
    # The Last Resort font has every character, as a box.
    fonts = [font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")]
    fonts.sort(key=lambda font: (font.style != "normal", font.weight != 400))
    name = next((font.name for font in fonts if has(font.fname, lacking)), None) if lacking else None
    matplotlib.rcParams["font.family"] = [*families, *([name] if name else [])]
    return plt, name is not None or not lacking


def _plain(value: float) -> str:
    """Three digits, all before the point where there are more: 1,138 rather than 1.14e+03."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_curves(run_dir: Path) -> Path:
    """curves.png from metrics.jsonl: losses on the left, accuracy and F1 on the right, over steps."""
    plt, _ = _pyplot()
    events = read_metrics(run_dir)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    train = [event for event in events if event["event"] == "train"]
    for key, color, label in (("loss", "0.7", "train"), ("answer_loss", "tab:green", "train, the letter alone")):
        if train and key in train[0]:
            left.plot([e["step"] for e in train], [e[key] for e in train], color=color, label=label, linewidth=1)
    for split, color in (("validation", "tab:orange"), ("test", "tab:blue")):
        evaluations = [event for event in events if event["event"] == "eval" and event["split"] == split]
        lines = ((left, "loss", "", "o-"), (right, "accuracy", " accuracy", "o-"), (right, "f1", " macro F1", "x--"))
        for axes, key, score, style in lines if evaluations else ():
            steps, values = zip(*((event["step"], event[key]) for event in evaluations), strict=True)
            axes.plot(steps, values, style, color=color, label=split + score, markersize=4)
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
    """confusion.png from a (C, C) confusion matrix, shaded by the share of the true class, so that small classes show.

    Of more than MAX_CLASSES classes it shows those with most mistakes, and all others merged. Where no installed font
    has the characters of the names, their indices stand for them, and a printed line says so.
    """
    counts = np.asarray(confusion)
    names = [name if len(name) <= 28 else f"{name[:27]}…" for name in map(shown, label_names)]
    plt, readable = _pyplot(names)
    if not readable:
        legend = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20])) + ", …" * (len(names) > 20)
        print(
            f"no installed font has the characters of all class names, so confusion.png shows their indices: {legend}"
        )
        names = [str(i) for i in range(len(names))]
    title = f"Test rows: {counts.sum():,}"
    if len(counts) > MAX_CLASSES:
        mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        kept = np.sort(np.argsort(-mistakes, kind="stable")[: MAX_CLASSES // 2])
        place = np.full(len(counts), len(kept))
        place[kept] = np.arange(len(kept))
        merged = np.zeros((len(kept) + 1, len(kept) + 1), counts.dtype)
        np.add.at(merged, (place[:, None], place[None]), counts)
        title += f"; the {len(kept)} classes with most mistakes, and the {len(counts) - len(kept)} others"
        counts, names = merged, [*(names[i] for i in kept), "all others"]
    C = len(counts)
    cell, points = (0.62, 9) if C <= 10 else (0.4, 8) if C <= 30 else (0.22, 7)  # inches; font size
    longest = max(map(len, names)) * points / 72 * 0.6  # inches
    size = 2.0 + max(cell * C, 2.5)
    figure, axes = plt.subplots(figsize=(size + longest + 1.0, size + longest * 0.9), layout="constrained")
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
    figure.savefig(run_dir / "confusion.png", dpi=120, bbox_inches="tight")  # a square in a frame of any shape
    plt.close(figure)
    return run_dir / "confusion.png"


def plot_rps(rows: Sequence[dict], output_dir: Path) -> Path:
    """rps.png: requests per second of bench.json's valid rows as bars, a panel for each mode, a colour for each
    engine."""
    rows = [row for row in rows if row["status"] == "ok"]
    plt, _ = _pyplot([row["model"] for row in rows])
    modes, engines = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "engine"))
    tallest = max([sum(row["mode"] == mode for row in rows) for mode in modes], default=1)
    names = {id(row): f"{row['model']}, {row['engine']}, {row['method']}" for row in rows}
    longest = max(map(len, names.values()), default=0) * 0.065  # inches, at 8 points
    size = ((3.5 + longest) * max(1, len(modes)), 1.5 + 0.4 * tallest)
    figure, panels = plt.subplots(1, max(1, len(modes)), figsize=size, layout="constrained", squeeze=False)
    for axes, mode in zip(panels[0], modes, strict=False):
        of_mode = [row for row in rows if row["mode"] == mode][::-1]  # the first on top
        rates = [row["requests_per_second"] for row in of_mode]
        bars = axes.barh(range(len(of_mode)), rates, color=[f"C{engines.index(row['engine'])}" for row in of_mode])
        axes.bar_label(bars, [_plain(rate) for rate in rates], padding=3, fontsize=8)
        axes.set_yticks(range(len(of_mode)), [names[id(row)] for row in of_mode], fontsize=8)
        axes.set(xlabel="requests per second", title=mode, xlim=(0, 1.25 * max(rates)))  # room for the figures
        axes.xaxis.set_major_locator(plt.MaxNLocator(5))
        axes.xaxis.set_major_formatter("{x:,g}")
    figure.savefig(output_dir / "rps.png", dpi=120)
    plt.close(figure)
    return output_dir / "rps.png"


def plot_learning_curves(curves: dict[str, Sequence], file: Path, dpi: int = 120) -> None:
    """Accuracy over training rows: by label the points (rows, accuracy, low, high, seeds); a single seed is hollow."""
    plt, _ = _pyplot([*curves])
    figure, axes = plt.subplots(figsize=(8, 5 + 0.25 * len(curves)), layout="constrained")
    for i, (label, points) in enumerate(curves.items()):
        color = f"C{i}"
        rows, accuracy, low, high, seeds = np.array(points, float).T
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
    for size in sorted({point[0] for points in curves.values() for point in points}):
        ticks += [size] if not ticks or size > 1.4 * ticks[-1] else []  # labels of nearer ones would overlap
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if any(point[4] == 1 for points in curves.values() for point in points):
        note = "hollow: one seed, interval of test rows only"
        axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", fontsize=8)
    figure.legend(loc="outside lower center", fontsize=9)
    figure.savefig(file, dpi=dpi)
    plt.close(figure)


def plot_deploy(rows: Sequence[dict], file: Path) -> None:
    """Accuracy over requests per second of bench.json's valid rows: a panel for each mode, a colour for each model, a
    marker for each engine and method."""
    rows = [row for row in rows if row["status"] == "ok" and row.get("accuracy") is not None]
    plt, _ = _pyplot([row["model"] for row in rows])
    models, modes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "mode"))
    ways = list(dict.fromkeys((row["engine"], row["method"]) for row in rows))
    markers = "osD^vP*X<>ph"
    size = (max(7.0, 5.0 * len(modes)), 5.0 + 0.2 * (len(models) + len(ways)))
    figure, panels = plt.subplots(1, max(1, len(modes)), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, mode in zip(panels[0], modes or [""], strict=True):
        for row in (row for row in rows if row["mode"] == mode):
            x, y, color = row["requests_per_second"], row["accuracy"], f"C{models.index(row['model'])}"
            low, high = metrics.accuracy_interval(y, row["num_requests"]) if row.get("num_requests") else (y, y)
            marker = markers[ways.index((row["engine"], row["method"])) % len(markers)]
            axes.errorbar(x, y, [[y - low], [high - y]], fmt=marker, color=color, capsize=3, alpha=0.8, clip_on=False)
        axes.set(xscale="log", xlabel="requests per second", title=mode)
        axes.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    bottom, top = panels[0, 0].get_ylim()
    panels[0, 0].set(ylabel="accuracy, 95 % interval", ylim=(max(0.0, bottom), min(1.0, top)))
    handles = [plt.Line2D([], [], color=f"C{i}", linewidth=6, label=model) for i, model in enumerate(models)]
    for i, way in enumerate(ways):
        handles.append(
            plt.Line2D([], [], color="0.3", marker=markers[i % len(markers)], linestyle="", label=", ".join(way))
        )
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(file, dpi=120)
    plt.close(figure)
