"""Several processes under torchrun, or one: start, sum over ranks, and who prints. Without torchrun every sum is a no-op."""

import os
from pathlib import Path

import torch
import torch.distributed
from torch import nn

from minicls.config import UserError


def start(device: str | None, threads: int | None = None) -> torch.device:
    """Picks the device of this rank and joins the process group if torchrun set one up (nccl on CUDA, gloo on CPU)."""
    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads: {threads} is too small; pass at least 1")
        torch.set_num_threads(threads)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"--device: {device!r} is no device; pass cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device: {device!r} is not supported; pass cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device: {device!r} asked for, but torch sees no CUDA device; pass cpu")
    index = int(os.environ.get("LOCAL_RANK", torch.device(device).index or 0))
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise UserError(
            f"--device: cuda:{index} is not there, torch sees {torch.cuda.device_count()}; pass a lower N or fewer ranks"
        )
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


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
