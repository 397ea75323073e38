"""A cascade: a small classifier answers, and defers to a large one where it is unsure.

    python -m minicls report --cascade SMALL LARGE --bench bench.json     # what it brings and what it costs
    python -m minicls predict SMALL texts.csv --then LARGE                # runs it

A text is deferred if the small model's confidence, the probability of its prediction, is not above a threshold. The
threshold is chosen on validation rows by the one-standard-error rule (Breiman et al. 1984): the lowest, which defers
the fewest texts, whose accuracy is within one standard error of the best.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minicls.config import UserError
from minicls.results import read_predictions


class Answers(NamedTuple):
    """The predictions of both models for the same n rows."""

    labels: np.ndarray  # (n,) classes
    small: np.ndarray  # (n,) predicted classes
    large: np.ndarray  # (n,)
    confidence: np.ndarray  # (n,) the small model's

    def cascade(self, threshold: float) -> np.ndarray:
        """The classes (n,) that the cascade predicts."""
        return np.where(self.confidence <= threshold, self.large, self.small)

    def accuracy(self, threshold: float) -> float:
        return float((self.cascade(threshold) == self.labels).mean())

    def share_deferred(self, threshold: float) -> float:
        return float((self.confidence <= threshold).mean())

    def at_random(self, share: float) -> float:
        """The expected accuracy if such a share of the texts is deferred at random."""
        return (1 - share) * self.accuracy(0) + share * self.accuracy(1)


def pair(small: dict[str, np.ndarray], large: dict[str, np.ndarray]) -> Answers:
    """The answers in two files of predictions for the same rows, as written or as results/thin.py reduces them."""
    probabilities = [values for name, values in small.items() if name.startswith("probability")]  # (n,) each
    return Answers(small["label"], small["prediction"], large["prediction"], np.max(probabilities, axis=0))


def validation_answers(small: Path, large: Path, hint: str = ", or pass --threshold") -> Answers:
    """The answers of two runs for their validation rows. Raises UserError, with `hint` added, if these differ."""
    columns = [read_predictions(run / "validation.parquet") for run in (small, large)]
    if None in columns:
        run = (small, large)[columns.index(None)]
        raise UserError(f"{run}: no validation.parquet; train with --validation-size{hint}")
    if any(not np.array_equal(columns[0][name], columns[1][name]) for name in ("row", "label")):
        raise UserError(f"{large}: other validation rows than {small}; train both with one --validation-size{hint}")
    return pair(*columns)


def deferral_curve(answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every division of n rows that a threshold can make, from nothing deferred to everything: three arrays (T,).

    The thresholds, ascending from 0; the rows that the cascade answers right; and, of the deferred rows, those that
    only one of the models answers right.
    """
    thresholds, level = np.unique(np.append(0, answers.confidence), return_inverse=True)  # (T,), (1 + n,)
    small, large = (np.append(0, answer == answers.labels) for answer in (answers.small, answers.large))  # (1 + n,)
    gained, differing = (np.bincount(level, change).cumsum() for change in (large - small, abs(large - small)))
    return thresholds, small.sum() + gained, differing


def choose_threshold(validation: Answers) -> float:
    """The lowest threshold that is no more than one standard error worse than the best.

    Two thresholds treat only the rows between them differently. If d of these are answered right by one model alone,
    the standard error of the difference in right answers is about the square root of d, as in McNemar's test.
    """
    thresholds, right, differing = deferral_curve(validation)
    best = right.argmax()
    return float(thresholds[np.argmax(right[best] - right <= np.sqrt(abs(differing[best] - differing)))])


def unsure(log_probabilities: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which of n rows to defer, (n,) bool, by the small model's log-probabilities (n, C)."""
    return log_probabilities.exp().amax(1) <= threshold


def defer(scores: torch.Tensor, threshold: float, texts: Sequence[str], large: Callable) -> int:
    """Replaces the log-probabilities (n, C) of unsure texts by `large(these texts)`; returns how many were deferred."""
    deferred = unsure(scores, threshold).nonzero().flatten().tolist()
    if deferred:
        scores[deferred] = large([texts[i] for i in deferred])
    return len(deferred)


class Cascade:
    """Two classifiers that answer as one: what `predict` needs of a `Classifier`."""

    def __init__(self, small, large, threshold: float):
        """small, large: `Classifier`s of the same classes."""
        if small.label_names != large.label_names:
            raise UserError("--then: its classes are not those of RUN; pass a run that was trained on the same classes")
        self.small, self.large, self.threshold = small, large, threshold
        self.label_names, self.predictions = small.label_names, small.predictions
        self.num_deferred = 0

    def scores(self, texts: Sequence[str]) -> torch.Tensor:
        """Log-probabilities (n, C) float64 by the model that answers each text."""
        scores = self.small.scores(texts).log_softmax(1)
        large = self.large.scores
        self.num_deferred += defer(scores, self.threshold, texts, lambda deferred: large(deferred).log_softmax(1))
        return scores

    def perplexities(self, scores: torch.Tensor) -> list[None]:
        """None for each text: those of two models are not comparable."""
        return [None] * len(scores)
