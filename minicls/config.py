"""Settings: one frozen dataclass per script is its command line, its `--help` and its `run.json`.

A field's name is its flag (`learning_rate` -> `--learning-rate`), its annotation the flag's type, its default the
flag's default; `X | None` means "may be off". There are no settings files and no other way to set anything.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A user's mistake, told in one line: the flag or file, the value, and the remedy. Scripts exit with code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # values and other libraries' messages may hold line breaks


def setting(default, help: str, *, choices: tuple | None = None, minimum: float | None = None, maximum: float | None = None):
    """A dataclass field with what the command line needs to know about it. The bounds are inclusive."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum, "maximum": maximum})


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError (one line) instead of a usage text, and a typo is met with a guess."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0] or "''"
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message = f"unknown flag {flag}; " + (f"did you mean {close[0]}?" if close else "see --help")
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


def parse(cls: type, argv: list[str] | None = None, description: str | None = None, prog: str | None = None):
    """Reads the command line into an instance of the dataclass `cls`.

    Where `cls` has a field `resume` and the flag is given, all settings come from that run's `run.json`; beside it only
    `--eval-only` and `--device` may be given, so that a resumed run cannot silently become another experiment.
    Raises UserError for unknown flags and for values of the wrong type or outside their bounds.
    """
    parser = Parser(prog, description)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, several = _value_type(hints[field.name])
        meta = field.metadata
        # SUPPRESS keeps flags that were not given out of the namespace: --resume has to know which were.
        options: dict = {"dest": field.name, "default": argparse.SUPPRESS}
        shown = ("" if kind is bool else f"{kind.__name__}, ") + f"default: {'off' if field.default is None else field.default}"
        options["help"] = f"{meta['help']} ({shown})".replace("%", "%%")
        if kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            options |= {"type": kind, "choices": meta["choices"]}
            options |= {"metavar": kind.__name__.upper()} if not meta["choices"] else {}
            options |= {"nargs": "+"} if several else {}
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for field in dataclasses.fields(cls):
        value, low, high = given.get(field.name), field.metadata["minimum"], field.metadata["maximum"]
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{flag}: {value} is not a finite number; pass one")
            if low is not None and value < low:
                raise UserError(f"{flag}: {value} is too small; pass at least {low}")
            if high is not None and value > high:
                raise UserError(f"{flag}: {value} is too large; pass at most {high}")
    if given.get("resume") is None:
        return cls(**given)
    settings = load(cls, Path(given["resume"]) / "run.json")
    for name in given.keys() - {"resume", "eval_only", "device"}:
        raise UserError(
            f"--{name.replace('_', '-')}: a resumed run keeps its settings ({getattr(settings, name)!r} in "
            f"{given['resume']}/run.json); leave the flag out, or start a new run without --resume"
        )
    return dataclasses.replace(settings, **given)


def load(cls: type, path: Path):
    """Reads the settings saved in a `run.json`; raises UserError where it is absent, broken or of another script."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such run directory; check the path")
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable run.json ({error}); is {path.parent} a run directory?") from None
    known = {field.name for field in dataclasses.fields(cls)}
    if values.keys() != known:
        odd = ", ".join(sorted(values.keys() ^ known))
        raise UserError(f"{path}: settings differ from this script's ({odd}); was it another script or version?")
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def run(main: Callable[[list[str] | None], int | None]) -> None:
    """Runs a script's `main`: a UserError becomes the last line of stderr and exit code 2, without a traceback.

    So does an OSError, a full disk for one: nothing here can mend it, and the message names the file.
    """
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
