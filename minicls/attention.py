"""The packed batch, and attention over it: the only layer that must know where a row of text ends.

A batch is one sequence of N tokens without padding, so all other layers compute on real tokens
only. Three functions keep the rows apart:

    attention         PyTorch's variable-length flash kernel, if a GPU has it, else the next one
    padded_attention  gathers rows with padding for a dense kernel, and the real tokens back
    cached_attention  new tokens see their row's keys and values in a cache

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

# Rows per padded group on a CPU. Sorted by length, 16 rows waste little on padding and still fill
# a kernel: on AG News lengths (64 rows, 12 heads) this takes half the time of one group of 64.
ROWS_PER_GROUP = 16
# Up to this length, a CPU computes a head's S * S scores in full, and keeps them for backward.
MAX_PLAIN = 256
# torch 2.11 accepts grouped heads unasked; later versions refuse them without this argument.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Batch(NamedTuple):
    """B rows of token ids packed into one sequence of N tokens: what the models take."""

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, counted within each row
    cu_seqlens: Tensor  # (B + 1,) int32: row b is tokens cu_seqlens[b] up to cu_seqlens[b + 1]
    max_seqlen: int
    shared: int = 0  # tokens that begin every row and are packed once, in the first; no cache then

    @property
    def last(self) -> Tensor:
        """The index of each row's last token, (B,) int64: the one a language model continues."""
        return self.cu_seqlens[1:].long() - 1


class Layout(NamedTuple):
    """How attention reads the rows of a batch. Made once per forward pass, for all layers.

    The variable-length kernel reads packed rows. A dense kernel reads groups of rows, each padded
    to its longest; one index gathers them, another gathers the tokens back. For the rows abc, d
    and ef in one group:

        packed       a b c d e f
        pad_index    0 1 2 | 3 3 3 | 4 5 4     (rows, S) the token at each padded position
        padded       a b c | d d d | e f e     padding repeats its row
        unpad_index  0 1 2   3       6 7       (N,) each token's position among all padded ones

    A single row is neither: it is dense as it is.
    """

    cu_seqlens: Tensor | None = None  # for the variable-length kernel
    max_seqlen: int | None = None
    groups: list[tuple[Tensor, Tensor]] | None = None  # each a pad_index and a mask (rows, 1, 1, S)
    unpad_index: Tensor | None = None


def lay_out(batch: Batch, x: Tensor, head_dim: int, dropout_p: float = 0.0) -> Layout:
    """Chooses how attention reads the batch whose hidden states are x.

    Call it before the first layer: inside a layer, activation checkpointing would repeat it.
    """
    dtype = matmul_dtype(x)
    # The kernel has no dropout, and needs all tokens of a row next to each other.
    if not dropout_p and not batch.shared and has_flash(x.device, dtype, head_dim):
        return Layout(batch.cu_seqlens, batch.max_seqlen)
    if len(batch.cu_seqlens) == 2:
        return Layout()
    return (pad_layout if on_gpu(x.device) else _pad_layout_uncompiled)(batch, dtype)


def pad_layout(batch: Batch, dtype: torch.dtype) -> Layout:
    """The layout for `padded_attention` of q, k and v in `dtype`."""
    N, shared, device = len(batch.input_ids), batch.shared, batch.cu_seqlens.device
    starts, lengths = batch.cu_seqlens[:-1], batch.cu_seqlens.diff()  # (B,)
    row = torch.repeat_interleave(lengths, output_size=N)  # (N,)
    # Rows after the first lack the shared tokens; start and measure them as if they had them.
    absent = shared * (torch.arange(len(lengths), device=device) > 0)  # (B,)
    starts, lengths = starts - absent, lengths + absent
    if on_gpu(device):  # one group of a length that is known without waiting for the GPU
        splits = [(slice(None), batch.max_seqlen + shared)]
    else:  # groups of similar lengths, since attention costs rows * S * S
        splits = lengths.argsort(stable=True).split(ROWS_PER_GROUP)
        splits = [(members, int(lengths[members[-1]])) for members in splits]
    groups, padded_starts, size = [], torch.empty_like(lengths), 0
    for members, S in splits:
        # Padding repeats its row, so one gather fills all positions, and autograd keeps only the
        # index. If it repeated a single token, a GPU would add up its gradients one by one.
        position = torch.arange(S, device=device) % lengths[members, None]  # (rows, S)
        pad_index = torch.where(position < shared, position, starts[members, None] + position)
        mask = positions_up_to(lengths[members, None, None, None] - 1, S, dtype)  # (rows, 1, 1, S)
        groups.append((pad_index, mask))
        padded_starts[members] = size + S * torch.arange(len(pad_index), device=device)
        size += pad_index.numel()
    unpad_index = (padded_starts - starts)[row] + torch.arange(N, device=device)
    return Layout(groups=groups, unpad_index=unpad_index)


