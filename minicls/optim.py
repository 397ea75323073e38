"""AdamW with two parameter groups, the learning rate as a function of the step, class weights."""

import math

import numpy as np
import torch
from torch import nn


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) with the HF Trainer's defaults: betas (0.9, 0.999), eps 1e-8.

    Only matrices and embeddings decay, not the one-dimensional parameters: biases, norm weights.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def cosine_lr(
    step: int, total_steps: int, learning_rate: float, warmup_ratio: float = 0.0
) -> float:
    """The learning rate of `step`, counted from 0.

    Linear warm-up from 0 over `warmup_ratio` of the steps (rounded up, as in the HF Trainer), then
    a half cosine down to 0. Equals transformers' `get_cosine_schedule_with_warmup`.
    """
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_class_weights(labels: np.ndarray, num_labels: int, scheme: str) -> np.ndarray:
    """The weight of each class's rows in the loss, (C,) fp32. labels: (n,) int64.

    `none` gives 1. `balanced` gives n / (number of classes that occur * rows of the class), as in
    scikit-learn, and 0 to a class without rows.
    """
    if scheme == "none":
        return np.ones(num_labels, np.float32)
    counts = np.bincount(labels, minlength=num_labels)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts > 0, weights, 0.0).astype(np.float32)
