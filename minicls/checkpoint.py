"""Run directories and checkpoints: opening or creating a run, atomic saves, exact resume, a lock.

A checkpoint is a model directory with a folder `resume`, which holds the optimizer's moments and the counters. It is
written under a temporary name and renamed, so a directory called `step-…` is complete. No generator states are saved:
randomness is seeded from (seed, step, micro-step, rank), and the order of rows is a function of (seed, epoch).
"""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from torch import nn

import minicls
from minicls import dist, metrics, weights
from minicls.config import TrainingSettings, UserError, flag_of, read_json, write_json, written_aside
from minicls.data import Data, Split, derived_seed
from minicls.logger import Logger
from minicls.weights import read_tensor, write_tensors


def check_output_dir(output_dir: str | Path | None, flag: str = "--output-dir", hint: str = "") -> None:
    """Refuses a directory that is in use, before time is spent on models and data. `hint`: ends the message."""
    if output_dir and Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise UserError(f"{flag}: {output_dir} is not empty; name a new directory{hint}")


def new_run_dir(output_dir: str | Path | None, script: str, flag: str = "--output-dir") -> Path:
    """Makes the directory that `flag` names, by default runs/<script>-<time>; it must be new or empty."""
    check_output_dir(output_dir, flag)
    path = Path(output_dir or f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not output_dir:  # another run may have begun in the same second
        later = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
        path = next(choice for choice in itertools.chain([path], later) if not choice.exists())
    try:
        path.mkdir(parents=True, exist_ok=bool(output_dir))
    except OSError as error:
        raise UserError(f"{flag}: cannot write to {path} ({error.strerror}); name another directory") from None
    return path


_locks: dict[Path, TextIO] = {}  # held by this process


def lock(run_dir: Path) -> TextIO:
    """Locks a run for this process until the returned file is closed or the process ends, however it ends.

    The lock file is never deleted: otherwise two processes could lock two files of the same name.
    Raises UserError if another process holds the run.
    """
    path = run_dir.resolve() / ".lock"
    if path in _locks:  # left by a call that failed: in a notebook, its traceback keeps the file open
        _locks.pop(path).close()
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = path.read_text() or "unknown"
        file.close()
        problem = f"process {owner} is training or testing this run"
        raise UserError(f"{run_dir}: {problem}; wait for it or stop it first") from None
    except OSError:
        pass  # a file system without locks
    _locks[path] = file
    path.write_text(str(os.getpid()))
    return file


@dataclass(frozen=True)
class Run:
    """A run directory on disk: its run.json, its results if it has any, and the checkpoint to continue from."""

    dir: Path
    info: dict
    results: dict  # empty: not tested yet
    newest: Path | None  # None: no complete checkpoint

    @property
    def finished(self) -> bool:
        return self.results.get("final_step") == self.info["total_steps"] or bool(self.results.get("stopped_early"))

    def check_data(self, data: Data) -> None:
        """Raises UserError if this is not the data that the run was started on."""
        if differing := data.differences(self.info["data_fingerprint"]):
            name = "soft_labels" if differing == ["soft_labels"] else "data"
            problem = f"{self.info['settings'][name]} has other rows or classes than {self.dir} was started on"
            raise UserError(f"{flag_of(name)}: {problem} ({', '.join(differing)}); restore them or start a new run")


def open_run(run_dir: Path) -> Run:
    """Raises UserError if run.json is absent, or if it or results.json is broken."""
    kinds = {"settings": dict, "data_fingerprint": dict, "total_steps": int}
    info = read_json(run_dir / "run.json", "restore it or start a new run", **kinds)
    file, remedy = run_dir / "results.json", "restore it, or delete it so that --resume writes it again"
    results = read_json(file, remedy, final_step=int) if file.is_file() else {}
    saved = checkpoints(run_dir)
    return Run(run_dir, info, results, saved[max(saved)] if saved else None)


def inference_settings(directory: Path) -> dict:
    """A model directory's minicls.json: its head and its input. Empty if there is none; UserError if it is broken."""
    file = directory / "minicls.json"
    return read_json(file, "restore it, or copy the whole model directory again") if file.is_file() else {}


def info_of_model(directory: Path) -> dict:
    """The run.json of a run directory or of a checkpoint's run. Without one, no settings; UserError if it is broken."""
    places = [directory, *directory.resolve().parents[1:2]]  # a run, or its checkpoints/step-…
    file = next((place / "run.json" for place in places if (place / "run.json").is_file()), None)
    remedy = "restore it, or delete it to lose the run's settings"
    return read_json(file, remedy, settings=dict) if file else {"settings": {}}


def write_run_info(run_dir: Path, script: str, settings: dict, device: torch.device, data: Data, details: dict) -> None:
    """Writes run.json: the settings, the versions, the hardware, the data's digests and further `details`."""
    versions = {"minicls": minicls.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    labelled = int((data.train.rows >= 0).sum())  # without the texts that come with soft labels
    info = {"script": script, "settings": settings, "versions": versions, "device": dist.device_name(device)}
    info |= {"data_revision": data.revision, "data_fingerprint": data.fingerprint(), "num_train_rows": labelled}
    write_json(run_dir / "run.json", info | details)


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by step, oldest first."""
    paths = [path for path in run_dir.glob("checkpoints/step-*") if re.fullmatch(r"step-\d+", path.name)]
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in paths))


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fills the optimizer from a checkpoint whose weights the model already holds; returns its state.json."""
    try:
        state = json.loads((directory / "resume" / "state.json").read_text(encoding="utf-8"))
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            step = torch.tensor(float(state["step"]), device=parameter.device)
            parameter_state = optimizer.state[parameter] = {"step": step}
            for key in ("exp_avg", "exp_avg_sq"):
                moment = read_tensor(directory / "resume" / "optimizer.safetensors", f"{key}.{name}")
                parameter_state[key] = torch.empty_like(parameter, requires_grad=False).copy_(moment)
        best = state["best_on_validation"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        problem = f"not a complete checkpoint ({error!r})"
        raise UserError(f"{directory}: {problem}; delete it and resume from the one before") from None
    if best and best[0] not in checkpoints(directory.parents[1]):
        raise UserError(f"{directory}: step {best[0]}, the best on validation, no longer has a checkpoint; restore it")
    return state


def seed_everything(*numbers: int) -> None:
    """Seeds torch from (seed, step, micro-step, rank), so that dropout does not depend on where a run was resumed."""
    torch.manual_seed(derived_seed(*numbers))


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM sets the event, so that the loop can save and end; a second one ends the process at once."""
    stop = threading.Event()

    def handle(number, frame):
        stop.set()
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def every_steps(interval: float, total_steps: int) -> int:
    """`--eval-every` or `--save-every` as a number of steps; 0 means never.

    Below 1 it is a fraction of all steps, rounded up as in the HF Trainer: 0.1 of 9,375 is 938.
    """
    return math.ceil(interval * total_steps) if interval < 1 else int(interval)


def new_state() -> dict:
    """Counters and clocks of a run, as resume/state.json saves them; best_on_…: [step, macro F1]."""
    state = {"step": 0, "train_seconds": 0.0, "eval_seconds": 0.0, "evaluations": 0, "samples": 0, "tokens": 0}
    return state | {"best_on_validation": None, "best_on_test": None, "evaluations_since_best": 0}


def headline_step(state: dict) -> int:
    """The step whose scores count: the best on validation, else the last."""
    return (state["best_on_validation"] or [state["step"]])[0]


def check_finite(step: int, remedy: str, **values: float) -> None:
    """Raises UserError for a value that is not finite, so that a broken step is never saved."""
    for name, value in values.items():
        if not math.isfinite(value):
            flag, advice = remedy.split(": ", 1)
            raise UserError(f"{flag}: the {name.replace('_', ' ')} became {value} at step {step}; {advice}")


def evaluate(
    splits: dict[str, Split],
    logits_of: Callable[[str], torch.Tensor],
    state: dict,
    logger: Logger,
    remedy: str = "--model: try --dtype fp32",
) -> dict[str, torch.Tensor]:
    """Scores the splits; logs the scores and updates the best steps in `state`.

    logits_of(split name) gives the logits (n, C) fp32 of a split's rows. Returns the logits of each split. Raises
    UserError with the remedy if a loss is not finite.
    """
    started, logits = time.perf_counter(), {}
    for name, split in splits.items():
        logits[name] = logits_of(name)
        scores, _ = metrics.evaluate_logits(logits[name], split.labels)
        check_finite(state["step"], remedy, **{f"{name} loss": scores["loss"]})
        logger.event("eval", state["step"], split=name, **scores)
        logger.print(f"step {state['step']} {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        best = state[f"best_on_{name}"]
        if better := best is None or scores["f1"] > best[1]:
            state[f"best_on_{name}"] = [state["step"], scores["f1"]]
        if name == "validation":
            state["evaluations_since_best"] = 0 if better else state["evaluations_since_best"] + 1
    state["eval_seconds"] += time.perf_counter() - started
    state["evaluations"] += 1
    return logits


class TrainingRun:
    """The bookkeeping of a training script: its run directory, pinned revisions, counters, clocks and checkpoints.

    The script calls the methods in the order in which they are defined. Only the first rank has a directory and writes
    to it; the counters are equal on all ranks.
    """

    def __init__(self, script: str, settings: TrainingSettings):
        """A new run, or the one that `--resume` names. Raises UserError if that one is broken."""
        self.script, self.settings = script, settings
        for name in ("eval_every", "save_every"):
            if (interval := getattr(settings, name)) >= 1 and interval % 1:
                remedy = "pass a whole number of steps, or a fraction of them below 1"
                raise UserError(f"{flag_of(name)}: {interval} is not a number of steps; {remedy}")
        self.previous = open_run(Path(settings.resume)) if settings.resume else None
        self.finished = bool(self.previous and self.previous.finished)
        self.info = self.previous.info if self.previous else {}
        # Commits of the hub, so that a resumed run gets the same files.
        self.revision, self.data_revision = self.info.get("revision"), self.info.get("data_revision")
        self.checkpoint = self.previous.newest if self.previous else None  # to continue from
        self.dir: Path | None = None
        self.state, self.logits, self.interrupted = new_state(), None, False

    def claim(self) -> None:
        """Locks a resumed run and checks the directory of a new one, before time is spent on models and data."""
        if dist.is_first() and self.previous:
            self.dir, self.lock = self.previous.dir, lock(self.previous.dir)
        elif dist.is_first():
            check_output_dir(self.settings.output_dir, hint=", or continue a run with --resume")

    def check_data(self, data: Data) -> None:
        """Raises UserError if the data differs from that of the resumed run, or lacks rows that a flag needs."""
        patience = self.settings.patience
        if patience and not data.validation:
            raise UserError(f"--patience: {patience} needs validation rows; hold some out with --validation-size")
        if self.previous:
            self.previous.check_data(data)

    def find_model(self) -> tuple[Path | None, Path | None]:
        """The directories to take config and tokenizer (None for `tiny`) and weights (None for random ones) from.

        Both are the newest checkpoint if there is one, else that of `--model`.
        """
        if self.checkpoint or self.settings.model == "tiny":
            return self.checkpoint, self.checkpoint
        directory, self.revision = weights.find_model(self.settings.model, self.revision)
        return directory, None if self.settings.init == "random" else directory

    def start(
        self,
        total_steps: int,
        data: Data,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        save_model: Callable[[Path], None],
        device: torch.device,
        **details,
    ) -> None:
        """Restores the counters and the optimizer of a resumed run, or creates a new run's directory.

        save_model(directory) writes the model directory; `details` are added to run.json.
        """
        s = self.settings
        self.total_steps, self.model, self.optimizer, self.device = total_steps, model, optimizer, device
        self.save_model, self.num_train_rows, self.splits = save_model, len(data.train), data.eval_splits
        self.eval_every = every_steps(s.eval_every, total_steps)
        self.save_every = every_steps(s.save_every, total_steps)
        if self.checkpoint:
            self.state |= load_state(self.checkpoint, model, optimizer)
        if dist.is_first() and not self.previous:
            self.dir = new_run_dir(s.output_dir, self.script)
            self.lock = lock(self.dir)
            details |= {"total_steps": total_steps, "revision": self.revision}
            details |= {"model_type": getattr(model.config, "model_type", "bert")}
            write_run_info(self.dir, self.script, dataclasses.asdict(s), device, data, details)
        elif dist.is_first():
            for name in ("results.json", "config.json"):  # of a test in between: the run is unfinished until its end
                (self.dir / name).unlink(missing_ok=True)
        self.logger = Logger(self.dir, self.state["step"], total_steps)
        self.logged = dict(self.state)

    def steps(self) -> Iterator[int]:
        """The remaining steps, counted from 0. Exits with code 130 after a step that a signal interrupted."""
        while not self.over:
            self.started = time.perf_counter()
            yield self.state["step"]
            if self.interrupted and not self.over:
                self.logger.close()
                reached = f"stopped at step {self.state['step']} of {self.total_steps}"
                self.logger.print(f"{reached}; continue with: python {self.script}.py --resume {self.dir}")
                self.close()
                raise SystemExit(130)

    @property
    def over(self) -> bool:
        return self.state["step"] == self.total_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        return self.settings.patience is not None and self.state["evaluations_since_best"] >= self.settings.patience

    def log_step(self, samples: int, tokens: int, learning_rate: float, grad_norm: float, **losses: float) -> None:
        """Counts a step and its time, shows its losses, and logs them every `--log-every` steps.

        Raises UserError if a value is not finite, before anything of the step is saved.
        """
        state, logged = self.state, self.logged
        check_finite(state["step"] + 1, self.remedy, **losses, gradient_norm=grad_norm)
        state["step"] += 1  # `steps` yields this one next
        state["samples"] += samples
        state["tokens"] += tokens
        state["train_seconds"] += time.perf_counter() - self.started
        seconds = state["train_seconds"] - logged["train_seconds"]
        rates = {f"{unit}_per_second": (state[unit] - logged[unit]) / seconds for unit in ("samples", "tokens")}
        shown = {name: f"{value:.4f}" for name, value in losses.items()}
        self.logger.progress(**shown, samples_per_second=f"{rates['samples_per_second']:.1f}")
        if state["step"] % self.settings.log_every == 0 or state["step"] == self.total_steps:
            values = {"epoch": state["samples"] / self.num_train_rows, "learning_rate": learning_rate}
            values |= losses | rates | {"grad_norm": grad_norm, "train_seconds": state["train_seconds"]}
            memory = dist.peak_memory_bytes(self.device)
            self.logger.event("train", state["step"], **values, peak_memory_bytes=memory)
            self.logged = dict(state)

    @property
    def remedy(self) -> str:
        """The advice in the message about a loss that is not finite."""
        rate, place = self.settings.learning_rate, self.dir or "the run directory"  # only the first rank knows it
        return f"--learning-rate: lower {rate} or try --dtype fp32 (earlier checkpoints, if any, are in {place})"

    def evaluate_if_due(self, logits_of: Callable[[str], torch.Tensor]) -> None:
        """Evaluates every `--eval-every` steps and after the last one."""
        step = self.state["step"]
        if step == self.total_steps or (self.eval_every and step % self.eval_every == 0):
            self.logits = evaluate(self.splits, logits_of, self.state, self.logger, self.remedy)
            self.state["stopped_early"] = self.stopped_early
            if self.stopped_early and step < self.total_steps:
                patience = self.settings.patience
                self.logger.print(f"stopped early: {patience} evaluations without a better validation score")

    def save_if_due(self, stop: threading.Event) -> None:
        """Saves a checkpoint every `--save-every` steps, at a best validation score, after a signal and at the end."""
        step, best_step = self.state["step"], (self.state["best_on_validation"] or [None])[0]
        self.interrupted = dist.any_rank(stop.is_set(), self.device)
        due = self.over or self.interrupted or step == best_step or (self.save_every and step % self.save_every == 0)
        if due and dist.is_first():
            self.save_checkpoint(best_step)

    def save_checkpoint(self, best_step: int | None) -> None:
        """Saves the current step, then deletes all checkpoints but the newest `--keep-checkpoints` and `best_step`.

        Raises OSError, for example on a full disk, and then leaves the checkpoints as they were.
        """
        final = self.dir / "checkpoints" / f"step-{self.state['step']:06d}"
        with written_aside(final) as aside:
            self.save_model(aside)
            moments = {
                f"{key}.{name}": self.optimizer.state[parameter][key]
                for name, parameter in self.model.named_parameters()
                if parameter in self.optimizer.state  # a frozen parameter has no state
                for key in ("exp_avg", "exp_avg_sq")
            }
            # In a folder of their own: vLLM would take a second safetensors file in the directory for weights.
            (aside / "resume").mkdir()
            write_tensors(moments, aside / "resume" / "optimizer.safetensors")
            write_json(aside / "resume" / "state.json", self.state)
            # The checkpoint survives a crash of the machine only if its files are on the disk before the rename.
            for path in (*aside.rglob("*"), aside):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        saved = checkpoints(self.dir)
        for step in [*saved][: -self.settings.keep_checkpoints]:
            if step != best_step:
                # Rename before deleting: a kill half-way must not leave a checkpoint that only looks complete.
                saved[step].rename(saved[step].with_name(f".{saved[step].name}.old"))
        for leftover in final.parent.glob(".step-*"):
            shutil.rmtree(leftover)

    def save_headline_model(
        self, architecture: weights.Architecture, logits_of: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Loads the headline step's weights and saves them in the run directory; returns their logits of each split."""
        step = headline_step(self.state)
        if step != self.state["step"]:
            if dist.is_first():
                weights.load_weights(self.model, checkpoints(self.dir)[step], architecture)
            dist.broadcast_model(self.model)
            self.logits = None
        if self.logits is None:  # resumed after the last step, or the weights are not those last evaluated
            started = time.perf_counter()
            self.logits = {name: logits_of(name) for name in self.splits}
            self.state["eval_seconds"] += time.perf_counter() - started
            self.state["evaluations"] += 1
        self.logger.close()
        if dist.is_first():
            self.save_model(self.dir)
        return self.logits

    def close(self) -> None:
        """Leaves the process group and releases the lock."""
        dist.stop()
        if self.dir:
            self.lock.close()
