"""Counts -> accuracy, precision, recall, F1, with their uncertainty. Everything starts from a confusion matrix.

n rows, C classes. `confusion[i, j]` counts rows of class i that were predicted as j.
"""

import math

import numpy as np


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """labels, predictions: (n,) int. Returns (C, C) int64: true class down, predicted class across."""
    return np.bincount(labels * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)


def per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, (..., C) each, from (..., C, C) counts. 0/0 counts as 0, as in scikit-learn."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)  # (..., C)
    predicted, actual = confusion.sum(-2), confusion.sum(-1)  # (..., C)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(predicted + actual, 1)
    return precision, recall, f1


def classification_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, and the unweighted (macro) mean over the classes of precision, recall and F1."""
    precision, recall, f1 = per_class(confusion)
    accuracy = np.trace(confusion) / max(1, confusion.sum())
    means = {"precision": precision.mean(), "recall": recall.mean(), "f1": f1.mean()}
    return {"accuracy": float(accuracy)} | {name: float(value) for name, value in means.items()}


def f1_interval(confusion: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of macro F1 by a bootstrap over the test rows (Efron & Tibshirani 1993, chapter 13).

    Rows enter F1 only through the cell they count in, so drawing n rows with replacement is one multinomial draw of the
    C * C cells: the same distribution as resampling rows, at a thousandth of the work.
    """
    n, C = int(confusion.sum()), len(confusion)
    if n == 0:
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    f1 = [
        per_class(rng.multinomial(n, confusion.flatten() / n, size=min(500, resamples - start)).reshape(-1, C, C))[2].mean(-1)
        for start in range(0, resamples, 500)  # in parts: 10,000 tables of 77 x 77 cells would be half a gigabyte
    ]
    low, high = np.quantile(np.concatenate(f1), [0.025, 0.975])
    return float(low), float(high)


def accuracy_interval(accuracy: float, n: int) -> tuple[float, float]:
    """95 % interval of an accuracy over n rows (Wilson 1927): unlike +-1.96 standard errors it stays within [0, 1]."""
    z2 = 1.959963984540054**2
    middle, half = accuracy + z2 / (2 * n), math.sqrt(z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n * n)))
    # Rounding may put a bound of 0 or 1 just outside, or on the wrong side of the accuracy itself.
    return min(accuracy, max(0.0, (middle - half) / (1 + z2 / n))), max(accuracy, min(1.0, (middle + half) / (1 + z2 / n)))


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

    logits: (n, C); labels: (n,). To be fitted on rows that are not tested on. Where no finite T is the best, on rows that are
    all right for one, it is the nearer bound.
    """
    logits = logits - logits.max(1, keepdims=True)
    low, high = math.log(0.01), math.log(100)  # of 1 / T: the cross-entropy is convex in it, so its slope changes sign once
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
    """Differences a - b of two classifiers on the same rows: {"accuracy" and "f1": (difference, low, high)}, 95 % intervals.

    Both are scored on the same resampled rows, so that rows hard for both move neither bound (Efron & Tibshirani 1993). As in
    `f1_interval`, rows that agree in label and both predictions are drawn together.
    """
    cells, counts = np.unique(np.stack([labels, predictions_a, predictions_b]), axis=1, return_counts=True)
    label, *predicted = np.eye(num_labels)[cells]  # (cells, C) each

    def scores(draws: np.ndarray) -> np.ndarray:
        """(2, R): the differences in accuracy and macro F1 of R draws, (R, cells) counts."""
        hits = [draws @ (label * p) for p in predicted]  # (R, C) each
        f1 = [2 * h / np.maximum(draws @ (label + p), 1) for h, p in zip(hits, predicted, strict=True)]
        return np.stack([(hits[0] - hits[1]).sum(1) / len(labels), (f1[0] - f1[1]).mean(1)])

    rng = np.random.default_rng(seed)
    sizes = [min(500, resamples - start) for start in range(0, resamples, 500)]
    drawn = [scores(rng.multinomial(len(labels), counts / len(labels), size=size).astype(np.float64)) for size in sizes]
    low, high = np.quantile(np.concatenate(drawn, axis=1), [0.025, 0.975], axis=1)
    differences = scores(counts[None].astype(np.float64))[:, 0]
    return {name: (float(differences[i]), float(low[i]), float(high[i])) for i, name in enumerate(("accuracy", "f1"))}
