"""An operation that logs numbers, and tells which variables of a tracker it can see."""

import math
import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Operation, RunContext
from app.specs import JobSpec


class ChattySpec(JobSpec):
    """Logs one loss a step."""

    type: Literal["chatty"] = "chatty"
    mode: Literal["ok", "interrupted"] = "ok"
    marker: str = Field(description="A file that it makes when it ends.")
    steps: int = 3
    trackers: list[str] = Field(default_factory=list)


def run(spec: ChattySpec, ctx: RunContext) -> None:
    """Logs, then says how long it took."""
    began = time.monotonic()
    for step in range(1, spec.steps + 1):
        ctx.metrics(step, {"loss": 1 / step, "grad_norm": math.nan})
    Path(spec.marker).write_text("done")
    if spec.mode == "interrupted":
        os._exit(9)
    seen = [name for name in os.environ if name.startswith("WITNESS_")]
    ctx.result(seconds=time.monotonic() - began, final=1 / spec.steps, seen=seen)


operation = Operation(ChattySpec, run)
