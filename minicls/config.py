"""Settings: one frozen dataclass per script is its command line, its `--help` and its `run.json`.

A field's name is its flag (`learning_rate` -> `--learning-rate`), its annotation is the flag's type, its default the
flag's default; `X | None` means "may be unset". There are no settings files and no other way to set anything.
Below them is what every other module needs: the error for a user's mistake, and JSON files that are never half-written.
"""

import argparse
import codecs
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import shutil
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Our settings, and the names that other trainers have for them, where the spelling does not suggest ours.
ALIASES = {
    "model": "model_name_or_path",
    "data": "dataset_name train_file validation_file test_file",
    "epochs": "num_train_epochs num_epochs",
    "global_batch_size": "batch_size train_batch_size gradient_accumulation_steps",
    "micro_batch_size": "per_device_train_batch_size",
    "learning_rate": "lr",
    "warmup_ratio": "warmup warmup_steps",
    "max_length": "max_seq_length max_seq_len",
    "eval_every": "eval_steps eval_strategy",
    "save_every": "save_steps save_strategy",
    "keep_checkpoints": "save_total_limit",
    "log_every": "logging_steps",
    "validation_size": "validation_split val_size",
    "max_train_rows": "max_train_samples",
    "max_eval_rows": "max_eval_samples max_predict_samples",
    "patience": "early_stopping_patience",
    "dtype": "bf16 fp16 fp32",
    "device": "gpu no_cuda use_cpu",
    "activation_checkpointing": "gradient_checkpointing",
    "resume": "resume_from_checkpoint",
}


class UserError(Exception):
    """A user's mistake, reported in one line: the flag or file, the value, the remedy. Scripts exit with code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # values and other libraries' messages may hold line breaks


def setting(
    default,
    help: str,
    *,
    choices: tuple | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    group: str | None = None,
):
    """A dataclass field with its entry in `--help`. Bounds are inclusive.

    `group` is a heading of `--help`, for this field and those that follow it.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


# For settings whose defaults differ between the scripts.
EVALUATION = "evaluation and checkpoints"
EVAL_EVERY = "steps between evaluations; below 1 a fraction of all steps; 0: only after the last"
SAVE_EVERY = "steps between checkpoints; below 1 a fraction of all steps; 0: only the last and the best on validation"


@dataclass(frozen=True)
class DataSettings:
    """The choice of rows, so that equal flags give equal rows in every command that reads data; and the machine."""

    data: str = setting("fancyzhx/ag_news", "hub id, directory, or synthetic", group="data")
    text_column: str = setting("text", "column of the texts")
    label_column: str = setting("label", "column of the labels: class indices or class names")
    label_names: tuple[str, ...] | None = setting(None, "class names in the order of their indices")
    validation_size: float = setting(0.0, "training rows (below 1: a fraction) to hold out for validation", minimum=0)
    test_size: float = setting(0.0, "training rows (below 1: a fraction) to test on without a test split", minimum=0)
    max_train_rows: int | None = setting(None, "a stratified sample of the training rows, drawn by --seed", minimum=1)
    max_eval_rows: int | None = setting(None, "a sample of test and validation rows, the same for all seeds", minimum=1)
    seed: int = setting(42, "seed of --max-train-rows, the order of rows, dropout and fresh weights", minimum=0)
    device: str | None = setting(None, "cpu, cuda or cuda:N; unset: cuda if there is one", group="machine")
    threads: int | None = setting(None, "CPU threads; unset: the libraries' choice", minimum=1)


@dataclass(frozen=True)
class TrainingSettings(DataSettings):
    """The settings that have the same default and meaning in train_bert.py and train_qwen.py."""

    init: str = setting("pretrained", "random: no weights are loaded", choices=("pretrained", "random"), group="model")
    max_length: int = setting(512, "tokens of a row, control tokens, question and answer included", minimum=3)
    max_steps: int | None = setting(None, "optimizer steps; overrides --epochs", minimum=1, group="optimisation")
    max_grad_norm: float = setting(1.0, "clip the gradient norm to this value; 0 disables clipping", minimum=0)
    class_weights: str = setting("none", "balanced: classes weigh the same in the loss", choices=("none", "balanced"))
    label_smoothing: float = setting(0.0, "fraction of a target spread over all classes", minimum=0, maximum=1)
    output_dir: str | None = setting(None, "run directory, new or empty; unset: runs/<script>-<time>", group=EVALUATION)
    keep_checkpoints: int = setting(2, "newest checkpoints to keep, in addition to the best on validation", minimum=1)
    log_every: int = setting(10, "steps between lines of metrics.jsonl", minimum=1)
    patience: int | None = setting(None, "evaluations without a better validation score before a stop", minimum=1)
    resume: str | None = setting(None, "run directory to continue, under its own settings")
    dtype: str = setting("bf16", "bf16 is autocast over fp32 weights", choices=("bf16", "fp32"), group="machine")
    compile: bool = setting(False, "torch.compile the model")
    activation_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError (one line) instead of a usage text, and a typo gets a suggestion."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0] or "''"
            name = flag.lstrip("-").replace("_", "-").lower()
            known = [option[2:] for option in self._option_string_actions if option[:2] == "--" and option != "--help"]
            close = [o for o in known if name.replace("-", "_") in ALIASES.get(o.replace("-", "_"), "").split()]
            close = close or difflib.get_close_matches(name, known, n=1)
            message = f"unknown flag {flag}; " + (f"did you mean --{close[0]}?" if close else "see --help")
        elif message.startswith("argument "):
            message = message.removeprefix("argument ") + "; see --help"
        raise UserError(message)


