"""minicls, transformers and vLLM behind the same few methods on rows of token ids, and what serves requests as they come.

An engine is made from a model directory, with its weights in `dtype`, and has `version` and `peak_memory_bytes`.

    classify(rows)                            log-probabilities (n, C) fp32 of the classes, where the model has such a head
    score(rows, options)                      log-probabilities (n, O) fp32 of the options' tokens after each row
    generate(rows, max_new_tokens, stop_ids)  the likeliest ids after each row, up to and without a stop id
    forget()                                  drops what it remembers of rows, so that asking again costs the same
    close()                                   ends what it started

One row is one request alone; of many, each engine makes the batches that suit it. Engines other than minicls score options of
one token only.
"""

import functools
import http.client
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import minicls
from minicls import dist, scorer, weights
from minicls.config import UserError
from minicls.generate import generate
from minicls.predict import classify_rows

Rows = Sequence[list[int]]


def is_classifier(directory: Path) -> bool:
    """Whether a model directory holds a classification head rather than a language model."""
    return weights.read_config(directory)["architectures"][0].endswith("ForSequenceClassification")


def one_token(options: Rows) -> list[int]:
    if any(len(option) > 1 for option in options):
        raise UserError("--engines: an option of several tokens; only minicls scores those")
    return [option[0] for option in options]


def before_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return list(ids[:end])


class Minicls:
    """The packed forward pass of evaluation, the scorer, and greedy decoding with a cache."""

    version = minicls.__version__

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, compile: bool = False):
        config = weights.read_config(directory)
        kind = weights.ARCHITECTURES[config["architectures"][0]]
        model, _, _ = weights.build_model(kind, config, directory, 0, device, dtype)
        if kind is weights.BERT:  # hidden states go to fp32 before a head
            model.bert.pooler.float(), model.classifier.float()
        self.model, self.device = model.eval().requires_grad_(False), device
        if compile:
            self.model.compile(dynamic=True)
            self.version += ", compiled"
        self.forget()

    def classify(self, rows: Rows) -> torch.Tensor:
        return classify_rows(self.model, rows, self.device).log_softmax(1)

    def score(self, rows: Rows, options: Rows) -> torch.Tensor:
        # One request after another has no prefix of its own: what it and the one before begin with stays for those that follow.
        if not (self.prefix and self.prefix.begins(rows)):
            self.prefix = scorer.read_prefix(self.model, [*rows, *self.last], self.device)
        self.last = list(rows[-1:])
        return scorer.score(self.model, rows, options, self.device, "sum", prefix=self.prefix)

    def generate(self, rows: Rows, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        return generate(self.model, rows, max_new_tokens, stop_ids, self.device)

    @property
    def peak_memory_bytes(self) -> int:
        return dist.peak_memory_bytes(self.device)

    def forget(self) -> None:
        self.prefix: scorer.Prefix | None = None
        self.last: Rows = []

    def close(self) -> None:
        pass


class Transformers:
    """transformers' own models and `generate`, its default attention; rows in padded batches, sorted by length."""

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, batch_size: int = 32, logits_to_keep: int = 1
    ):
        """`logits_to_keep`: positions that a score computes logits of, counted from the end; 0: all, the library's default."""
        import transformers

        auto = (
            transformers.AutoModelForSequenceClassification
            if is_classifier(directory)
            else transformers.AutoModelForCausalLM
        )
        self.version, self.device = transformers.__version__, device
        self.model = auto.from_pretrained(directory, dtype=dtype).eval().to(device)
        self.batch_size, self.logits_to_keep = batch_size, logits_to_keep

    def _batches(self, rows: Rows, side: str) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Row numbers, and their ids (B, T) and mask (B, T), padded on one side."""
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(rows), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = [torch.tensor(rows[row]) for row in batch]
            pad = functools.partial(pad_sequence, batch_first=True, padding_side=side)
            padded = {
                "input_ids": pad(ids, padding_value=self.model.config.pad_token_id or 0),
                "attention_mask": pad([torch.ones_like(row) for row in ids]),
            }
            yield batch, {name: x.to(self.device) for name, x in padded.items()}

    @torch.inference_mode()
    def classify(self, rows: Rows) -> torch.Tensor:
        found = torch.zeros(len(rows), self.model.config.num_labels)
        for batch, padded in self._batches(rows, "right"):
            found[batch] = self.model(**padded).logits.float().log_softmax(1).cpu()
        return found

    @torch.inference_mode()
    def score(self, rows: Rows, options: Rows) -> torch.Tensor:
        first = one_token(options)
        found = torch.zeros(len(rows), len(options))
        for batch, padded in self._batches(rows, "left"):
            positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logits = self.model(
                **padded, position_ids=positions, use_cache=False, logits_to_keep=self.logits_to_keep
            ).logits
            # All positions in the weights' own dtype, as harnesses do; one in fp32, for its digits.
            logits = logits.float() if self.logits_to_keep else logits
            found[batch] = logits.log_softmax(-1)[:, -1, first].float().cpu()
        return found

    @torch.inference_mode()
    def generate(self, rows: Rows, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in rows]
        how = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": list(stop_ids) or None,
            "pad_token_id": 0,
        }
        for batch, padded in self._batches(rows, "left"):
            new = self.model.generate(**padded, **how)[:, padded["input_ids"].shape[1] :]
            for row, ids in zip(batch, new.tolist(), strict=True):
                found[row] = before_stop(ids, stop_ids)
        return found

    def forget(self) -> None:
        pass

    peak_memory_bytes = Minicls.peak_memory_bytes
    close = Minicls.close


# What a CPU needs for a fair figure: all the cores, a cache of a few GiB, the engine in its own process; else it is halved.
def vllm_environment(threads: int) -> dict[str, str]:
    """Environment variables for a process that imports vLLM; the CPU's mean nothing to a GPU."""
    cpu = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    return cpu | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def _vllm_arguments(directory: Path, dtype: torch.dtype, device: torch.device, max_length: int, eager: bool) -> dict:
    runner = "pooling" if is_classifier(directory) else "generate"
    dtype_name = str(dtype).removeprefix("torch.")
    # Its default is nearly the whole card, of which others, a desktop or bench.py itself, have taken a part.
    share = {"gpu_memory_utilization": 0.6} if device.type == "cuda" else {}
    lengths = {"max_model_len": max_length, "enforce_eager": eager}
    return {"model": str(directory), "dtype": dtype_name, "runner": runner} | lengths | share


