"""A CPU's stand-in for PyTorch's variable-length flash kernel, so that the branches a GPU takes run in this suite.

Importing it registers the kernel, forward and backward, under the operators that `varlen_attn` calls. It makes the checks of
PyTorch's flash_api.cpp, and those that the real kernel leaves out though it would answer with wrong numbers.
"""

import torch


def check(good: bool, message: str) -> None:
    if not good:
        raise RuntimeError(message)


def check_inputs(q, k, v, ends_q, ends_k, max_q, max_k, dropout_p, *others) -> None:
    for x in (q, k, v, *others):
        check(x.dtype in (torch.float16, torch.bfloat16), f"FlashAttention only supports fp16 and bf16, not {x.dtype}")
        check(x.dtype == q.dtype, "query, key, and value must have the same dtype")
        check(x.dim() == 3 and x.stride(-1) == 1, "three dimensions, the last one contiguous")
        size = x.element_size()
        aligned = x.storage_offset() * size % 16 == 0 and all(stride * size % 16 == 0 for stride in x.stride()[:-1])
        check(aligned, "rows begin at multiples of 16 bytes")
    check(
        q.shape[2] % 8 == 0 and q.shape[2] <= 256,
        f"head_size must be a multiple of 8 and at most 256, got {q.shape[2]}",
    )
    check(q.shape[1] % k.shape[1] == 0, "the number of heads in key/value must divide that in query")
    check(k.shape == v.shape and dropout_p == 0.0, "keys and values of one shape, no dropout")
    for x, ends, longest in ((q, ends_q, max_q), (k, ends_k, max_k)):
        check(
            ends.dtype == torch.int32 and ends.is_contiguous() and len(ends) > 1,
            "ends: int32, contiguous, at least a row",
        )
        check(
            int(ends[0]) == 0 and int(ends[-1]) == len(x),
            "tokens outside all rows: their gradients would be uninitialised",
        )
        check(longest == int(ends.diff().max()), "the longest row is another one")


def probabilities(q, k, causal, scale):
    """Softmax over the keys that a query sees, (H, T, S), of one row: q (H, T, Dh), k (H, S, Dh)."""
    scores = q @ k.transpose(1, 2) * scale
    T, S = scores.shape[1:]
    hidden = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T) if causal else torch.zeros(T, S, dtype=torch.bool)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def rows_of(tensors, ends):
    """Each row's part of the tensors, in fp32 as (heads, tokens, Dh)."""
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        yield slice(begin, end), *(x[begin:end].float().transpose(0, 1) for x in tensors)


def is_causal(causal, left, right) -> bool:
    check(left in (None, -1) and right in (None, -1, 0), "no sliding windows here")
    return causal or right == 0


def forward(
    q, k, v, ends_q, ends_k, max_q, max_k, dropout_p, causal, return_debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, **unused,
):  # fmt: skip
    check_inputs(q, k, v, ends_q, ends_k, max_q, max_k, dropout_p)
    check(all(value is None for value in unused.values()), f"not made for {unused}")
    causal, group, out = (
        is_causal(causal, window_size_left, window_size_right),
        q.shape[1] // k.shape[1],
        torch.empty_like(q),
    )
    for place, q_row, k_row, v_row in rows_of((q, k, v), ends_q):
        k_row, v_row = (x.repeat_interleave(group, 0) for x in (k_row, v_row))
        p = probabilities(q_row, k_row, causal, scale or q.shape[-1] ** -0.5)
        out[place] = (p @ v_row).transpose(0, 1).to(q.dtype)
    nothing = torch.zeros((), dtype=torch.uint64)
    return out, torch.zeros(q.shape[1], len(q)), nothing, nothing.clone(), torch.empty(0)


def backward(
    grad, q, k, v, out, logsumexp, ends_q, ends_k, max_q, max_k, dropout_p, causal, rng_state, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    check_inputs(q, k, v, ends_q, ends_k, max_q, max_k, dropout_p, grad, out)
    causal, group = is_causal(causal, window_size_left, window_size_right), q.shape[1] // k.shape[1]
    scale = scale or q.shape[-1] ** -0.5
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for place, q_row, k_row, v_row, grad_row in rows_of((q, k, v, grad), ends_q):
        k_row, v_row = (x.repeat_interleave(group, 0) for x in (k_row, v_row))
        p = probabilities(q_row, k_row, causal, scale)
        dp = grad_row @ v_row.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        found = (
            ds @ k_row,
            *((x.transpose(1, 2) @ y).unflatten(0, (-1, group)).sum(1) for x, y in ((ds, q_row), (p, grad_row))),
        )
        for ours, theirs in zip(grads, found, strict=True):
            ours[place] = theirs.transpose(0, 1).to(q.dtype)
    return tuple(grads)


library = torch.library.Library("aten", "IMPL")
library.impl("_flash_attention_forward", forward, "CPU")
library.impl("_flash_attention_backward", backward, "CPU")
