"""Option perplexity: how likely a model finds each answer to a question; the likeliest is the prediction.

The perplexity of an option is exp of the mean negative log-likelihood of its tokens after the question. A score is the mean
log-likelihood: exp(-score) is the perplexity, and a softmax over the scores gives probabilities. With `--normalize sum` it
is not divided by the option's length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from minicls import dist
from minicls.attention import on_gpu
from minicls.batch import length_batches, pack, to_device
from minicls.decoder import KVCache

# Of a batch and its cache, on a CPU and on a GPU: no result depends on it, only speed and memory.
MAX_TOKENS = 1536, 16_384


@torch.inference_mode()
def score_brute_force(
    model: nn.Module,
    questions: Sequence[list[int]],
    options: Sequence[list[int]],
    device: torch.device,
    normalize: str = "mean",
) -> torch.Tensor:
    """What scoring means, one forward pass for every question and option; `score` must equal it. Returns (n, O) fp32."""
    scores = torch.zeros(len(questions), len(options))
    for row, question in enumerate(questions):
        for o, option in enumerate(options):
            # The token before an option's token predicts it; the last one predicts what nobody asks.
            at = torch.arange(len(question) - 1, len(question) + len(option) - 1, device=device)
            logits = model(*pack([question + option], device), at)  # (tokens of the option, V)
            targets = torch.tensor(option, device=device)[:, None]
            likelihood = logits.log_softmax(1).gather(1, targets).sum()
            scores[row, o] = likelihood / (len(option) if normalize == "mean" else 1)
    return scores


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The ids that all rows begin with; of each row at least the last one is left over."""
    first, last = (
        min(rows),
        max(rows),
    )  # in the order of a dictionary: what these two share, all rows share
    shortest = min(map(len, rows))
    same = 0
    while same < shortest - 1 and first[same] == last[same]:
        same += 1
    return first[:same]


class Prefix(NamedTuple):
    """What questions begin with, and its keys and values, which all of them share."""

    ids: list[int]
    cache: KVCache  # of one row

    def begins(self, questions: Sequence[list[int]]) -> bool:
        """Whether all questions begin so, and go on."""
        return all(
            len(ids) > len(self.ids) and ids[: len(self.ids)] == self.ids for ids in questions
        )


@torch.inference_mode()
def read_prefix(
    model: nn.Module, questions: Sequence[list[int]], device: torch.device
) -> Prefix | None:
    """One forward pass over what all questions begin with; None where that is nothing, or there is only one question."""
    ids = common_prefix(questions) if len(questions) > 1 else []
    if not ids:
        return None
    cache = KVCache(1, len(ids))
    model(*pack([ids], device), torch.tensor([len(ids) - 1], device=device), cache)
    return Prefix(ids, cache)


@torch.inference_mode()
def score(
    model: nn.Module,
    questions: Sequence[list[int]],
    options: Sequence[list[int]],
    device: torch.device,
    normalize: str = "mean",
    max_tokens: int | None = None,
    share_prefix: bool = True,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """The score of each option after each question, (n, O) fp32 on the CPU, in the questions' order.

    What all questions begin with goes through the model once (`prefix`: it has already); the rest of each once, in batches of
    similar lengths of at most `max_tokens` tokens, cached ones included; that gives every option's first token. Further
    tokens follow the question's cached keys and values: one short pass an option, each overwriting what the option before it
    left there. Ranks take batches in turn.
    """
    scores = torch.zeros(len(questions), len(options), device=device)
    if not len(questions):
        return scores.cpu()
    if share_prefix and prefix is None:
        prefix = read_prefix(model, questions, device)
    start = len(prefix.ids) if prefix else 0
    rests = [question[start:] for question in questions]
    first_tokens = torch.tensor([option[0] for option in options], device=device)
    longest_option = max(map(len, options))
    batches = length_batches(
        rests, max_tokens or MAX_TOKENS[on_gpu(device)], extra=start + longest_option - 1
    )
    for batch in batches[dist.rank() :: dist.world_size()]:
        rows = [rests[row] for row in batch]
        lengths = [len(questions[row]) for row in batch]
        cache = None
        if prefix or longest_option > 1:
            cache = KVCache(
                len(rows), max(lengths) + longest_option - 1, prefix.cache if prefix else None
            )
        packed = pack(rows, device, [start] * len(rows))
        logits = model(*packed, packed.last, cache)  # (B, V)
        likelihoods = logits.log_softmax(1)[:, first_tokens]  # (B, O)
        for o, option in enumerate(options):
            if len(option) > 1:
                packed = pack([option[:-1]] * len(rows), device, lengths)
                logits = model(
                    *packed, torch.arange(len(packed.input_ids), device=device), cache
                )  # (B * tokens, V)
                targets = to_device(np.array(option[1:] * len(rows)), device)[:, None]
                likelihoods[:, o] += (
                    logits.log_softmax(1).gather(1, targets).view(len(rows), -1).sum(1)
                )
        scores[to_device(batch, device)] = likelihoods
    if normalize == "mean":
        scores /= torch.tensor([len(option) for option in options], device=device)
    return dist.all_sum(scores).cpu()  # a row is zero on all ranks but one, so the sum is exact
