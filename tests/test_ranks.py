"""Two ranks under torchrun (gloo, CPU) against one process.   python -m pytest -m "slow or not slow" tests/test_ranks.py

Without dropout and in fp32 both compute the same sums in another order: losses differ by a few 1e-7 (bound: 1e-5), weights
and probabilities by a few 1e-6 (bound: 1e-4, as in test_train.py). Two ranks add two gradients, and a + b = b + a, so two
runs of two ranks are equal bit for bit.
"""

import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, TINY
from runs import SCRIPTS, events, losses, results, train, without_dropout
from safetensors.torch import load_file

from minicls.checkpoint import checkpoints
from minicls.data import load_data, split_data

# Three epochs of windows of 32, 32 and 1 row: of the last one the second rank gets nothing. Four rows at a time.
FLAGS = [
    "--max-train-rows",
    "65",
    "--epochs",
    "3",
    "--micro-batch-size",
    "4",
    "--dtype",
    "fp32",
    "--validation-size",
    "20",
]
FLAGS += ["--log-every", "1", "--eval-every", "3", "--save-every", "4", "--learning-rate", "3e-3"]

# The Ctrl-C reaches the rank that neither logs nor saves: both must stop, and at the same step.
INTERRUPTED = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from minicls.config import run_main
from runs import SCRIPTS, interrupt_at

script = SCRIPTS[sys.argv.pop(1)]
with interrupt_at(5 if os.environ["RANK"] == "1" else 0):
    run_main(script.main)
"""


def torchrun(*command: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as logs:  # by default they stay in /tmp
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--log-dir",
            logs,
        ]
        return subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module", params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def flags(name, bert_run, tmp_path_factory):
    if name == "qwen":  # it has no dropout
        return FLAGS
    return ["--model", str(without_dropout(bert_run, tmp_path_factory.mktemp("calm") / "model")), *FLAGS]


@pytest.fixture(scope="module")
def ranked(name, flags, tmp_path_factory):
    """A run of two ranks, stopped at step 5 of 9 and resumed."""
    folder = tmp_path_factory.mktemp("ranked")
    (folder / "interrupted.py").write_text(INTERRUPTED)
    run = folder / "run"
    stopped = torchrun(str(folder / "interrupted.py"), name, *TINY, *flags, "--output-dir", str(run))
    assert stopped.stdout.count("stopped at step 5 of 9; continue with: ") == 1, stopped.stderr
    assert [*checkpoints(run)][-1] == 5 and not (run / "results.json").exists()
    resumed = torchrun(str(ROOT / f"train_{name}.py"), "--resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    return run


def test_two_ranks_train_as_one_process(name, flags, ranked, tmp_path):
    single = train(tmp_path / "single", *flags, script=SCRIPTS[name])
    assert np.array(losses(ranked)) == pytest.approx(np.array(losses(single)), rel=1e-5)
    weights, expected = load_file(ranked / "model.safetensors"), load_file(single / "model.safetensors")
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-4)
    for split in ("validation", "test"):
        found, wanted = (
            [[e["step"], e["loss"], e["f1"]] for e in events(run, "eval", split)] for run in (ranked, single)
        )
        assert np.array(found) == pytest.approx(np.array(wanted), rel=1e-5)
    for name in ("headline_step", "final_step", "num_test_rows", "confusion"):
        assert results(ranked)[name] == results(single)[name], name
    found, wanted = (pq.read_table(run / "predictions.parquet").to_pydict() for run in (ranked, single))
    for column in wanted:
        assert found[column] == pytest.approx(wanted[column], abs=1e-4), column


def test_two_ranks_learn_soft_labels_as_one_process(bert_run, tmp_path):
    """Half of the texts have no label; weight, temperature and targets reach the rank that has the row."""
    calm = without_dropout(bert_run, tmp_path / "calm")
    data = split_data(load_data("synthetic"), max_train_rows=120, seed=42)
    random = np.random.default_rng(0).dirichlet(np.ones(len(data.label_names)), len(data.train)).T
    columns = {f"probability_{name}": column for name, column in zip(data.label_names, random, strict=True)}
    pq.write_table(pa.table({"text": data.train.texts} | columns), tmp_path / "soft.parquet")
    flags = ["--model", str(calm), *FLAGS, "--epochs", "1", "--soft-labels", str(tmp_path / "soft.parquet")]
    flags += ["--temperature", "2", "--soft-label-weight", "0.7"]
    single = train(tmp_path / "single", *flags)
    done = torchrun(str(ROOT / "train_bert.py"), *TINY, *flags, "--output-dir", str(tmp_path / "ranks"))
    assert done.returncode == 0, done.stderr
    assert np.array(losses(tmp_path / "ranks")) == pytest.approx(np.array(losses(single)), rel=1e-5)
    found, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("ranks", "single"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_one_rank_writes(ranked):
    assert [step for step, *_ in losses(ranked)] == [*range(1, 10)]
    assert [e["step"] for e in events(ranked, "eval", "test")] == [3, 6, 9]
    assert [e["epoch"] for e in events(ranked, "train")][-1] == 3
    assert "2 x 1 threads" in results(ranked)["device"]


@pytest.mark.slow
def test_resumed_ranks_equal_uninterrupted_ones(name, flags, ranked, tmp_path):
    whole = tmp_path / "whole"
    done = torchrun(str(ROOT / f"train_{name}.py"), *TINY, *flags, "--output-dir", str(whole))
    assert done.returncode == 0, done.stderr
    assert losses(ranked) == losses(whole)
    for name in ("model.safetensors", "checkpoints/step-000009/resume/optimizer.safetensors"):
        assert (ranked / name).read_bytes() == (whole / name).read_bytes(), name
