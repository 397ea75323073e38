"""Run directories and checkpoints: written aside and renamed, so that what has a name is whole; exact resume.

A checkpoint is a model directory plus `optimizer.safetensors` and `state.json`. No generator states: randomness is
seeded from (seed, step, micro-step, rank), and the order of rows is a function of (seed, epoch).
"""

import contextlib
import fcntl
import importlib.metadata
import itertools
import json
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
from minicls import dist
from minicls.config import UserError
from minicls.data import derived_seed
from minicls.weights import read_tensor, write_tensors


def check_output_dir(output_dir: str | None) -> None:
    """Refuses a directory that is in use, before the time is spent to get models and data."""
    if output_dir and Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise UserError(
            f"--output-dir: {output_dir} is not empty; name a new directory, or go on with --resume {output_dir}"
        )


def new_run_dir(output_dir: str | None, script: str) -> Path:
    """Makes `--output-dir`, by default runs/<script>-<time>; it must be new or empty."""
    check_output_dir(output_dir)
    path = named = Path(output_dir or f"runs/{script}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        for number in itertools.count(2):
            try:
                path.mkdir(parents=True, exist_ok=bool(output_dir))
                break
            except FileExistsError:
                if output_dir:
                    raise
                path = named.with_name(f"{named.name}-{number}")  # another run was started in the same second
        (path / ".writable").touch()
        (path / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output-dir: cannot write to {path} ({error.strerror}); name another directory") from None
    return path


_locks: dict[Path, TextIO] = {}  # of this process


def lock(run_dir: Path) -> TextIO:
    """Takes a run for this process until the returned file is closed, at the latest when the process ends, however it ends.

    The file itself stays: to delete it would let two processes lock two files of the same name.
    Raises UserError where another process has the run.
    """
    path = run_dir.resolve() / ".lock"
    if path in _locks:  # from a call that ended with an error, whose traceback a notebook keeps
        _locks.pop(path).close()
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{run_dir}: process {owner} is training or testing this run; wait for it or stop it first"
        ) from None
    except OSError:
        pass  # a file system without locks
    _locks[path] = file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


@dataclass(frozen=True)
class Run:
    """A run directory as found: its run.json, its results if it has any, and the model directory to go on from."""

    dir: Path
    info: dict
    results: dict | None
    newest: Path | None  # None: no complete checkpoint, start over

    @property
    def finished(self) -> bool:
        if self.results is None:
            return False
        return self.results["final_step"] == self.info["total_steps"] or bool(self.results.get("stopped_early"))


def open_run(run_dir: Path) -> Run:
    """Raises OSError where there is no run.json, and UserError where it or results.json is broken."""
    info = _read_object(
        run_dir / "run.json", ("settings", "data_fingerprint", "total_steps"), "restore it or start a new run"
    )
    file = run_dir / "results.json"
    results = None
    if file.is_file():
        results = _read_object(file, ("final_step",), "restore it, or delete it for --resume to write it anew")
    saved = checkpoints(run_dir)
    return Run(run_dir, info, results, saved[max(saved)] if saved else None)


def _read_object(file: Path, keys: tuple[str, ...], remedy: str) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in values] if isinstance(values, dict) else keys
    except ValueError as error:
        raise UserError(f"{file}: not readable ({error}); {remedy}") from None
    if missing:
        raise UserError(f"{file}: no {missing[0]} in it; {remedy}")
    return values


def how_asked(directory: Path) -> dict:
    """A model directory's minicls.json: which head it has and how it is asked. Empty for a model from elsewhere.

    Runs and checkpoints from before there was such a file have a run.json in or above them, which says the same.
    Raises UserError where the file is broken.
    """
    file = directory / "minicls.json"
    if file.is_file():
        try:
            asked = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(asked, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file}: not readable ({error}); restore it, or copy the whole model directory again"
            ) from None
        return asked
    info = info_of_model(directory)
    return info["settings"] | {name: info[name] for name in ("template", "chat") if info.get(name)}


