"""Knowledge distillation: a large model's class probabilities as a small one's targets (Hinton et al. 2015).

    python -m minicls predict LARGE texts.csv --out soft.parquet        # the probabilities of every class
    python train_bert.py --data DIR --soft-labels soft.parquet          # labelled rows, and texts that have no label

The models exchange nothing but probabilities over the classes, so they need not share a tokenizer or a head. The paper
is arXiv 1503.02531.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minicls.batch import to_device
from minicls.config import UserError, flag_of
from minicls.data import Data, Split, read_rows

PREFIX = "probability_"  # begins the names of the columns that `predict` writes, one for each class


def read_soft_labels(file: Path, text_column: str, label_names: Sequence[str]) -> dict[str, np.ndarray]:
    """The class probabilities (C,) float64 of each text in a file of `predict`; for a repeated text, its first row's.

    Raises UserError if a column is missing, or if a row's probabilities are not positive numbers with the sum 1.
    """
    if not file.is_file():
        raise UserError(
            f"--soft-labels: no file {file}; write one with `python -m minicls predict RUN TEXTS --out FILE`"
        )
    soft_labels: dict[str, np.ndarray] = {}
    for text, row in read_rows(file, text_column):
        columns = {name.removeprefix(PREFIX): value for name, value in row.items() if name.startswith(PREFIX)}
        if columns.keys() != {*label_names}:
            differing = sorted(columns.keys() ^ {*label_names})
            problem = (
                f"must have a column {PREFIX}<class> for each class of --data; it differs in {', '.join(differing)}"
            )
            remedy = "write it as .parquet or .csv, with a model of these classes and without --top-k"
            raise UserError(f"--soft-labels: {file} {problem[:200]}; {remedy}")
        try:
            probabilities = np.array([float(columns[name]) for name in label_names])
        except (TypeError, ValueError):
            probabilities = np.array([np.nan])
        if not ((probabilities >= 0).all() and abs(probabilities.sum() - 1) < 1e-3):
            problem = f"the probabilities of {text[:40]!r} are not numbers of at least 0 with the sum 1"
            raise UserError(f"--soft-labels: {file}: {problem}; write the file with `python -m minicls predict`")
        soft_labels.setdefault(text, probabilities)
    return soft_labels


def add_soft_labels(s, data: Data) -> Data:
    """The data with soft labels in its training split, and with the file's other texts added to that.

    `s` has the settings of train_bert.py. An added text has its most probable class as label, and row -1. A text of the
    validation or the test rows is not added: training on it would make their scores worthless.
    """
    if not s.soft_labels:
        for name in ("soft_label_weight", "temperature"):
            if getattr(s, name) is not None:
                raise UserError(f"{flag_of(name)}: used only with --soft-labels FILE; add that or leave the flag out")
        return data
    soft_labels = read_soft_labels(Path(s.soft_labels), s.text_column, data.label_names)
    train_texts = {*data.train.texts}
    other_texts = [text for text in soft_labels if text not in train_texts]
    added = [text for text in other_texts if text not in data.held_out_texts]
    missing, num_labelled = np.full(len(data.label_names), np.nan), len(data.train)
    texts = data.train.texts + added
    targets = np.array([soft_labels.get(text, missing) for text in texts])  # (n, C)
    labels = np.concatenate([data.train.labels, targets[num_labelled:].argmax(1)])
    train = Split(texts, labels, np.concatenate([data.train.rows, np.full(len(added), -1)]), targets)
    known = sum(text in soft_labels for text in data.train.texts)
    line = f"soft labels: for {known:,} of the {num_labelled:,} labelled rows, and {len(added):,} texts without a label"
    line += f"; {len(other_texts) - len(added):,} texts left out because they are validation or test rows"
    return dataclasses.replace(data, train=train, sources=(*data.sources, line))


class SoftTargets:
    """Targets (n, C) fp32 of a split's rows, and the weight of each in its row's loss, (n,) fp32.

    At temperature T the targets are the teacher's softmax(logits / T), which is proportional to p^(1 / T). The weight
    is `--soft-label-weight` for labelled rows, 1 for texts without a label, and 0 for rows without a soft label.
    """

    def __init__(self, split: Split, s, device: torch.device):
        """`s` has the settings of train_bert.py."""
        weight = 0.5 if s.soft_label_weight is None else s.soft_label_weight
        self.temperature, self.device = s.temperature or 1.0, device
        known = ~np.isnan(split.soft_labels[:, 0])  # (n,)
        softened = np.nan_to_num(split.soft_labels) ** (1 / self.temperature)  # (n, C)
        targets = softened / np.maximum(softened.sum(1, keepdims=True), np.finfo(float).tiny)
        weights = np.where(split.rows < 0, 1, weight) * known
        self.arrays = targets.astype(np.float32), weights.astype(np.float32)

    def __getitem__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The targets (B, C) of B rows, their weights (B,), and the temperature."""
        return *(to_device(array[rows], self.device) for array in self.arrays), self.temperature


def distillation_loss(
    losses: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mixes each row's loss with the cross-entropy between its soft target and softmax(logits / T), times T^2.

    losses, weights: (B,); logits, targets: (B, C). The gradient of the soft part shrinks with 1 / T^2; the factor makes
    up for that, so that the weight means the same at every temperature (Hinton et al. 2015, section 2).
    """
    soft = F.cross_entropy(logits / temperature, targets, reduction="none") * temperature**2  # (B,)
    return torch.lerp(losses, soft, weights)
