"""Greedy decoding with a cache, and reading the option that a generated answer names."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from minicls.batch import length_batches, pack
from minicls.decoder import KVCache
from minicls.kernels import on_gpu

# Tokens of a batch with its answers, on a CPU and on a GPU. A GPU decodes 200 rows in the time of one.
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
    """The likeliest continuation of each prompt, token by token: at most `max_new_tokens` ids, ending before a stop id.

    Equals transformers' `generate(do_sample=False)`. Prompts are batched by length, at most `max_tokens` tokens with
    their answers; positions count within a row, so no row depends on its neighbours.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    stop = set(stop_ids)
    for rows in length_batches(prompts, max_tokens or MAX_TOKENS[on_gpu(device)], extra=max_new_tokens):
        lengths = np.array([len(prompts[row]) for row in rows])
        cache = KVCache(len(rows), int(lengths.max()) + max_new_tokens)
        batch, running = pack([prompts[row] for row in rows], device), set(rows)
        for step in range(max_new_tokens):
            next_ids = model(batch, batch.last, cache).argmax(1).tolist()  # (B,)
            for row, token in zip(rows, next_ids, strict=True):
                if token in stop:
                    running.discard(row)
                elif row in running:
                    answers[row].append(token)
            if not running:
                break
            # Finished rows keep decoding, ignored, so the batch keeps its shape.
            batch = pack([[token] for token in next_ids], device, lengths + step)
    return answers


def read_answer(text: str, num_options: int) -> int | None:
    """The index of the option that a generated text names, or None.

    The option is the text's first letter, after a think block if there is one. It must be alone, or followed by
    punctuation or a line break: "A.", not "A story about".
    """
    answer = text.rsplit("</think>", 1)[-1]
    match = re.match(r"[\W_]*([A-Z])(?=[\W_]*$|[.:,;)\]*_<\n])", answer)
    index = ord(match.group(1)) - ord("A") if match else num_options
    return index if index < num_options else None
