"""Sends requests to an engine, and computes the figures of one row of bench.json: all timing, and the check of answers.

In a closed loop (modes single and offline) the next request is sent once the previous one is answered. In an open loop
(mode server) requests arrive when they are due, whether the engine is ready or not. bench.py says why that matters.
"""

import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minicls.engines import Engine
from minicls.generate import read_answer
from minicls.predict import Reader

# In mode server: the tokens of a batch, and the seconds that it waits for more requests.
MAX_BATCH_TOKENS, MAX_BATCH_WAIT = 2048, 0.005
WARM_UP_ROWS = 16
MARGIN = 0.05  # nats between the two best options, above which every engine must give the same answer
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.1}  # nats by which a log-probability from random weights may differ
UNKNOWN = dict.fromkeys(("accuracy", "agreement", "changed_answers"))  # in the verdict on a row without answers


def request_steps(s, reader: Reader, engine: Engine, method: str) -> tuple[Callable, Callable]:
    """The two steps of a request, both of which are timed: texts -> rows of ids, and rows -> one answer per row.

    An answer is a list of log-probabilities or of generated ids. Generation stops at the end of the turn, except with
    random weights. For a model trained on the letter alone, the think block is part of the prompt, and only the letter
    is generated.
    """
    if method in ("classify", "cascade"):
        encode = engine.encode if method == "cascade" else reader.rows
        return encode, lambda rows: engine.classify(rows).tolist()
    chat = reader.chat
    if method == "score":
        return reader.rows, lambda rows: engine.score(rows, chat.options).tolist()
    only_letter = reader.settings.get("train_on") == "letter"
    given_think = only_letter or reader.settings.get("think_in") == "prompt"
    max_new_tokens = min(s.max_new_tokens, max(map(len, chat.options))) if only_letter else s.max_new_tokens
    stop_ids = [] if s.init == "random" else chat.stop_ids
    encode = chat.questions if given_think else chat.prompts
    return lambda texts: encode(texts)[0], lambda rows: engine.generate(rows, max_new_tokens, stop_ids)


def measure_row(s, reader: Reader, engine: Engine, method: str, mode: str, texts: list[str], others: list[str]) -> dict:
    """Measures one method in one mode on `texts`; `others` warm the engine up. `s` has the settings of bench.py.

    Returns the row's figures, and the predictions (None: no option named) and log-probabilities that bench.py checks.
    """
    encode, answer = request_steps(s, reader, engine, method)
    batch_size = 1 if mode == "single" else len(texts)

    def warm_up_window() -> None:
        engine.forget()
        # With --compile, use the timed batch size, so that nothing is compiled while the clock runs.
        size = batch_size if s.compile else min(batch_size, WARM_UP_ROWS)
        for start in range(0, WARM_UP_ROWS, WARM_UP_ROWS if batch_size > 1 else 4):
            answer(encode(others[start : start + size]))
        engine.warm_up(others[:size])

    warm_up(warm_up_window)
    tokens = statistics.mean(map(len, encode(texts)))
    if mode == "server":
        engine.forget()
        due = arrivals(s.rate, len(texts), s.seed).tolist()
        if engine.concurrent:
            latencies, answers = serve_each(due, lambda i: answer(encode([texts[i]]))[0])
        else:
            feed = Feed(due, lambda i: encode([texts[i]])[0])
            latencies, answers = serve_batches(due, feed, answer, MAX_BATCH_TOKENS, MAX_BATCH_WAIT)
        seconds = max(due_time + latency for due_time, latency in zip(due, latencies, strict=True))
        row = figures(latencies, seconds, len(texts), tokens, s.slo_ms)
    else:
        timed = (lambda batch: answer(encode(batch))), engine.forget, s.num_requests, s.min_seconds
        latencies, num_answered, answers = closed_loop(texts, batch_size, *timed)
        row = figures(latencies, sum(latencies), num_answered, tokens)
    if method == "generate":
        predictions = [read_answer(reader.tokenizer.decode(ids), len(reader.label_names)) for ids in answers]
    else:
        predictions = [int(np.argmax(values)) for values in answers]
    # Accuracy and agreement count each text once: sending one again steadies the timing but adds no information.
    row |= {"num_requests": len(texts), "peak_memory_bytes": engine.peak_memory_bytes, "engine_version": engine.version}
    return row | {"predictions": predictions, "log_probabilities": None if method == "generate" else answers}


