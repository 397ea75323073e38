"""Packed attention: the one layer of a model that has to know where a row of text ends.

A batch is one line of N tokens (design: no padding).

N tokens of the batch, B rows, S longest row, H heads, Hkv key/value heads (H is a multiple of it), Dh head size.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

GPUS = ("cuda",)  # device types; tests add the CPU, to run a GPU's branches over a reference kernel
# Rows per padded group on a CPU. Sorted by length, 16 rows waste little on padding and are still enough work for a call:
# on AG News lengths (64 rows, 12 heads) this takes about half the time of one group of 64.
ROWS_PER_GROUP = 16
# The longest row whose scores, S * S a head, a CPU lays out in full, and in training keeps for the backward pass.
MAX_PLAIN = 256
# torch 2.11 takes grouped heads as they are; later versions refuse them unless they are asked.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def on_gpu(device: torch.device) -> bool:
    """Whether to do what is fast on a GPU. Everything that depends on the kind of device asks here."""
    return device.type in GPUS


def products_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that matrix products of x have: autocast's where it is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's flash kernels take it: half precision, head sizes in steps of 8, compute capability 8.0 or later."""
    if (
        not on_gpu(device)
        or dtype not in (torch.float16, torch.bfloat16)
        or head_dim % 8
        or head_dim > 256
    ):
        return False
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8


class Rows:
    """Where the rows of a packed batch lie, the same for every layer.

    cu_seqlens: (B + 1,) int32, the cumulative row lengths, as flash-attention's variable-length kernels want them: row b is
    `[cu_seqlens[b], cu_seqlens[b + 1])`. max_seqlen: the longest row in it. `shared`: all rows begin with the first row's
    first `shared` tokens; the other rows stand in the batch without them.
    """

    def __init__(self, cu_seqlens: torch.Tensor, max_seqlen: int, shared: int = 0):
        self.cu_seqlens, self.max_seqlen, self.shared = cu_seqlens, max_seqlen, shared
        self.varlen: bool | None = (
            None  # whether the variable-length kernel does it; None: nobody has asked yet
        )
        self.padded = None  # the layout, for attention that pads

    def prepare(
        self,
        device: torch.device,
        dtype: torch.dtype,
        N: int,
        head_dim: int,
        dropout_p: float = 0.0,
    ) -> None:
        """Chooses the way of attention for q, k and v of N tokens in `dtype`, and lays the rows out if that is to pad.

        To be called before the first layer: inside one, activation checkpointing would do it again, and torch.compile could not.
        """
        # The kernel has no dropout, and wants every row whole.
        self.varlen = dropout_p == 0.0 and not self.shared and has_flash(device, dtype, head_dim)
        if not self.varlen:
            self.lay_out(N, dtype)

    def lay_out(self, N: int, dtype: torch.dtype) -> None:
        """Sets `padded`; one row alone is laid out as it is."""
        if len(self.cu_seqlens) > 2:
            # A CPU's layout asks for numbers, at which torch.compile breaks its graph; a GPU would wait for them.
            lay_out = _lay_out if on_gpu(self.cu_seqlens.device) else _lay_out_without_compile
            self.padded = lay_out(self.cu_seqlens, self.max_seqlen, self.shared, N, dtype)


