"""Counts -> accuracy, precision, recall, F1, with their uncertainty. Everything starts from a confusion matrix.

n rows, C classes. `confusion[i, j]` counts rows of class i that were predicted as j.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch


def evaluate_logits(logits: torch.Tensor, labels: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Loss (mean cross-entropy), accuracy and macro precision, recall, F1 of logits (n, C); and their confusion matrix."""
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels)).item()
    confusion = confusion_matrix(labels, logits.argmax(1).numpy(), logits.shape[1])
    return {"loss": loss} | classification_metrics(confusion), confusion


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """labels, predictions: (n,) int. Returns (C, C) int64: true class down, predicted class across."""
    return np.bincount(labels * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)


def per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, (..., C) each, from (..., C, C) counts. 0/0 counts as 0, as in
    scikit-learn."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)  # (..., C)
    predicted, actual = confusion.sum(-2), confusion.sum(-1)  # (..., C)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(predicted + actual, 1)
    return precision, recall, f1


def classification_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, and the unweighted (macro) mean of precision, recall and F1 over the classes that occur.

    A class that has no rows and is never predicted is left out of the mean, as scikit-learn leaves it out where it is
    given no `labels`; a class without rows that is predicted counts as 0.
    """
    occurring = occurs(confusion)
    accuracy = np.trace(confusion) / max(1, confusion.sum())
    means = [float(scores.sum() / max(1, occurring.sum())) for scores in per_class(confusion)]  # 0 where nothing occurs
    return {"accuracy": float(accuracy)} | dict(zip(("precision", "recall", "f1"), means, strict=True))


def occurs(confusion: np.ndarray) -> np.ndarray:
    """Which classes have rows or are predicted, (C,) bool: the macro means are over these."""
    return confusion.sum(0) + confusion.sum(1) > 0


def constant_metrics(support: np.ndarray, answer: int) -> dict[str, float]:
    """Accuracy and macro F1 of always answering one class; support: rows of each class, (C,)."""
    confusion = np.zeros((len(support), len(support)), np.int64)
    confusion[:, answer] = support
    return {name: value for name, value in classification_metrics(confusion).items() if name in ("accuracy", "f1")}


def _scores(
    draws: np.ndarray, labels: np.ndarray, predictions: np.ndarray, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and macro F1, (R,) each, of R draws: (R, K) counts of K cells, whose label and prediction are (K,)
    each."""

    def sums(cells: np.ndarray, classes: np.ndarray) -> np.ndarray:  # (R, C)
        index = np.arange(len(cells))[:, None] * num_labels + classes
        return np.bincount(index.ravel(), cells.ravel(), len(cells) * num_labels).reshape(-1, num_labels)

    right = labels == predictions
    hits, rows = sums(draws[:, right], labels[right]), sums(draws, labels) + sums(draws, predictions)
    f1 = (2 * hits / np.maximum(rows, 1)).sum(1) / np.maximum((rows > 0).sum(1), 1)
    return hits.sum(1) / np.maximum(draws.sum(1), 1), f1


