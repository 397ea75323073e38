"""Packed attention: the one layer of a model that has to know where a row of text ends.

A batch is one line of N tokens (design: no padding).

N tokens of the batch, B rows, S longest row, H heads, Hkv key/value heads (H is a multiple of it), Dh head size.
"""

import inspect

import torch
import torch.nn.functional as F

# Rows per padded group on a CPU. Sorted by length, 16 rows waste little on padding and are still enough work for a call:
# on AG News lengths (64 rows, 12 heads) this takes about half the time of one group of 64.
ROWS_PER_GROUP = 16
# The longest row whose scores, S * S a head, a CPU lays out in full, and in training keeps for the backward pass.
MAX_PLAIN = 256


class Rows:
    """Where the rows of a packed batch lie, the same for every layer.

    cu_seqlens: (B + 1,) int32, the cumulative row lengths, as flash-attention's variable-length kernels want them: row b is
    `[cu_seqlens[b], cu_seqlens[b + 1])`. max_seqlen: the longest row in it. `shared`: all rows begin with the first row's
    first `shared` tokens; the other rows stand in the batch without them.
    """

    def __init__(self, cu_seqlens: torch.Tensor, max_seqlen: int, shared: int = 0):
        self.cu_seqlens, self.max_seqlen, self.shared = cu_seqlens, max_seqlen, shared
        # A CPU needs the layout wherever there are several rows: at once, as torch.compile breaks its graph there, and must not
        # in every layer. A GPU needs it with dropout alone.
        self.padded = None
        if not cu_seqlens.is_cuda and len(cu_seqlens) > 2:
            self.lay_out()

    @torch.compiler.disable
    def lay_out(self) -> None:
        """Sets `padded`, how the rows are laid out whole, with padding: groups, each of the token (rows, S) that stands at each
        place and of which places are real (rows, S); and where among all places of all groups each token's own one is (N,).

        On a CPU a group is of rows of similar length, since everything inside attention grows with rows * S * S.
        """
        starts, lengths = self.cu_seqlens[:-1], self.cu_seqlens.diff()  # (B,)
        device, N = lengths.device, int(self.cu_seqlens[-1])
        if self.shared:  # where a row would begin, and how long it would be, if the shared tokens stood before its own ones
            missing = self.shared * (torch.arange(len(lengths), device=device) > 0)  # (B,)
            starts, lengths = starts - missing, lengths + missing
        groups, places, offset = [], self.cu_seqlens.new_empty(N), 0
        for rows in lengths.argsort(stable=True).split(len(lengths) if lengths.is_cuda else ROWS_PER_GROUP):
            columns = torch.arange(int(lengths[rows[-1]]), device=device)  # (S,)
            real = columns < lengths[rows, None]  # (rows, S)
            # Padding repeats a row's first token, so that one gather makes the layout, and autograd keeps nothing but indices.
            column = columns * real  # (rows, S)
            tokens, own = starts[rows, None] + column, real  # (rows, S)
            if self.shared:
                tokens = torch.where(column < self.shared, column.to(tokens.dtype), tokens)
                own = real & (tokens >= self.cu_seqlens[rows, None])
            groups.append((tokens, real))
            places[tokens[own]] = offset + own.flatten().nonzero()[:, 0].to(places.dtype)
            offset += real.numel()
        self.padded = groups, places


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, causal: bool = False, dropout_p: float = 0.0
) -> torch.Tensor:
    """Scaled dot-product attention of every token to the tokens of its own row.

    q: (N, H, Dh); k, v: (N, Hkv, Dh). Returns (N, H, Dh) in q's dtype. Attention Is All You Need, section 3.2.1; grouped heads:
    arXiv 2305.13245.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and dropout_p == 0.0 and not rows.shared:
        return _varlen_attention(q, k, v, rows, causal)
    return padded_attention(q, k, v, rows, causal, dropout_p)


def _varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, causal: bool) -> torch.Tensor:
    """PyTorch's variable-length flash kernel: no padding even inside. CUDA, fp16/bf16, no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    # torch 2.11 says is_causal and takes grouped heads as they are; 2.13 says window_size and wants to be asked.
    known = inspect.signature(varlen_attn).parameters
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))  # (N, H, Dh)
    ends, longest = rows.cu_seqlens, rows.max_seqlen
    return varlen_attn(q, k, v, ends, ends, longest, longest, **options)