def _lay_out(
    cu_seqlens: torch.Tensor, max_seqlen: int, shared: int, N: int, dtype: torch.dtype
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """How rows are laid out whole, with padding: groups, each of the token (rows, S) that stands at each place and of a mask
    that hides padding (rows, 1, 1, S); and where among all places of all groups each of the N tokens stands (N,).

    On a CPU a group is of rows of similar length, since everything inside attention grows with rows * S * S.
    """
    starts, lengths, device = cu_seqlens[:-1], cu_seqlens.diff(), cu_seqlens.device  # (B,)
    row = torch.repeat_interleave(lengths, output_size=N)  # (N,)
    if shared:  # where a row would begin, and how long it would be, if the shared tokens stood before its own ones
        missing = shared * (torch.arange(len(lengths), device=device) > 0)  # (B,)
        starts, lengths = starts - missing, lengths + missing
    groups, begins, offset = [], torch.empty_like(lengths), 0
    for some in (
        [slice(None)] if on_gpu(device) else lengths.argsort(stable=True).split(ROWS_PER_GROUP)
    ):
        S = max_seqlen + shared if on_gpu(device) else int(lengths[some[-1]])
        # Padding repeats its row from the start, so that one gather makes the layout, and autograd keeps nothing but indices.
        # Not one token again and again: a GPU would add up all their gradients in one place, one after another.
        column = torch.arange(S, device=device) % lengths[some, None]  # (rows, S)
        tokens = starts[some, None] + column  # (rows, S)
        if shared:
            tokens = torch.where(column < shared, column, tokens)
        last = lengths[some, None, None, None] - 1  # (rows, 1, 1, 1)
        groups.append((tokens, positions_up_to(last, S, dtype)))
        begins[some] = (offset + S * torch.arange(len(tokens), device=device)).to(begins.dtype)
        offset += tokens.numel()
    return groups, (begins - starts)[row] + torch.arange(N, device=device)


_lay_out_without_compile = torch.compiler.disable(_lay_out)


def positions_up_to(last: torch.Tensor, S: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask (..., S) of the positions 0 to `last` (..., 1): bool on a CPU; on a GPU what its kernels add to the scores, 0 or
    -inf in their dtype, in memory whose lines are multiples of 8, or they would make such a copy in each layer."""
    if not on_gpu(last.device):
        return torch.arange(S, device=last.device) <= last
    positions = torch.arange(
        (S // 8 + 1) * 8, device=last.device
    )  # always more than S: one case for torch.compile
    return torch.where(positions <= last, 0.0, -torch.inf).to(dtype)[..., :S]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Scaled dot-product attention of every token to the tokens of its own row.

    q: (N, H, Dh); k, v: (N, Hkv, Dh). Returns (N, H, Dh) in q's dtype. Attention Is All You Need, section 3.2.1; grouped heads:
    arXiv 2305.13245.
    """
    if rows.varlen is None:
        rows.prepare(q.device, q.dtype, len(q), q.shape[-1], dropout_p)
    if not rows.varlen or dropout_p > 0.0:
        return padded_attention(q, k, v, rows, causal, dropout_p)
    ends, longest = rows.cu_seqlens, rows.max_seqlen
    return varlen_attn(
        q, k, v, ends, ends, longest, longest, window_size=(-1, 0 if causal else -1), **GROUPED
    )


def padded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """`attention` through padding: rows are laid out whole, attended, and each one's own tokens gathered back."""
    if rows.padded is None:
        rows.lay_out(len(q), q.dtype)
    if rows.padded is None:  # a single row
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, Dh)
        return _dot_product_attention(q, k, v, None, causal, dropout_p)[0].transpose(
            0, 1
        )  # (N, H, Dh)
    (groups, places), outputs = rows.padded, []
    for tokens, mask in groups:
        padded = [
            x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)
            for x in (q, k, v)
        ]
        # Padding is on the right, so a causal mask already hides it from every real query.
        output = _dot_product_attention(
            *padded, None if causal else mask, causal, dropout_p
        )  # (rows, H, S, Dh)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (rows * S, H, Dh)
    return torch.cat(outputs).index_select(0, places)  # (N, H, Dh)


