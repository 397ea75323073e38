"""Settings: a dataclass is the command line, its `--help` and its `run.json`.

python -m pytest tests/test_config.py
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_bert
from minicls import baseline
from minicls.checkpoint import write_run_info
from minicls.config import UserError, load, parse, run_main, setting
from minicls.data import Data, Split
from minicls.predict import EvaluateSettings


@dataclass(frozen=True)
class Settings:
    name: str = setting("a", "help of name", group="first things")
    batch_size: int = setting(8, "help of batch size", minimum=1, maximum=64)
    share: float = setting(0.5, "50 % of it", minimum=0, maximum=1)
    kind: str = setting("one", "help of kind", choices=("one", "two"))
    names: tuple[str, ...] | None = setting(None, "help of names")
    limit: int | None = setting(None, "help of limit", minimum=1)
    fast: bool = setting(False, "help of fast", group="last things")
    safe: bool = setting(True, "help of safe")
    device: str | None = setting(None, "help of device")
    resume: str | None = setting(None, "help of resume")


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        ("", {}),
        ("--name b", {"name": "b"}),
        ("--name=b", {"name": "b"}),
        ("--batch-size 64 --share 1e-3", {"batch_size": 64, "share": 0.001}),
        ("--share 0", {"share": 0.0}),
        ("--kind two", {"kind": "two"}),
        ("--names x y z --name b", {"names": ("x", "y", "z"), "name": "b"}),
        ("--names x", {"names": ("x",)}),
        ("--limit 3", {"limit": 3}),
        ("--fast --no-safe", {"fast": True, "safe": False}),
        ("--no-fast --safe", {}),
        ("--fast --no-fast", {}),  # the last one counts
    ],
)
def test_flags_come_from_the_dataclass(argv, changed):
    settings = parse(Settings, argv.split())
    assert settings == dataclasses.replace(Settings(), **changed)
    for field in dataclasses.fields(Settings):  # 1 == 1.0 == True
        value, default = getattr(settings, field.name), field.default
        assert type(value) is type(default) or default is None or value is None


def test_the_defaults_of_train_bert_are_the_published_experiment():
    s = parse(train_bert.Settings, [])
    assert (s.model, s.data, s.epochs, s.global_batch_size, s.micro_batch_size) == (
        *("google-bert/bert-base-cased", "fancyzhx/ag_news"),
        *(5, 64, 64),
    )
    assert (s.learning_rate, s.warmup_ratio, s.weight_decay, s.max_grad_norm) == (1e-5, 0, 1e-6, 1.0)
    assert (s.max_length, s.eval_every, s.seed, s.dtype) == (512, 0.1, 42, "bf16")


@pytest.mark.parametrize("cls", [Settings, train_bert.Settings])
def test_help_lists_every_flag_with_type_default_and_meaning(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # argparse breaks lines, at hyphens too
    with pytest.raises(SystemExit) as exit:
        parse(cls, ["--help"], "What it is,\n    with a command.")
    assert not exit.value.code
    out = capsys.readouterr().out
    assert "What it is,\n    with a command." in out
    if cls is Settings:
        body = out[out.index("\noptions:") :]
        headings = [
            body.index(text) for text in ("first things:", "--name ", "--limit ", "last things:", "--fast", "--resume ")
        ]
        assert headings == sorted(headings)
    for field in dataclasses.fields(cls):
        flag = "--" + field.name.replace("_", "-")
        (entry,) = re.findall(rf"^  {flag}[ ,].*(?:\n {{10,}}.*)*", out, re.MULTILINE)
        entry = " ".join(entry.split())
        kind = next(k for k in ("bool", "int", "float", "str") if k in str(field.type))
        default = f"default: {'unset' if field.default is None else field.default}"
        if kind == "bool":
            assert entry.startswith(f"{flag}, --no-{flag[2:]} ")
            assert entry.endswith(f"{field.metadata['help']} ({default})")
        else:
            assert entry.endswith(f"{field.metadata['help']} ({kind}, {default})")
        for choice in field.metadata["choices"] or ():
            assert choice in entry


@pytest.mark.parametrize("cls", [train_bert.Settings, baseline.Settings, EvaluateSettings])
def test_help_lists_shared_flags_under_their_own_heading(cls, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help"])
    headings, heading = {}, None
    for line in capsys.readouterr().out.splitlines():
        if re.fullmatch(r"[a-z ]+:", line):
            heading = line
        elif flag := re.match("  --([a-z-]+)", line):
            headings.setdefault(heading, []).append(flag[1])
    assert {"data", "text-column", "test-size", "seed"} <= {*headings["data:"]}
    assert {"dtype", "device", "threads"} <= {*headings["machine:"]} and "features" not in headings["data:"]


def test_an_empty_argument_is_shown():
    with pytest.raises(UserError, match="unknown flag ''; see --help"):
        parse(Settings, ["--fast", ""])  # from an unset "$FLAGS"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--nam b", ["--nam", "did you mean --name?"]),
        ("--batchsize 3", ["--batchsize", "did you mean --batch-size?"]),
        ("--batch_size=3", ["--batch_size", "did you mean --batch-size?"]),
        ("--batch 3", ["unknown flag --batch"]),  # abbreviations are typing errors
        ("--zzz", ["--zzz", "see --help"]),
        ("--names x y x", ["--names", "'x' is given twice", "once"]),
        ("stray", ["stray"]),
        ("--batch-size 1.5", ["--batch-size", "int", "'1.5'", "--help"]),
        ("--batch-size many", ["--batch-size", "int", "'many'", "--help"]),
        ("--share half", ["--share", "float", "'half'", "--help"]),
        ("--kind three", ["--kind", "'three'", "one", "two"]),
        ("--name", ["--name", "--help"]),
        ("--names", ["--names", "--help"]),
        ("--fast yes", ["yes"]),
        ("--batch-size 0", ["--batch-size", "0", "at least 1"]),
        ("--batch-size -3", ["--batch-size", "-3", "at least 1"]),
        ("--batch-size 65", ["--batch-size", "65", "at most 64"]),
        ("--share -0.1", ["--share", "-0.1", "at least 0"]),
        ("--share 1.01", ["--share", "1.01", "at most 1"]),
        ("--share nan", ["--share", "nan"]),
        ("--share inf", ["--share", "inf"]),
        ("--limit 0", ["--limit", "0", "at least 1"]),
    ],
)
def test_a_mistake_is_one_line_that_names_flag_value_and_remedy(argv, parts):
    with pytest.raises(UserError) as error:
        parse(Settings, argv.split())
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--lr", "--learning-rate"),
        ("--batch-size", "--global-batch-size"),
        ("--batch_size", "--global-batch-size"),
        ("--num-train-epochs", "--epochs"),
        ("--num_train_epochs=3", "--epochs"),
        ("--per-device-train-batch-size", "--micro-batch-size"),
        ("--gradient-accumulation-steps", "--global-batch-size"),
        ("--max-seq-length", "--max-length"),
        ("--model-name-or-path", "--model"),
        ("--eval-steps", "--eval-every"),
        ("--bf16", "--dtype"),
        ("--resume-from-checkpoint", "--resume"),
        ("--learning-rat", "--learning-rate"),
        ("--weigth-decay", "--weight-decay"),
    ],
)
def test_a_flag_of_another_trainer_is_met_with_ours(flag, ours):
    with pytest.raises(UserError) as error:
        parse(train_bert.Settings, [flag, "3"])
    assert str(error.value) == f"unknown flag {flag.split('=')[0]}; did you mean {ours}?"


@pytest.mark.parametrize("flag", ["--lr", "--hel", "-x", "--he"])
def test_a_guess_is_a_flag_that_there_is(flag):
    with pytest.raises(UserError, match=f"unknown flag {flag}; see --help"):
        parse(Settings, [flag, "3"])


# run.json


def save(settings, directory) -> None:
    split = Split(["text"], np.array([0]), np.array([0]))
    data, device = Data(split, split, ("a", "b")), torch.device("cpu")
    write_run_info(directory, "train_bert", dataclasses.asdict(settings), device, data, {"total_steps": 3})


@pytest.mark.parametrize(
    "argv", ["", "--names é y --limit 3 --fast --no-safe --share 0.1", "--name \u2028 --share 1e-300"]
)
def test_run_json_gives_the_settings_back(argv, tmp_path):
    settings = parse(Settings, argv.split(" ") if argv else [])
    save(settings, tmp_path)
    assert load(Settings, tmp_path / "run.json") == settings
    info = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert info["total_steps"] == 3 and {"python", "torch", "minicls"} <= info["versions"].keys()


def test_a_resumed_run_has_its_own_settings(tmp_path):
    settings = parse(Settings, ["--names", "x", "y", "--share", "0.25"])
    save(settings, tmp_path)
    run_dir = str(tmp_path)
    assert parse(Settings, ["--resume", run_dir]) == dataclasses.replace(settings, resume=run_dir)
    resumed = parse(Settings, ["--resume", run_dir, "--device", "cpu"])
    assert resumed == dataclasses.replace(settings, resume=run_dir, device="cpu")


@pytest.mark.parametrize("flag", ["--share 0.5", "--names x", "--fast"])
def test_a_resumed_run_takes_no_other_settings(flag, tmp_path):
    save(parse(Settings, ["--share", "0.25"]), tmp_path)
    with pytest.raises(UserError, match=rf"{flag.split()[0].replace('--no-', '--')}: .*leave the flag out"):
        parse(Settings, ["--resume", str(tmp_path), *flag.split()])


@pytest.mark.parametrize("flag", ["--share 0.25", "--no-fast"])
def test_a_resumed_run_s_settings_may_be_repeated(flag, tmp_path):
    settings = parse(Settings, ["--share", "0.25"])
    save(settings, tmp_path)
    run_dir = str(tmp_path)
    assert parse(Settings, ["--resume", run_dir, *flag.split()]) == dataclasses.replace(settings, resume=run_dir)


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"{}", b"3", b'{"settings": {}}', b'{"settings": []}', b'{"settings": null}', b"\xff"],
    ids=str,
)
def test_a_broken_run_json_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: ") as error:
        parse(Settings, ["--resume", str(tmp_path)])
    assert "\n" not in str(error.value)


def edit_settings(run_dir, **changes) -> None:
    info = json.loads((run_dir / "run.json").read_text())
    values = {name: value for name, value in (info["settings"] | changes).items() if value != "drop"}
    (run_dir / "run.json").write_text(json.dumps(info | {"settings": values}))


@pytest.mark.parametrize("changes", [{"language": "zh"}, {"limit": "drop"}], ids=str)
def test_a_setting_too_many_or_too_few_is_an_error(changes, tmp_path):
    save(Settings(), tmp_path)
    edit_settings(tmp_path, **changes)
    with pytest.raises(
        UserError, match=rf"run\.json: .*differ from .* in {next(iter(changes))}; resume it with the script"
    ):
        parse(Settings, ["--resume", str(tmp_path)])


def test_settings_of_another_script_are_named(tmp_path):
    save(Settings(), tmp_path)
    with pytest.raises(
        UserError, match=r"run\.json: .*differ from .* in batch_size, fast, .*resume it with the script"
    ):
        load(train_bert.Settings, tmp_path / "run.json")
    with pytest.raises(UserError, match="no such run directory"):
        load(train_bert.Settings, tmp_path / "nowhere" / "run.json")


# The end of a script.


@pytest.mark.parametrize(
    ("raised", "code", "last_line"),
    [
        (None, None, ""),
        (UserError("--flag: 3 is bad; pass 4"), 2, "error: --flag: 3 is bad; pass 4"),
        (
            OSError(28, "No space left on device", "/disk/file"),
            2,
            "error: .*No space left on device.*/disk/file.*; check .*disk",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(130), 130, ""),
    ],
)
def test_a_script_ends_with_a_code_and_a_line(raised, code, last_line, capsys):
    def main(argv):
        assert argv is None
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == code
    assert re.fullmatch(last_line, capsys.readouterr().err.strip())


def test_characters_that_the_output_has_not_are_escaped():
    code = "from minicls.config import UserError, run_main\ndef main(argv):\n    print('é 财经 😀')\n    raise UserError('财经; x')\nrun_main(main)"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "\\u00e9 \\u8d22\\u7ecf \\ud83d\\ude00\n")
    assert json.loads(f'"{done.stdout.strip()}"') == "é 财经 😀"
    assert done.stderr == "error: \\u8d22\\u7ecf; x\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 / 0)
