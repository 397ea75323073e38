"""Device set-up, and one or several ranks under torchrun. In a single process every sum over ranks is a no-op."""

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
DRIVER = Path("/proc/driver/nvidia/version")  # exists if NVIDIA's driver is installed
SLOW_BF16 = "BF16 IS SLOW HERE: {}; pass --dtype fp32"


def start(device: str | None, threads: int | None = None, dtype: str | None = None) -> torch.device:
    """Chooses this rank's device, sets PyTorch up for it, and joins torchrun's process group if there is one.

    `dtype`: the value of --dtype; warns if it is bf16 and that is slow here.
    """
    if threads:
        torch.set_num_threads(threads)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if reason := why_no_cuda():
            _note(f"THIS RUNS ON THE CPU, though the machine has an NVIDIA driver: {reason}")
    if not re.fullmatch(r"cpu|cuda(:[1-9]?\d)?", device):
        raise UserError(f"--device: {device!r} is not supported; pass cpu, cuda or cuda:N")
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            reason = why_no_cuda() or "torch sees no CUDA device; pass cpu"
            raise UserError(f"--device: {device!r} is not available: {reason}")
        index, count = int(os.environ.get("LOCAL_RANK", chosen.index or 0)), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"--device: cuda:{index} does not exist, torch sees {count}; pass a lower N or fewer ranks")
        chosen = torch.device("cuda", index)
        set_up_cuda(chosen, dtype)
    else:
        set_up_cpu(dtype)
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        missing = ", ".join(name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ)
        if missing:
            rank = os.environ["RANK"]
            raise UserError(f"RANK: {rank!r} in the environment, but no {missing}; start with torchrun, or unset RANK")
        backend, device_id = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
        hour = datetime.timedelta(hours=1)  # the other ranks wait while the first one saves gigabytes
        torch.distributed.init_process_group(backend, timeout=hour, device_id=device_id)
    return chosen


def _note(text: str) -> None:
    print(f"NOTE: {text}", file=sys.stderr, flush=True)


def set_up_cuda(device: torch.device, dtype: str | None) -> None:
    """PyTorch's settings for every GPU."""
    # Every batch has another size, and expandable segments leave no holes. PyTorch reads this at the first allocation.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.cuda.set_device(device)
    # On Hopper and later PyTorch prefers cuDNN attention, which builds a plan for each new shape in tenths of a second,
    # and whose dropout rounds the probability to sixteenths in torch 2.11.
    torch.backends.cuda.enable_cudnn_sdp(False)
    major, minor = torch.cuda.get_device_capability(device)
    if dtype == "bf16" and major < 8:
        card = torch.cuda.get_device_name(device)
        _note(SLOW_BF16.format(f"{card} has compute capability {major}.{minor} and only emulates it"))


def set_up_cpu(dtype: str | None = None) -> None:
    """Warns if bf16 is slow here, and keeps memory from growing with the number of steps."""
    if dtype == "bf16" and not _fast_bf16():
        _note(SLOW_BF16.format("this CPU only emulates it, at a seventh of fp32's speed"))
    # oneDNN and ideep, PyTorch's layer over it, each cache the last 1,024 operations that they compiled, one per shape,
    # and nearly every batch has a new shape. The cache takes memory and pins holes between freed tensors: two layers as
    # wide as MiniLM's, 64 rows of 3 to 30 words, fp32, peak at 843 MB after 100 steps and 1,129 MB after 400; with 32
    # entries, at 712 and 743 MB, in the same time. With fewer, layers of one pass could not share what was compiled.
    # The variables are read at the first matrix product, not when torch is imported.
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # the older name of the first
        os.environ.setdefault(CPU_CACHES[0], CPU_CACHE_CAPACITY)
    os.environ.setdefault(CPU_CACHES[1], CPU_CACHE_CAPACITY)


def _fast_bf16() -> bool:
    """Whether oneDNN has bf16 kernels for this CPU: with AVX-512, AVX-NE-CONVERT, or Arm's bf16."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return not flags or bool({"avx512bw", "avx_ne_convert", "bf16"} & {*flags[1].split()})


def why_no_cuda() -> str | None:
    """Why torch cannot use a GPU despite NVIDIA's driver; None if it can, has no driver, or the user hides the GPUs."""
    if not DRIVER.is_file() or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or torch.cuda.is_available():
        return None
    driver = re.search(r"\d+\.\d+[.\d]*", DRIVER.read_text())
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    fault = f"torch {torch.__version__} is built {built} and cannot use driver {driver[0] if driver else 'unknown'}"
    return f"{fault}; install a build for the CUDA that the driver supports, or update the driver"


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
    """The micro-batches of one rank in a step. A micro-batch shrinks to a rank's share of the global batch."""
    per_rank = global_batch_size // world_size()
    micro = min(micro_batch_size, per_rank)
    if global_batch_size % world_size() or per_rank % micro:
        divisor = f"{world_size()} rank(s) x --micro-batch-size {micro_batch_size}"
        raise UserError(f"--global-batch-size: {global_batch_size} is not divisible by {divisor}; change one of them")
    return per_rank // micro


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the ranks, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(x)
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is true on any rank: ranks must agree on stopping, or the others wait forever."""
    return bool(all_sum(torch.tensor(float(flag), device=device)).item()) if world_size() > 1 else flag


def broadcast_model(model: nn.Module) -> None:
    """Gives every rank the first rank's parameters."""
    if world_size() > 1:
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.data, 0)


def sum_gradients(model: nn.Module) -> None:
    """Sums gradients over the ranks; each rank has divided its loss by the global count, so the sum is the mean.

    All ranks reduce the same tensors in the same order, even a rank without rows in this step.
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
    name = re.search(r"^model name\s*:\s*(.*?)\s*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"CPU ({name[1] if name else 'unknown'}), {world_size()} x {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """This rank's peak: memory allocated by torch on a GPU, resident memory of the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak_bytes()


def resident_peak_bytes(pid: int | str = "self") -> int:
    """The peak resident memory of a process, in bytes; 0 for a zombie, which has none."""
    # Not getrusage's ru_maxrss, which exec inherits: all small processes started by a large bench.py would read alike.
    peak = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(peak[1]) * 1024 if peak else 0