def _dot_product_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """softmax(q kᵀ / √Dh) v of q (B, H, T, Dh), k and v (B, Hkv, S, Dh) in the way that is fastest; returns (B, H, T, Dh).

    mask: what a query sees, of a shape that broadcasts to (B, H, T, S); without one, all, or if `causal`, no later position.
    """
    (H, T, Dh), (Hkv, S) = q.shape[1:], k.shape[1:3]
    group = H // Hkv
    with torch.autocast(q.device.type, enabled=False):  # it would change dtypes
        if on_gpu(q.device):
            return _fused_attention(q, k, v, mask, causal, dropout_p)
        # The CPU's fused kernel takes twice the time in bf16, as long in fp32, and has no dropout.
        if S <= MAX_PLAIN or dropout_p > 0.0:
            # Heads that share keys stand below one another from here to the end: softmax does not mind, and torch.compile, which
            # does not know T, would find each number of a reshape by division, one at a time.
            q = q.unflatten(1, (Hkv, group)).flatten(2, 3) * Dh**-0.5  # (B, Hkv, group * T, Dh)
            # A product with keys that lie scattered takes many times as long as to copy them.
            scores = q @ k.contiguous().transpose(2, 3)  # (B, Hkv, group * T, S)
            if causal:
                mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril()
            if mask is not None:
                scores.masked_fill_(
                    ~(mask if mask.shape[2] == 1 else mask.repeat(1, 1, group, 1)), -torch.inf
                )
            return (F.dropout(scores.softmax(-1), dropout_p) @ v).view(-1, H, T, Dh)
        # Backward, it is several times as fast in fp32 as in bf16.
        inputs = (
            [x.float() for x in (q, k, v)]
            if q.requires_grad and q.dtype == torch.bfloat16
            else (q, k, v)
        )
        grouped = (
            {"enable_gqa": True} if group > 1 else {}
        )  # not `group > 1`: torch.compile may know H and Hkv as symbols
        return F.scaled_dot_product_attention(*inputs, mask, is_causal=causal, **grouped).to(
            q.dtype
        )


def _fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    dropout_p: float,
) -> torch.Tensor:
    """The same on a GPU. Flash takes grouped heads and no mask, the memory-efficient kernel the reverse, and where neither can
    PyTorch computes all T * S scores in several passes: so heads are laid out for one of the two."""
    (H, T, Dh), Hkv = q.shape[1:], k.shape[1]
    group = H // Hkv
    if (
        group > 1 and mask is not None
    ):  # of one row (rows, 1, 1, S), or for all queries of a group (B, 1, group * T, S)
        q = q.unflatten(1, (Hkv, group)).flatten(2, 3)  # (B, Hkv, group * T, Dh)
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        return output.unflatten(2, (group, T)).flatten(1, 2)  # (B, H, T, Dh)
    if group > 1 and has_flash(q.device, q.dtype, Dh):
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, enable_gqa=True)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, H, S, Dh)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)


def cache_slots(
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    S: int,
    dtype: torch.dtype,
    group: int,
) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor | None]:
    """Where the tokens of a packed batch belong next to a cache of S positions a row; the same for every layer.

    position_ids: (N,); cu_seqlens: (B + 1,); `dtype`: that of queries; `group`: the heads that share keys. Returns each token's
    row and its column (N,) in a padded layout (B, T), T, and the mask (B, 1, T, S), on a GPU (B, 1, group * T, S): a query at
    position p sees the keys 0 to p of its row. `is_causal` would line the first query up with the first key, which is wrong
    as soon as the cache is not empty.

    For a fused kernel, and where most positions are new, T is S, a token's column is its position, and the mask is None: then
    `is_causal` is right, and half the work of a mask.
    """
    N, gpu = len(position_ids), on_gpu(position_ids.device)
    rows = torch.repeat_interleave(cu_seqlens.diff(), output_size=N).long()  # (N,)
    if 2 * max_seqlen > S and (gpu or S > MAX_PLAIN):
        return rows, position_ids, S, None
    columns = torch.arange(N, device=rows.device) - cu_seqlens[rows]  # (N,)
    last = position_ids.new_zeros(len(cu_seqlens) - 1, max_seqlen).index_put(
        (rows, columns), position_ids
    )  # (B, T)
    last = last.repeat(1, group) if gpu else last
    return rows, columns, max_seqlen, positions_up_to(last[:, None, :, None], S, dtype)


def cached_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    T: int,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of new tokens, one or several a row, over a cache that holds their own keys and values already.

    q: (N, H, Dh) packed; keys, values: (B, S, Hkv, Dh); the rest comes from `cache_slots`. Returns (N, H, Dh).
    """
    B = len(keys)
    full = (
        len(q) == B * T
    )  # as in decoding: every row has T tokens, and the packed layout is the padded one
    padded = (
        q.view(B, T, *q.shape[1:])
        if full
        else q.new_zeros(B, T, *q.shape[1:]).index_put((rows, columns), q)
    )
    output = _dot_product_attention(
        padded.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask, mask is None
    )
    output = output.transpose(1, 2)  # (B, T, H, Dh)
    return output.flatten(0, 1) if full else output[rows, columns]  # (N, H, Dh)