def figures(
    latencies: Sequence[float], seconds: float, num_answered: int, tokens: float, slo_ms: float | None = None
) -> dict:
    """The figures of a row in which `num_answered` requests of on average `tokens` input tokens took `seconds`.

    latencies: in seconds; in mode offline, that of the whole call. With `slo_ms`, the row also has the fraction of
    requests that were answered within it.
    """
    p50, p90, p99 = (1000 * np.percentile(latencies, [50, 90, 99])).tolist()
    row = {"requests_per_second": num_answered / seconds, "input_tokens_per_second": tokens * num_answered / seconds}
    row |= {"latency_p50_ms": p50, "latency_p90_ms": p90, "latency_p99_ms": p99}
    if slo_ms is not None:
        row["slo_attainment"] = float(np.mean([1000 * latency <= slo_ms for latency in latencies]))
    return row


def warm_up(window: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> int:
    """Calls `window` until two successive calls differ by less than a tenth, at most ten times; returns the count."""
    seconds: list[float] = []
    while len(seconds) < 10 and not (len(seconds) > 1 and abs(seconds[-1] / seconds[-2] - 1) < 0.1):
        begin = clock()
        window()
        seconds.append(clock() - begin)
    return len(seconds)


def closed_loop(
    texts: list[str],
    batch_size: int,
    answer: Callable[[list[str]], list],
    forget: Callable[[], None],
    num_requests: int,
    min_seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], int, list]:
    """Sends `batch_size` texts, waits for the answers, sends the next; in whole passes, until both minima are reached.

    Returns the seconds of each call, the number of requests, and the answers of the first pass.
    """
    seconds, passes, first_answers = [], 0, []
    while passes * len(texts) < num_requests or sum(seconds) < min_seconds:
        forget()
        for start in range(0, len(texts), batch_size):
            begin = clock()
            answers = answer(texts[start : start + batch_size])
            seconds.append(clock() - begin)
            first_answers += answers if passes == 0 else []
        passes += 1
    return seconds, passes * len(texts), first_answers


# The open loop. All times are seconds from its start.


def arrivals(rate: float, n: int, seed: int) -> np.ndarray:
    """The times at which n requests are due, (n,): a Poisson process of `rate` per second, so gaps are exponential."""
    return np.random.default_rng(seed).exponential(1 / rate, n).cumsum()


class Feed:
    """A thread that tokenizes each text when it is due, whatever the engine is doing."""

    def __init__(self, due: Sequence[float], encode: Callable[[int], list[int]], clock: Callable = time.perf_counter):
        """`encode(i)` is the row of request i."""
        self.queue: queue.Queue = queue.Queue()
        start = clock()
        self.clock = lambda: clock() - start

        def run() -> None:
            for i, due_time in enumerate(due):
                time.sleep(max(0.0, due_time - self.clock()))
                try:
                    self.queue.put((i, encode(i)))
                except Exception as error:  # `poll` raises it
                    self.queue.put((i, error))

        threading.Thread(target=run, daemon=True).start()

    def poll(self, timeout: float | None) -> tuple[int, list[int]] | None:
        """The next request and its row; None if none comes within `timeout` seconds (None: wait forever)."""
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
    """Answers the requests that have arrived in batches of at most `max_tokens` tokens (or one row).

    A batch waits at most `max_wait` seconds for more requests. Returns latencies, counted from when the requests were
    due, and answers.
    """
    latencies, answers = [0.0] * len(due), [None] * len(due)
    overflow = None  # the request that did not fit into the previous batch
    left = len(due)
    while left:
        batch = [overflow or feed.poll(None)]
        overflow, tokens, deadline = None, len(batch[0][1]), feed.clock() + max_wait
        while len(batch) < left and tokens < max_tokens and (request := feed.poll(max(0.0, deadline - feed.clock()))):
            tokens += len(request[1])
            if tokens > max_tokens:
                overflow = request
                break
            batch.append(request)
        batch_answers = answer([row for _, row in batch])
        now = feed.clock()
        for (i, _), request_answer in zip(batch, batch_answers, strict=True):
            latencies[i], answers[i] = now - due[i], request_answer
        left -= len(batch)
    return latencies, answers


