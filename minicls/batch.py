"""Batches: the order of rows, the rows of a batch, and packing. Host work, done before a model runs.

The order is a pure function of (seed, epoch), so a run can be repeated, and resumed at any step.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from minicls.attention import Batch

Rows = Sequence[list[int]]  # token ids of each row


@functools.lru_cache(maxsize=1)
def _epoch_order(epoch: int, num_rows: int, seed: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_rows)
    order.flags.writeable = False  # every step of the epoch reads the same array
    return order


def step_rows(step: int, num_rows: int, global_batch_size: int, seed: int) -> np.ndarray:
    """The training rows of an optimizer step: a window of the epoch's shuffled order, shorter at the epoch's end."""
    steps_per_epoch = -(-num_rows // global_batch_size)
    epoch, index = divmod(step, steps_per_epoch)
    order = _epoch_order(epoch, num_rows, seed)
    return order[index * global_batch_size : (index + 1) * global_batch_size]


def to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copies the array to `device`, without making the host wait for a GPU."""
    tensor, device = torch.from_numpy(array), torch.device(device)
    # A copy of more than a few pages from memory that is not pinned waits for all work queued before it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def pack(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", starts: Sequence[int] | None = None
) -> Batch:
    """Packs rows of ids. `starts`: the position of each row's first token, if a cache holds the tokens before it."""
    lengths = np.array([len(row) for row in rows])
    cu_seqlens = np.concatenate([[0], lengths.cumsum()])
    first = cu_seqlens[:-1] if starts is None else cu_seqlens[:-1] - np.array(starts)
    position_ids = np.arange(cu_seqlens[-1]) - np.repeat(first, lengths)
    arrays = np.concatenate(rows).astype(np.int64), position_ids, cu_seqlens.astype(np.int32)
    return Batch(*(to_device(array, device) for array in arrays), int(lengths.max()))


def pack_shared(rows: Sequence[list[int]], num_shared: int, device: torch.device | str = "cpu") -> Batch:
    """Packs rows whose first `num_shared` ids are equal: only the first row holds them, so they are computed once."""
    first, *others = rows
    starts = [0] + [num_shared] * len(others)
    return pack([first, *(row[num_shared:] for row in others)], device, starts)._replace(num_shared=num_shared)


def length_batches(rows: Sequence[Sequence[int]], max_tokens: int, extra: int = 0) -> list[np.ndarray]:
    """Indices of rows, sorted by length, in batches of one row or at most `max_tokens` tokens: for evaluation.

    A row counts as long as the longest of its batch, which is the room it gets in a cache. `extra`: tokens that each
    row needs besides its own.
    """
    batches, batch = [], []
    for row in np.argsort([len(row) for row in rows], kind="stable"):
        if batch and (len(batch) + 1) * (len(rows[row]) + extra) > max_tokens:
            batches.append(np.array(batch))
            batch = []
        batch.append(row)
    return [*batches, np.array(batch)] if batch else []
