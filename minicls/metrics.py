"""Counts -> accuracy, precision, recall and F1, with their uncertainty. Most functions start from a confusion matrix.

n rows, C classes. `confusion[i, j]` counts rows of class i that were predicted as j.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch


def evaluate_logits(logits: torch.Tensor, labels: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Loss (mean cross-entropy), accuracy and macro precision, recall, F1 of logits (n, C); their confusion matrix."""
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels)).item()
    confusion = confusion_matrix(labels, logits.argmax(1).numpy(), logits.shape[1])
    return {"loss": loss} | classification_metrics(confusion), confusion


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """labels, predictions: (n,) int. Returns (C, C) int64: true class down, predicted class across."""
    return np.bincount(labels * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)


def per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, (..., C) each, from (..., C, C) counts; 0/0 is 0, as in scikit-learn."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)  # (..., C)
    predicted, actual = confusion.sum(-2), confusion.sum(-1)  # (..., C)
    f1 = 2 * hits / np.maximum(predicted + actual, 1)
    return hits / np.maximum(predicted, 1), hits / np.maximum(actual, 1), f1


def classification_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, and the unweighted (macro) mean of precision, recall and F1 over the classes that occur.

    A class that has no rows and is never predicted is left out of the means, as in scikit-learn without `labels`; a
    class without rows that is predicted counts as 0.
    """
    occurring = occurs(confusion)
    accuracy = np.trace(confusion) / max(1, confusion.sum())
    means = [float(scores.sum() / max(1, occurring.sum())) for scores in per_class(confusion)]  # 0 if no class occurs
    return {"accuracy": float(accuracy)} | dict(zip(("precision", "recall", "f1"), means, strict=True))


def occurs(confusion: np.ndarray) -> np.ndarray:
    """The classes that have rows or are predicted, (C,) bool: macro means are taken over these."""
    return confusion.sum(0) + confusion.sum(1) > 0


def _scores(draws: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Accuracy and macro F1 of R resamples, (2, R). draws: (R, K), counts of K cells; labels, predictions: (K,)."""
    num_labels = 1 + max(labels.max(), predictions.max())

    def per_label(cells: np.ndarray, classes: np.ndarray) -> np.ndarray:  # (R, C): cells added up by class
        index = np.arange(len(cells))[:, None] * num_labels + classes
        return np.bincount(index.ravel(), cells.ravel(), len(cells) * num_labels).reshape(-1, num_labels)

    right = labels == predictions
    hits, rows = per_label(draws[:, right], labels[right]), per_label(draws, labels) + per_label(draws, predictions)
    f1 = (2 * hits / np.maximum(rows, 1)).sum(1) / np.maximum((rows > 0).sum(1), 1)
    return np.stack([hits.sum(1) / np.maximum(draws.sum(1), 1), f1])


