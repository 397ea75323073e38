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


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): |confidence - accuracy| over equal-width bins.

    probabilities: (n, C); labels: (n,). 0 is perfect; 0.05 means off by five percentage points on average.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    # Bins are (low, high], as in the paper; the clip keeps a confidence that rounding put above 1 in the last one.
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=confidence, minlength=bins) - np.bincount(index, weights=right, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


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
