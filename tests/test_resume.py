"""Exact resume: interrupted, killed, or out of disk space.   python -m pytest -m "slow or not slow" tests/test_resume.py

A resumed run equals the uninterrupted one bit for bit (same machine, eager, one thread), so there are no tolerances. The
moments of the kills in the slow test depend on the clock; that the result does not is what it tests.
"""

import contextlib
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY
from runs import SCRIPTS, events, interrupt_at, losses, results, resume, script_of, train, write_news

import minicls.__main__
import train_bert
from minicls import metrics
from minicls.checkpoint import checkpoints
from minicls.config import UserError, run_main
from minicls.predict import Classifier, evaluate

# Ten steps with dropout over windows of 32, 32, 32, 32 and 22 rows.
FLAGS = ["--max-train-rows", "150", "--epochs", "2", "--log-every", "1", "--eval-every", "3", "--save-every", "2"]


@pytest.fixture(scope="module", params=["bert fp32", "bert bf16", "qwen fp32", "qwen bf16"])
def pair(request, tmp_path_factory):
    """The same run twice: uninterrupted, and stopped at step 5 of 10."""
    folder = tmp_path_factory.mktemp("pair")
    name, dtype = request.param.split()
    # Accumulating, and few rows to score: Qwen's are five times as long.
    flags = [*FLAGS, "--dtype", dtype] + (
        ["--micro-batch-size", "16", "--max-eval-rows", "20"] if name == "qwen" else []
    )
    whole = train(folder / "whole", *flags, script=SCRIPTS[name])
    with interrupt_at(5), pytest.raises(SystemExit):
        train(folder / "stopped", *flags, script=SCRIPTS[name])
    assert [*checkpoints(folder / "stopped")] == [4, 5]
    return whole, folder / "stopped"


@pytest.fixture
def whole(pair):
    return pair[0]