# On a CPU it reads lengths as numbers, and torch.compile would break its graph at each.
_pad_layout_uncompiled = torch.compiler.disable(pad_layout)


def positions_up_to(last: Tensor, S: int, dtype: torch.dtype) -> Tensor:
    """The mask (..., S) of positions 0 to `last` (..., 1): bool on a CPU, 0 or -inf on a GPU.

    A GPU kernel adds the mask to scores in `dtype`. Unless each of its lines takes a multiple of 8
    elements in memory, the kernel would make such a copy in every layer.
    """
    if not on_gpu(last.device):
        return torch.arange(S, device=last.device) <= last
    padded = (S // 8 + 1) * 8  # always above S: one case to compile
    positions = torch.arange(padded, device=last.device)
    return torch.where(positions <= last, 0.0, -torch.inf).to(dtype)[..., :S]


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """Scaled dot-product attention of every token to its own row (arXiv 1706.03762, section 3.2.1).

    q: (N, H, Dh); k, v: (N, Hkv, Dh), grouped as in arXiv 2305.13245. `causal`: to no later token.
    Returns (N, H, Dh) in q's dtype.
    """
    if layout.cu_seqlens is None:
        return padded_attention(q, k, v, layout, causal, dropout_p)
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    window = (-1, 0 if causal else -1)  # tokens seen to the left and to the right; -1: all of them
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=window, **GROUPED)


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
    """Where the N new tokens of a batch belong. Made once per forward pass, for all layers."""

    rows: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64; keys and values belong at [row, position] of the cache
    columns: Tensor  # (N,) int64; queries belong at [row, column] of a padded (B, T)
    T: int
    mask: Tensor | None  # keys that each query sees, (B, 1, T, S); None: with `is_causal`


def cache_slots(batch: Batch, x: Tensor, S: int, group: int) -> CacheSlots:
    """Places new tokens, whose hidden states are x, in a cache of S positions; group = H / Hkv.

    A query at position p sees keys 0 to p of its row. `is_causal` would align the first query with
    the first key, which is wrong once the cache holds earlier tokens. For a fused kernel, and where
    most positions are new, T is S and a query's column is its position: then `is_causal` is
    right, and does half the work of a mask.
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
    """Causal attention of new tokens, any number a row, to a cache that already holds their keys.

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

    mask: broadcasts to (B, H, T, S); None: every key is seen, or with `causal` no later one.
    """
    with torch.autocast(q.device.type, enabled=False):  # it would change dtypes
        if on_gpu(q.device):
            return gpu_attention(q, k, v, mask, causal, dropout_p)
        # The CPU's fused kernel has no dropout, takes as long in fp32, and twice the time in bf16.
        if k.shape[2] <= MAX_PLAIN or dropout_p > 0.0:
            return plain_attention(q, k, v, mask, causal, dropout_p)
        # Its backward pass is several times as fast in fp32 as in bf16.
        upcast = q.requires_grad and q.dtype == torch.bfloat16
        inputs = [x.float() for x in (q, k, v)] if upcast else (q, k, v)
        # Not `enable_gqa=H > Hkv`, which torch.compile may hold as a symbol and not as a bool.
        grouped = {"enable_gqa": True} if q.shape[1] > k.shape[1] else {}
        output = F.scaled_dot_product_attention(*inputs, mask, is_causal=causal, **grouped)
        return output.to(q.dtype)
