"""Shared by all tests: one thread, no network, and a tiny trained run.   python -m pytest tests"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is run from its checkout
VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")  # for test_cuda.py; all others keep to the CPU
# Before torch is imported: many tiny products gain nothing from a second thread, and waiting threads burn the other core.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# A run of the real script that takes a second or two.
TINY = ["--model", "tiny", "--data", "synthetic", "--device", "cpu", "--threads", "1", "--learning-rate", "1e-3"]
TINY += ["--max-train-rows", "256", "--max-eval-rows", "100", "--global-batch-size", "32", "--micro-batch-size", "32"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with real data and tokenizers, where the machine has one."""
    folder = os.environ.get("MINICLS_SHARED")
    if not folder:
        pytest.skip("MINICLS_SHARED names no folder with real data")
    return Path(folder)


@pytest.fixture(scope="session")
def qwen(shared):
    """The published Qwen3 tokenizer."""
    from minicls.tokenizer import load_tokenizer

    return load_tokenizer(shared / "tokenizers" / "Qwen3-0.6B")


@pytest.fixture(scope="session")
def bert_run(tmp_path_factory) -> Path:
    """A finished run of train_bert.py (16 steps, fp32)."""
    import train_bert

    run_dir = tmp_path_factory.mktemp("bert") / "run"
    train_bert.main(
        [*TINY, "--max-steps", "16", "--dtype", "fp32", "--eval-every", "0.5", "--output-dir", str(run_dir)]
    )
    return run_dir


@pytest.fixture(scope="session")
def qwen_run(tmp_path_factory) -> Path:
    """A finished run of train_qwen.py (16 steps, fp32)."""
    import train_qwen

    run_dir = tmp_path_factory.mktemp("qwen") / "run"
    train_qwen.main(
        [*TINY, "--max-steps", "16", "--dtype", "fp32", "--eval-every", "0.5", "--output-dir", str(run_dir)]
    )
    return run_dir


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The branches that a GPU takes, on the CPU, over a reference kernel."""
    import flash_reference  # noqa: F401 - it registers the kernel

    monkeypatch.setattr("minicls.kernels.GPUS", ("cuda", "cpu"))


@pytest.fixture(params=["multiplied out", "fused", "as on a GPU"])
def way(request, monkeypatch):
    """All ways of attention: a CPU's two, multiplied out and PyTorch's kernel, whatever the length of a test's rows; a GPU's."""
    if request.param == "as on a GPU":
        request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr("minicls.attention.MAX_PLAIN", 256 if request.param == "multiplied out" else 0)
