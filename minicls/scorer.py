"""Option perplexity: how likely each answer is after a question; the likeliest is the prediction.

The perplexity of an option is exp of the mean negative log-likelihood of its tokens after the
question. A score is the mean log-likelihood: exp(-score) is the perplexity, and a softmax over the
scores gives probabilities. With `--normalize sum` it is not divided by the option's length.

n questions, O options, V vocabulary; B of the questions in a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minicls import dist
from minicls.batch import length_batches, pack, to_device
from minicls.decoder import KVCache
from minicls.kernels import on_gpu

# In a batch and its cache, on a CPU and on a GPU. Speed and memory depend on it, no score does.
MAX_TOKENS = 1536, 16_384
Rows = Sequence[list[int]]


@torch.inference_mode()
def score_brute_force(
    model: nn.Module, questions: Rows, options: Rows, device: torch.device, normalize: str = "mean"
) -> Tensor:
    """The definition of a score, one forward pass per question and option; `score` must equal it.

    Returns (n, O) fp32.
    """
    scores = torch.zeros(len(questions), len(options))
    for row, question in enumerate(questions):
        for o, option in enumerate(options):
            # A token is predicted by the one before it; the last token's prediction is not needed.
            at = torch.arange(len(question) - 1, len(question) + len(option) - 1, device=device)
            logits = model(pack([question + option], device), at)  # (tokens of the option, V)
            targets = torch.tensor(option, device=device)[:, None]
            log_likelihood = logits.log_softmax(1).gather(1, targets).sum()
            scores[row, o] = log_likelihood / (len(option) if normalize == "mean" else 1)
    return scores


def common_prefix(rows: Rows) -> list[int]:
    """The ids that all rows begin with, except that at least each row's last id is left over."""
    first, last = min(rows), max(rows)  # in dictionary order: all rows share what these two share
    shortest, length = min(map(len, rows)), 0
    while length < shortest - 1 and first[length] == last[length]:
        length += 1
    return first[:length]


class Prefix(NamedTuple):
    """Ids that questions begin with, and their keys and values."""

    ids: list[int]
    cache: KVCache  # of one row

    def begins(self, questions: Rows) -> bool:
        """Whether every question begins with these ids, and continues."""
        length = len(self.ids)
        return all(len(ids) > length and ids[:length] == self.ids for ids in questions)


@torch.inference_mode()
def read_prefix(model: nn.Module, questions: Rows, device: torch.device) -> Prefix | None:
    """One forward pass over the common prefix; None if it is empty, or with a single question."""
    ids = common_prefix(questions) if len(questions) > 1 else []
    if not ids:
        return None
    batch, cache = pack([ids], device), KVCache(1, len(ids))
    model(batch, batch.last, cache)
    return Prefix(ids, cache)


@torch.inference_mode()
def score(
    model: nn.Module,
    questions: Rows,
    options: Rows,
    device: torch.device,
    normalize: str = "mean",
    max_tokens: int | None = None,
    share_prefix: bool = True,
    prefix: Prefix | None = None,
) -> Tensor:
    """The score of each option after each question: (n, O) fp32, on the CPU, in the given order.

    The shared prefix is computed once, or passed as `prefix`. Each question's remainder is computed
    once, in batches of similar lengths of at most `max_tokens` tokens, cached ones included; it
    scores every option's first token. An option's further tokens take one short pass over the
    question's cached keys and values, and overwrite those of the option before. Ranks take
    batches in turn.
    """
    scores = torch.zeros(len(questions), len(options), device=device)
    if not len(questions):
        return scores.cpu()
    if share_prefix and prefix is None:
        prefix = read_prefix(model, questions, device)
    start = len(prefix.ids) if prefix else 0
    remainders = [question[start:] for question in questions]
    first_tokens = torch.tensor([option[0] for option in options], device=device)
    room = max(map(len, options)) - 1  # for an option's tokens that are inputs: all but its last
    max_tokens = max_tokens or MAX_TOKENS[on_gpu(device)]
    batches = length_batches(remainders, max_tokens, extra=start + room)
    for rows in batches[dist.rank() :: dist.world_size()]:
        lengths, cache = [len(questions[row]) for row in rows], None
        if prefix or room:
            cache = KVCache(len(rows), max(lengths) + room, prefix.cache if prefix else None)
        batch = pack([remainders[row] for row in rows], device, [start] * len(rows))
        logits = model(batch, batch.last, cache)  # (B, V)
        log_likelihoods = logits.log_softmax(1)[:, first_tokens]  # (B, O)
        for o, option in enumerate(options):
            if len(option) > 1:
                batch = pack([option[:-1]] * len(rows), device, lengths)
                everywhere = torch.arange(len(batch.input_ids), device=device)
                logits = model(batch, everywhere, cache)  # (B * further tokens, V)
                targets = to_device(np.array(option[1:] * len(rows)), device)[:, None]
                further = logits.log_softmax(1).gather(1, targets).view(len(rows), -1)
                log_likelihoods[:, o] += further.sum(1)
        scores[to_device(rows, device)] = log_likelihoods
    if normalize == "mean":
        scores /= torch.tensor([len(option) for option in options], device=device)
    return dist.all_sum(scores).cpu()  # a row is zero on all ranks but one, so the sum is exact