@pytest.fixture
def stopped(pair, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(pair[1], tmp_path / "run")


def hidden(run_dir):
    """Files that should have got a name or gone. The lock's file stays, taken or not."""
    return sorted(path.name for path in run_dir.rglob(".*") if path.name != ".lock")


def assert_same_run(resumed, whole):
    for name in (
        "model.safetensors",
        "checkpoints/step-000010/resume/optimizer.safetensors",
        "predictions.parquet",
        "config.json",
    ):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert losses(resumed) == losses(whole) and [step for step, *_ in losses(whole)] == [*range(1, 11)]
    assert events(resumed, "eval", "test") == events(whole, "eval", "test")
    assert [e["epoch"] for e in events(resumed, "train")] == [e["epoch"] for e in events(whole, "train")]
    assert [*checkpoints(resumed)] == [*checkpoints(whole)] == [8, 10]
    clocks = {name for name in results(whole) if name.endswith(("_seconds", "_per_second", "_bytes"))} | {"evaluations"}
    for name in results(whole).keys() - clocks:
        assert results(resumed)[name] == results(whole)[name], name
    assert not hidden(resumed)


def test_resumed_run_equals_the_uninterrupted_one(stopped, whole):
    seconds = events(stopped, "train")[-1]["train_seconds"]
    assert_same_run(resume(stopped), whole)
    assert results(stopped)["train_seconds"] > seconds  # the clock went on


@pytest.mark.parametrize("pair", ["bert fp32", "qwen fp32"], indirect=True)
class TestStopped:
    """Other things that may happen to the stopped run before it continues."""

    def test_torn_leftovers_are_not_picked_up(self, stopped, whole):
        newest = checkpoints(stopped)[5]
        torn = shutil.copytree(newest, newest.with_name(".step-000007.tmp"))  # left by a kill while saving
        (torn / "resume" / "optimizer.safetensors").write_bytes(b"half")
        shutil.copytree(newest, newest.with_name(".step-000006.old"))  # left by a kill while deleting
        with (stopped / "metrics.jsonl").open("a") as file:
            for step in (6, 7):
                file.write(json.dumps({"event": "train", "step": step, "loss": 9.9}) + "\n")
            file.write('{"event": "train", "step": 8, "lo')
        assert_same_run(resume(stopped), whole)

    def test_no_complete_checkpoint_starts_over(self, stopped, whole):
        checkpoints(stopped)[4].rename(stopped / "checkpoints" / ".step-000004.tmp")
        shutil.rmtree(checkpoints(stopped)[5])
        assert_same_run(resume(stopped), whole)

    def test_killed_before_the_results_were_written(self, pair, whole, tmp_path):
        copy = shutil.copytree(whole, tmp_path / "run")
        for name in ("results.json", "predictions.parquet", "model.safetensors"):
            (copy / name).unlink()
        (copy / ".model.safetensors.tmp").write_bytes(b"half")
        assert_same_run(resume(copy), whole)

    def test_a_test_of_an_unfinished_run_is_void_once_it_goes_on(self, stopped, monkeypatch):
        evaluate([str(stopped)])
        script = script_of(stopped)
        monkeypatch.setattr(script.checkpoint.TrainingRun, "steps", lambda run: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            resume(stopped)
        assert not (stopped / "results.json").exists()
        with pytest.raises(UserError, match="this run is not finished; pass its newest checkpoint"):
            Classifier(stopped)

    def test_a_setting_may_be_repeated(self, stopped, whole):
        assert_same_run(resume(stopped, "--learning-rate", "1e-3"), whole)

    def test_evaluating_scores_the_checkpoints_and_leaves_the_run_resumable(self, stopped, whole, capsys):
        steps = len(losses(stopped))
        evaluate([str(stopped)])
        assert [e["step"] for e in events(stopped, "eval", "test")] == [
            3,
            4,
            5,
        ]  # 3 while training, then both checkpoints
        assert results(stopped)["final_step"] == 5 and len(losses(stopped)) == steps
        assert results(stopped)["evaluations"] == 2  # those that took eval_seconds
        assert "note: this run stands at step 5 of 10; --resume" in capsys.readouterr().out
        resume(stopped)
        assert (
            losses(stopped) == losses(whole)
            and results(stopped)["best_step_on_test"] == results(whole)["best_step_on_test"]
        )
        assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    @pytest.mark.parametrize("limit", [300_000, 900_000], ids=["in the model", "in the optimizer"])
    def test_full_disk_leaves_the_earlier_checkpoint(self, limit, stopped, whole, capsys, monkeypatch):
        """Writing past the limit fails as on a full disk (Python ignores SIGXFSZ); weights take 0.6 MB, moments 1.2 MB."""
        newest = checkpoints(stopped)[5]
        before = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(stopped)])
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(SystemExit) as stop:
                run_main(script_of(stopped).main)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        error = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(error) == 1 and "File too large" in error[0] and "step-000006" in error[0]
        assert [*checkpoints(stopped)] == [4, 5] and not hidden(stopped)
        assert before == {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
        assert_same_run(resume(stopped), whole)

    @pytest.mark.parametrize(
        "flag", [["--learning-rate", "2e-3"], ["--max-steps", "20"], ["--output-dir", "elsewhere"]], ids=" ".join
    )
    def test_another_setting_is_an_error(self, flag, stopped):
        with pytest.raises(UserError, match=f"{flag[0]}: a resumed run keeps its settings"):
            resume(stopped, *flag)

    def test_broken_checkpoint_is_named(self, stopped):
        (checkpoints(stopped)[5] / "resume" / "optimizer.safetensors").write_bytes(b"half")
        with pytest.raises(UserError, match="step-000005: not a complete checkpoint"):
            resume(stopped)

    def test_finished_run_says_so_and_changes_nothing(self, whole, capsys):
        before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
        resume(whole)
        assert f"{whole} is finished; its results are in {whole / 'results.json'}" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train_bert.py", *TINY, "--max-steps", "4", "--output-dir", str(tmp_path / "run")]
    )
    before = signal.getsignal(signal.SIGINT)  # a shell may have started the tests with it ignored
    with interrupt_at(2), pytest.raises(SystemExit) as stop:
        run_main(train_bert.main)
    assert stop.value.code == 130
    assert (
        f"stopped at step 2 of 4; continue with: python train_bert.py --resume {tmp_path / 'run'}\n"
        in capsys.readouterr().out
    )
    assert [*checkpoints(tmp_path / "run")] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_changed_data_is_an_error(tmp_path):
    news = write_news(tmp_path / "news", num_train=64, num_test=8)
    with interrupt_at(1, signal.SIGTERM), pytest.raises(SystemExit):
        train(tmp_path / "run", "--data", str(news), "--max-steps", "4")
    text = (news / "train.csv").read_text()
    (news / "train.csv").write_text(text.replace("beefood", "honey", 1))
    with pytest.raises(UserError, match=r"--data: .*news has other rows or classes than"):
        resume(tmp_path / "run")
    (news / "train.csv").write_text(text)
    assert results(resume(tmp_path / "run"))["final_step"] == 4