def flag_of(name: str) -> str:
    """The flag of a setting: `learning_rate` -> `--learning-rate`."""
    return "--" + name.replace("_", "-")


def command_line(settings: dict) -> list[str]:
    """Settings as flags, without those that are unset."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags += [flag_of(name)] if value else []
        elif value is not None:
            flags += [flag_of(name), *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def _add_flags(parser: Parser, cls: type) -> None:
    hints, groups, fields = typing.get_type_hints(cls), {None: parser}, dataclasses.fields(cls)
    titles = itertools.accumulate((field.metadata["group"] for field in fields), lambda title, group: group or title)
    titled = zip(titles, fields, strict=True)
    # A script's own settings come first, then those it shares with others.
    for title, field in sorted(titled, key=lambda item: item[1].name not in cls.__annotations__):
        value_type = hints[field.name]
        if isinstance(value_type, types.UnionType):  # X | None
            value_type = typing.get_args(value_type)[0]
        if several := typing.get_origin(value_type) is tuple:
            value_type = typing.get_args(value_type)[0]
        default = "unset" if field.default is None else field.default
        if value_type is bool:
            options, shown = {"action": argparse.BooleanOptionalAction}, f"default: {default}"
        else:
            options, shown = {"type": value_type}, f"{value_type.__name__}, default: {default}"
            options |= {"nargs": "+"} if several else {}
            choices = field.metadata["choices"]
            options |= {"choices": choices} if choices else {"metavar": value_type.__name__.upper()}
        options["help"] = f"{field.metadata['help']} ({shown})".replace("%", "%%")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        # SUPPRESS leaves out flags that were not given: `parse` must know which ones were given with --resume.
        groups[title].add_argument(flag_of(field.name), default=argparse.SUPPRESS, **options)


def check_value(name: str, value, minimum: float | None, maximum: float | None) -> None:
    """Raises UserError for a number outside its bounds and for a value that is given twice."""
    flag = flag_of(name)
    twice = [item for item in value if value.count(item) > 1] if isinstance(value, tuple) else []
    if twice:
        raise UserError(f"{flag}: {twice[0]!r} is given twice; give each value once")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{flag}: {value} is not a finite number; pass one")
        if minimum is not None and value < minimum:
            raise UserError(f"{flag}: {value} is too small; pass at least {minimum}")
        if maximum is not None and value > maximum:
            raise UserError(f"{flag}: {value} is too large; pass at most {maximum}")


def parse(cls: type, argv: list[str] | None = None, description: str | None = None, prog: str | None = None):
    """Reads the command line into an instance of the dataclass `cls`.

    If `cls` has a field `resume` and the flag is given, all settings come from that run's `run.json`. Only `--device`
    may differ from them, so that a resumed run cannot silently become another experiment.
    Raises UserError for unknown flags and for values of the wrong type or outside their bounds.
    """
    parser = Parser(prog, description)
    _add_flags(parser, cls)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for field in dataclasses.fields(cls):
        check_value(field.name, given.get(field.name), field.metadata["minimum"], field.metadata["maximum"])
    if given.get("resume") is None:
        return cls(**given)
    settings = load(cls, Path(given["resume"]) / "run.json")
    for name, value in given.items():
        if name not in ("resume", "device") and value != getattr(settings, name):
            problem = f"a resumed run keeps its settings ({getattr(settings, name)!r} in {given['resume']}/run.json)"
            raise UserError(f"{flag_of(name)}: {problem}; leave the flag out, or start a new run without --resume")
    return dataclasses.replace(settings, **given)


def load(cls: type, path: Path):
    """The settings saved in a `run.json`. Raises UserError if it is absent, broken or written by another script."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such run directory; check the path")
    values = read_json(path, f"is {path.parent} a run directory?", settings=dict)["settings"]
    fields = {field.name for field in dataclasses.fields(cls)}
    if different := sorted(values.keys() - fields) + sorted(fields - values.keys()):
        problem = f"its settings differ from this script's in {', '.join(different[:5])}"
        raise UserError(f"{path}: {problem}; resume it with the script and the version that wrote it")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A hidden path at which to write a file or a directory; it takes the name when the block ends without an error.

    So what has the name is complete, the new content or the previous one, even if the process is killed in the block.
    """
    aside = path.with_name(f".{path.name}.tmp")

    def clear() -> None:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)

    clear()  # a killed process may have left something
    try:
        yield aside
        aside.replace(path)
    finally:
        clear()


def write_json(file: Path, values: dict | list, indent: int | None = 2) -> None:
    """Writes UTF-8; `indent` None: on one line."""
    with written_aside(file) as aside:
        aside.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path, remedy: str, **kinds: type) -> dict:
    """A JSON object that has values of these types. Raises UserError with the remedy if the file is anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if missing := [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]:
            raise ValueError(f"no {' and no '.join(missing)} in it")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable ({error}); {remedy}") from None
    return values


def run_main(main: Callable[[list[str] | None], int | None]) -> None:
    """Runs a script's `main`: a UserError becomes the last line of stderr and exit code 2, without a traceback.

    An OSError, such as a full disk, does the same: the program cannot fix it, and the message names the file. A
    character that the output's encoding lacks is written as its JSON escape, so that JSON lines stay JSON.
    """
    codecs.register_error("json", lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's streams take everything
            stream.reconfigure(errors="json")
    try:
        code = main(None)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit would fail
        code = 1
    except (UserError, OSError) as error:
        remedy = "" if isinstance(error, UserError) else "; check the path, its permissions and the space on its disk"
        print(f"error: {error}{remedy}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
