"""BERT (arXiv 1810.04805) for sequence classification, on packed batches.

Follows transformers' `modeling_bert.py` in names, so that its weights load and export as they are, and
google-research/bert's `modeling.py` in arithmetic. Leaves out what a classifier does not need: the pretraining heads,
cross-attention, relative positions, and sentence pairs (every token has token type 0).

N tokens of the batch, B rows, D hidden size, H heads, Dh head size, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minicls.attention import Rows, attention, products_dtype
from minicls.kernels import cast_once


@dataclass
class BertConfig:
    """The fields of a BERT `config.json` that shape the model, with the published defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    num_labels: int = 2

    def __post_init__(self):
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported, only 'gelu'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}"
            )


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)  # (N, D)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings.weight[0]))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        x = cast_once(x)
        q, k, v = (
            f(x).view(len(x), self.num_attention_heads, -1)
            for f in (self.query, self.key, self.value)
        )  # (N, H, Dh)
        dropout_p = self.dropout_p if self.training else 0.0
        return attention(q, k, v, rows, dropout_p=dropout_p).flatten(1)  # (N, D)


class BertOutput(nn.Module):
    """Projection, dropout, residual and LayerNorm: how both halves of a layer end (post-norm, unlike later models)."""

    def __init__(self, in_features: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)  # (N, D)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, x: torch.Tensor, rows: Rows, at: torch.Tensor | None) -> torch.Tensor:
        attended = self.self(x, rows)  # (N, D)
        return (
            self.output(attended, x) if at is None else self.output(attended[at], x[at])
        )  # (N or n, D)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(x))  # exact (erf) GELU: the tanh approximation is another function


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, x: torch.Tensor, rows: Rows, at: torch.Tensor | None) -> torch.Tensor:
        """x: (N, D). `at` (n,): the tokens that are asked for, where no layer follows that needs the others."""
        x = self.attention(x, rows, at)  # (N or n, D)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(x))


class BertModel(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.activation_checkpointing = False

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        at: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the hidden states (n, D), before the pooler, of the tokens asked for, by their indices in the batch: at (n,)."""
        x = self.embeddings(input_ids, position_ids)  # (N, D)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        dropout_p = self.config.attention_probs_dropout_prob if self.training else 0.0
        rows = Rows(cu_seqlens, max_seqlen)
        rows.prepare(x.device, products_dtype(x), len(x), head_dim, dropout_p)
        for layer in self.encoder.layer:
            wanted = at if layer is self.encoder.layer[-1] else None
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, rows, wanted, use_reentrant=False)
            else:
                x = layer(x, rows, wanted)
        return x  # (n, D)


class BertForSequenceClassification(nn.Module):
    """BERT with a pooler over each row's first token, dropout, and a linear classifier."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        dropout = (
            config.hidden_dropout_prob
            if config.classifier_dropout is None
            else config.classifier_dropout
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> torch.Tensor:
        """input_ids, position_ids: (N,) int64; cu_seqlens: (B + 1,) int32. Returns the logits (B, C) in fp32.

        The head is applied to each row's first token alone, and in fp32 also under autocast: it costs next to nothing
        there, and bf16 logits would have three significant digits.
        """
        first = self.bert(
            input_ids, position_ids, cu_seqlens, max_seqlen, cu_seqlens[:-1]
        ).float()  # (B, D)
        with torch.autocast(first.device.type, enabled=False):
            return self.classifier(self.dropout(self.bert.pooler(first)))  # (B, C)
