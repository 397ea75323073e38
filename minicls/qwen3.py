"""Qwen3 (arXiv 2505.09388), the dense sizes, on packed batches: a decoder with a language-model or a classification head.

Follows transformers' `modeling_qwen3.py` in names and arithmetic, so that weights load and export as they are. Leaves out
what the published checkpoints do not use: sliding windows, attention biases, stretched RoPE, attention dropout.

N tokens of the batch, B rows, S cached positions, D hidden size, H heads, Hkv key/value heads, Dh head size, V vocabulary,
C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minicls.attention import Rows, attention, cache_slots, cached_attention


@dataclass
class Qwen3Config:
    """The fields of a Qwen3 `config.json` that shape the model; what a file leaves out has transformers' default."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_parameters: dict | None = None  # where newer files keep rope_theta
    rope_scaling: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    pad_token_id: int | None = None
    num_labels: int = 2

    def __post_init__(self):
        rope = (self.rope_parameters or {}) | (self.rope_scaling or {})
        self.rope_theta = rope.get("rope_theta", self.rope_theta)
        supported = {
            "hidden_act": (self.hidden_act, "silu"),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
            "attention_bias": (self.attention_bias, False),
            "attention_dropout": (self.attention_dropout, 0.0),
            "use_sliding_window": (self.use_sliding_window, False),
        }
        for name, (found, wanted) in supported.items():
            if found != wanted:
                raise ValueError(f"{name} {found!r} is not supported, only {wanted!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"{heads} is no multiple of num_key_value_heads {self.num_key_value_heads}")


class KVCache:
    """The keys and values of B rows, at most S positions each, of every layer: (B, S, Hkv, Dh), taken at the first write.

    A token is written at its row and position. What stands at later positions is never seen (`cached_attention`), so going
    back to an earlier state needs no more than giving the next tokens its positions.
    """

    def __init__(self, batch_size: int, max_length: int, prefix: "KVCache | None" = None):
        """`prefix`: a cache of one row, whose S positions become the first ones of every row here."""
        self.shape = (batch_size, max_length)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of a layer
        for layer, (k, v) in enumerate(prefix.layers if prefix else []):
            for ours, theirs in zip(self._allocated(layer, k), (k, v), strict=True):
                ours[:, : k.shape[1]] = theirs

    def _allocated(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self.layers):
            # Zeros: a masked value counts 0 times whatever it is, and 0 times the NaN of fresh memory is NaN.
            self.layers.append(tuple(like.new_zeros(*self.shape, *like.shape[-2:]) for _ in range(2)))
        return self.layers[layer]

    def write(self, layer: int, rows: torch.Tensor, position_ids: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Puts k, v (N, Hkv, Dh) of tokens in their places; returns all keys and values of the layer."""
        keys, values = self._allocated(layer, k)
        keys[rows, position_ids], values[rows, position_ids] = k, v
        return keys, values


class _RMSNorm(torch.autograd.Function):
    """The norm with its gradient by hand. What CUDA's fused kernel does for `F.rms_norm`; a CPU has none, and autograd would
    keep three fp32 copies of x for the backward pass where x itself and one number a vector are enough. On a CPU an operation
    costs what it moves: hence one conversion to fp32, and results written over what is no longer needed."""

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


class Qwen3RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv 1910.07467), in fp32 whatever x is."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        return _RMSNorm.apply(x, self.weight, self.eps)


def as_products_want(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype, where it is on: one copy for several products, which would make and keep one each."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def rope_tables(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines (N, 1, Dh) fp32 of rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4.2).

    Pair i of a head's dimensions turns by position * theta^(-2i / Dh). As in Llama's and Qwen's weights, the pair is made of
    dimensions i and i + Dh / 2, not of neighbours as in the paper. The sine of the first has a minus: (a, b) turns into
    (a cos - b sin, b cos + a sin).
    """
    powers = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim  # (Dh / 2,)
    angles = position_ids[:, None, None].float() / theta**powers  # (N, 1, Dh / 2)
    cos, sin = angles.cos(), angles.sin()
    # Written as one tensor, which torch.compile keeps; the cosines alone it would compute anew in each head of each layer.
    return torch.cat([cos, cos, -sin, sin], dim=-1).chunk(2, dim=-1)  # (N, 1, Dh) each


class _Rotation(torch.autograd.Function):
    """The rotation with its gradient by hand, which is the gradient turned back: nothing of x is kept, and both directions
    may write over their own results."""

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
    """Turns q or k (N, heads, Dh) by their positions' angles, in fp32: x * cos + (x with its halves exchanged) * sin."""
    return _Rotation.apply(x, cos, sin)


class Qwen3Attention(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = Qwen3RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, at, position_ids, rows, rope, cache, slots) -> torch.Tensor:
        x = as_products_want(x)
        q, k, v = (f(x).unflatten(1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))  # (N, heads, Dh)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)  # each head is normalised by itself, then turned
        if cache is None:
            output = attention(q, k, v, rows, causal=True)  # (N, H, Dh)
        else:
            keys, values = cache.write(self.layer, slots[0], position_ids, k, v)  # (B, S, Hkv, Dh)
            output = cached_attention(q, keys, values, *slots)  # (N, H, Dh)
        return self.o_proj(output.flatten(1) if at is None else output.flatten(1)[at])  # (N or n, D)


class Qwen3MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = as_products_want(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (N, D)


class Qwen3DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.self_attn = Qwen3Attention(config, layer)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, at: torch.Tensor | None, *where) -> torch.Tensor:
        """x: (N, D). `at` (n,): the tokens that are asked for, where no layer follows that needs the others."""
        attended = self.self_attn(self.input_layernorm(x), at, *where)  # (N or n, D)
        x = (x if at is None else x[at]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))  # (N or n, D)


class Qwen3Model(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        at: torch.Tensor,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> torch.Tensor:
        """Returns the hidden states (n, D) of the tokens asked for, by their indices in the packed batch: at (n,) int64.

        `shared`, without a cache: all rows begin with the first row's first `shared` tokens, which go through the model once.
        The other rows are packed without them; their positions begin at `shared`.
        """
        x = self.embed_tokens(input_ids)  # (N, D)
        rope = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        slots = cache_slots(position_ids, cu_seqlens, max_seqlen, cache.shape[1]) if cache is not None else None
        rows = Rows(cu_seqlens, max_seqlen, shared) if cache is None else None  # beside a cache, slots say where a row ends
        where = position_ids, rows, rope, cache, slots
        for layer in self.layers:
            wanted = at if layer is self.layers[-1] else None
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, wanted, *where, use_reentrant=False)
            else:
                x = layer(x, wanted, *where)
        return self.norm(x)  # (n, D)


class Qwen3ForCausalLM(nn.Module):
    """Qwen3 with a language-model head, which smaller sizes share with the embedding."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        at: torch.Tensor,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> torch.Tensor:
        """input_ids, position_ids: (N,) int64; cu_seqlens: (B + 1,) int32. Returns the logits (n, V) fp32 after the tokens
        `at` (n,), and of no others: (N, V) would be gigabytes. `shared`: as in `Qwen3Model`.

        fp32 weights: the product is in fp32, also under autocast. bf16 weights: it is in bf16, as converting the
        embedding each time would take longer than everything else for a single token.
        """
        x = self.model(input_ids, position_ids, cu_seqlens, max_seqlen, at, cache, shared)  # (n, D)
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight  # (V, D)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight).float()  # (n, V)


class Qwen3ForSequenceClassification(nn.Module):
    """Qwen3 with a linear head over each row's last token."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        shared: int = 0,
    ) -> torch.Tensor:
        """input_ids, position_ids: (N,) int64; cu_seqlens: (B + 1,) int32; `shared`: as in `Qwen3Model`. Returns the logits
        (B, C) in fp32."""
        at = cu_seqlens[1:] - 1
        x = self.model(input_ids, position_ids, cu_seqlens, max_seqlen, at, shared=shared)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.score.weight.float())  # (B, C)
