"""Requests per second of minicls, transformers and vLLM on the same rows and weights; and training against the HF Trainer.

    python bench.py --bert RUN --qwen RUN --qwen-linear RUN --data DIR  # trained runs; answers are compared, too
    python bench.py --model-size real --data synthetic                  # the published sizes, both heads of Qwen3: no files
    python bench.py --init random --qwen DIR ...                        # DIR gives config and tokenizer, and needs no weights
    python bench.py --mode server --rate 4 --slo-ms 500 ...             # requests at random times, not in turn
    python bench.py --task train --bert DIR --data DIR                  # training steps against the HF Trainer's
    python bench.py --task train --qwen DIR --data DIR                  # the same for supervised fine-tuning (SFT)
    python bench.py --task score --qwen DIR --data DIR                  # option scoring against a harness's brute force

Each engine runs in processes of its own, started in turn on the same machine. Prints a table and writes bench.json (and
rps.png); the tasks train and score end with one JSON line. Nothing here is a test: a shared machine is noisy, so read ratios,
and their spread over the rounds.
"""

import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import minicls
import train_bert
import train_qwen
from minicls import checkpoint, dist, engines, plots, prompt, weights
from minicls.batch import step_rows
from minicls.config import UserError, parse, run_main, setting
from minicls.data import Data, load_data, stratified_rows
from minicls.generate import read_answers
from minicls.predict import Reader
from minicls.prompt import Chat, make_template
from minicls.tiny import SIZES, train_bert_tokenizer, train_qwen_tokenizer
from minicls.tokenizer import bert_rows, load_tokenizer

SIDES = ("minicls", "transformers", "vllm")
MODES = ("single", "offline", "server")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = {"bert": weights.BERT, "qwen": weights.DECODER, "qwen_linear": weights.DECODER_LINEAR}
METHODS = {"bert": ("classify",), "qwen": ("generate", "score"), "qwen_linear": ("classify",)}
ROW = "ROW "  # begins the lines of a process that are rows: engines print, too
MARGIN = 0.05  # nats between the two best options, from where on an answer must be the same
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}  # nats, of a log-probability from random weights
BATCH_TOKENS, BATCH_WAIT = 2048, 0.005  # of a batch in mode server, and seconds that it waits for more requests
COLUMNS = ("model", "engine", "engine_version", "method", "mode", "dtype", "threads", "device", "requests_per_second")
COLUMNS += ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "input_tokens_per_second", "peak_memory_bytes")
COLUMNS += ("accuracy", "agreement", "num_requests", "status", "reason")
SHARES = {"accuracy": 10, "agreement": 11}  # widths in the table


@dataclass(frozen=True)
class Settings:
    """All sides get the same rows. Settings not listed here are the defaults of train_bert.py and train_qwen.py."""

    task: str = setting(
        "rps",
        "measurement: requests per second, training steps or option scoring",
        choices=("rps", "train", "score"),
        group="task and model",
    )
    bert: str | None = setting(None, "finished run of train_bert.py, directory or hub id; not for --task score")
    qwen: str | None = setting(None, "finished run of train_qwen.py, directory or hub id")
    qwen_linear: str | None = setting(
        None, "finished run of train_qwen.py --head linear, directory or hub id; for --task rps"
    )
    init: str = setting("pretrained", "random needs no weights in the directory", choices=("pretrained", "random"))
    model_size: str = setting(
        "given",
        "real: --init random; where no model is named, all three in the published sizes",
        choices=("given", "real"),
    )
    data: str | None = setting(
        None,
        "hub id, directory, or synthetic; unset: the data that the run was trained on, else fancyzhx/ag_news",
        group="data",
    )
    text_column: str = setting("text", "column of the texts")
    label_column: str = setting("label", "column of the labels")
    max_steps: int | None = setting(
        None,
        "training steps of one process, the first not counted; unset: 5, on a GPU 50 with the first 10 not counted",
        minimum=2,
        group="measurement",
    )
    num_questions: int | None = setting(
        None, "test rows of one process of --task score; unset: 64, on a GPU 2000", minimum=1
    )
    engines: tuple[str, ...] | None = setting(None, "for --task rps; unset: those that are installed", choices=SIDES)
    mode: tuple[str, ...] = setting(
        ("single", "offline"), "one request at a time, all at once, or as they arrive; for --task rps", choices=MODES
    )
    num_requests: int = setting(
        64, "requests of a row; with fewer test rows they are asked again, except in mode server", minimum=1
    )
    min_seconds: float = setting(10.0, "minimum seconds of a row, in the modes single and offline", minimum=0)
    rate: float = setting(2.0, "requests per second that arrive in mode server", minimum=1e-3)
    slo_ms: float = setting(1000.0, "latency target of a request in mode server", minimum=0)
    max_new_tokens: int = setting(8, "maximum tokens of a generated answer", minimum=1)
    rounds: int = setting(3, "processes of each side, in turn; figures are medians over them", minimum=1)
    global_batch_size: int | None = setting(
        None, "rows of a training step; unset: 64 for BERT, 12 for Qwen3", minimum=1
    )
    max_length: int = setting(512, "tokens of a row", minimum=3)
    dtype: str = setting(
        "bf16",
        "in training, bf16 is autocast over fp32 weights; otherwise the dtype of the weights",
        choices=("bf16", "fp32"),
        group="machine",
    )
    device: str | None = setting(None, "cpu, cuda or cuda:N; unset: cuda if there is one")
    threads: int | None = setting(None, "CPU threads of each side; unset: torch's choice", minimum=1)
    compile: bool = setting(False, "torch.compile minicls' model")
    seed: int = setting(42, "seeds the order of rows, arrivals in mode server, and --init random", minimum=0)
    vllm_python: str | None = setting(
        None, "interpreter of an environment with vLLM; unset: this one, and for --task score no vLLM"
    )
    output_dir: str | None = setting(None, "directory of bench.json, new or empty; unset: runs/bench-<time>")
    side: str | None = setting(
        None, "measure only this side, in this process, as the comparison starts it", choices=SIDES
    )