class VLLM:
    """vLLM's engine in this process; `vllm_environment` must be set before it starts."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, max_length: int, eager: bool = False):
        """`max_length`: tokens of a row with its answer; `eager`: no torch.compile, which takes most of a minute."""
        import vllm

        self.version, self.device = vllm.__version__, device
        self.llm = vllm.LLM(**_vllm_arguments(directory, dtype, device, max_length, eager))
        self.parameters = functools.partial(vllm.SamplingParams, temperature=0, detokenize=False)

    def _ask(self, method: str, rows: Rows, *parameters) -> list:
        return getattr(self.llm, method)([{"prompt_token_ids": list(ids)} for ids in rows], *parameters, use_tqdm=False)

    def classify(self, rows: Rows) -> torch.Tensor:
        return torch.tensor([found.outputs.probs for found in self._ask("classify", rows)]).log()

    def score(self, rows: Rows, options: Rows) -> torch.Tensor:
        first = one_token(options)
        found = self._ask("generate", rows, self.parameters(max_tokens=1, logprob_token_ids=first))
        return torch.tensor([[one.outputs[0].logprobs[0][token].logprob for token in first] for one in found])

    def generate(self, rows: Rows, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        how = self.parameters(max_tokens=max_new_tokens, ignore_eos=True, stop_token_ids=list(stop_ids))
        return [before_stop(found.outputs[0].token_ids, stop_ids) for found in self._ask("generate", rows, how)]

    def forget(self) -> None:
        self.llm.reset_prefix_cache()

    @property
    def peak_memory_bytes(self) -> int | None:
        """None on a GPU, whose memory vLLM takes ahead of its needs."""
        return None if self.device.type == "cuda" else dist.peak_memory_bytes(self.device)

    close = Minicls.close


class VLLMServer:
    """vLLM's HTTP server in a process of its own. Rows go one after another; several threads may ask at once."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, max_length: int, eager: bool = False):
        import vllm

        self.version, self.device = vllm.__version__, device
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        flags = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"]
        for name, value in _vllm_arguments(directory, dtype, device, max_length, eager).items():
            flag = "--" + name.replace("_", "-")
            flags += [flag] * value if isinstance(value, bool) else [flag, str(value)]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
        env = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # for /reset_prefix_cache
        self.process = subprocess.Popen(command, stdout=2, env=env)  # with its errors: standard output is for results
        try:
            self._wait_until_it_answers()
        except BaseException:  # interrupted, too: who started the server has nothing yet to close it by
            self.close()
            raise

    def _wait_until_it_answers(self) -> None:
        while self.process.poll() is None:
            try:
                self._send("GET", "/health")
                return
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
        raise RuntimeError(f"vLLM's server ended with code {self.process.returncode}")

    def _send(self, verb: str, path: str, **body) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(verb, path, json.dumps({"model": "model"} | body) if body else None, headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"vLLM's server answered {response.status}: {text[:200]}")
        return json.loads(text) if text else {}

    def _complete(self, row: list[int], **how) -> dict:
        return self._send("POST", "/v1/completions", prompt=row, temperature=0, **how)["choices"][0]

    def classify(self, rows: Rows) -> torch.Tensor:
        return torch.tensor([self._send("POST", "/classify", input=row)["data"][0]["probs"] for row in rows]).log()

    def score(self, rows: Rows, options: Rows) -> torch.Tensor:
        first = one_token(options)
        how = {"max_tokens": 1, "logprobs": 1, "logprob_token_ids": first, "return_tokens_as_token_ids": True}
        found = [self._complete(row, **how)["logprobs"]["top_logprobs"][0] for row in rows]
        return torch.tensor([[one[f"token_id:{token}"] for token in first] for one in found])

    def generate(self, rows: Rows, max_new_tokens: int, stop_ids: Sequence[int]) -> list[list[int]]:
        how = {
            "max_tokens": max_new_tokens,
            "ignore_eos": True,
            "stop_token_ids": list(stop_ids),
            "return_token_ids": True,
        }
        return [before_stop(self._complete(row, **how)["token_ids"], stop_ids) for row in rows]

    @property
    def peak_memory_bytes(self) -> int | None:
        """Resident memory of the server's processes, each at its peak; None on a GPU, which does not say another's memory."""
        if self.device.type == "cuda":
            return None
        processes, total = [self.process.pid], 0
        while processes:
            pid = processes.pop()
            total += dist.resident_peak_bytes(pid)
            processes += [
                child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
            ]
        return total

    def forget(self) -> None:
        if not self._send("POST", "/reset_prefix_cache").get("success", True):
            raise RuntimeError("vLLM's server did not empty its prefix cache")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# Requests as they come. All times are seconds from the first moment on.


