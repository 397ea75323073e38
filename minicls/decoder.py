"""Llama, Qwen2 and Qwen3 on packed batches: one decoder, with a language-model or a linear head.

The three families differ in two ways. Qwen3 (arXiv 2505.09388) normalises each head's queries and
keys before RoPE; Qwen2 and Qwen2.5 (arXiv 2412.15115) have biases on q, k and v; Llama (arXiv
2302.13971) and SmolLM2, which shares its architecture, have neither. Parameters carry transformers'
names, so weights load and export unchanged. Left out: sliding windows, scaled RoPE, other biases,
attention dropout.

A batch is one sequence of N tokens, the B rows one after another (`attention.Batch`). S cached
positions, D hidden size, H heads, Hkv key/value heads, Dh head size, V vocabulary, C classes; n is
the number of tokens that an index `at` selects.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minicls.attention import Batch, attention, cache_slots, cached_attention, lay_out
from minicls.kernels import cast_once, matmul_dtype, rms_norm, rotate


class Family(NamedTuple):
    """The differences between one model_type and another."""

    prefix: str  # the start of transformers' class names, such as LlamaForCausalLM
    defaults: dict  # values of fields that a config.json leaves out, as in transformers
    qkv_bias: bool = False
    qk_norm: bool = False


LLAMA = {"vocab_size": 32_000, "intermediate_size": 11_008, "max_position_embeddings": 2048}
FAMILIES = {
    "llama": Family("Llama", LLAMA),
    "qwen2": Family("Qwen2", {"num_key_value_heads": 32}, qkv_bias=True),
    "qwen3": Family("Qwen3", {"num_key_value_heads": 32, "head_dim": 128}, qk_norm=True),
}


@dataclass
class DecoderConfig:
    """The fields of a decoder's `config.json` that shape the model.

    A field that is None takes its family's default or, if the family has none, the common one.
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
    rope_parameters: dict | None = None  # newer files keep rope_theta here
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
        for name, (value, required) in supported.items():
            if value != required:
                raise ValueError(f"{name} {value!r} is not supported, only {required!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads}, num_key_value_heads {self.num_key_value_heads}"
            raise ValueError(f"num_attention_heads must be a multiple of key/value heads: {heads}")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]