def command_line(settings: dict) -> list[str]:
    """Settings as flags; unset ones are left out."""
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else []
        elif value is not None:
            flags += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def uses_gpu(s: Settings) -> bool:
    return (s.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")


def uncounted_steps(s: Settings) -> int:
    """Training steps that warm up: a GPU is still choosing kernels, and fetching memory."""
    return min(10, s.max_steps // 2) if uses_gpu(s) else 1


def read_data(s: Settings) -> Data:
    return load_data(s.data, s.text_column, s.label_column)


def find(s: Settings, role: str) -> Path:
    """The directory of the model that --bert, --qwen or --qwen-linear names."""
    return weights.find_model(getattr(s, role), flag=f"--{role.replace('_', '-')}")[0]


def make_chat(s: Settings, data: Data) -> Chat:
    """The default question, which training begins with; --task score asks as a run was trained."""
    directory = find(s, "qwen")
    tokenizer, asked = load_tokenizer(directory), checkpoint.how_asked(directory) if s.task == "score" else {}
    return prompt.make_chat(asked, tokenizer, data.label_names, s.max_length)


def training_rows(s: Settings, data: Data, rows: np.ndarray) -> list[list[int]]:
    texts = [data.train.texts[row] for row in rows]
    if s.bert:
        return bert_rows(load_tokenizer(find(s, "bert")), texts, s.max_length)[0]
    return make_chat(s, data).training_rows(texts, data.train.labels[rows])[0]


def question_rows(s: Settings, data: Data) -> np.ndarray:
    """The test rows that are asked about."""
    wanted = s.num_requests if s.task == "rps" else s.num_questions
    return stratified_rows(data.test, min(wanted, len(data.test)))


def question_texts(s: Settings, data: Data) -> list[str]:
    return data.test.select(question_rows(s, data)).texts


# Training.


def train_minicls(s: Settings) -> dict:
    """The real script, logged at every step."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        shared = (
            "data",
            "text_column",
            "label_column",
            "max_steps",
            "global_batch_size",
            "max_length",
            "dtype",
            "seed",
            "compile",
        )
        flags = {name: getattr(s, name) for name in (*shared, "device", "threads")}
        flags |= {
            "model": s.bert or s.qwen,
            "output_dir": run_dir,
            "micro_batch_size": s.global_batch_size,
            "log_every": 1,
        }
        flags |= {"eval_every": 0, "save_every": 0, "max_eval_rows": 8}
        (train_bert if s.bert else train_qwen).main(command_line(flags))
        events = [
            e for e in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if e["event"] == "train"
        ]
    clock = [event["train_seconds"] for event in events]
    return {
        "seconds": np.diff(clock)[uncounted_steps(s) - 1 :].tolist(),
        "peak_memory_bytes": events[-1]["peak_memory_bytes"],
        "losses": [e["loss"] for e in events],
        "version": minicls.__version__,
    }


def train_transformers(s: Settings) -> dict:
    """The HF Trainer over the same rows in the same order: dynamic padding, its default attention, no checkpoints."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

    device = dist.start(s.device, s.threads, s.dtype)
    data = read_data(s)
    rows = np.concatenate(
        [step_rows(step, len(data.train), s.global_batch_size, s.seed) for step in range(s.max_steps)]
    )
    ids = training_rows(s, data, rows)
    if s.bert:
        directory, labels = find(s, "bert"), data.train.labels[rows].tolist()
        model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(data.label_names))
    else:
        directory, chat = find(s, "qwen"), make_chat(s, data)
        trained = [sum(chat.target_counts(label)) for label in data.train.labels[rows]]
        labels = [[-100] * (len(row) - n) + row[-n:] for row, n in zip(ids, trained, strict=True)]
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    clock = []

    def collate(rows: list[tuple[list[int], int | list[int]]]) -> dict[str, torch.Tensor]:
        """Pads to the longest row of the batch, as transformers' own collators do."""
        ids, labels = [torch.tensor(ids) for ids, _ in rows], [torch.tensor(label) for _, label in rows]
        mask = [torch.ones_like(row) for row in ids]
        padded = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence(mask, batch_first=True),
        }
        return padded | {
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100) if s.qwen else torch.stack(labels)
        }

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    defaults = (train_bert if s.bert else train_qwen).Settings()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=s.max_steps,
                per_device_train_batch_size=s.global_batch_size,
                train_sampling_strategy="sequential",
                learning_rate=defaults.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=defaults.warmup_ratio,
                weight_decay=defaults.weight_decay,
                bf16=s.dtype == "bf16",
                use_cpu=device.type == "cpu",
                save_strategy="no",
                logging_steps=1,
                remove_unused_columns=False,
                report_to=[],
                disable_tqdm=True,
                seed=s.seed,
            ),
            train_dataset=list(zip(ids, labels, strict=True)),
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": np.diff(clock)[uncounted_steps(s) - 1 :].tolist(),
        "peak_memory_bytes": dist.peak_memory_bytes(device),
        "losses": losses,
        "version": transformers.__version__,
    }