def padded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, causal: bool = False, dropout_p: float = 0.0
) -> torch.Tensor:
    """`attention` through padding: rows are laid out whole, attended, and each one's own tokens gathered back."""
    if len(rows.cu_seqlens) == 2:  # one row is laid out as it is
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, Dh)
        return _dot_product_attention(q, k, v, None, causal, dropout_p)[0].transpose(0, 1)  # (N, H, Dh)
    if rows.padded is None:
        rows.lay_out()
    (groups, places), outputs = rows.padded, []
    for tokens, real in groups:
        padded = [x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2) for x in (q, k, v)]
        # Padding is on the right, so a causal mask already hides it from every real query.
        output = _dot_product_attention(*padded, None if causal else real[:, None, None], causal, dropout_p)  # (rows, H, S, Dh)
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # (rows * S, H, Dh)
    return torch.cat(outputs).index_select(0, places)  # (N, H, Dh)


def _dot_product_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, dropout_p: float = 0.0
) -> torch.Tensor:
    """softmax(q kᵀ / √Dh) v of q (B, H, T, Dh), k and v (B, Hkv, S, Dh) in the way that is fastest; returns (B, H, T, Dh).

    mask: what a query sees, of a shape that broadcasts to (B, H, T, S); without one, all, or if `causal`, no later position.
    """
    (H, T, Dh), (Hkv, S), on_cpu = q.shape[1:], k.shape[1:3], not q.is_cuda
    with torch.autocast(q.device.type, enabled=False):  # it would change dtypes
        # The CPU's fused kernel takes twice the time in bf16, as long in fp32, and has no dropout.
        if on_cpu and (S <= MAX_PLAIN or dropout_p > 0.0):
            # Heads that share keys stand below one another from here to the end: softmax does not mind, and torch.compile, which
            # does not know T, would find each number of a reshape by division, one at a time.
            group = H // Hkv
            q = q.unflatten(1, (Hkv, group)).flatten(2, 3) * Dh**-0.5  # (B, Hkv, group * T, Dh)
            # A product with keys that lie scattered takes many times as long as to copy them.
            scores = q @ k.contiguous().transpose(2, 3)  # (B, Hkv, group * T, S)
            if causal:
                mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril()
            if mask is not None:
                scores.masked_fill_(~(mask if mask.shape[2] == 1 else mask.repeat(1, 1, group, 1)), -torch.inf)
            return (F.dropout(scores.softmax(-1), dropout_p) @ v).view(-1, H, T, Dh)
        # Backward, it is several times as fast in fp32 as in bf16.
        inputs = [x.float() for x in (q, k, v)] if on_cpu and q.requires_grad and q.dtype == torch.bfloat16 else (q, k, v)
        how = {"attn_mask": mask, "dropout_p": dropout_p, "is_causal": causal, "enable_gqa": Hkv != H}
        return F.scaled_dot_product_attention(*inputs, **how).to(q.dtype)


def cache_slots(
    position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, S: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Where the tokens of a packed batch belong beside a cache of S positions a row; the same for every layer.

    position_ids: (N,); cu_seqlens: (B + 1,). Returns each token's row and its column (N,) in a padded layout (B, T), T being
    max_seqlen, and the mask (B, 1, T, S): a query at position p sees the keys 0 to p of its row. `is_causal` would line the
    first query up with the first key, which is wrong as soon as the cache is not empty.

    For a fused kernel, and where most positions are new, T is S, a token's column is its position, and the mask is None: then
    `is_causal` is right, and half the work of a mask.
    """
    N = len(position_ids)
    rows = torch.repeat_interleave(cu_seqlens.diff(), output_size=N)  # (N,)
    if 2 * max_seqlen > S and (rows.is_cuda or S > MAX_PLAIN):
        return rows, position_ids, None
    columns = torch.arange(N, device=rows.device) - cu_seqlens[rows]  # (N,)
    last = position_ids.new_zeros(len(cu_seqlens) - 1, max_seqlen).index_put((rows, columns), position_ids)  # (B, T)
    return rows, columns, torch.arange(S, device=rows.device) <= last[:, None, :, None]


def cached_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of new tokens, one or several a row, over a cache that holds their own keys and values already.

    q: (N, H, Dh) packed; keys, values: (B, S, Hkv, Dh); the rest comes from `cache_slots`. Returns (N, H, Dh).
    """
    B, T = len(keys), keys.shape[1] if mask is None else mask.shape[2]
    full = len(q) == B * T  # as in decoding: every row has T tokens, and the packed layout is the padded one
    padded = q.view(B, T, *q.shape[1:]) if full else q.new_zeros(B, T, *q.shape[1:]).index_put((rows, columns), q)
    output = _dot_product_attention(padded.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask, mask is None)
    output = output.transpose(1, 2)  # (B, T, H, Dh)
    return output.flatten(0, 1) if full else output[rows, columns]  # (N, H, Dh)
