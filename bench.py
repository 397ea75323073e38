"""Measure speed and memory: minicls against its peers, each in processes of its own, started in turn on the same machine.

    python bench.py --task train --bert DIR --data DIR                  # minicls and the HF Trainer on the same rows
    python bench.py --task train --bert DIR --data DIR --init random    # DIR needs no weights: time does not depend on them

Prints a table, writes bench.json, and ends with the same as one JSON line. Nothing here is a test: a shared machine is
noisy, so read the ratio, and its spread over the rounds. Scoring and requests per second come with the engines.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import minicls
import train_bert
from minicls import checkpoint, dist, weights
from minicls.config import UserError, parse, run, setting
from minicls.data import load_data, step_rows
from minicls.tokenizer import bert_rows, load_tokenizer

SIDES = ("minicls", "transformers")


@dataclass(frozen=True)
class Settings:
    """Both sides train on the same rows of the same steps, with the settings of train_bert.py where none is named here."""

    task: str = setting("train", "what to measure", choices=("train",))
    bert: str = setting("google-bert/bert-base-cased", "hub id or directory")
    init: str = setting("pretrained", "random needs no weights in the directory", choices=("pretrained", "random"))
    data: str = setting("fancyzhx/ag_news", "hub id, directory, or synthetic")
    text_column: str = setting("text", "column of the texts")
    label_column: str = setting("label", "column of the labels")
    max_steps: int = setting(5, "optimizer steps of one process; the first is not counted", minimum=2)
    rounds: int = setting(3, "processes of each side", minimum=1)
    global_batch_size: int = setting(64, "rows of a step", minimum=1)
    max_length: int = setting(512, "tokens of a row", minimum=3)
    dtype: str = setting("bf16", "bf16 is autocast over fp32 weights", choices=("bf16", "fp32"))
    device: str | None = setting(None, "cpu, cuda or cuda:N; off: cuda if there is one")
    threads: int | None = setting(None, "CPU threads of each side; off: torch's choice", minimum=1)
    seed: int = setting(42, "of the order of rows", minimum=0)
    output_dir: str | None = setting(None, "for bench.json, new or empty; off: runs/bench-<time>")
    side: str | None = setting(None, "measure this side alone, in this process (what the comparison starts)", choices=SIDES)


def command_line(settings: dict) -> list[str]:
    """Settings as flags; those that are off are left out."""
    return [part for name, value in settings.items() if value is not None for part in ("--" + name.replace("_", "-"), str(value))]


def train_minicls(s: Settings) -> dict:
    """The real script, logged at every step."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        shared = ("init", "data", "text_column", "label_column", "max_steps", "global_batch_size", "max_length", "dtype", "seed")
        flags = {name: getattr(s, name) for name in (*shared, "device", "threads")}
        flags |= {"model": s.bert, "output_dir": run_dir, "micro_batch_size": s.global_batch_size, "log_every": 1}
        flags |= {"eval_every": 0, "save_every": 0, "max_eval_rows": 8}
        train_bert.main(command_line(flags))
        events = [e for e in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if e["event"] == "train"]
    clock = [event["train_seconds"] for event in events]
    return {
        "step_seconds": np.diff(clock).tolist(),
        "peak_memory_bytes": events[-1]["peak_memory_bytes"],
        "losses": [e["loss"] for e in events],
        "version": minicls.__version__,
    }


def train_transformers(s: Settings) -> dict:
    """The HF Trainer over the same rows in the same order: dynamic padding, its default attention, no checkpoints."""
    import transformers
    from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments

    device = dist.start(s.device, s.threads)
    data = load_data(s.data, s.text_column, s.label_column)
    directory, _ = weights.find_model(s.bert)
    rows = np.concatenate([step_rows(step, len(data.train), s.global_batch_size, s.seed) for step in range(s.max_steps)])
    ids, _ = bert_rows(load_tokenizer(directory), [data.train.texts[row] for row in rows], s.max_length)
    examples = list(zip(ids, data.train.labels[rows].tolist(), strict=True))
    if s.init == "random":
        torch.manual_seed(s.seed)
        config = AutoConfig.from_pretrained(directory, num_labels=len(data.label_names))
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(data.label_names))
    clock = []

    def collate(rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        """Pads to the longest row of the batch, as transformers' DataCollatorWithPadding does."""
        ids = [torch.tensor(ids) for ids, _ in rows]
        mask = [torch.ones_like(row) for row in ids]
        padded = {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": pad_sequence(mask, batch_first=True)}
        return padded | {"labels": torch.tensor([label for _, label in rows])}

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=s.max_steps,
                per_device_train_batch_size=s.global_batch_size,
                train_sampling_strategy="sequential",
                learning_rate=1e-5,
                lr_scheduler_type="cosine",
                weight_decay=1e-6,
                bf16=s.dtype == "bf16",
                use_cpu=device.type == "cpu",
                save_strategy="no",
                logging_steps=1,
                remove_unused_columns=False,
                report_to=[],
                disable_tqdm=True,
                seed=s.seed,
            ),
            train_dataset=examples,
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "step_seconds": np.diff(clock).tolist(),
        "peak_memory_bytes": dist.peak_memory_bytes(device),
        "losses": losses,
        "version": transformers.__version__,
    }