def _draws(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples of rows that fall into cells, in parts: (R, K) counts, `resamples` in all.

    Rows enter the scores only through the cell they count in, so drawing n rows with replacement is one multinomial
    draw of the K occupied cells: the same distribution as resampling rows, at a fraction of the work.
    """
    rng, part = np.random.default_rng(seed), max(1, min(500, 2_000_000 // len(counts)))
    for start in range(0, resamples, part):
        yield rng.multinomial(counts.sum(), counts / counts.sum(), size=min(part, resamples - start))


def f1_interval(confusion: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of macro F1 by a bootstrap over the test rows (Efron & Tibshirani 1993, chapter 13).

    The macro mean of a resample is over the classes that occur in it, as `classification_metrics` has it.
    """
    labels, predictions = np.nonzero(confusion)
    if not len(labels):
        return 0.0, 0.0
    drawn = _draws(confusion[labels, predictions], resamples, seed)
    f1 = np.concatenate([_scores(draws, labels, predictions, len(confusion))[1] for draws in drawn])
    low, high = np.quantile(f1, [0.025, 0.975])
    return float(low), float(high)


def accuracy_interval(accuracy: float, n: int) -> tuple[float, float]:
    """95 % interval of an accuracy over n rows (Wilson 1927): unlike +-1.96 standard errors it stays within [0, 1]."""
    z2 = 1.959963984540054**2
    middle, half = accuracy + z2 / (2 * n), math.sqrt(z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n * n)))
    # Rounding may put a bound of 0 or 1 just outside, or on the wrong side of the accuracy itself.
    return min(accuracy, max(0.0, (middle - half) / (1 + z2 / n))), max(
        accuracy, min(1.0, (middle + half) / (1 + z2 / n))
    )


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): |confidence - accuracy| over equal-width bins.

    probabilities: (n, C); labels: (n,). 0 is perfect; 0.05 means off by five percentage points on average.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    # Bins are (low, high], as in the paper; the clip keeps a confidence that rounding put above 1 in the last one.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=confidence, minlength=bins) - np.bincount(index, weights=right, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 of the lowest cross-entropy of softmax(logits / T) (Guo et al. 2017, section 4.2), in [0.01, 100].

    logits: (n, C); labels: (n,). To be fitted on rows that are not tested on. Where no finite T is the best, on rows
    that are all right for one, it is the nearer bound.
    """
    logits = logits - logits.max(1, keepdims=True)
    low, high = (
        math.log(0.01),
        math.log(100),
    )  # of 1 / T: the cross-entropy is convex in it, so its slope changes sign once
    for _ in range(50):
        middle = (low + high) / 2
        weights = np.exp(math.exp(middle) * logits)
        expected = (weights * logits).sum(1) / weights.sum(1)  # (n,)
        if (expected - logits[np.arange(len(labels)), labels]).mean() < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def mcnemar(labels: np.ndarray, predictions_a: np.ndarray, predictions_b: np.ndarray) -> tuple[int, int, float]:
    """Exact McNemar test of two classifiers on the same rows (McNemar 1947; exact binomial form).

    Returns (rows only a gets right, rows only b gets right, two-sided p-value).
    """
    a, b = predictions_a == labels, predictions_b == labels
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    # Exact in integers: the sum can have thousands of digits, the quotient is an ordinary float.
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return only_a, only_b, min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    labels: np.ndarray,
    predictions_a: np.ndarray,
    predictions_b: np.ndarray,
    num_labels: int,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Differences a - b of two classifiers on the same rows: {"accuracy" and "f1": (difference, low, high)}, 95 %
    intervals.

    Both are scored on the same resampled rows, so that rows hard for both move neither bound (Efron & Tibshirani 1993).
    As in `f1_interval`, rows that agree in label and both predictions are drawn together.
    """
    cells, counts = np.unique(np.stack([labels, predictions_a, predictions_b]), axis=1, return_counts=True)
    label, *predicted = cells  # (K,) each

    def differences(draws: np.ndarray) -> np.ndarray:
        """(2, R): the differences in accuracy and macro F1 of R draws, (R, K) counts."""
        a, b = (np.stack(_scores(draws, label, p, num_labels)) for p in predicted)
        return a - b

    drawn = np.concatenate([differences(draws) for draws in _draws(counts, resamples, seed)], axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    values = differences(counts[None])[:, 0]
    return {name: (float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate(("accuracy", "f1"))}


def resampled_accuracies(
    right: np.ndarray, points: Sequence[Sequence[int]], resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracies of groups of runs on the same test rows, and a bootstrap of them over seeds and test rows.

    right: (runs, n) bool; points: for each of P points, the runs that are its seeds. Returns the means, (P,), and their
    replicates, (resamples, P). A replicate draws n test rows with replacement, the same for all runs, and for each
    point as many of its runs as it has, with replacement: a point of one run varies with the test rows alone. Seeded.
    """
    patterns, counts = np.unique(
        right, axis=1, return_counts=True
    )  # (runs, K): rows that all runs treat alike are drawn together
    rng, replicates = np.random.default_rng((seed, 1)), []
    for draws in _draws(counts, resamples, seed):
        accuracies = draws @ patterns.T / right.shape[1]  # (R, runs)
        drawn = [rng.integers(0, len(runs), (len(draws), len(runs))) for runs in points]
        parts = [
            np.take_along_axis(accuracies[:, [*runs]], pick, 1).mean(1)
            for runs, pick in zip(points, drawn, strict=True)
        ]
        replicates.append(np.stack(parts, axis=1))
    return np.array([right[[*runs]].mean() for runs in points]), np.concatenate(replicates)


def last_crossing(x: np.ndarray, differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where piecewise linear curves change sign for the last time.

    x: (S,) ascending; differences: (R, S), the curves' values there. Returns the places, (R,), NaN where a curve has no
    values of both signs; and the sign (R,) from there on, or of the whole curve where there is no change (0 if it is 0
    everywhere). Where a curve is 0 for a while between the signs, the place is the end of that.
    """
    sign = np.sign(differences[:, -1])  # from here on
    begins, places = (np.full(len(differences), np.nan) for _ in range(2))
    for j in range(len(x) - 2, -1, -1):
        here, following = differences[:, j], differences[:, j + 1]
        with np.errstate(invalid="ignore", divide="ignore"):
            zero = x[j] + (x[j + 1] - x[j]) * here / (here - following)
        other = (sign != 0) & (np.sign(here) != sign)
        begins = np.where(other & np.isnan(begins), zero, begins)
        places = np.where(other & (here != 0) & np.isnan(places), begins, places)
        sign = np.where(sign == 0, np.sign(here), sign)
    return places, sign


def crossing(
    sizes: Sequence[int], a: np.ndarray, b: np.ndarray, replicates_a: np.ndarray, replicates_b: np.ndarray
) -> dict[str, float | int | None]:
    """The number of training rows where a's curve and b's cross for the last time, with its 95 % interval.

    sizes: (S,) numbers of rows, ascending; a, b: (S,) mean accuracies there; replicates_…: (R, S), of the same draws. Between
    sizes a - b is linear in the logarithm of the rows; outside of them nothing is said. Returns
    - rows: where a - b changes sign for the last time, None if it does not
    - later: the sign of a - b from there on (1: a is ahead), or of all of it where it does not change
    - low, high: percentiles 2.5 and 97.5 of the replicates' crossings, on a scale that holds those without one: a replicate whose
      a - b has the later sign everywhere has crossed below all sizes (-inf), any other has not crossed yet (inf). So a
      side with more than 2.5 % of such replicates is open. Where a - b itself has no crossing, the later sign is here that of most
      crossing replicates. NaN where no replicate crosses
    - without: the share of replicates that do not cross
    """
    x = np.log(sizes)
    (place,), (later,) = last_crossing(x, (a - b)[None])
    places, signs = last_crossing(x, replicates_a - replicates_b)
    none = np.isnan(places)
    found = {
        "rows": None if np.isnan(place) else float(np.exp(place)),
        "later": int(later),
        "without": float(none.mean()),
    }
    if none.all():
        return found | {"low": math.nan, "high": math.nan}
    towards = later if found["rows"] else np.sign(signs[~none].sum()) or later
    scale = np.sort(np.where(none, np.where(signs == towards, -np.inf, np.inf), np.exp(places)))
    cut = math.floor(
        0.025 * len(scale)
    )  # no interpolation: an end is infinite where more than 2.5 % of the replicates are
    low, high = scale[cut], scale[len(scale) - 1 - cut]
    return found | {"low": float(low), "high": float(high)}