def arrivals(rate: float, n: int, seed: int) -> np.ndarray:
    """When n requests arrive, (n,) ascending: a Poisson process of `rate` a second, so the gaps are exponential."""
    return np.random.default_rng(seed).exponential(1 / rate, n).cumsum()


class Feed:
    """A thread that tokenizes each text when it arrives, whatever the engine does meanwhile."""

    def __init__(self, due: Sequence[float], encode: Callable[[int], list[int]], clock: Callable = time.perf_counter):
        """`encode(i)`: the row of request i."""
        self.queue: queue.Queue = queue.Queue()
        start = clock()
        self.clock = lambda: clock() - start

        def run() -> None:
            for i, moment in enumerate(due):
                time.sleep(max(0.0, moment - self.clock()))
                try:
                    self.queue.put((i, encode(i)))
                except Exception as error:  # to be raised where somebody listens
                    self.queue.put((i, error))

        threading.Thread(target=run, daemon=True).start()

    def poll(self, timeout: float | None) -> tuple[int, list[int]] | None:
        """The next request, waiting for it at most `timeout` seconds (None: as long as it takes), else None."""
        try:
            i, row = self.queue.get(timeout=timeout) if timeout is None or timeout > 0 else self.queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(row, Exception):
            raise row
        return i, row


def serve_batches(
    due: Sequence[float], feed: Feed, answer: Callable[[list[list[int]]], list], max_tokens: int, max_wait: float
) -> tuple[list[float], list]:
    """Answers requests in batches: what has arrived, up to `max_tokens` tokens, waiting at most `max_wait` seconds for more.

    Returns each request's latency and answer. A latency counts from the moment the request was *due*, so that the time it
    waited for an engine that was busy, or stalled, is in it.
    """
    latencies, answers = [0.0] * len(due), [None] * len(due)
    held = None  # arrived, but too much for the batch before
    left = len(due)
    while left:
        batch = [held or feed.poll(None)]
        held, tokens, deadline = None, len(batch[0][1]), feed.clock() + max_wait
        while len(batch) < left and tokens < max_tokens and (request := feed.poll(max(0.0, deadline - feed.clock()))):
            tokens += len(request[1])
            if tokens > max_tokens:
                held = request
                break
            batch.append(request)
        found = answer([row for _, row in batch])
        now = feed.clock()
        for (i, _), one in zip(batch, found, strict=True):
            latencies[i], answers[i] = now - due[i], one
        left -= len(batch)
    return latencies, answers


def serve_each(due: Sequence[float], answer: Callable[[int], object]) -> tuple[list[float], list]:
    """Sends request i at its moment from a thread of its own, to a server that batches by itself: latencies and answers."""
    latencies, answers = [0.0] * len(due), [None] * len(due)
    errors: list[Exception] = []
    start = time.perf_counter()

    def send(i: int) -> None:
        try:
            answers[i] = answer(i)
            latencies[i] = time.perf_counter() - start - due[i]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(due))]
    for thread, moment in zip(threads, due, strict=True):
        time.sleep(max(0.0, start + moment - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return latencies, answers
