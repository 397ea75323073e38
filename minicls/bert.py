"""BERT (arXiv 1810.04805) for sequence classification, on packed batches.

Names and arithmetic follow transformers' `modeling_bert.py`, so its weights load and export
unchanged. Left out, since a classifier does not need them: the pretraining heads, cross-attention,
relative positions, and sentence pairs (every token has token type 0).

A batch is one sequence of N tokens, the B rows one after another (`attention.Batch`). D hidden
size, H heads, Dh head size, C classes; n is the number of tokens that an index `at` selects.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minicls.attention import Batch, Layout, attention, lay_out
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
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
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
            sizes = f"{self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads: {sizes}")


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        D, pad = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x, heads = cast_once(x), (self.num_attention_heads, -1)  # three layers share the cast copy
        projections = self.query, self.key, self.value
        q, k, v = (projection(x).unflatten(1, heads) for projection in projections)  # (N, H, Dh)
        dropout_p = self.dropout_p if self.training else 0.0
        return attention(q, k, v, layout, dropout_p=dropout_p).flatten(1)  # (N, D)


class BertOutput(nn.Module):
    """Projection, dropout, residual, LayerNorm: the end of each half of a layer (post-norm)."""

    def __init__(self, in_features: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)  # (N or n, D)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, x: Tensor, layout: Layout, at: Tensor | None) -> Tensor:
        attended = self.self(x, layout)  # (N, D)
        if at is not None:
            attended, x = attended[at], x[at]  # (n, D)
        return self.output(attended, x)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))  # exact (erf), as in transformers; Google's code has tanh


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, x: Tensor, layout: Layout, at: Tensor | None) -> Tensor:
        """(N, D) to (N, D), or with `at` to (n, D): the last layer computes only these tokens."""
        x = self.attention(x, layout, at)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    """Holds the layers under transformers' name; `BertModel` runs them."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class BertModel(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.activation_checkpointing = False

    def forward(self, batch: Batch, at: Tensor) -> Tensor:
        """Returns the hidden states (n, D) of the tokens at indices `at` (n,), unpooled."""
        x = self.embeddings(batch.input_ids, batch.position_ids)  # (N, D)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        dropout_p = self.config.attention_probs_dropout_prob if self.training else 0.0
        layout = lay_out(batch, x, head_dim, dropout_p)
        for layer in self.encoder.layer:
            selected = at if layer is self.encoder.layer[-1] else None
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, layout, selected, use_reentrant=False)
            else:
                x = layer(x, layout, selected)
        return x


class BertForSequenceClassification(nn.Module):
    """BERT with a pooler over each row's first token, dropout, and a linear classifier."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        dropout_p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout_p is None else dropout_p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, batch: Batch) -> Tensor:
        """Returns the logits (B, C) in fp32.

        The head runs in fp32 even under autocast: for one token per row that costs next to nothing,
        and bf16 logits would have only two to three significant digits.
        """
        first = self.bert(batch, at=batch.cu_seqlens[:-1]).float()  # (B, D)
        with torch.autocast(first.device.type, enabled=False):
            return self.classifier(self.dropout(self.bert.pooler(first)))  # (B, C)
