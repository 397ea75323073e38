"""The packed batch, and attention over it: the only layer that must know where a row of text ends.

A batch is one sequence of N tokens without padding, so all other layers compute on real tokens
only. Three functions keep the rows apart:

    attention         PyTorch's variable-length flash kernel, if a GPU has it, else the next one
    padded_attention  pads the rows for a dense kernel and gathers the real tokens back
    cached_attention  lets new tokens see their row's keys and values in a cache

N tokens in the batch, B rows, T queries and S keys in a row, H heads, Hkv key/value heads (a
divisor of H), Dh head size.
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from minicls.kernels import gpu_attention, has_flash, matmul_dtype, on_gpu, plain_attention

# Rows per padded group on a CPU. Rows are sorted by length, so 16 waste little on padding and still
# keep a kernel busy: with AG News lengths (64 rows, 12 heads), half the time of one group of 64.
ROWS_PER_GROUP = 16
# Up to this length, a CPU uses `plain_attention`, which keeps all S * S scores for backward.
MAX_PLAIN = 256
# Versions after torch 2.11 need this argument for grouped heads; 2.11 does not have it.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Batch(NamedTuple):
    """B rows of token ids packed into one sequence of N tokens: the input of the models."""

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, counted within each row
    cu_seqlens: Tensor  # (B + 1,) int32: row b is tokens cu_seqlens[b] up to cu_seqlens[b + 1]
    max_seqlen: int
    num_shared: int = 0  # length of a shared prefix that only row 0 holds; 0 with a cache

    @property
    def last(self) -> Tensor:
        """The index of each row's last token, (B,) int64: a language model continues it."""
        return self.cu_seqlens[1:].long() - 1


class Layout(NamedTuple):
    """How attention reads the rows of a batch. Made once per forward pass, for all layers.

    The variable-length kernel reads packed rows. A dense kernel reads groups of rows, each padded
    to its longest; one index gathers them, another gathers the tokens back. For the rows abc, d
    and ef in one group:

        packed       a b c d e f
        pad_index    0 1 2 | 3 3 3 | 4 5 4     (rows, S) the token at each padded position
        padded       a b c | d d d | e f e     padding repeats the row's own tokens
        unpad_index  0 1 2   3       6 7       (N,) each token's index in the flattened padding

    A batch of one row needs no index: it is already dense.
    """

    cu_seqlens: Tensor | None = None  # for the variable-length kernel
    max_seqlen: int | None = None
    groups: list[tuple[Tensor, Tensor]] | None = None  # each a pad_index and a mask (rows, 1, 1, S)
    unpad_index: Tensor | None = None


def lay_out(batch: Batch, x: Tensor, head_dim: int, dropout_p: float = 0.0) -> Layout:
    """Chooses the layout of a batch whose hidden states are x, by device and dtype.

    Call it before the first layer: inside a layer, activation checkpointing would repeat it.
    """
    dtype = matmul_dtype(x)
    # The flash kernel has no dropout, and needs all tokens of a row next to each other.
    if not dropout_p and not batch.num_shared and has_flash(x.device, dtype, head_dim):
        return Layout(batch.cu_seqlens, batch.max_seqlen)
    if len(batch.cu_seqlens) == 2:
        return Layout()
    return (pad_layout if on_gpu(x.device) else _pad_layout_uncompiled)(batch, dtype)


def pad_layout(batch: Batch, dtype: torch.dtype) -> Layout:
    """The layout for `padded_attention`, with masks for q, k and v in `dtype`."""
    N, num_shared, device = len(batch.input_ids), batch.num_shared, batch.cu_seqlens.device
    starts, lengths = batch.cu_seqlens[:-1], batch.cu_seqlens.diff()  # (B,)
    row = torch.repeat_interleave(lengths, output_size=N)  # (N,) the row of each token
    # Only row 0 holds the shared tokens: count them into the other rows' starts and lengths.
    missing = num_shared * (torch.arange(len(lengths), device=device) > 0)  # (B,)
    starts, lengths = starts - missing, lengths + missing
    if on_gpu(device):  # one group, whose length is known without waiting for the GPU
        members_and_lengths = [(slice(None), batch.max_seqlen + num_shared)]
    else:  # groups of similar lengths, since attention costs rows * S * S
        by_length = lengths.argsort(stable=True).split(ROWS_PER_GROUP)
        members_and_lengths = [(members, int(lengths[members[-1]])) for members in by_length]
    groups, padded_starts, size = [], torch.empty_like(lengths), 0
    for members, S in members_and_lengths:
        # Padding repeats the row's tokens: one gather fills all positions, and autograd keeps only
        # the index. If it repeated a single token, a GPU would add up its gradients one by one.
        position = torch.arange(S, device=device) % lengths[members, None]  # (rows, S)
        pad_index = torch.where(position < num_shared, position, starts[members, None] + position)
        mask = positions_up_to(lengths[members, None, None, None] - 1, S, dtype)  # (rows, 1, 1, S)
        groups.append((pad_index, mask))
        padded_starts[members] = size + S * torch.arange(len(pad_index), device=device)
        size += pad_index.numel()
    unpad_index = (padded_starts - starts)[row] + torch.arange(N, device=device)
    return Layout(groups=groups, unpad_index=unpad_index)


# On a CPU the lengths become Python numbers, each of which would break torch.compile's graph.
_pad_layout_uncompiled = torch.compiler.disable(pad_layout)


