"""Settings: one frozen dataclass per script is its command line, its `--help` and its `run.json`.

A field's name is its flag (`learning_rate` -> `--learning-rate`), its annotation the flag's type, its default the
flag's default; `X | None` means "may be unset". There are no settings files and no other way to set anything.
"""

import argparse
import codecs
import dataclasses
import difflib
import io
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

# Flags of other trainers that are called otherwise here, where spelling alone would not tell.
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
    """A user's mistake, told in one line: the flag or file, the value, and the remedy. Scripts exit with code 2."""

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
    """A dataclass field with what the command line needs to know about it. The bounds are inclusive.

    `group` is a heading of `--help`, for this field and those that follow it.
    """
    about = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "group": group}
    return dataclasses.field(default=default, metadata=about)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError (one line) instead of a usage text, and a typo is met with a guess."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0] or "''"
            name = flag.lstrip("-").replace("_", "-").lower()
            ours = [
                option[2:] for option in self._option_string_actions if option.startswith("--") and option != "--help"
            ]
            close = [o for o in ours if name.replace("-", "_") in ALIASES.get(o.replace("-", "_"), "").split()]
            close = close or difflib.get_close_matches(name, ours, n=1)
            message = f"unknown flag {flag}; " + (f"did you mean --{close[0]}?" if close else "see --help")
        elif message.startswith("argument "):
            message = message.removeprefix("argument ") + "; see --help"
        raise UserError(message)


def _value_type(annotation) -> tuple[type, bool]:
    """The type of one value, and whether the flag takes several: `tuple[str, ...] | None` -> (str, True)."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (t for t in typing.get_args(annotation) if t is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def parse(
    cls: type,
    argv: list[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
    upgrade: Callable[[dict], dict] | None = None,
):
    """Reads the command line into an instance of the dataclass `cls`.

    Where `cls` has a field `resume` and the flag is given, all settings come from that run's `run.json`, as `load` reads it; with
    it only `--eval-only` and `--device` may be given, so that a resumed run cannot silently become another experiment.
    Raises UserError for unknown flags and for values of the wrong type or outside their bounds.
    """
    parser = group = Parser(prog, description)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, several = _value_type(hints[field.name])
        meta = field.metadata
        # SUPPRESS keeps flags that were not given out of the namespace: --resume has to know which were.
        options: dict = {"dest": field.name, "default": argparse.SUPPRESS}
        shown = (
            "" if kind is bool else f"{kind.__name__}, "
        ) + f"default: {'unset' if field.default is None else field.default}"
        options["help"] = f"{meta['help']} ({shown})".replace("%", "%%")
        if kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            options |= {"type": kind, "choices": meta["choices"]}
            options |= {"metavar": kind.__name__.upper()} if not meta["choices"] else {}
            options |= {"nargs": "+"} if several else {}
        group = parser.add_argument_group(meta["group"]) if meta["group"] else group
        group.add_argument("--" + field.name.replace("_", "-"), **options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for field in dataclasses.fields(cls):
        value, low, high = given.get(field.name), field.metadata["minimum"], field.metadata["maximum"]
        flag = "--" + field.name.replace("_", "-")
        twice = [item for item in value if value.count(item) > 1] if isinstance(value, tuple) else []
        if twice:
            raise UserError(f"{flag}: {twice[0]!r} is given twice; give each value once")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{flag}: {value} is not a finite number; pass one")
            if low is not None and value < low:
                raise UserError(f"{flag}: {value} is too small; pass at least {low}")
            if high is not None and value > high:
                raise UserError(f"{flag}: {value} is too large; pass at most {high}")
    if given.get("resume") is None:
        return cls(**given)
    settings, defaults = load(cls, Path(given["resume"]) / "run.json", upgrade)
    if defaults and os.environ.get("RANK", "0") == "0":
        flags = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in defaults.items())
        print(f"{given['resume']} is older than some settings, which take their defaults: {flags}")
    for name in given.keys() - {"resume", "eval_only", "device"}:
        raise UserError(
            f"--{name.replace('_', '-')}: a resumed run keeps its settings ({getattr(settings, name)!r} in "
            f"{given['resume']}/run.json); leave the flag out, or start a new run without --resume"
        )
    return dataclasses.replace(settings, **given)


def load(cls: type, path: Path, upgrade: Callable[[dict], dict] | None = None) -> tuple:
    """Reads the settings saved in a `run.json`: (settings, those that it does not have with the defaults they take).

    `upgrade` turns the values of an older version into this one's. Raises UserError where the file is absent, broken or of
    another script.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such run directory; check the path")
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable run.json ({error}); is {path.parent} a run directory?") from None
    values = upgrade(values) if upgrade else values
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    missing = {name: default for name, default in fields.items() if name not in values}
    unknown = ", ".join(sorted(values.keys() - fields.keys()))
    if unknown or len(missing) * 2 > len(fields):  # a version adds a few
        odd = f"has {unknown}, which this script has not" if unknown else f"lacks {', '.join([*missing][:5])} and more"
        raise UserError(f"{path}: its settings are not this script's (it {odd}); was it another script or version?")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}), missing


def run(main: Callable[[list[str] | None], int | None]) -> None:
    """Runs a script's `main`: a UserError becomes the last line of stderr and exit code 2, without a traceback.

    So does an OSError, a full disk for one: nothing here can fix it, and the message names the file. A character that the
    output's encoding lacks is written as its JSON escape, so that JSON lines stay JSON.
    """
    codecs.register_error("json", lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's streams take everything
            stream.reconfigure(errors="json")
    try:
        code = main(None)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        code = 1
    except (UserError, OSError) as error:
        remedy = "" if isinstance(error, UserError) else "; check the path, its permissions and the space on its disk"
        print(f"error: {error}{remedy}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
