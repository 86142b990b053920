"""The hardware of a run: device, compute dtype, threads, peak memory."""

import math
import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

from app.catalog import RunContext
from app.specs import Dtype

CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")


class Compute(NamedTuple):
    """Where and in which precision the matrix products run."""

    device: str
    dtype: Dtype

    @property
    def torch_dtype(self) -> Any:
        """The ``torch.dtype``."""
        import torch

        return getattr(torch, self.dtype)


def device_and_dtype(requested: Dtype | None, ctx: RunContext, field: str = "model.dtype") -> Compute:
    """The device, with the asked dtype where the hardware computes in it, else float32.

    On a CPU that is always float32: without AMX, 16-bit products run at a small fraction of its speed.
    """
    import torch

    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        supported = {"float32", "float16"} | ({"bfloat16"} if has_bf16 else set())
        device, default = "cuda", "bfloat16" if has_bf16 else "float32"
    else:
        device, default, supported = "cpu", "float32", {"float32"}
    chosen = requested or default
    if chosen not in supported:
        ctx.event(
            "dtype_replaced",
            f"{field}: {chosen} is not fast on this {device.upper()}; computing in float32",
            level="warn",
            requested=chosen,
            used="float32",
        )
        chosen = "float32"
    if chosen != requested:
        ctx.resolved(field, chosen)
    return Compute(device, chosen)  # type: ignore[arg-type]


def set_threads() -> int:
    """One thread per core that this process may use, container limits included; the ranks of a run share them."""
    import torch

    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CGROUP_CPU.read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup, or "max": no limit
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(cores)
    return cores


def peak_memory(device: str) -> int:
    """Bytes: the most that the GPU allocated, or the process's largest resident size."""
    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_now() -> int:
    """Bytes: what the GPU has allocated at this moment, or the process's resident size."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
