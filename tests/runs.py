"""Shared by the tests of the training scripts: runs in this process (a new one costs seconds), and tiny inputs."""

import csv
import itertools
import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from conftest import TINY

import train_bert
import train_qwen
from minicls.logger import Logger

CLASSES = ("ant", "bee", "cat", "dog")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


# Two epochs of windows of 64, 64 and 22 rows, every step logged.
EVERY_STEP = ["--max-train-rows", "150", "--global-batch-size", "64", "--micro-batch-size", "64", "--epochs", "2"]
EVERY_STEP += ["--log-every", "1", "--dtype", "fp32", "--eval-every", "0", "--save-every", "0"]
SCRIPTS = {"bert": train_bert, "qwen": train_qwen}


def train(run_dir: Path, *flags: str, script: ModuleType = train_bert) -> Path:
    """Trains as TINY and the flags say; returns the run directory."""
    script.main([*TINY, "--output-dir", str(run_dir), *flags])
    return run_dir


def script_of(run_dir: Path) -> ModuleType:
    """The script that began a run."""
    return {"train_bert": train_bert, "train_qwen": train_qwen}[
        json.loads((run_dir / "run.json").read_text())["script"]
    ]


def resume(run_dir: Path, *flags: str) -> Path:
    script_of(run_dir).main(["--resume", str(run_dir), *flags])
    return run_dir


@contextmanager
def interrupt_at(step: int, number: signal.Signals = signal.SIGINT) -> Iterator[None]:
    """Within the block, a run gets a real Ctrl-C (or another signal) in its `step`-th step from where it starts."""
    original, steps = Logger.progress, itertools.count(1)

    def progress(self, **postfix):
        original(self, **postfix)
        if next(steps) == step:
            signal.raise_signal(number)

    with mock.patch.object(Logger, "progress", progress):
        yield


def events(run_dir: Path, kind: str, split: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl of one event type in file order, including lines written twice."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind and line.get("split") == split]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in events(run_dir, "train")]


def results(run_dir: Path) -> dict:
    return json.loads((run_dir / "results.json").read_text())


def without_dropout(model_dir: Path, folder: Path) -> Path:
    """Copies a model directory, its dropout turned off: then how rows are spread over micro-batches does not matter."""
    folder.mkdir()
    for name in MODEL_FILES:
        shutil.copy(model_dir / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )
    return folder


def write_news(folder: Path, num_train: int = 600, num_test: int = 200) -> Path:
    """A directory for `--data` that a tiny model learns in 40 steps: most words of a text belong to its class alone."""
    rng = random.Random(0)
    folder.mkdir()
    for split, size in (("train", num_train), ("test", num_test)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(size):
                name = rng.choice(CLASSES)
                own, common = (f"{name}s", f"{name}food", f"{name}land"), ("the", "a", "of", "on", "for", "with", "at")
                words = [rng.choice(own if rng.random() < 0.6 else common) for _ in range(rng.randint(5, 9))]
                writer.writerow([" ".join(words), name])
    return folder


def write_uneven(folder: Path) -> Path:
    """A directory for `--data` with four classes of very different sizes in training: the later, the rarer."""
    write_news(folder, num_train=400, num_test=20)
    header, *lines = (folder / "train.csv").read_text().splitlines(keepends=True)
    kept = [line for i, line in enumerate(lines) if i % (2 * CLASSES.index(line.strip().rpartition(",")[2]) + 1) == 0]
    (folder / "train.csv").write_text("".join([header, *kept]))
    return folder


def smoothed(log_likelihoods: torch.Tensor, target: int, smoothing: float) -> torch.Tensor:
    """The cross-entropy of one target of which a share is spread evenly: arXiv 1512.00567, section 7."""
    return -(1 - smoothing) * log_likelihoods[target] - smoothing * log_likelihoods.mean()


LOSS_FLAGS = {  # flags: (class weights, smoothing)
    "": ("none", 0.0),
    "--class-weights balanced": ("balanced", 0.0),
    "--label-smoothing 0.1": ("none", 0.1),
    "--class-weights balanced --label-smoothing 0.1": ("balanced", 0.1),
}


def their_class_weights(scheme: str, labels: np.ndarray) -> np.ndarray:
    from sklearn.utils.class_weight import compute_class_weight

    return compute_class_weight("balanced" if scheme == "balanced" else None, classes=np.arange(4), y=labels)


def padded(rows: list[list[int]], padding: int) -> dict[str, torch.Tensor]:
    """The batch as transformers wants it, padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ones = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    return {
        "input_ids": pad([*map(torch.tensor, rows)], batch_first=True, padding_value=padding),
        "attention_mask": pad(ones, batch_first=True),
    }
