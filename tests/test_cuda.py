"""On a real CUDA device, where there is one: the checks of results/gpu.py, and two ranks under NCCL.

    python -m pytest tests/test_cuda.py

In processes of their own, as this one hides all devices from the other tests.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, VISIBLE_DEVICES
from runs import losses


def environment() -> dict[str, str]:
    hidden = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    }
    return hidden | ({} if VISIBLE_DEVICES is None else {"CUDA_VISIBLE_DEVICES": VISIBLE_DEVICES})


@pytest.fixture(scope="session")
def devices() -> int:
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    run = [sys.executable, "-c", code]
    count = int(subprocess.check_output(run, env=environment())) if torch.version.cuda else 0
    if not count:
        pytest.skip("no CUDA device")
    return count


@pytest.mark.parametrize("section", ["attention_check", "models", "scripts", "scoring_check", "compiled"])
def test_checks_of_the_script(section, devices, tmp_path):
    command = [sys.executable, str(ROOT / "results" / "gpu.py"), "--only", section, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["wrong"] == [] and section in result["seconds"]


@pytest.mark.parametrize("name", ["bert", "qwen"])
def test_two_ranks_under_nccl_train_as_one(name, devices, tmp_path):
    if devices < 2:
        pytest.skip("one CUDA device")
    flags = [
        "--model",
        "tiny",
        "--data",
        "synthetic",
        "--dtype",
        "fp32",
        "--max-steps",
        "10",
        "--log-every",
        "1",
        "--max-eval-rows",
    ]
    flags += [
        "40",
        "--global-batch-size",
        "32",
        "--micro-batch-size",
        "16",
        "--learning-rate",
        "1e-3",
        "--max-train-rows",
        "320",
    ]
    launchers = {
        1: [sys.executable],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    for ranks, launcher in launchers.items():
        command = [*launcher, str(ROOT / f"train_{name}.py"), *flags, "--output-dir", str(tmp_path / str(ranks))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
    one, two = (np.array(losses(tmp_path / ranks)) for ranks in "12")
    # BERT's dropout draws other numbers for each rank; Qwen3 has none.
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=0.1 if name == "bert" else 1e-3)
