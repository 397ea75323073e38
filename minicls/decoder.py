"""Llama, Qwen2 and Qwen3 on packed batches: one decoder with a language-model or a classification head.

The three families differ in two things. Qwen3 (arXiv 2505.09388) normalises each head's queries and keys before RoPE;
Qwen2 and Qwen2.5 (arXiv 2412.15115) have biases on q, k and v; Llama (arXiv 2302.13971), SmolLM2 among
them, has neither. Parameters carry transformers' names, so weights load and export unchanged.
Left out: sliding windows, stretched RoPE, other biases, attention dropout.

N tokens of the batch, B rows, S cached positions, D hidden size, H heads, Hkv key/value heads, Dh head size,
V vocabulary, C classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minicls.attention import Rows, attention, cache_slots, cached_attention, products_dtype
from minicls.kernels import cast_once, rms_norm, rotate


class Family(NamedTuple):
    """What distinguishes one model_type from another."""

    prefix: str  # of transformers' class names
    qkv_bias: bool
    qk_norm: bool
    defaults: dict  # what a config.json leaves out, as in transformers


FAMILIES = {
    "llama": Family(
        "Llama",
        qkv_bias=False,
        qk_norm=False,
        defaults={
            "vocab_size": 32_000,
            "intermediate_size": 11_008,
            "max_position_embeddings": 2048,
        },
    ),
    "qwen2": Family("Qwen2", qkv_bias=True, qk_norm=False, defaults={"num_key_value_heads": 32}),
    "qwen3": Family(
        "Qwen3",
        qkv_bias=False,
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
}


@dataclass
class DecoderConfig:
    """The fields of a decoder's `config.json` that shape the model.

    A field that is None takes its family's default in transformers; without one, head_dim is
    hidden_size / num_attention_heads, and there are as many key/value heads as heads.
    """

    model_type: str = "qwen3"
    vocab_size: int | None = None
    hidden_size: int = 4096
    intermediate_size: int | None = None
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_parameters: dict | None = None  # where newer files keep rope_theta
    rope_scaling: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    num_labels: int = 2

    def __post_init__(self):
        defaults = {
            "vocab_size": 151_936,
            "intermediate_size": 22_016,
            "max_position_embeddings": 32_768,
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
        }
        for name, value in (defaults | self.family.defaults).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        rope = (self.rope_parameters or {}) | (self.rope_scaling or {})
        self.rope_theta = rope.get("rope_theta", self.rope_theta)
        supported = {
            "hidden_act": (self.hidden_act, "silu"),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
            "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
            "attention_bias": (self.attention_bias, False),
            "mlp_bias": (self.mlp_bias, False),
            "attention_dropout": (self.attention_dropout, 0.0),
            "use_sliding_window": (self.use_sliding_window, False),
            "layer_types": ({*(self.layer_types or ["full_attention"])}, {"full_attention"}),
        }
        for name, (value, wanted) in supported.items():
            if value != wanted:
                raise ValueError(f"{name} {value!r} is not supported, only {wanted!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(
                f"{heads} is no multiple of num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


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
            self.layers.append(
                tuple(like.new_zeros(*self.shape, *like.shape[-2:]) for _ in range(2))
            )
        return self.layers[layer]

    def write(
        self,
        layer: int,
        rows: torch.Tensor,
        position_ids: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ):
        """Puts k, v (N, Hkv, Dh) of tokens in their places; returns all keys and values of the layer."""
        keys, values = self._allocated(layer, k)
        keys[rows, position_ids], values[rows, position_ids] = k, v
        return keys, values


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_tables(
    position_ids: torch.Tensor, head_dim: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines (N, 1, Dh) fp32 of rotary position embedding (RoFormer, arXiv 2104.09864, section 3.4.2).

    Pair i of a head's dimensions turns by position * theta^(-2i / Dh). As in Llama's and Qwen's weights, the pair is made of
    dimensions i and i + Dh / 2, not of neighbours as in the paper. The sine of the first has a minus: (a, b) turns into
    (a cos - b sin, b cos + a sin).
    """
    powers = (
        torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    )  # (Dh / 2,)
    angles = position_ids[:, None, None].float() / theta**powers  # (N, 1, Dh / 2)
    cos, sin = angles.cos(), angles.sin()
    # Written as one tensor, which torch.compile keeps; the cosines alone it would compute anew in each head of each layer.
    return torch.cat([cos, cos, -sin, sin], dim=-1).chunk(2, dim=-1)  # (N, 1, Dh) each