def positions_up_to(last: Tensor, S: int, dtype: torch.dtype) -> Tensor:
    """The mask (..., S) of positions 0 to `last` (..., 1): bool on a CPU, 0 or -inf on a GPU.

    A GPU kernel adds the mask to the scores, so it has their `dtype`. Its row stride must be a
    multiple of 8 elements, or every layer would copy it.
    """
    if not on_gpu(last.device):
        return torch.arange(S, device=last.device) <= last
    stride = (S // 8 + 1) * 8  # always above S, so that torch.compile sees one case
    positions = torch.arange(stride, device=last.device)
    return torch.where(positions <= last, 0.0, -torch.inf).to(dtype)[..., :S]


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """Scaled dot-product attention of every token to its own row (arXiv 1706.03762, section 3.2.1).

    q: (N, H, Dh); k, v: (N, Hkv, Dh), grouped as in arXiv 2305.13245. `causal`: a token sees none
    after it. Returns (N, H, Dh) in q's dtype.
    """
    if layout.cu_seqlens is None:
        return padded_attention(q, k, v, layout, causal, dropout_p)
    bounds, longest = layout.cu_seqlens, layout.max_seqlen  # the same for queries and keys
    window = (-1, 0 if causal else -1)  # tokens seen to the left and to the right; -1: all of them
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window, **GROUPED)


def padded_attention(q, k, v, layout, causal=False, dropout_p=0.0) -> Tensor:
    """`attention` by padding each group of rows, attending, and gathering the real tokens back."""
    if layout.groups is None:  # a single row
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, Dh)
        return _dense_attention(q, k, v, None, causal, dropout_p)[0].transpose(0, 1)
    outputs = []
    for pad_index, mask in layout.groups:
        flat, shape = pad_index.flatten(), pad_index.shape
        padded = (x.index_select(0, flat).unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        # Padding is on the right, so a causal mask already hides it from every real query.
        output = _dense_attention(*padded, None if causal else mask, causal, dropout_p)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (rows * S, H, Dh)
    return torch.cat(outputs).index_select(0, layout.unpad_index)  # (N, H, Dh)


class CacheSlots(NamedTuple):
    """Where a batch's N new tokens go in a cache. Made once per forward pass, for all layers."""

    rows: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64; keys and values belong at [row, position] of the cache
    columns: Tensor  # (N,) int64; queries belong at [row, column] of a padded (B, T)
    T: int  # length of the padded queries
    mask: Tensor | None  # (B, 1, T, S), on a GPU (B, 1, group * T, S); None: use `is_causal`


def cache_slots(batch: Batch, x: Tensor, S: int, group: int) -> CacheSlots:
    """Places new tokens, whose hidden states are x, in a cache of S positions; group = H / Hkv.

    A query at position p sees keys 0 to p of its row. `is_causal` aligns the first query with the
    first key, so in general that takes a mask. But if most positions are new and the kernel is
    fused, queries are padded to T = S and placed at the column of their position: there `is_causal`
    is right, and costs half as much.
    """
    N, B, T = len(batch.input_ids), len(batch.cu_seqlens) - 1, batch.max_seqlen
    positions, gpu = batch.position_ids, on_gpu(x.device)
    rows = torch.repeat_interleave(batch.cu_seqlens.diff(), output_size=N).long()  # (N,)
    if 2 * T > S and (gpu or S > MAX_PLAIN):
        return CacheSlots(rows, positions, positions, S, None)
    columns = torch.arange(N, device=x.device) - batch.cu_seqlens[rows]  # (N,)
    last = positions.new_zeros(B, T).index_put((rows, columns), positions)  # (B, T)
    last = last.repeat(1, group) if gpu else last  # `gpu_attention` stacks a group's queries
    mask = positions_up_to(last[:, None, :, None], S, matmul_dtype(x))
    return CacheSlots(rows, positions, columns, T, mask)


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, slots: CacheSlots) -> Tensor:
    """Causal attention of new tokens, any number per row, to a cache that already has their keys.

    q: (N, H, Dh) packed; keys, values: (B, S, Hkv, Dh). Returns (N, H, Dh).
    """
    shape, at = (len(keys), slots.T, *q.shape[1:]), (slots.rows, slots.columns)
    full = len(q) == len(keys) * slots.T  # as in decoding: every row has T tokens
    queries = q.view(shape) if full else q.new_zeros(shape).index_put(at, q)  # (B, T, H, Dh)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    output = _dense_attention(queries, keys, values, slots.mask, causal=slots.mask is None)
    output = output.transpose(1, 2)  # (B, T, H, Dh)
    return output.flatten(0, 1) if full else output[at]  # (N, H, Dh)


def _dense_attention(q, k, v, mask, causal, dropout_p=0.0) -> Tensor:
    """softmax(q kᵀ / √Dh) v by the fastest kernel. q: (B, H, T, Dh); k, v: (B, Hkv, S, Dh).

    mask: broadcasts to (B, H, T, S), or for groups on a GPU to (B, Hkv, H / Hkv * T, S); None:
    every key is seen, or with `causal` no later one.
    """
    with torch.autocast(q.device.type, enabled=False):  # autocast would change the dtypes
        if on_gpu(q.device):
            return gpu_attention(q, k, v, mask, causal, dropout_p)
        # The CPU's fused kernel has no dropout. On short rows, plain attention is as fast in fp32
        # and twice as fast in bf16.
        if k.shape[2] <= MAX_PLAIN or dropout_p > 0.0:
            return plain_attention(q, k, v, mask, causal, dropout_p)
        # The fused kernel's backward pass is several times as fast in fp32 as in bf16.
        upcast = q.requires_grad and q.dtype == torch.bfloat16
        inputs = [x.float() for x in (q, k, v)] if upcast else (q, k, v)
        # Not `enable_gqa=H > Hkv`: torch.compile may hold the comparison as a symbol, not a bool.
        grouped = {"enable_gqa": True} if q.shape[1] > k.shape[1] else {}
        output = F.scaled_dot_product_attention(*inputs, mask, is_causal=causal, **grouped)
        return output.to(q.dtype)
