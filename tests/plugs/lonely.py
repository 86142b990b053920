"""An operation without a network that tries to call somebody."""

import os
import socket
from typing import Literal

from app.catalog import Operation, RunContext
from app.specs import JobSpec


class LonelySpec(JobSpec):
    """Calls a port of this machine."""

    type: Literal["lonely"] = "lonely"
    port: int
    mode: str = ""
    marker: str | None = None


def run(spec: LonelySpec, ctx: RunContext) -> None:
    """Says how far it came."""
    try:
        socket.create_connection(("127.0.0.1", spec.port), 5).close()
        reached = True
    except OSError:
        reached = False
    (ctx.output("report", name=spec.experiment_name) / "report.txt").write_text("done")
    ctx.result(reached=reached, hub_offline=os.environ.get("HF_HUB_OFFLINE"))


operation = Operation(LonelySpec, run, offline=True)
