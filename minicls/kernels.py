"""Operations with a gradient by hand, for a CPU: RMSNorm, the rotation of queries and keys, one cast for several products.

On a CPU an elementwise operation costs the bytes it moves, and autograd keeps what it needs for the backward pass. These
functions convert to fp32 once, keep less, and write over results that nobody needs any more.
"""

import torch
import torch.nn.functional as F

from minicls.attention import on_gpu, products_dtype


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a backward pass by hand: autograd would keep three fp32 copies of x, where x and one scale per vector suffice."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        in_fp32 = x.float()
        scale = (torch.linalg.vector_norm(in_fp32, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (in_fp32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        weight_fp32, grad, normed = weight.float(), grad.float(), x.float() * scale
        product = grad * normed
        weight_grad = product.flatten(0, -2).sum(0)
        mean = (product @ weight_fp32)[..., None] / x.shape[-1]  # of (grad * weight) * normed
        grad = (grad * weight_fp32).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad.to(x.dtype), weight_grad.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in fp32; returns x's shape and dtype (arXiv 1910.07467)."""
    if on_gpu(x.device):  # PyTorch's fused kernel keeps as little as ours
        if (
            x.dtype == weight.dtype
        ):  # it computes in fp32 by itself; casts would be three launches more, as long as all the rest
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


class _Rotation(torch.autograd.Function):
    """The rotation with a backward pass by hand: the gradient is turned back, so nothing of x is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half, in_fp32 = x.shape[-1] // 2, x.float()
        turned = in_fp32 * cos
        turned[..., :half].addcmul_(in_fp32[..., half:], sin[..., :half])
        turned[..., half:].addcmul_(in_fp32[..., :half], sin[..., half:])
        return turned.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns q or k (N, heads, Dh) by their positions' angles: x * cos + (x with its halves exchanged) * sin, in fp32.

    cos, sin: (N, 1, Dh) fp32, the first half of the sines negated.
    """
    return _Rotation.apply(x, cos, sin)


def cast_once(x: torch.Tensor) -> torch.Tensor:
    """Casts x to autocast's dtype, where autocast is on, so that several linear layers share the copy."""
    return x.to(products_dtype(x))
