"""Option perplexity: how likely each answer is after a question; the likeliest is the prediction.

The perplexity of an option is exp of the mean negative log-likelihood of its tokens after the
question. A score is the mean log-likelihood: exp(-score) is the perplexity, and a softmax over the
scores gives probabilities. With `--normalize sum`, a score is the sum and not the mean.

n questions, O options, V vocabulary; B questions in a batch.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minicls import dist
from minicls.batch import Rows, length_batches, pack, to_device
from minicls.decoder import KVCache
from minicls.kernels import on_gpu

# Tokens per batch, cached ones included, on a CPU and on a GPU: for speed and memory, not scores.
MAX_TOKENS = 1536, 16_384


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
            # Each token is predicted at the one before it: start one early, leave out the last.
            at = torch.arange(len(question) - 1, len(question) + len(option) - 1, device=device)
            logits = model(pack([question + option], device), at)  # (option length, V)
            targets = torch.tensor(option, device=device)[:, None]
            log_likelihood = logits.log_softmax(1).gather(1, targets).sum()
            scores[row, o] = log_likelihood / (len(option) if normalize == "mean" else 1)
    return scores


def common_prefix(rows: Rows) -> list[int]:
    """The ids that all rows begin with, without any row's last id, so that no row becomes empty."""
    first, last = min(rows), max(rows)  # all rows sort between these, so they share no less
    shortest, length = min(map(len, rows)), 0
    while length < shortest - 1 and first[length] == last[length]:
        length += 1
    return first[:length]


class Prefix(NamedTuple):
    """The ids that questions begin with, and their keys and values."""

    ids: list[int]
    cache: KVCache  # holds one row

    def begins(self, questions: Rows) -> bool:
        """Whether every question begins with these ids and has more after them."""
        length = len(self.ids)
        return all(len(ids) > length and ids[:length] == self.ids for ids in questions)


@torch.inference_mode()
def read_prefix(model: nn.Module, questions: Rows, device: torch.device) -> Prefix | None:
    """Computes the common prefix in one forward pass; None if it is empty, or for one question."""
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

    The prefix that the questions share is computed once, or passed as `prefix`. The rest of each
    question is computed once, in batches of similar lengths with at most `max_tokens` tokens,
    cached ones included; its last token's logits score every option's first token. An option's
    further tokens take one short pass over the question's cached keys and values, and overwrite
    those of the option before. Ranks take batches in turn.
    """
    scores = torch.zeros(len(questions), len(options), device=device)
    if not len(questions):
        return scores.cpu()
    if share_prefix and prefix is None:
        prefix = read_prefix(model, questions, device)
    start = len(prefix.ids) if prefix else 0
    remainders = [question[start:] for question in questions]
    first_tokens = torch.tensor([option[0] for option in options], device=device)
    room = max(map(len, options)) - 1  # an option's last token predicts nothing, so is no input
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
                all_tokens = torch.arange(len(batch.input_ids), device=device)
                logits = model(batch, all_tokens, cache)  # (B * (option length - 1), V)
                targets = to_device(np.array(option[1:] * len(rows)), device)[:, None]
                further = logits.log_softmax(1).gather(1, targets).view(len(rows), -1)
                log_likelihoods[:, o] += further.sum(1)
        scores[to_device(rows, device)] = log_likelihoods
    if normalize == "mean":
        scores /= torch.tensor([len(option) for option in options], device=device)
    return dist.all_sum(scores).cpu()  # a row is zero on all ranks but one, so the sum is exact