def test_best_on_validation_is_remembered(tmp_path, monkeypatch):
    """A resumed run knows the best step of its first part: F1 is scripted to fall with every evaluation."""
    original, script = metrics.evaluate_logits, iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])

    def evaluate_logits(logits, labels):
        scores, confusion = original(logits, labels)
        return scores | ({"f1": next(script)} if len(labels) == 40 else {}), confusion

    monkeypatch.setattr(metrics, "evaluate_logits", evaluate_logits)
    with interrupt_at(3), pytest.raises(SystemExit):
        train(
            tmp_path / "run",
            "--validation-size",
            "40",
            "--max-steps",
            "6",
            "--eval-every",
            "1",
            "--keep-checkpoints",
            "1",
        )
    best = checkpoints(tmp_path / "run")[1].rename(tmp_path / "aside")
    with pytest.raises(UserError, match="step 1, the best on validation, no longer has a checkpoint"):
        resume(tmp_path / "run")
    best.rename(tmp_path / "run/checkpoints/step-000001")
    found = results(resume(tmp_path / "run"))
    assert (found["headline_step"], found["final_step"]) == (1, 6)
    assert [*checkpoints(tmp_path / "run")] == [1, 6]


# Two processes and one run.

HOLD = "import sys, time; from pathlib import Path; from minicls.checkpoint import lock\n"
HOLD += "held = lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"


@contextlib.contextmanager
def held(run_dir):
    """Within the block, another process has the run, until it is killed."""
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """A run of three steps that was stopped after the first."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    with interrupt_at(1), pytest.raises(SystemExit):
        train(run_dir, "--max-steps", "3", "--max-eval-rows", "8", "--dtype", "fp32")
    return run_dir


def contents(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_that_another_process_has_is_refused(command, one_step, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(one_step, tmp_path / "run")
    main = train_bert.main if command == "train" else minicls.__main__.main
    argv = ["train_bert.py", "--resume", str(copy)] if command == "train" else ["minicls", "evaluate", str(copy)]
    monkeypatch.setattr(sys, "argv", argv)
    with held(copy) as process:
        before = contents(copy)
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        message = (
            f"error: {copy}: process {process.pid} is training or testing this run; wait for it or stop it first\n"
        )
        assert (stop.value.code, capsys.readouterr().err, contents(copy)) == (2, message, before)
    # The process was killed: what it had is free.
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert (stop.value.code or 0) == 0 and results(copy)["final_step"] == (1 if command == "evaluate" else 3)


def test_a_run_is_taken_while_it_trains_and_free_when_it_ends(one_step, tmp_path, monkeypatch):
    """However it ends; a traceback that is kept, as a notebook keeps it, does not keep the run."""
    copy, answers = shutil.copytree(one_step, tmp_path / "run"), []
    ask = "import sys; from pathlib import Path; from minicls.checkpoint import lock; lock(Path(sys.argv[1]))"

    def other_process():
        done = subprocess.run([sys.executable, "-c", ask, str(copy)], capture_output=True, text=True, cwd=ROOT)
        return f"process {os.getpid()} is training" in done.stderr if done.returncode else None

    run, save_checkpoint = train_bert.checkpoint.TrainingRun, train_bert.checkpoint.TrainingRun.save_checkpoint

    def spoiled(*arguments):
        answers.append(other_process())
        raise UserError("spoiled")

    monkeypatch.setattr(run, "save_checkpoint", spoiled)
    with pytest.raises(UserError, match="spoiled") as kept:
        resume(copy)
    monkeypatch.setattr(run, "save_checkpoint", save_checkpoint)
    assert results(resume(copy))["final_step"] == 3 and kept.value
    assert answers == [True] and other_process() is None


def test_a_file_system_without_locks_is_no_refusal(one_step, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train_bert.checkpoint.fcntl, "flock", flock)
    assert results(resume(shutil.copytree(one_step, tmp_path / "run")))["final_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_any_moment(name, tmp_path):
    """SIGKILL six times, then on to the end; a checkpoint at every step, so that kills fall into saving and deleting too."""
    flags = [*TINY, "--max-steps", "150", "--log-every", "1", "--eval-every", "0.1", "--save-every", "1"]
    if name == "qwen":
        flags += ["--global-batch-size", "8", "--micro-batch-size", "4", "--max-eval-rows", "20"]
    whole, killed = train(tmp_path / "whole", *flags, script=SCRIPTS[name]), tmp_path / "killed"
    rng, reached = random.Random(0), []
    while True:
        command = ["--resume", str(killed)] if reached else [*flags, "--output-dir", str(killed)]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / f"train_{name}.py"), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if len(reached) < 6:
            # Up to a second after a checkpoint of its own; every third one earlier, perhaps while it still starts.
            early = time.monotonic() + rng.uniform(0, 6) if len(reached) % 3 == 2 else math.inf
            newest = max(checkpoints(killed), default=0)
            while process.poll() is None and max(checkpoints(killed), default=0) == newest and time.monotonic() < early:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            process.kill()
        output, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
        reached.append(max(checkpoints(killed)))
    assert len(set(reached)) > 2, reached  # it was killed while it trained
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert losses(killed) == losses(whole) and events(killed, "eval", "test") == events(whole, "eval", "test")
    assert not hidden(killed)