class DecoderAttention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, family = config.hidden_size, config.family
        q_size, kv_size = (
            heads * config.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(D, q_size, bias=family.qkv_bias)
        self.k_proj = nn.Linear(D, kv_size, bias=family.qkv_bias)
        self.v_proj = nn.Linear(D, kv_size, bias=family.qkv_bias)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        if family.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, at, position_ids, rows, rope, cache, slots) -> torch.Tensor:
        x = cast_once(x)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (f(x).unflatten(1, (-1, self.head_dim)) for f in projections)  # (N, heads, Dh)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is None:
            # No default: torch.compile with checkpointing takes a default float for an input, and fails in the second layer.
            output = attention(q, k, v, rows, causal=True, dropout_p=0.0)  # (N, H, Dh)
        else:
            keys, values = cache.write(self.layer, slots[0], position_ids, k, v)  # (B, S, Hkv, Dh)
            output = cached_attention(q, keys, values, *slots)  # (N, H, Dh)
        return self.o_proj(
            output.flatten(1) if at is None else output.flatten(1)[at]
        )  # (N or n, D)


class DecoderMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = cast_once(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (N, D)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.self_attn = DecoderAttention(config, layer)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, at: torch.Tensor | None, *where) -> torch.Tensor:
        """x: (N, D). `at` (n,): the tokens that are asked for, where no layer follows that needs the others."""
        attended = self.self_attn(self.input_layernorm(x), at, *where)  # (N or n, D)
        x = (x if at is None else x[at]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))  # (N or n, D)


class DecoderModel(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        # transformers does not train the pad token's row, whatever else that token means: SmolLM2 pads with <|im_end|>.
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        rows = slots = None
        if cache is None:
            rows = Rows(cu_seqlens, max_seqlen, shared)
            rows.prepare(x.device, products_dtype(x), len(x), self.config.head_dim)
        else:
            group = self.config.num_attention_heads // self.config.num_key_value_heads
            slots = cache_slots(
                position_ids, cu_seqlens, max_seqlen, cache.shape[1], products_dtype(x), group
            )
        where = position_ids, rows, rope, cache, slots
        for layer in self.layers:
            wanted = at if layer is self.layers[-1] else None
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, wanted, *where, use_reentrant=False)
            else:
                x = layer(x, wanted, *where)
        return self.norm(x)  # (n, D)


class DecoderForCausalLM(nn.Module):
    """A decoder with a language-model head; smaller models share its weight with the embedding (tied)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
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
        `at` (n,), and of no others: (N, V) would be gigabytes. `shared`: as in `DecoderModel`.

        fp32 weights: the product is in fp32, also under autocast. bf16 weights: it is in bf16, as converting the
        embedding each time would take longer than everything else for a single token.
        """
        x = self.model(input_ids, position_ids, cu_seqlens, max_seqlen, at, cache, shared)  # (n, D)
        weight = (
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )  # (V, D)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(weight.dtype), weight).float()  # (n, V)


class DecoderForSequenceClassification(nn.Module):
    """A decoder with a linear head over each row's last token."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        shared: int = 0,
    ) -> torch.Tensor:
        """input_ids, position_ids: (N,) int64; cu_seqlens: (B + 1,) int32; `shared`: as in `DecoderModel`. Returns the logits
        (B, C) in fp32."""
        at = cu_seqlens[1:] - 1
        x = self.model(input_ids, position_ids, cu_seqlens, max_seqlen, at, shared=shared)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.score.weight.float())  # (B, C)
