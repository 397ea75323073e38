"""Choice of kernels by device; RMSNorm and rotary embedding with hand-written gradients; dense attention.

On a CPU, an elementwise operation takes as long as the memory it moves. So these functions convert to fp32 once, save
less for the backward pass than autograd would, and overwrite intermediate results.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GPUS = ("cuda",)  # device types; tests add the CPU to run the GPU branches over a reference kernel


def on_gpu(device: torch.device) -> bool:
    """Whether to take the GPU's branch. All code that chooses between a CPU's and a GPU's computation calls this."""
    return device.type in GPUS


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's if enabled, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether flash kernels apply: half precision, head sizes to 256 in steps of 8, compute capability 8.0 or more."""
    if not on_gpu(device) or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return False
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8


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
        mean = (product @ weight_fp32)[..., None] / x.shape[-1]  # the mean of (grad * weight) * normed
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
    """The gradient is the upstream gradient rotated back, so x need not be saved."""

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


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> Tensor:
    """softmax(q kᵀ / √Dh) v as two matrix products, for a CPU. q: (B, H, T, Dh); k, v: (B, Hkv, S, Dh).

    mask: broadcasts to (B, H, T, S); None: every key is seen, or with `causal` no later one.
    """
    (H, T, Dh), (Hkv, S) = q.shape[1:], k.shape[1:3]
    group = H // Hkv
    # Query heads that share keys stay stacked along T until the end: softmax is row-wise, and with dynamic T each
    # compiled reshape would cost an integer division per element.
    q = q.unflatten(1, (Hkv, group)).flatten(2, 3) * Dh**-0.5  # (B, Hkv, group * T, Dh)
    # Copying the strided keys takes a fraction of the time that a product with strided keys would take.
    scores = q @ k.contiguous().transpose(2, 3)  # (B, Hkv, group * T, S)
    if causal:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril()
    if mask is not None:
        mask = mask if mask.shape[2] == 1 else mask.repeat(1, 1, group, 1)
        scores.masked_fill_(~mask, -torch.inf)
    return (F.dropout(scores.softmax(-1), dropout_p) @ v).view(-1, H, T, Dh)


def gpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout_p: float) -> Tensor:
    """The same on a GPU. Flash takes grouped heads but no mask, the memory-efficient kernel a mask but no groups.

    With both a mask and groups, PyTorch would compute all T * S scores in several passes, so one of them is removed.
    """
    (H, T, Dh), Hkv = q.shape[1:], k.shape[1]
    group = H // Hkv
    if group > 1 and mask is not None:  # per row (rows, 1, 1, S) or query (B, 1, group * T, S)
        q = q.unflatten(1, (Hkv, group)).flatten(2, 3)  # (B, Hkv, group * T, Dh)
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        return output.unflatten(2, (group, T)).flatten(1, 2)  # (B, H, T, Dh)
    if group > 1 and has_flash(q.device, q.dtype, Dh):
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, causal, enable_gqa=True)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, H, S, Dh)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