# Options scored, all questions at once: weights in --dtype, tokenisation inside the clock.


def make_engine(s: Settings, directory: Path, device: torch.device, max_length: int, **how):
    """The engine that --side names; `how` is for transformers alone. Raises UserError where it is not installed."""
    dtype = DTYPES[s.dtype]
    try:
        if s.side == "minicls":
            return engines.Minicls(directory, dtype, device, s.compile)
        if s.side == "transformers":
            return engines.Transformers(directory, dtype, device, **how)
        vllm = engines.VLLMServer if s.task == "rps" and s.mode == ("server",) else engines.VLLM
        return vllm(directory, dtype, device, max_length)
    except ImportError as error:
        raise UserError(f"{s.side} does not import ({error}); install it, or leave it out") from None


def ask(s: Settings) -> dict:
    """minicls' scorer, vLLM's one token with the options' log-probabilities, or transformers as lm-evaluation-harness uses it:
    a pass a question that gives the logits of all positions."""
    device = dist.start(s.device, s.threads, s.dtype)
    data = read_data(s)
    chat = make_chat(s, data)
    engine = make_engine(s, find(s, "qwen"), device, s.max_length + 1, batch_size=1, logits_to_keep=0)
    texts = question_texts(s, data)

    def answer(texts: list[str]) -> list[int]:
        return engine.score(chat.questions(texts)[0], chat.options).argmax(1).tolist()

    # Other texts: engines may remember what they have seen. As many where a batch of another size is a matter of its own: it
    # would be compiled in the clock, or be the first for a GPU's kernels and memory.
    answer(data.train.texts[: len(texts) if s.compile or device.type == "cuda" else min(8, len(texts))])
    begin = time.perf_counter()
    predictions = answer(texts)
    seconds = [time.perf_counter() - begin]
    memory = engine.peak_memory_bytes
    return {"seconds": seconds, "predictions": predictions, "peak_memory_bytes": memory, "version": engine.version}


# Training and scoring: the comparison.