def info_of_model(directory: Path) -> dict:
    """The run.json of a run directory, or of the run that a checkpoint is in; with no settings for a model from elsewhere,
    which may have a run.json of its own. Raises UserError where the file is broken."""
    places = [directory, *directory.resolve().parents[1:2]]  # a run, or its checkpoints/step-…
    file = next((place / "run.json" for place in places if (place / "run.json").is_file()), None)
    try:
        info = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not readable ({error}); restore it, or delete it to lose the run's settings"
        ) from None
    return {"settings": {}} | (info if isinstance(info, dict) else {})


def write_json(path: Path, values: dict | list) -> None:
    """Written aside and renamed: the file is whole or the one before."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by step, oldest first."""
    found = {
        int(p.name.removeprefix("step-")): p
        for p in run_dir.glob("checkpoints/step-*")
        if re.fullmatch(r"step-\d+", p.name)
    }
    return dict(sorted(found.items()))


def save_checkpoint(
    run_dir: Path,
    save_model: Callable[[Path], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep_checkpoints: int,
    best_step: int | None,
) -> None:
    """Saves step `state["step"]`, then deletes all checkpoints but the newest `keep_checkpoints` and that of `best_step`.

    save_model(directory) writes the model directory. Raises OSError, a full disk for one; then the checkpoints are as
    before. For the first rank alone.
    """
    final = run_dir / "checkpoints" / f"step-{state['step']:06d}"
    if final.exists():
        return
    aside = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_model(aside)
        moments = {
            f"{key}.{name}": optimizer.state[parameter][key]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state  # a frozen one has none
            for key in ("exp_avg", "exp_avg_sq")
        }
        write_tensors(moments, aside / "optimizer.safetensors")
        write_json(aside / "state.json", state)
        # A rename survives a crash of the machine only if what it names is on the disk before it.
        for path in (*aside.iterdir(), aside):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        aside.rename(final)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    found = checkpoints(run_dir)
    for step in [*found][:-keep_checkpoints]:
        if step != best_step:
            # Renamed before it is emptied: a kill half-way must not leave a checkpoint that only looks whole.
            found[step].rename(found[step].with_name(f".{found[step].name}.old"))
    for leftover in final.parent.glob(".step-*"):  # the doomed, and what a kill left half-written
        shutil.rmtree(leftover)


def load_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict:
    """Fills the optimizer, if there is one, from a checkpoint whose weights the model holds already; returns its state.json."""
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        trained = {p for group in optimizer.param_groups for p in group["params"]} if optimizer else ()
        for name, parameter in model.named_parameters():
            if parameter not in trained:
                continue
            slots = optimizer.state[parameter] = {"step": torch.tensor(float(state["step"]), device=parameter.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                moment = read_tensor(directory / "optimizer.safetensors", f"{key}.{name}")
                slots[key] = torch.empty_like(parameter, requires_grad=False).copy_(moment)
        best = state["best_on_validation"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{directory}: not a whole checkpoint ({error!r}); delete it and resume from the one before"
        ) from None
    if best and best[0] not in checkpoints(directory.parents[1]):
        raise UserError(f"{directory}: step {best[0]}, the best on validation, has no checkpoint any more; restore it")
    return state


def seed_everything(*numbers: int) -> None:
    """Seeds torch from (seed, step, micro-step, rank): dropout is then a function of the place in the run."""
    torch.manual_seed(derived_seed(*numbers))


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C or SIGTERM sets the event, for the loop to save and end; a second one ends the process at once."""
    stop = threading.Event()

    def handle(number, frame):
        stop.set()
        signal.signal(number, before[number])

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_run_info(run_dir: Path, settings: dict, device: torch.device, about: dict) -> None:
    """Writes run.json: the settings, and enough to say which versions ran, on which hardware and rows."""
    versions = {"minicls": minicls.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    write_json(
        run_dir / "run.json", {"settings": settings, "versions": versions, "device": dist.device_name(device)} | about
    )
