"""An operation of several ranks that only add up numbers: what torchrun's signals and ends are tested with."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Interrupted, Operation, RunContext
from app.errors import Code, RunError
from app.specs import JobSpec


class GatheringSpec(JobSpec):
    """All ranks add up their numbers until somebody asks them to stop, or ``rounds`` are over."""

    type: Literal["gathering"] = "gathering"
    rounds: int = Field(3, ge=1)
    mode: Literal["ok", "refuse", "hang"] = "ok"
    marker: str = Field(description="Each rank writes its pid into <marker>.<rank>.")


def run(spec: GatheringSpec, ctx: RunContext) -> None:
    """One all_reduce a round; the ranks agree on when they stop."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, size = dist.get_rank(), dist.get_world_size()
    stop = torch.zeros(1)
    for step in range(1, spec.rounds + 1):
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total)
        ctx.metrics(step, {"sum": total.item()})
        ctx.progress(step, spec.rounds)
        if step == 1:
            Path(f"{spec.marker}.{rank}").write_text(str(os.getpid()))
        if spec.mode == "refuse" and rank == size - 1:
            raise RunError(Code.OUT_OF_MEMORY, "the last rank has no memory left", hint="Ask for less.")
        if spec.mode == "hang" and rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        stop[0] = float(ctx.stop_requested())
        dist.all_reduce(stop)
        if stop.item():
            raise Interrupted
        time.sleep(0.02)
    (ctx.output("report", name=spec.experiment_name) / f"rank{rank}.txt").write_text(str(size))
    ctx.result(sum=total.item(), size=size)
    print(f"rank {rank} is done", file=sys.stderr)
    dist.destroy_process_group()


operation = Operation(GatheringSpec, run, slot="train")