class KVCache:
    """The keys and values of B rows with up to S positions, for every layer.

    A token is written at its row and position. No query sees positions after its own
    (`cache_slots`), so returning to an earlier state needs no erasing: new tokens overwrite old.
    """

    def __init__(self, batch_size: int, max_length: int, prefix: "KVCache | None" = None):
        """`prefix`: a cache of one row, copied to the first positions of every row."""
        self.batch_size, self.max_length = batch_size, max_length
        self.layers: list[tuple[Tensor, Tensor]] = []  # keys and values, (B, S, Hkv, Dh) each
        for index, (k, v) in enumerate(prefix.layers if prefix else ()):
            keys, values = self.layer(index, k[0, 0])
            keys[:, : k.shape[1]], values[:, : v.shape[1]] = k, v

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values; a new one gets the shape (Hkv, Dh) and dtype of `like`."""
        if index == len(self.layers):
            shape = (self.batch_size, self.max_length, *like.shape)
            # Zeros: a masked value has weight 0, but 0 * NaN is NaN, and fresh memory may hold NaN.
            self.layers.append((like.new_zeros(shape), like.new_zeros(shape)))
        return self.layers[index]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, 1, Dh) fp32 of rotary position embedding (arXiv 2104.09864, 3.4.2).

    Pair i is dimensions i and i + Dh / 2 of a head, as in transformers' weights, not neighbours as
    in the paper. It is rotated by the angle position * theta^(-2i / Dh): (a, b) becomes
    (a cos - b sin, b cos + a sin), so the first half of the sines is negated.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[:, None, None].float() / theta**exponents  # (N, 1, Dh / 2)
    cos, sin = angles.cos(), angles.sin()
    # Concatenating makes torch.compile store the tables; else it recomputes them for every head.
    return torch.cat([cos, cos, -sin, sin], dim=-1).chunk(2, dim=-1)  # (N, 1, Dh) each


class DecoderAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D, Dh, family = config.hidden_size, config.head_dim, config.family
        H, Hkv = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, H * Dh, bias=family.qkv_bias)
        self.k_proj = nn.Linear(D, Hkv * Dh, bias=family.qkv_bias)
        self.v_proj = nn.Linear(D, Hkv * Dh, bias=family.qkv_bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=False)
        self.q_norm = RMSNorm(Dh, config.rms_norm_eps) if family.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(Dh, config.rms_norm_eps) if family.qk_norm else nn.Identity()

    def forward(self, x, at, rope, layout, kv) -> Tensor:  # see DecoderLayer.forward
        x = cast_once(x)  # three layers share the cast copy
        projections = self.q_proj, self.k_proj, self.v_proj
        # q: (N, H, Dh); k, v: (N, Hkv, Dh)
        q, k, v = (projection(x).unflatten(1, (-1, self.head_dim)) for projection in projections)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if kv is None:
            # dropout_p is passed because torch.compile, under activation checkpointing, takes a
            # float default for a graph input and fails in the second layer.
            output = attention(q, k, v, layout, causal=True, dropout_p=0.0)  # (N, H, Dh)
        else:
            keys, values = kv  # (B, S, Hkv, Dh)
            at_slots = layout.rows, layout.positions
            keys[at_slots], values[at_slots] = k, v
            output = cached_attention(q, keys, values, layout)  # (N, H, Dh)
        output = output.flatten(1)  # (N, H * Dh)
        return self.o_proj(output if at is None else output[at])  # (N or n, D)


class DecoderMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = cast_once(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (N or n, D)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.self_attn = DecoderAttention(config)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, at: Tensor | None, rope, layout, kv) -> Tensor:
        """(N, D) to (N, D), or with `at` to (n, D): the last layer computes only these tokens.

        rope: cosines and sines. layout: a Layout or, with a cache, CacheSlots. kv: this layer's
        cached keys and values, to which those of the new tokens are written; or None.
        """
        attended = self.self_attn(self.input_layernorm(x), at, rope, layout, kv)
        x = (x if at is None else x[at]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderModel(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        D, pad = config.hidden_size, config.pad_token_id
        # As in transformers, the padding token's embedding gets no gradient as an input (only from
        # a tied head), even if the token has another use: SmolLM2 pads with <|im_end|>.
        self.embed_tokens = nn.Embedding(config.vocab_size, D, padding_idx=pad)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.activation_checkpointing = False

    def forward(self, batch: Batch, at: Tensor, cache: KVCache | None = None) -> Tensor:
        """Returns the normed hidden states (n, D) of the tokens at indices `at` (n,), int64."""
        config, x = self.config, self.embed_tokens(batch.input_ids)  # (N, D)
        rope = rope_tables(batch.position_ids, config.head_dim, config.rope_theta)
        if cache is None:
            layout = lay_out(batch, x, config.head_dim)
        else:
            group = config.num_attention_heads // config.num_key_value_heads
            layout = cache_slots(batch, x, cache.max_length, group)
            shape = config.num_key_value_heads, config.head_dim
            like = x.new_empty(shape, dtype=matmul_dtype(x))
        for index, layer in enumerate(self.layers):
            selected = at if layer is self.layers[-1] else None
            kv = None if cache is None else cache.layer(index, like)
            inputs = x, selected, rope, layout, kv
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return self.norm(x)


class DecoderForCausalLM(nn.Module):
    """A decoder with a language-model head; smaller models share its weight with the embedding."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, batch: Batch, at: Tensor, cache: KVCache | None = None) -> Tensor:
        """Returns the logits (n, V) in fp32 at the tokens with indices `at` (n,), int64.

        For all N tokens they would take gigabytes. The product runs in the weights' own dtype, even
        under autocast: to convert a bf16 embedding at each call would take longer than the rest of
        the model does for a single token.
        """
        x = self.model(batch, at, cache)  # (n, D)
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(head.weight.dtype), head.weight).float()  # (n, V)


class DecoderForSequenceClassification(nn.Module):
    """A decoder with a linear head over each row's last token."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        """Returns the logits (B, C) in fp32."""
        x = self.model(batch, at=batch.last)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.score.weight.float())  # (B, C)
