"""transformers' Trainer on the same rows and settings as minicls: how good is it, and how fast?

    python results/hf_trainer.py --model DIR --data DIR --learning-rate 3e-4 --output results/NAME.json
    python results/hf_trainer.py --measure speed --model DIR --data DIR --max-steps 8 --output results/bench/NAME.json

quality fine-tunes a BERT for --epochs and scores the test rows. --group-by-length is the Trainer's own way to save
padding: rows of similar length share a batch. Without it, the Trainer takes about twice the time on AG News.
speed times the steps of train_bert.py or train_qwen.py, and of the Trainer on the same rows in the same order, in
processes of their own that alternate. Read the ratio, and its range over the rounds. Needs requirements-dev.txt.
"""

import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minicls
import train_bert
import train_qwen
from minicls import dist, engines, weights
from minicls.batch import step_rows
from minicls.config import UserError, command_line, flag_of, parse, run_main, setting, write_json
from minicls.data import Data, load_data, stratified_rows
from minicls.metrics import classification_metrics, confusion_matrix, f1_interval
from minicls.prompt import make_chat
from minicls.tokenizer import bert_rows, load_tokenizer

IGNORED = {
    "quality": ("init", "max_steps", "rounds", "compile"),
    "speed": ("epochs", "max_train_rows", "group_by_length"),
}


@dataclass(frozen=True)
class Settings:
    """Unset settings take the defaults of train_bert.py or train_qwen.py."""

    model: str | None = setting(None, "directory or hub id of a BERT or, for speed, of a decoder")
    data: str = setting("fancyzhx/ag_news", "hub id, directory, or synthetic")
    output: str = setting("hf_trainer.json", "the JSON file to write")
    measure: str = setting("quality", "accuracy on the test rows, or seconds a step", choices=("quality", "speed"))
    epochs: float = setting(1.0, "quality: passes over the training rows", minimum=0)
    max_train_rows: int | None = setting(None, "quality: a stratified sample of the training rows", minimum=1)
    group_by_length: bool = setting(False, "quality: rows of similar length share a batch")
    init: str = setting(
        "pretrained", "speed: random needs no weights, as in bench.py", choices=("pretrained", "random")
    )
    max_steps: int | None = setting(None, "speed: steps; unset: 5, on a GPU 50 with the first 10 untimed", minimum=2)
    rounds: int = setting(3, "speed: processes of each side", minimum=1)
    compile: bool = setting(False, "speed: torch.compile minicls' model")
    learning_rate: float | None = setting(None, "peak of the cosine schedule", minimum=0)
    weight_decay: float | None = setting(None, "applied to matrices and embeddings", minimum=0)
    global_batch_size: int | None = setting(None, "rows of a step; unset: 64 for BERT, 12 for a decoder", minimum=1)
    max_length: int = setting(512, "tokens of a row", minimum=3)
    dtype: str = setting("bf16", "bf16 is autocast over fp32 weights", choices=("bf16", "fp32"))
    device: str | None = setting(None, "cpu, cuda or cuda:N; unset: cuda if there is one")
    threads: int | None = setting(None, "CPU threads; unset: torch's choice", minimum=1)
    seed: int = setting(42, "seeds the order of rows, dropout and fresh weights", minimum=0)


def is_bert(s: Settings) -> bool:
    return weights.read_config(Path(s.model))["model_type"] == "bert"


def training_examples(s: Settings, data: Data, rows: np.ndarray) -> list[dict]:
    """Input ids and labels of training rows: the class, or for a decoder the target at each position."""
    tokenizer, texts = load_tokenizer(Path(s.model)), [data.train.texts[row] for row in rows]
    labels = data.train.labels[rows].tolist()
    if is_bert(s):
        ids, _ = bert_rows(tokenizer, texts, s.max_length)
    else:
        chat = make_chat({}, tokenizer, data.label_names, s.max_length)
        ids, _ = chat.training_rows(texts, labels)
        counts = [sum(chat.target_counts(label)) for label in labels]
        labels = [[-100] * (len(row) - count) + row[-count:] for row, count in zip(ids, counts, strict=True)]
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def step_windows(s: Settings, data: Data) -> list[np.ndarray]:
    return [step_rows(step, len(data.train), s.global_batch_size, s.seed) for step in range(s.max_steps)]


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Pads to the longest row of the batch, as transformers' own collators do."""
    ids, labels = ([torch.tensor(item[name]) for item in items] for name in ("input_ids", "labels"))
    pad = functools.partial(pad_sequence, batch_first=True)
    padded = {"input_ids": pad(ids), "attention_mask": pad([torch.ones_like(row) for row in ids])}
    return padded | {"labels": pad(labels, padding_value=-100) if labels[0].ndim else torch.stack(labels)}