def _bootstrap(counts: np.ndarray, statistic: Callable, resamples: int, seed: int) -> np.ndarray:
    """A statistic of bootstrap resamples, (..., resamples).

    counts: the rows in each of K cells; statistic: takes (R, K) counts. The scores depend on a row only through its
    cell, so n rows drawn with replacement are one multinomial draw of the K occupied cells: the same distribution for
    a fraction of the work.
    """
    rng, part = np.random.default_rng(seed), max(1, min(500, 2_000_000 // len(counts)))
    sizes = [min(part, resamples - start) for start in range(0, resamples, part)]
    draws = (rng.multinomial(counts.sum(), counts / counts.sum(), size=size) for size in sizes)
    return np.concatenate([statistic(drawn) for drawn in draws], axis=-1)


def f1_interval(confusion: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of macro F1 by a bootstrap over the test rows (Efron & Tibshirani 1993, chapter 13).

    As in `classification_metrics`, the macro mean of a resample is over the classes that occur in it.
    """
    labels, predictions = np.nonzero(confusion)
    if not len(labels):
        return 0.0, 0.0
    counts = confusion[labels, predictions]
    f1 = _bootstrap(counts, lambda draws: _scores(draws, labels, predictions)[1], resamples, seed)
    low, high = np.quantile(f1, [0.025, 0.975])
    return float(low), float(high)


def accuracy_interval(accuracy: float, n: int) -> tuple[float, float]:
    """95 % interval of an accuracy over n rows (Wilson 1927). Unlike +-1.96 standard errors, it stays within [0, 1]."""
    z2 = 1.959963984540054**2
    middle, half = accuracy + z2 / (2 * n), math.sqrt(z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n * n)))
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    # Rounding can put a bound just outside [0, 1], or on the wrong side of the accuracy.
    return min(accuracy, max(0.0, low)), max(accuracy, min(1.0, high))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): |confidence - accuracy| over equal-width bins.

    probabilities: (n, C); labels: (n,). 0 is perfect; 0.05 is an average gap of five percentage points.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    # Bins are (low, high], as in the paper. Rounding can put a confidence above 1: the clip keeps it in the last bin.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=confidence, minlength=bins) - np.bincount(index, weights=right, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in [0.01, 100] that minimises the cross-entropy of softmax(logits / T) (Guo et al. 2017, section 4.2).

    logits: (n, C); labels: (n,). Fit it on rows that are not test rows. If no finite T is best, for example if all rows
    are right, the result is the nearer bound.
    """
    logits = logits - logits.max(1, keepdims=True)
    # The cross-entropy is convex in 1 / T, so its slope changes sign once: bisect log(1 / T).
    low, high = math.log(0.01), math.log(100)
    for _ in range(50):
        middle = (low + high) / 2
        weights = np.exp(math.exp(middle) * logits)
        expected = (weights * logits).sum(1) / weights.sum(1)  # (n,)
        slope = (expected - logits[np.arange(len(labels)), labels]).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def mcnemar(labels: np.ndarray, predictions_a: np.ndarray, predictions_b: np.ndarray) -> tuple[int, int, float]:
    """McNemar's test of two classifiers on the same rows (McNemar 1947), in its exact binomial form.

    Returns the number of rows that only a gets right, the number that only b gets right, and the two-sided p-value.
    """
    a, b = predictions_a == labels, predictions_b == labels
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    # Integers are exact: the sum can have thousands of digits, the quotient is an ordinary float. Each binomial
    # coefficient comes from the one before: math.comb would start over, minutes for tens of thousands of rows.
    tail = sum(itertools.accumulate(range(k), lambda term, i: term * (n - i) // (i + 1), initial=1))
    return only_a, only_b, min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    labels: np.ndarray, predictions_a: np.ndarray, predictions_b: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """{"accuracy" and "f1": (difference a - b, low, high)} of two classifiers on the same rows, with 95 % intervals.

    Both are scored on the same resampled rows, so that rows that are hard for both move neither bound (Efron &
    Tibshirani 1993). As in `f1_interval`, rows with the same label and predictions are drawn together.
    """
    cells, counts = np.unique(np.stack([labels, predictions_a, predictions_b]), axis=1, return_counts=True)
    label, cells_a, cells_b = cells  # (K,) each

    def differences(draws: np.ndarray) -> np.ndarray:  # (2, R), in accuracy and macro F1
        return _scores(draws, label, cells_a) - _scores(draws, label, cells_b)

    low, high = np.quantile(_bootstrap(counts, differences, resamples, seed), [0.025, 0.975], axis=1)
    values = differences(counts[None])[:, 0]
    return {name: (float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate(("accuracy", "f1"))}


def resampled_accuracies(
    points: Sequence[Sequence[np.ndarray]], resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracies of groups of runs on the same test rows, and their bootstrap over seeds and test rows.

    points: for each of P points, which rows its seeds answer right, (n,) bool each. Returns the means, (P,), and their
    replicates, (resamples, P). A replicate draws n test rows with replacement, the same for all runs, and for each
    point its runs with replacement, in their number. So a point with a single run varies only with the test rows.
    """
    right, starts = np.concatenate(points), np.cumsum([len(point) for point in points[:-1]])  # (runs, n), (P - 1,)
    # Test rows that all runs treat alike are drawn together.
    patterns, counts = np.unique(right, axis=1, return_counts=True)  # (runs, K), (K,)
    rng = np.random.default_rng((seed, 1))

    def means(draws: np.ndarray) -> np.ndarray:  # (P, R)
        parts = np.split(draws @ patterns.T / right.shape[1], starts, axis=1)  # (R, its runs) for each point
        picks = [rng.integers(0, part.shape[1], part.shape) for part in parts]
        return np.stack([np.take_along_axis(part, pick, 1).mean(1) for part, pick in zip(parts, picks, strict=True)])

    return np.array([np.mean(point) for point in points]), _bootstrap(counts, means, resamples, seed).T


def last_crossing(x: np.ndarray, differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places where piecewise linear curves last change sign, (R,), and the signs from there on, (R,).

    x: (S,), ascending; differences: (R, S), the curves' values there. A curve without values of both signs has NaN and
    its only sign (0 if it is 0 everywhere). If a curve is 0 over an interval between the signs, the place is its end.
    """
    places, signs = np.full(len(differences), np.nan), np.sign(differences[:, 0])
    for i in range(1, len(x)):
        here, following = differences[:, i - 1], differences[:, i]
        with np.errstate(invalid="ignore", divide="ignore"):
            zeros = x[i - 1] + (x[i] - x[i - 1]) * here / (here - following)
        places = np.where(following * signs < 0, zeros, places)
        signs = np.where(following != 0, np.sign(following), signs)  # touching 0 does not change the sign
    return places, signs


def crossing(sizes: Sequence[int], differences: np.ndarray, replicates: np.ndarray) -> dict[str, float | int | None]:
    """The number of training rows at which two learning curves a and b cross for the last time, with its 95 % interval.

    sizes: (S,) numbers of rows, ascending; differences: (S,), a's mean accuracies minus b's; replicates: (R, S), the
    same of bootstrap draws. a - b is taken as linear in the logarithm of the rows between sizes; outside them nothing
    is said. Returns
    - rows: where a - b changes sign for the last time, None if it does not
    - later: the sign of a - b from there on (1: a is ahead), or its only sign
    - low, high: the 2.5 and 97.5 percentiles of the replicates' crossings. A replicate without one counts as -inf (it
      crossed below all sizes) if its sign is `later`, else as inf (it has not crossed yet), so a side with more than
      2.5 % of such replicates is open. If a - b has no crossing, the sign of most crossing replicates stands for
      `later` here. NaN if no replicate crosses
    - without: the share of replicates that do not cross
    """
    x = np.log(sizes)
    (place,), (later,) = last_crossing(x, differences[None])
    places, signs = last_crossing(x, replicates)
    crosses, uncrossed = not np.isnan(place), np.isnan(places)
    low = high = math.nan
    if not uncrossed.all():
        towards = later if crosses else np.sign(signs[~uncrossed].sum()) or later
        scale = np.sort(np.where(uncrossed, np.where(signs == towards, -np.inf, np.inf), np.exp(places)))
        cut = math.floor(0.025 * len(scale))  # without interpolation, which infinite neighbours would break
        low, high = float(scale[cut]), float(scale[-1 - cut])
    result = {"rows": float(np.exp(place)) if crosses else None, "later": int(later), "low": low, "high": high}
    return result | {"without": float(uncrossed.mean())}