def serve_each(due: Sequence[float], answer: Callable[[int], object]) -> tuple[list[float], list]:
    """Sends each request when it is due, from a thread of its own, to a server that batches by itself.

    Returns latencies, counted from when the requests were due, and answers.
    """
    start = time.perf_counter()

    def send(i: int) -> tuple[float, object]:
        request_answer = answer(i)
        return time.perf_counter() - start - due[i], request_answer

    futures = []
    with ThreadPoolExecutor(max_workers=len(due)) as threads:
        for i, due_time in enumerate(due):
            time.sleep(max(0.0, start + due_time - time.perf_counter()))
            futures.append(threads.submit(send, i))
    latencies, answers = zip(*(future.result() for future in futures), strict=True)
    return [*latencies], [*answers]


def judge(row: dict, expected: np.ndarray, labels: np.ndarray, s, near: np.ndarray | bool = False) -> dict:
    """A row's accuracy, agreement with the reference (n, C), number of changed answers, status and reason.

    Trained weights: invalid if a prediction differs on a text whose two best options are more than MARGIN apart; an
    answer that names no option counts as different. Random weights: invalid if a log-probability differs by more than
    TOLERANCE. near: (n,) bool, the texts so near a cascade's threshold that rounding decides which model answers.
    """
    predictions, log_probabilities = row["predictions"], row["log_probabilities"]
    equal = np.array([a == b for a, b in zip(predictions, expected.argmax(1), strict=True)])
    if s.init == "random":
        verdict = UNKNOWN | {"status": "ok", "reason": "random weights: timed, not compared"}
        if log_probabilities is None:
            return verdict
        gap = float(np.abs(np.array(log_probabilities) - expected).max())
        verdict["status"] = "ok" if gap <= TOLERANCE[s.dtype] else "invalid"
        verdict["reason"] = f"random weights: log-probabilities within {gap:.1e}, {TOLERANCE[s.dtype]} allowed"
        return verdict | {"agreement": float(equal.mean())}
    second, first = np.sort(expected, axis=1)[:, -2:].T
    wrong = int((~equal & (first - second > MARGIN) & np.logical_not(near)).sum())
    reasons = [f"{wrong} of {len(equal)} answers differ from minicls in fp32"] * bool(wrong)
    reasons += [f"{predictions.count(None)} of {len(equal)} name no option"] * (None in predictions)
    accuracy = float(np.mean([a == b for a, b in zip(predictions, labels, strict=True)]))
    verdict = {"accuracy": accuracy, "agreement": float(equal.mean()), "changed_answers": int((~equal).sum())}
    return verdict | {"status": "invalid" if wrong else "ok", "reason": ", ".join(reasons) or None}


def median_row(rows: list[dict]) -> dict:
    """Merges a row's rounds: the medians of its figures, and its worst status."""
    merged = dict(max(rows, key=lambda row: ("ok", "invalid", "failed").index(row["status"])))
    for name in merged:
        values = [row[name] for row in rows if row["status"] != "failed"]
        values = [value for value in values if not isinstance(value, (str, type(None)))]
        if values:  # counts are the same in all rounds, and stay whole
            merged[name] = values[0] if len({*values}) == 1 else statistics.median(values)
    return merged
