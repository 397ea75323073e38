"""Operations with hand-written gradients for a CPU: RMSNorm and the rotation of queries and keys; and one shared cast.

On a CPU an elementwise operation costs the bytes it moves. These functions convert to fp32 once, keep less for the
backward pass than autograd would, and overwrite intermediate results.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minicls.attention import matmul_dtype, on_gpu


class _RMSNorm(torch.autograd.Function):
    """Autograd would save three fp32 copies of x; x itself and one scale per vector suffice."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x_fp32 = x.float()
        scale = (torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x_fp32 * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        weight_fp32, grad, normed = weight.float(), grad.float(), x.float() * scale
        product = grad * normed
        weight_grad = product.flatten(0, -2).sum(0)
        mean = (product @ weight_fp32)[..., None] / x.shape[-1]  # of (grad * weight) * normed
        grad = (grad * weight_fp32).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad.to(x.dtype), weight_grad.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in fp32; returns x's dtype (arXiv 1910.07467)."""
    if not on_gpu(x.device):
        return _RMSNorm.apply(x, weight, eps)
    if x.dtype == weight.dtype:  # PyTorch's fused kernel saves as little, and computes in fp32 without casts
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient is the upstream gradient rotated back, so nothing of x is saved."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        half, x_fp32 = x.shape[-1] // 2, x.float()
        rotated = x_fp32 * cos
        rotated[..., :half].addcmul_(x_fp32[..., half:], sin[..., :half])
        rotated[..., half:].addcmul_(x_fp32[..., :half], sin[..., half:])
        return rotated.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates q or k (N, heads, Dh) by `rope_tables` (N, 1, Dh): x * cos + (x with halves swapped) * sin, in fp32."""
    return _Rotation.apply(x, cos, sin)


def cast_once(x: Tensor) -> Tensor:
    """Casts x to autocast's dtype, if autocast is enabled, so that several linear layers share the copy."""
    return x.to(matmul_dtype(x))
