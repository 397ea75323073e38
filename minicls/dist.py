"""Several processes under torchrun, or one: start, sum over ranks, and who prints. Without torchrun every sum is a no-op."""

import datetime
import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed
from torch import nn

from minicls.config import UserError

CPU_CACHES, CPU_CACHE_CAPACITY = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "32"  # see set_up_cpu
DRIVER = Path("/proc/driver/nvidia/version")  # is there where NVIDIA's driver is


def start(device: str | None, threads: int | None = None, dtype: str | None = None) -> torch.device:
    """Picks the device of this rank, sets PyTorch up for it, and joins the process group if torchrun set one up (nccl on CUDA,
    gloo on a CPU). `dtype`: `--dtype`, for a note where bf16 is slow."""
    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads: {threads} is too small; pass at least 1")
        torch.set_num_threads(threads)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and (reason := why_no_cuda()):
            print(
                f"NOTE: THIS RUNS ON THE CPU, though the machine has an NVIDIA driver: {reason}",
                file=sys.stderr,
                flush=True,
            )
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"--device: {device!r} is no device; pass cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device: {device!r} is not supported; pass cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        reason = why_no_cuda() or "torch sees no CUDA device; pass cpu"
        raise UserError(f"--device: {device!r} asked for, but {reason}")
    index = int(os.environ.get("LOCAL_RANK", torch.device(device).index or 0))
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise UserError(
            f"--device: cuda:{index} is not there, torch sees {torch.cuda.device_count()}; pass a lower N or fewer ranks"
        )
    chosen = torch.device("cuda", index) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        set_up_cuda(chosen, dtype)
    else:
        set_up_cpu(dtype)
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"RANK: {os.environ['RANK']!r} in the environment, but no {', '.join(missing)}; start with torchrun, or unset RANK"
            )
        # An hour, as the others wait while the first rank saves gigabytes.
        hour = datetime.timedelta(hours=1)
        torch.distributed.init_process_group(
            "nccl" if kind == "cuda" else "gloo", timeout=hour, device_id=chosen if kind == "cuda" else None
        )
    return chosen


def set_up_cuda(device: torch.device, dtype: str | None) -> None:
    """What minicls wants of PyTorch on every GPU."""
    # Batches are all of different sizes: segments that grow leave no holes between them. Read at the first allocation.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.cuda.set_device(device)
    # On Hopper and later cuDNN comes first, which builds a plan for each new shape, in tenths of a second; and its dropout
    # rounds the probability to sixteenths in torch 2.11.
    torch.backends.cuda.enable_cudnn_sdp(False)
    capability = torch.cuda.get_device_capability(device)
    if dtype == "bf16" and capability < (8, 0):
        name = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
        print(f"NOTE: BF16 IS SLOW HERE: {name} and only emulates it; pass --dtype fp32", file=sys.stderr, flush=True)


def set_up_cpu(dtype: str | None = None) -> None:
    """Says whether bf16 is slow here, and keeps memory from growing with the number of steps."""
    if dtype == "bf16" and not _fast_bf16():
        print(
            "NOTE: BF16 IS SLOW HERE: this CPU only emulates it, at a seventh of fp32's speed; pass --dtype fp32",
            file=sys.stderr,
        )
    # These variables are read at the first matrix product, not when torch is imported.
    # oneDNN, and ideep, PyTorch's layer over it, each keep the last 1,024 operations that they compiled, one for each shape, and
    # nearly every batch has a number of tokens of its own. What they keep takes room and pins holes between the freed tensors.
    # Two layers as wide as MiniLM's, 64 rows of 3 to 30 words, fp32: a peak of 843 MB after 100 steps and of 1,129 after 400;
    # with 32, of 712 and 743, in the same time. Fewer, and the layers of one pass could no longer share what was compiled.
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # the older name
        os.environ.setdefault(CPU_CACHES[0], CPU_CACHE_CAPACITY)
    os.environ.setdefault(CPU_CACHES[1], CPU_CACHE_CAPACITY)


def _fast_bf16() -> bool:
    """Whether oneDNN has kernels for bf16 on this CPU: with AVX-512, AVX-NE-CONVERT, or Arm's bf16."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return not flags or bool({"avx512bw", "avx_ne_convert", "bf16"} & {*flags[1].split()})


def why_no_cuda() -> str | None:
    """Why torch uses no GPU although the machine has NVIDIA's driver; None where it has none, or the user has hidden them."""
    if not DRIVER.is_file() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or torch.cuda.is_available():
        return None
    version = re.search(r"(\d+)\.\d+[.\d]*", DRIVER.read_text())
    driver = version.group() if version else "of an unknown version"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install the build for CUDA (pip install torch)"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which driver {driver} does not run; update the driver "
        "or install a torch for an older CUDA"
    )


def stop() -> None:
    """Leaves the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def grad_accum_steps(global_batch_size: int, micro_batch_size: int) -> int:
    """Micro-batches of one rank in one step. The micro-batch shrinks to what a rank gets of the global batch."""
    per_rank = global_batch_size // world_size()
    micro = min(micro_batch_size, per_rank)
    if global_batch_size % world_size() or per_rank % micro:
        raise UserError(
            f"--global-batch-size: {global_batch_size} is not divisible by {world_size()} rank(s) x --micro-batch-size "
            f"{micro_batch_size}; change one of them"
        )
    return per_rank // micro


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the ranks, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(x)
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if it is true on one: ranks must agree on stopping, or the others wait for ever."""
    return bool(all_sum(torch.tensor(float(flag), device=device)).item()) if world_size() > 1 else flag


def broadcast_model(model: nn.Module) -> None:
    """Gives every rank the first rank's parameters."""
    if world_size() > 1:
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.data, 0)


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of the ranks. Each rank has divided its loss by the step's global count, so this is the mean.

    All ranks reduce the same tensors in the same order, also a rank that had no rows in this step.
    """
    if world_size() > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)


def device_name(device: torch.device) -> str:
    """The hardware in words, for run.json and results.json."""
    if device.type == "cuda":
        return f"{world_size()} x {torch.cuda.get_device_name(device)}"
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
    return f"CPU ({names[0] if names else 'unknown'}), {world_size()} x {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """Of this rank: memory allocated by torch on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak_bytes()


def resident_peak_bytes(pid: int | str = "self") -> int:
    """Most resident memory that a process has had, in bytes."""
    # Not getrusage's ru_maxrss: exec carries that of the parent over, and every small side of a large bench.py would read alike.
    (peak,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
