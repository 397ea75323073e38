"""Batches: which rows, in which order, and packed into one line of tokens. All of it is host work, done before a model runs.

The order is a pure function of (seed, epoch), so that a run can be repeated and resumed at any step.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


@functools.lru_cache(maxsize=1)
def _epoch_order(epoch: int, num_rows: int, seed: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_rows)
    order.flags.writeable = False  # every step of the epoch reads the same array
    return order


def step_rows(step: int, num_rows: int, global_batch_size: int, seed: int) -> np.ndarray:
    """The training rows of one optimizer step: a window of the epoch's shuffled order, the last one of an epoch shorter.

    A function of its arguments alone, so that resuming at any step needs no state.
    """
    steps_per_epoch = -(-num_rows // global_batch_size)
    epoch, index = divmod(step, steps_per_epoch)
    order = _epoch_order(epoch, num_rows, seed)
    return order[index * global_batch_size : (index + 1) * global_batch_size]


def to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The array as a tensor on `device`. On a GPU nobody waits: neither the host for the work before, nor that for the copy."""
    tensor, device = torch.from_numpy(array), torch.device(device)
    # A copy out of memory that is not pinned waits for the work queued before it, as soon as it is more than a few pages.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Batch(NamedTuple):
    """B rows packed into one line of N tokens: what the models' `forward` takes."""

    input_ids: torch.Tensor  # (N,) int64
    position_ids: torch.Tensor  # (N,) int64, counted in each row from 0
    cu_seqlens: torch.Tensor  # (B + 1,) int32, cumulative row lengths
    max_seqlen: int

    @property
    def last(self) -> torch.Tensor:
        """Where each row's last token stands, (B,) int64: what a language model is asked to continue."""
        return self.cu_seqlens[1:].long() - 1


def pack(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", starts: Sequence[int] | None = None
) -> Batch:
    """Packs rows of ids. `starts`: the position of each row's first token, where a cache holds what comes before it."""
    lengths = np.array([len(row) for row in rows])
    cu_seqlens = np.concatenate([[0], lengths.cumsum()])
    first = cu_seqlens[:-1] if starts is None else cu_seqlens[:-1] - np.array(starts)
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(first, lengths)
    input_ids = np.concatenate(rows).astype(np.int64)
    arrays = input_ids, position_ids, cu_seqlens.astype(np.int32)
    return Batch(*(to_device(array, device) for array in arrays), int(lengths.max()))


def pack_shared(rows: Sequence[list[int]], shared: int, device: torch.device | str = "cpu") -> Batch:
    """Packs rows that all begin with the same `shared` ids: these stand in the batch once, in the first row."""
    first, *others = rows
    return pack([first, *(row[shared:] for row in others)], device, [0] + [shared] * len(others))


def length_batches(rows: Sequence[Sequence[int]], max_tokens: int, extra: int = 0) -> list[np.ndarray]:
    """Row numbers in batches of at most `max_tokens` tokens (or one row), sorted by length: for evaluation.

    `extra`: what each row needs besides its own tokens, as in a cache with room for more.
    """
    batches, batch, tokens = [], [], 0
    for row in np.argsort([len(row) for row in rows], kind="stable"):
        if batch and tokens + len(rows[row]) + extra > max_tokens:
            batches.append(np.array(batch))
            batch, tokens = [], 0
        batch.append(row)
        tokens += len(rows[row]) + extra
    return [*batches, np.array(batch)] if batch else []
