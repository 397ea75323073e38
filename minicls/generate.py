"""Greedy decoding with a cache, and reading the chosen option back out of what was written."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minicls.attention import on_gpu
from minicls.batch import length_batches, pack
from minicls.decoder import KVCache
from minicls.tokenizer import Tokenizer

# Of a batch with its answers, on a CPU and on a GPU, where a step takes as long for 200 rows as for one.
MAX_TOKENS = 4096, 32_768


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    device: torch.device,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token: at most `max_new_tokens` ids, up to and without a stop id.

    Prompts go in batches of similar lengths, at most `max_tokens` tokens with their answers. A row's positions count its own
    tokens alone, so no row depends on its neighbours. Equals transformers' `generate(do_sample=False)`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    stop = set(stop_ids)
    for batch in length_batches(prompts, max_tokens or MAX_TOKENS[on_gpu(device)], extra=max_new_tokens):
        lengths = np.array([len(prompts[row]) for row in batch])
        cache = KVCache(len(batch), int(lengths.max()) + max_new_tokens)
        packed = pack([prompts[row] for row in batch], device)
        going = np.ones(len(batch), bool)
        for new in range(max_new_tokens):
            next_ids = model(*packed, packed.last, cache).argmax(1).tolist()  # (B,)
            for i, token in enumerate(next_ids):
                going[i] &= token not in stop
                if going[i]:
                    answers[batch[i]].append(token)
            if not going.any():
                break
            # A finished row goes on, unheard, until all are: the batch keeps its shape.
            packed = pack([[token] for token in next_ids], device, lengths + new)
    return answers


def read_answer(text: str, num_options: int) -> int | None:
    """The option that generated text names: the letter it begins with, after the think block if there is one, else None.

    The letter must stand alone, or before punctuation or a line break: "A.", not "A story about".
    """
    answer = text.rsplit("</think>", 1)[-1]
    match = re.match(r"[\W_]*([A-Z])(?=[\W_]*$|[.:,;)\]*_<\n])", answer)
    index = ord(match.group(1)) - ord("A") if match else num_options
    return index if index < num_options else None


def read_answers(
    tokenizer: Tokenizer, answers: Sequence[Sequence[int]], num_options: int
) -> tuple[list[int | None], float]:
    """The option of each generated answer, and the share of answers that name none."""
    read = [read_answer(tokenizer.decode(ids), num_options) for ids in answers]
    return read, read.count(None) / max(1, len(read))