def measure(s: Settings, side: str) -> dict:
    """Runs one side in a process of its own; returns what it measured."""
    flags = command_line(asdict(replace(s, side=side, output_dir=None)))
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--side {side}: failed ({(done.stderr.strip().splitlines() or ['no message'])[-1][:300]})")
    return json.loads(done.stdout.strip().splitlines()[-1])


def train_task(s: Settings) -> dict:
    """minicls and the HF Trainer in alternating processes. Returns medians over all steps, and the ratio of each round."""
    data = load_data(s.data, s.text_column, s.label_column)
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for number in range(s.rounds):
        for side in SIDES:
            runs[side].append(measure(s, side))
            seconds = statistics.median(runs[side][-1]["step_seconds"])
            print(f"round {number + 1} of {s.rounds}, {side}: {seconds:.2f} s a step", file=sys.stderr)
    tokenizer = load_tokenizer(weights.find_model(s.bert)[0])
    windows = [step_rows(step, len(data.train), s.global_batch_size, s.seed) for step in range(1, s.max_steps)]
    lengths = [[len(row) for row in bert_rows(tokenizer, [data.train.texts[i] for i in w], s.max_length)[0]] for w in windows]
    tokens_per_step = statistics.mean(sum(window) for window in lengths)
    rows = []
    for side in SIDES:
        step_seconds = statistics.median(seconds for one in runs[side] for seconds in one["step_seconds"])
        rows.append(
            {
                "side": side,
                "version": runs[side][0]["version"],
                "step_seconds": step_seconds,
                "samples_per_second": statistics.mean(map(len, windows)) / step_seconds,
                "tokens_per_second": tokens_per_step / step_seconds,
                "peak_memory_bytes": max(one["peak_memory_bytes"] for one in runs[side]),
                "losses": runs[side][0]["losses"],
            }
        )
    pairs = zip(*(runs[side] for side in SIDES), strict=True)
    ratios = [statistics.median(b["step_seconds"]) / statistics.median(a["step_seconds"]) for a, b in pairs]
    return {
        "task": "train",
        "rows": rows,
        "speedup": statistics.median(ratios),
        "speedup_of_each_round": ratios,
        "memory_ratio": rows[0]["peak_memory_bytes"] / rows[1]["peak_memory_bytes"],
        "real_over_padded_tokens": statistics.mean(sum(w) / (max(w) * len(w)) for w in lengths),
        "settings": asdict(s),
        "torch": torch.__version__,
        "device": dist.device_name(dist.start(s.device, s.threads)),
    }


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, argv, __doc__)
    if s.side:
        print(json.dumps({"minicls": train_minicls, "transformers": train_transformers}[s.side](s)))
        return
    output_dir = checkpoint.new_run_dir(s.output_dir, "bench")
    result = train_task(s)
    checkpoint.write_json(output_dir / "bench.json", result)
    print(f"{'':14}{'samples/s':>11}{'tokens/s':>11}{'s/step':>9}{'peak memory':>14}")
    for row in result["rows"]:
        rates = f"{row['samples_per_second']:11.2f}{row['tokens_per_second']:11.0f}{row['step_seconds']:9.2f}"
        print(f"{row['side']:14}{rates}{row['peak_memory_bytes'] / 2**30:10.2f} GiB   {row['version']}")
    spread = f"{min(result['speedup_of_each_round']):.2f} to {max(result['speedup_of_each_round']):.2f}"
    print(f"minicls is {result['speedup']:.2f} times as fast ({spread} over {s.rounds} rounds), {result['device']}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
