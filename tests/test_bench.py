"""bench.py's arithmetic on sides whose times are known; its real sides run in the README's commands (slow tier).

    python -m pytest tests/test_bench.py

Nothing here looks at a clock: figures are exact.
"""

import json
from dataclasses import replace

import pytest

import bench
from minicls.config import UserError, parse


def fake_measure(seconds, predictions=None):
    """A `measure` that answers from a table: {side: [seconds of each round's steps or requests]}."""
    rounds = {side: iter(times) for side, times in seconds.items()}

    def measure(s, side):
        side_s = parse(bench.Settings, bench.command_line({**vars(s), "side": side, "output_dir": None}))
        assert side_s == replace(s, side=side, output_dir=None)  # what a side's process is told is what was asked
        memory = {"minicls": 2**30, "transformers": 2 * 2**30, "vllm": 4 * 2**30}[side]
        losses = {"losses": [1.0]} if s.task == "train" else {"predictions": predictions[side]}
        return {"seconds": next(rounds[side]), "peak_memory_bytes": memory, "version": "1"} | losses

    return measure


def run(capsys, tmp_path, *flags):
    bench.main([*flags, "--data", "synthetic", "--threads", "1", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out.strip().splitlines()
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert json.loads(printed[-1]) == result
    return result, "\n".join(printed)


def test_training(bert_run, tmp_path, capsys, monkeypatch):
    times = {"minicls": [[1.0, 3.0], [2.0, 2.0]], "transformers": [[8.0, 8.0], [2.0, 4.0]]}
    monkeypatch.setattr(bench, "measure", fake_measure(times))
    flags = ["--task", "train", "--bert", str(bert_run), "--max-steps", "3", "--rounds", "2", "--global-batch-size", "32"]
    result, printed = run(capsys, tmp_path, *flags)
    ours, theirs = result["rows"]
    assert (ours["side"], ours["seconds"], ours["samples_per_second"]) == ("minicls", 2.0, 16.0)
    assert (theirs["side"], theirs["seconds"], theirs["samples_per_second"]) == ("transformers", 6.0, 32 / 6)
    assert result["speedup_of_each_round"] == {"transformers": [4.0, 1.5]} and result["speedup"] == {"transformers": 2.75}
    assert result["memory_ratio"] == {"transformers": 0.5}
    assert "minicls is 2.75 times as fast as transformers (1.50 to 4.00 over 2 rounds)" in printed


@pytest.mark.parametrize(("task", "seconds", "rate"), [("score", [[2.0]], 2.0), ("generate", [[1.0, 2.0, 3.0, 9.0]], 0.4)])
def test_asking(task, seconds, rate, qwen_run, tmp_path, capsys, monkeypatch):
    answers = {"minicls": [0, 1, 2, 3], "transformers": [0, 1, 2, 0], "vllm": [0, 1, 2, 3]}
    if task == "generate":  # "A" and "?" in the tiny tokenizer's bytes
        from minicls.tokenizer import load_tokenizer

        (letter,), (other,) = load_tokenizer(qwen_run).encode(["A", "?"])
        answers = {side: [[letter]] * 3 + [[letter if side == "vllm" else other]] for side in answers}
    times = {"minicls": seconds, "transformers": [[10.0] * len(seconds[0])], "vllm": [[1.0] * len(seconds[0])]}
    monkeypatch.setattr(bench, "measure", fake_measure(times, answers))
    flags = ["--task", task, "--qwen", str(qwen_run), "--num-questions", "4", "--rounds", "1", "--vllm-python", "python"]
    result, printed = run(capsys, tmp_path, *flags)
    ours, _, vllm = result["rows"]
    assert ours["samples_per_second"] == pytest.approx(rate)
    expected = [1, 0.75, 1] if task == "score" else [1, 1, 0.75]
    assert [row["agreement"] for row in result["rows"]] == expected and [*result["speedup"]] == ["transformers", "vllm"]
    if task == "generate":
        assert (ours["unreadable"], vllm["unreadable"]) == (0.25, 0.0) and "25.0% name no option" in printed


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--task", "train"], ["--task train", "--qwen DIR", "--bert DIR"]),
        (["--task", "train", "--bert", "a", "--qwen", "b"], ["name one model"]),
        (["--task", "score", "--bert", "a"], ["--task score", "--qwen DIR"]),
        (["--task", "train", "--qwen", "a", "--vllm-python", "python"], ["--vllm-python", "does not train"]),
        (["--qwen", "a", "--rounds", "0"], ["--rounds", "at least 1"]),
    ],
)
def test_mistakes(flags, parts, tmp_path):
    with pytest.raises(UserError) as error:
        bench.main([*flags, "--output-dir", str(tmp_path / "out")])
    assert all(part in str(error.value) for part in parts) and not (tmp_path / "out").exists()


def test_a_side_that_fails_is_named(qwen_run, tmp_path):
    flags = ["--task", "score", "--qwen", str(qwen_run), "--data", "synthetic", "--rounds", "1", "--device", "cuda:99"]
    with pytest.raises(UserError, match=r"--side minicls: failed .*cuda:99"):
        bench.main([*flags, "--output-dir", str(tmp_path / "out")])