def side_process(s: Settings, side: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a process that measures one side."""
    python, env = sys.executable, dict(os.environ)
    if uses_gpu(s):  # the HF Trainer would spread a batch over all that it sees, and vLLM takes the first
        visible = (env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        index = torch.device(s.device or "cuda").index or 0
        if index < len(visible) and visible[index]:  # else the side itself says what is wrong
            env["CUDA_VISIBLE_DEVICES"], s = visible[index], replace(s, device="cuda")
    if side != "minicls":  # `dist.start` lowers these for our batches; the others keep what their libraries come with
        env |= {name: "1024" for name in dist.CPU_CACHES if env.get(name) in (None, dist.CPU_CACHE_CAPACITY)}
    if side == "vllm":
        python = s.vllm_python or python
        env |= engines.vllm_environment(s.threads or os.cpu_count())
    if side == "minicls" and s.compile and s.task != "train" and not uses_gpu(s):
        env["TORCHINDUCTOR_FREEZING"] = (
            "1"  # weights are constants: a CPU keeps them in the layout that its products want
        )
    return [python, __file__, *command_line(asdict(replace(s, side=side, output_dir=None, vllm_python=None)))], env


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")[:300]


def measure(s: Settings, side: str) -> dict:
    """Runs one side in a process of its own; returns what it measured."""
    command, env = side_process(s, side)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise UserError(f"--side {side}: failed ({last_line(done.stderr)}); run it alone")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(s: Settings, data: Data) -> dict:
    """Every side in alternating processes. Returns medians over all steps or requests, and each round's ratios to minicls."""
    sides = [*SIDES[:2], *(["vllm"] if s.vllm_python else [])]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for number in range(s.rounds):
        for side in sides:
            runs[side].append(measure(s, side))
            print(
                f"round {number + 1} of {s.rounds}, {side}: {statistics.median(runs[side][-1]['seconds']):.2f} s",
                file=sys.stderr,
            )
    if s.task == "train":
        windows = [
            step_rows(step, len(data.train), s.global_batch_size, s.seed)
            for step in range(uncounted_steps(s), s.max_steps)
        ]
        lengths = [[len(row) for row in training_rows(s, data, window)] for window in windows]
    else:
        lengths = [[len(row) for row in make_chat(s, data).questions(question_texts(s, data))[0]]]
    samples, tokens = (
        statistics.mean(f(part) for part in lengths) for f in (len, sum)
    )  # of one step, or of all questions
    rows = []
    for side in sides:
        seconds = statistics.median(value for one in runs[side] for value in one["seconds"])
        row = {"side": side, "version": runs[side][0]["version"], "seconds": seconds}
        row |= {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
        peaks = [one["peak_memory_bytes"] for one in runs[side]]
        row |= {
            "peak_memory_bytes": None if None in peaks else max(peaks)
        }  # vLLM takes a GPU's memory ahead of its needs
        if s.task == "train":
            row["losses"] = runs[side][0]["losses"]
        else:
            pairs = zip(runs["minicls"][0]["predictions"], runs[side][0]["predictions"], strict=True)
            row["agreement"] = statistics.mean(a == b for a, b in pairs)  # with minicls, prediction by prediction
        rows.append(row)
    ratios = {
        side: [
            statistics.median(b["seconds"]) / statistics.median(a["seconds"])
            for a, b in zip(runs["minicls"], runs[side], strict=True)
        ]
        for side in sides[1:]
    }
    return {
        "task": s.task,
        "rows": rows,
        "speedup": {side: statistics.median(values) for side, values in ratios.items()},
        "speedup_of_each_round": ratios,
        "memory_ratio": {
            row["side"]: rows[0]["peak_memory_bytes"] / row["peak_memory_bytes"]
            for row in rows[1:]
            if row["peak_memory_bytes"]
        },
        "real_over_padded_tokens": statistics.mean(sum(part) / (max(part) * len(part)) for part in lengths),
        "settings": asdict(s),
        "torch": torch.__version__,
        "device": dist.device_name(dist.start(s.device, s.threads)),
    }


# Requests per second: what the process of one model and one engine measures.


def method_calls(s: Settings, reader: Reader, engine, method: str) -> tuple[Callable, Callable]:
    """The two halves of a request, both inside the clock: texts -> rows of ids, and rows -> an answer each.

    An answer is a list of log-probabilities, or of generated ids. Answers stop at the end of a turn, but random weights know no
    end. A model that learned the letter alone is asked for no more, after the think block that is given to it.
    """
    if method != "generate":
        options = [reader.chat.options] if method == "score" else []
        return reader.rows, lambda rows: getattr(engine, method)(rows, *options).tolist()
    letter_alone = reader.settings.get("train_on") == "letter"
    think_given = letter_alone or reader.settings.get("think_in") == "prompt"
    longest = min(s.max_new_tokens, max(map(len, reader.chat.options))) if letter_alone else s.max_new_tokens
    stop_ids = [] if s.init == "random" else reader.chat.stop_ids
    ask = reader.chat.questions if think_given else reader.chat.prompts
    return lambda texts: ask(texts)[0], lambda rows: engine.generate(rows, longest, stop_ids)


def warm_up(window: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> int:
    """Runs windows until two in a row take equally long, within a tenth, or ten have run; returns how many."""
    seconds: list[float] = []
    while len(seconds) < 10 and not (len(seconds) > 1 and abs(seconds[-1] / seconds[-2] - 1) < 0.1):
        begin = clock()
        window()
        seconds.append(clock() - begin)
    return len(seconds)


def closed_loop(
    texts: list[str],
    at_once: int,
    answer: Callable[[list[str]], list],
    forget: Callable[[], None],
    num_requests: int,
    min_seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[float], int, list]:
    """Asks `at_once` texts at a time, the next when these are answered, in whole passes until both minima are reached.

    Returns the seconds of each call, the number of requests, and the answers of the first pass.
    """
    seconds, passes, answers = [], 0, []
    while passes * len(texts) < num_requests or sum(seconds) < min_seconds:
        forget()
        for start in range(0, len(texts), at_once):
            begin = clock()
            found = answer(texts[start : start + at_once])
            seconds.append(clock() - begin)
            answers += found if passes == 0 else []
        passes += 1
    return seconds, passes * len(texts), answers


def figures(latencies: list[float], seconds: float, requests: int, tokens: float) -> dict:
    """A row's figures, from the `latencies` of its requests, the `seconds` in which `requests` were answered, and the input `tokens`
    of one request."""
    p50, p90, p99 = (1000 * np.percentile(latencies, [50, 90, 99])).tolist()
    return {
        "requests_per_second": requests / seconds,
        "latency_p50_ms": p50,
        "latency_p90_ms": p90,
        "latency_p99_ms": p99,
        "input_tokens_per_second": tokens * requests / seconds,
    }


def slo_attainment(latencies: list[float], slo_ms: float) -> float:
    """The share of requests that were answered within `slo_ms`."""
    return float(np.mean([1000 * latency <= slo_ms for latency in latencies]))


def measure_row(
    s: Settings, reader: Reader, engine, method: str, mode: str, texts: list[str], others: list[str]
) -> dict:
    """One method in one mode over the test texts. Warm-up uses other texts, since engines cache; where a new batch size would be
    compiled while timed, as many of them.

    A latency is that of one request; of all at once, each waits for the whole call.
    """
    encode, answer = method_calls(s, reader, engine, method)
    at_once = 1 if mode == "single" else len(texts)

    def window() -> None:
        engine.forget()
        batch = at_once if s.compile else min(at_once, 16)
        for start in range(0, 16, 16 if at_once > 1 else 4):
            answer(encode(others[start : start + batch]))

    warm_up(window)
    tokens = statistics.mean(map(len, encode(texts)))
    if mode == "server":
        engine.forget()
        due = engines.arrivals(s.rate, len(texts), s.seed).tolist()
        if isinstance(engine, engines.VLLMServer):
            latencies, answers = engines.serve_each(due, lambda i: answer(encode([texts[i]]))[0])
        else:
            feed = engines.Feed(due, lambda i: encode([texts[i]])[0])
            latencies, answers = engines.serve_batches(due, feed, answer, BATCH_TOKENS, BATCH_WAIT)
        ended = max(moment + latency for moment, latency in zip(due, latencies, strict=True))
        row = figures(latencies, ended, len(texts), tokens) | {"slo_attainment": slo_attainment(latencies, s.slo_ms)}
    else:
        how = (lambda texts: answer(encode(texts))), engine.forget, s.num_requests, s.min_seconds
        latencies, requests, answers = closed_loop(texts, at_once, *how)
        row = figures(latencies, sum(latencies), requests, tokens)
    if method == "generate":
        predictions, log_probabilities = read_answers(reader.tokenizer, answers, len(reader.label_names))[0], None
    else:
        predictions, log_probabilities = [int(np.argmax(values)) for values in answers], answers
    # Those that accuracy and agreement count: to ask the same text once more steadies the clock, and tells no more.
    row |= {"num_requests": len(texts), "peak_memory_bytes": engine.peak_memory_bytes, "engine_version": engine.version}
    return row | {"predictions": predictions, "log_probabilities": log_probabilities}


def rps_side(s: Settings) -> None:
    """Loads the one model that is named into the engine of --side, and prints a line for each method and mode."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through `finally`: a server must not outlive this process
    device = dist.start(s.device, s.threads, s.dtype)
    data = read_data(s)
    ((role, directory),) = models(s).items()
    reader = Reader(directory, s.max_length)
    engine = make_engine(s, directory, device, reader.max_length + (s.max_new_tokens if role == "qwen" else 0))
    try:
        for mode, method in itertools.product(s.mode, METHODS[role]):
            row = {"method": method, "mode": mode}
            try:
                row |= measure_row(s, reader, engine, method, mode, question_texts(s, data), data.train.texts)
            except Exception as error:  # whatever an engine cannot do; the next method may go
                row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(ROW + json.dumps(row), flush=True)
    finally:
        engine.close()


# Requests per second: the table out of all processes.


def models(s: Settings) -> dict[str, Path]:
    return {role: find(s, role) for role in METHODS if getattr(s, role)}


def start_side(s: Settings, engine: str) -> Iterator[dict]:
    """Yields the rows of one process as they come; raises UserError with the last it said where it fails."""
    command, env = side_process(s, engine)
    try:
        with (
            tempfile.TemporaryFile("w+") as said,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=env) as side,
        ):
            try:
                yield from (json.loads(line.removeprefix(ROW)) for line in side.stdout if line.startswith(ROW))
            except BaseException:  # interrupted, here or where the rows are used
                side.terminate()
                raise
            if side.wait():
                said.seek(0)
                raise UserError(last_line(said.read()))
    except OSError as error:
        raise UserError(f"{command[0]} does not start ({error.strerror})") from None


def reference(
    s: Settings, role: str, reader: Reader, directory: Path, device: torch.device, texts: list[str]
) -> np.ndarray:
    """The log-probabilities (n, C) of classes or options by minicls in fp32, which all engines are checked against."""
    engine = engines.Minicls(directory, torch.float32, device)
    answers = method_calls(s, reader, engine, METHODS[role][-1])[1](reader.rows(texts))
    del engine
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the sides, vLLM above all, need it
    return np.array(answers)


def judge(row: dict, expected: np.ndarray, labels: np.ndarray, s: Settings) -> dict:
    """A row's accuracy, agreement with the reference (n, C), status and reason.

    Trained weights: invalid where a prediction differs on a text whose two best are more than MARGIN apart; an answer that
    names no option differs. Random weights: invalid where a log-probability is off by more than its dtype's TOLERANCE.
    """
    predictions, found = row["predictions"], row["log_probabilities"]
    equal = np.array([a == b for a, b in zip(predictions, expected.argmax(1), strict=True)])
    if s.init == "random":
        nothing = {"accuracy": None, "agreement": None, "status": "ok", "reason": "random weights: timed, not compared"}
        if found is None:
            return nothing
        gap = float(np.abs(np.array(found) - expected).max())
        status = "ok" if gap <= TOLERANCE[s.dtype] else "invalid"
        reason = f"random weights: log-probabilities off by {gap:.1e} at most, {TOLERANCE[s.dtype]} allowed"
        return nothing | {"agreement": float(equal.mean()), "status": status, "reason": reason}
    first, second = np.sort(expected, axis=1)[:, :-3:-1].T
    wrong = int((~equal & (first - second > MARGIN)).sum())
    unread = predictions.count(None)
    parts = [f"{wrong} of {len(equal)} answers differ from minicls in fp32"] * bool(wrong)
    parts += [f"{unread} of {len(equal)} name no option"] * bool(unread)
    reason = ", ".join(parts) or None
    accuracy = float(np.mean([p == label for p, label in zip(predictions, labels, strict=True)]))
    return {
        "accuracy": accuracy,
        "agreement": float(equal.mean()),
        "status": "invalid" if wrong else "ok",
        "reason": reason,
    }


def median_row(rows: list[dict]) -> dict:
    """One row out of the same row of each round: the median of its figures, and its worst status."""
    worst = max(rows, key=lambda row: ("ok", "invalid", "failed").index(row["status"]))
    merged = dict(worst)
    for name in worst:
        values = [
            row[name] for row in rows if row["status"] != "failed" and not isinstance(row[name], (str, type(None)))
        ]
        if values:  # counts are the same in all rounds, and stay whole
            merged[name] = values[0] if len({*values}) == 1 else statistics.median(values)
    return merged


def rps(s: Settings) -> tuple[list[dict], Path]:
    """Every engine with every model, in processes of their own: the rows, and the directory of bench.json.

    That file holds what is done so far at any moment.
    """
    device = dist.start(s.device, s.threads, s.dtype)
    data = read_data(s)
    test = data.test.select(question_rows(s, data))
    readers = {role: Reader(directory, s.max_length) for role, directory in models(s).items()}
    for role, reader in readers.items():
        flag = f"--{role.replace('_', '-')}: {getattr(s, role)}"
        if reader.kind is not KINDS[role]:
            names = [name for name, kind in weights.ARCHITECTURES.items() if kind is KINDS[role]]
            raise UserError(f"{flag} is a {reader.config['architectures'][0]}; pass a {' or '.join(names)}")
        if tuple(reader.label_names) != tuple(data.label_names):
            raise UserError(f"{flag} was trained on other classes than --data has ({', '.join(data.label_names)[:80]})")
    output_dir = checkpoint.new_run_dir(s.output_dir, "bench")
    file = output_dir / "bench.json"
    checkpoint.write_json(file, [])
    expected = {
        role: reference(s, role, reader, directory, device, test.texts)
        for (role, reader), directory in zip(readers.items(), models(s).values(), strict=True)
    }
    about = {"dtype": s.dtype, "threads": torch.get_num_threads(), "device": dist.device_name(device)}
    measured: dict[tuple, list[dict]] = {}

    def note(role: str, engine: str, row: dict) -> None:
        role_name, model = role.replace("_", "-"), Path(getattr(s, role)).name
        name = model if model == role_name else f"{role_name}: {model}"
        verdict = {"accuracy": None, "agreement": None, "status": "failed", "reason": row.get("failed")}
        if "failed" not in row:
            verdict = judge(row, expected[role], test.labels, s)
        values = {"model": name, "engine": engine, "mode": row["mode"]} | about | row | verdict
        names = COLUMNS + (("slo_attainment",) if row["mode"] == "server" else ())
        measured.setdefault((role, engine, row["method"], row["mode"]), []).append(
            {name: values.get(name) for name in names}
        )
        checkpoint.write_json(file, [median_row(rounds) for rounds in measured.values()])
        print(f"{name}, {engine}, {row['method']}, {row['mode']}: {verdict['status']}", file=sys.stderr)

    for _, role, engine in itertools.product(range(s.rounds), readers, s.engines):
        # vLLM's server is a process of its own; a copy of the model in this one would only take memory.
        parts = [s.mode]
        if engine == "vllm" and "server" in s.mode:
            parts = [part for part in (tuple(mode for mode in s.mode if mode != "server"), ("server",)) if part]
        for modes in parts:
            alone = replace(s, mode=modes, **{other: None for other in METHODS if other != role})
            missing = dict.fromkeys(itertools.product(METHODS[role], modes))
            try:
                for row in start_side(alone, engine):
                    missing.pop((row["method"], row["mode"]))
                    note(role, engine, row)
            except UserError as error:
                for method, mode in missing:
                    note(role, engine, {"method": method, "mode": mode, "failed": str(error)})
    return [median_row(rounds) for rounds in measured.values()], output_dir


def rps_table(rows: list[dict]) -> str:
    header = f"{'model':26}{'engine':25}{'method':10}{'mode':9}{'requests/s':>11}{'p50':>8}{'p90':>8}{'p99 ms':>8}{'tokens/s':>10}"
    lines = [header + f"{'GiB':>7}{'accuracy':>10}{'agreement':>11}  status"]
    for row in rows:
        line = f"{row['model']:26}{row['engine']} {row['engine_version'] or '':{24 - len(row['engine'])}}"
        line += f"{row['method']:10}{row['mode']:9}"
        if row["status"] != "failed":
            line += f"{row['requests_per_second']:11.2f}" + "".join(
                f"{row[f'latency_p{p}_ms']:8.0f}" for p in (50, 90, 99)
            )
            line += f"{row['input_tokens_per_second']:10.0f}"
            line += f"{'-':>7}" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:7.2f}"
            line += "".join(
                f"{row[name]:{w}.4f}" if row[name] is not None else f"{'-':>{w}}" for name, w in SHARES.items()
            )
        good = f", {row['slo_attainment']:.1%} in time" if row.get("slo_attainment") is not None else ""
        lines.append(f"{line}  {row['status']}{good}" + (f" ({row['reason']})" if row["reason"] else ""))
    return "\n".join(lines)


def with_random_weights(s: Settings, folder: str) -> Settings:
    """The settings with model directories of the same size and random weights, the same ones for every side.

    A directory gives config and tokenizer. For a published size without one, the tokenizer is learned from the data.
    """
    data = read_data(s)
    made = {}
    for role, kind in KINDS.items():
        if getattr(s, role):
            directory = find(s, role)
            tokenizer, config, name = (
                load_tokenizer(directory),
                weights.read_config(directory, kind),
                Path(getattr(s, role)).name,
            )
        elif s.model_size == "real" and not (s.bert or s.qwen or s.qwen_linear):
            name = "bert-base-cased" if role == "bert" else "Qwen3-0.6B"
            config = SIZES[name]
            texts = data.train.texts[:20_000]
            before, after = make_template(data.label_names, no_think=True)
            turns = [before + text + after for text in texts]
            tokenizer = train_bert_tokenizer(texts, 20_000) if role == "bert" else train_qwen_tokenizer(turns, 20_000)
        else:
            continue
        config = config | weights.label_config(data.label_names)
        if role != "bert":
            end, pad = train_qwen.end_and_pad(tokenizer, config)
            config |= {"pad_token_id": pad, "eos_token_id": end}
        dtype = torch.float32 if role == "bert" else torch.bfloat16
        model, _, _ = weights.build_model(kind, config, None, s.seed, torch.device("cpu"), dtype)
        made[role] = str(Path(folder) / role / name)
        weights.save_model(model, config, tokenizer, Path(made[role]))
    return replace(s, **made)


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, argv, __doc__)
    named = bool(s.bert) + bool(s.qwen) + bool(s.qwen_linear)
    if s.task == "rps" and not named and s.model_size == "given":
        raise UserError("--task rps: name a model, --bert RUN, --qwen RUN or --qwen-linear RUN, or --model-size real")
    if s.task != "rps" and (named != 1 or s.qwen_linear or (s.bert and s.task != "train")):
        raise UserError(
            f"--task {s.task}: name one model, --qwen DIR" + (" or --bert DIR" if s.task == "train" else "")
        )
    if s.model_size == "real":
        s = replace(s, init="random")
    s = replace(s, global_batch_size=s.global_batch_size or (64 if s.bert else 12))
    s = replace(s, max_steps=s.max_steps or (50 if uses_gpu(s) else 5))
    s = replace(s, num_questions=s.num_questions or (2000 if uses_gpu(s) else 64))
    if s.task == "train" and (s.vllm_python or s.side == "vllm"):
        raise UserError(f"{'--side vllm' if s.side else '--vllm-python'}: vLLM does not train; leave it out")
    if s.side and named != 1:
        raise UserError(f"--side {s.side}: measures one model; name one")
    if not s.side:
        checkpoint.check_output_dir(s.output_dir)
    if s.data is None:
        trained = [
            checkpoint.info_of_model(find(s, role))["settings"].get("data") for role in METHODS if getattr(s, role)
        ]
        s = replace(s, data=next(filter(None, trained), "fancyzhx/ag_news"))
    if s.side and s.task == "rps":
        rps_side(s)
        return
    if s.side:
        training = {"minicls": train_minicls, "transformers": train_transformers}
        print(json.dumps(training[s.side](s) if s.task == "train" else ask(s)))
        return
    if s.task == "rps" and s.engines is None:
        installed = tuple(
            side for side in SIDES if importlib.util.find_spec(side) or (side == "vllm" and s.vllm_python)
        )
        if left_out := [side for side in SIDES if side not in installed]:
            print(f"not installed, so not measured: {', '.join(left_out)}")
        s = replace(s, engines=installed)
    with tempfile.TemporaryDirectory() as folder:
        same = with_random_weights(s, folder) if s.init == "random" else s
        if s.task == "rps":
            rows, output_dir = rps(same)
            print(rps_table(rows))
            print(f"{output_dir / 'bench.json'}, {plots.plot_rps(rows, output_dir)}")
            return
        data = read_data(s)
        if s.task == "train" and s.max_steps * s.global_batch_size > len(data.train):
            # The last step of an epoch is a short one here; the Trainer, given the same rows as one list, would fill it up.
            steps = f"{s.max_steps} steps of {s.global_batch_size} rows"
            raise UserError(f"--max-steps: {steps} are more than the {len(data.train)} training rows; ask for fewer")
        output_dir = checkpoint.new_run_dir(s.output_dir, "bench")
        result = compare(same, data)
    result["settings"] = asdict(
        replace(s, vllm_python=None, output_dir=None)
    )  # paths of this machine say nothing elsewhere
    checkpoint.write_json(output_dir / "bench.json", result)
    print(f"{'':14}{'samples/s':>11}{'tokens/s':>11}{'seconds':>9}{'peak memory':>14}")
    for row in result["rows"]:
        rates = f"{row['samples_per_second']:11.2f}{row['tokens_per_second']:11.0f}{row['seconds']:9.2f}"
        agreement = f", {row['agreement']:.1%} of answers as minicls'" if "agreement" in row else ""
        memory = (
            f"{'-':>10}    " if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:10.2f} GiB"
        )
        print(f"{row['side']:14}{rates}{memory}   {row['version']}{agreement}")
    for side, ratios in result["speedup_of_each_round"].items():
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {s.rounds} rounds"
        print(f"minicls is {result['speedup'][side]:.2f} times as fast as {side} ({spread}), {result['device']}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
