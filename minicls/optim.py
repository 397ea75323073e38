"""AdamW over two parameter groups, the learning rate as a pure function of the step, and class weights."""

import math

import numpy as np
import torch
from torch import nn


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with the HF Trainer's defaults: betas (0.9, 0.999), eps 1e-8.

    Matrices and embeddings decay; biases and norm weights, which are all the one-dimensional ones, do not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """The steps that the learning rate rises over, rounded up as the HF Trainer does."""
    return math.ceil(total_steps * warmup_ratio)


def cosine_lr(
    step: int, total_steps: int, learning_rate: float, warmup_ratio: float = 0.0
) -> float:
    """The learning rate of `step` (from 0): linear warm-up from 0, then a half cosine down to 0 at `total_steps`.

    Equals transformers' `get_cosine_schedule_with_warmup`.
    """
    warmup = warmup_steps(total_steps, warmup_ratio)
    if step < warmup:
        return learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def every_steps(interval: float, total_steps: int) -> int:
    """`--eval-every` and `--save-every` in steps: below 1 a fraction of all steps, rounded up as the HF Trainer does.

    0.1 of 9,375 steps is every 938. 0 means never; the caller still acts at the last step.
    """
    return math.ceil(interval * total_steps) if interval < 1 else int(interval)


def class_weights(labels: np.ndarray, num_labels: int, scheme: str) -> torch.Tensor:
    """The weight of each class's rows in the loss, (C,) fp32: 1, or, `balanced`, inversely proportional to its rows.

    labels: (n,) int. Balanced weights are n / (classes that occur * rows of the class), as in scikit-learn; a class
    without rows has no row to weight, and gets 0.
    """
    if scheme == "none":
        return torch.ones(num_labels)
    counts = np.bincount(labels, minlength=num_labels)
    weights = np.where(
        counts > 0, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0
    )
    return torch.from_numpy(weights.astype(np.float32))