def train_transformers(s: Settings) -> dict:
    """The Trainer with its default attention and no checkpoints: step times and losses or, for quality, scores."""
    import transformers

    device, data, moments = dist.start(s.device, s.threads, s.dtype), load_data(s.data), []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    if s.measure == "speed":
        rows = np.concatenate(step_windows(s, data))
        warmup_ratio = (train_bert if is_bert(s) else train_qwen).Settings.warmup_ratio
        arguments = {"max_steps": s.max_steps, "train_sampling_strategy": "sequential", "warmup_steps": warmup_ratio}
    else:
        rows = stratified_rows(data.train, s.max_train_rows or len(data.train))
        sampling = "group_by_length" if s.group_by_length else "random"
        arguments = {"num_train_epochs": s.epochs, "train_sampling_strategy": sampling}
    arguments |= {"per_device_train_batch_size": s.global_batch_size, "per_device_eval_batch_size": 256}
    arguments |= {"learning_rate": s.learning_rate, "lr_scheduler_type": "cosine", "weight_decay": s.weight_decay}
    arguments |= {"bf16": s.dtype == "bf16", "use_cpu": device.type == "cpu", "seed": s.seed}
    arguments |= {"logging_steps": 1 if s.measure == "speed" else 50, "report_to": [], "disable_tqdm": True}
    arguments |= {"save_strategy": "no", "remove_unused_columns": False}
    if is_bert(s):
        auto_model, head = transformers.AutoModelForSequenceClassification, {"num_labels": len(data.label_names)}
    else:
        auto_model, head = transformers.AutoModelForCausalLM, {"dtype": torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            auto_model.from_pretrained(s.model, **head),
            transformers.TrainingArguments(folder, **arguments),
            train_dataset=training_examples(s, data, rows),
            data_collator=collate,
            callbacks=[Clock()],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        if s.measure == "speed":
            result = {"seconds": np.diff(moments).tolist(), "peak_memory_bytes": dist.peak_memory_bytes(device)}
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            return result | {"losses": losses, "version": transformers.__version__}
        # With --group-by-length the Trainer regroups the test rows, too: only its own labels match its predictions.
        test = trainer.predict(training_examples(s, replace(data, train=data.test), np.arange(len(data.test))))
    confusion = confusion_matrix(test.label_ids, np.asarray(test.predictions).argmax(-1), len(data.label_names))
    result = classification_metrics(confusion) | dict(zip(("f1_low", "f1_high"), f1_interval(confusion), strict=True))
    result |= {"num_train_rows": len(rows), "num_test_rows": len(data.test), "final_step": trainer.state.global_step}
    result |= {"train_seconds": seconds, "eval_seconds": time.perf_counter() - start - seconds}
    result |= {"samples_per_second": len(rows) * s.epochs / seconds, "threads": torch.get_num_threads()}
    return result | {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}


def train_minicls(s: Settings) -> dict:
    """The real script, logged at every step."""
    names = ("model", "data", "max_steps", "global_batch_size", "learning_rate", "weight_decay", "max_length", "dtype")
    flags = {name: getattr(s, name) for name in (*names, "device", "threads", "compile", "seed")}
    flags |= {"micro_batch_size": s.global_batch_size, "log_every": 1, "eval_every": 0, "save_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        flags |= {"max_eval_rows": 8, "output_dir": f"{folder}/run"}
        (train_bert if is_bert(s) else train_qwen).main(command_line(flags))
        events = map(json.loads, Path(folder, "run", "metrics.jsonl").read_text().splitlines())
        events = [event for event in events if event["event"] == "train"]
    seconds, losses = ([event[name] for event in events] for name in ("train_seconds", "loss"))
    result = {"seconds": np.diff(seconds).tolist(), "peak_memory_bytes": events[-1]["peak_memory_bytes"]}
    return result | {"losses": losses, "version": minicls.__version__}


SIDES = {"minicls": train_minicls, "transformers": train_transformers}


def train_side(s: Settings, side: str, env: dict[str, str]) -> dict:
    os.environ.update(env)  # libraries read these at their first call
    return SIDES[side](s)


def run_side(s: Settings, side: str) -> dict:
    """Trains one side in its own process, so that the peak memory is that side's."""
    env, device = engines.process_environment(side, s.device, s.threads)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(train_side, replace(s, device=device), side, env).result()


def untimed_steps(s: Settings) -> int:
    """The untimed steps, in which a GPU still chooses kernels and allocates memory."""
    return min(10, s.max_steps // 2) if engines.uses_gpu(s.device) else 1


def compare_speed(s: Settings, data: Data) -> dict:
    """Both sides in turn, --rounds times: medians over all timed steps, and the ratio of each round."""
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for number in range(s.rounds):
        for side, rounds in runs.items():
            measured = run_side(s, side)  # `seconds` has the time of every step but the first
            rounds.append(measured | {"seconds": measured["seconds"][untimed_steps(s) - 1 :]})
            seconds = statistics.median(rounds[-1]["seconds"])
            print(f"round {number + 1} of {s.rounds}, {side}: {seconds:.2f} s a step", file=sys.stderr)
    windows = [training_examples(s, data, window) for window in step_windows(s, data)[untimed_steps(s) :]]
    lengths = [[len(item["input_ids"]) for item in window] for window in windows]
    samples, tokens = statistics.mean(map(len, lengths)), statistics.mean(map(sum, lengths))  # means over the steps
    rows = []
    for side, rounds in runs.items():
        seconds = statistics.median(value for measured in rounds for value in measured["seconds"])
        row = {"side": side, "version": rounds[0]["version"], "seconds": seconds}
        row |= {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
        row["peak_memory_bytes"] = max(measured["peak_memory_bytes"] for measured in rounds)
        rows.append(row | {"losses": rounds[0]["losses"]})
    ours, theirs = ([statistics.median(measured["seconds"]) for measured in rounds] for rounds in runs.values())
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    memory = rows[0]["peak_memory_bytes"] / rows[1]["peak_memory_bytes"]
    result = {"task": "train", "rows": rows, "speedup": {"transformers": statistics.median(ratios)}}
    result |= {"speedup_of_each_round": {"transformers": ratios}, "memory_ratio": {"transformers": memory}}
    result["real_over_padded_tokens"] = statistics.mean(sum(part) / (max(part) * len(part)) for part in lengths)
    return result | {"torch": torch.__version__, "device": dist.device_name(dist.start(s.device, s.threads))}


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, argv, __doc__)
    for name in IGNORED[s.measure]:
        if getattr(s, name) != getattr(Settings, name):
            raise UserError(f"{flag_of(name)}: --measure {s.measure} does not use it; leave it out")
    if s.model is None:
        raise UserError("--model: unset; pass a directory or hub id")
    data, model = load_data(s.data), Path(s.model).name
    with tempfile.TemporaryDirectory() as folder:
        s = replace(s, model=str(weights.find_model(s.model)[0]))
        architecture, script = (weights.BERT, train_bert) if is_bert(s) else (weights.DECODER, train_qwen)
        if s.measure == "quality" and script is train_qwen:
            raise UserError(f"--model: {s.model} is a decoder, which --measure quality cannot score; pass a BERT")
        if s.init == "random":
            arguments = architecture, data.train.texts, data.label_names, s.seed, Path(folder)
            s = replace(s, model=str(weights.save_random_model(s.model, *arguments)))
        s = replace(s, global_batch_size=s.global_batch_size or (64 if script is train_bert else 12))
        s = replace(s, max_steps=s.max_steps or (50 if engines.uses_gpu(s.device) else 5))
        unset = [name for name in ("learning_rate", "weight_decay") if getattr(s, name) is None]
        s = replace(s, **{name: getattr(script.Settings, name) for name in unset})
        if s.measure == "speed" and s.max_steps * s.global_batch_size > len(data.train):
            # The last step of an epoch is short; the Trainer, given the same rows as one list, would fill it up.
            steps = f"{s.max_steps} steps of {s.global_batch_size} rows"
            raise UserError(f"--max-steps: {steps} are more than the {len(data.train)} training rows; ask for fewer")
        result = train_transformers(s) if s.measure == "quality" else compare_speed(s, data)
    used = {name: value for name, value in asdict(s).items() if name not in (*IGNORED[s.measure], "output")}
    result["settings"] = used | {"model": model, "data": Path(s.data).name}
    write_json(Path(s.output), result)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
