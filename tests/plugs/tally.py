"""An operation that leaves a line each time it is started: how often a job really ran."""

import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Interrupted, Operation, RunContext
from app.specs import JobSpec


class TallySpec(JobSpec):
    """Writes its line, waits, and succeeds."""

    type: Literal["tally"] = "tally"
    file: str = Field(description="One line a start.")
    seconds: float = Field(0, ge=0, description="How long it runs.")
    until: str | None = Field(None, description="It runs until there is such a file.")


def run(spec: TallySpec, ctx: RunContext) -> None:
    """One O_APPEND write."""
    with Path(spec.file).open("a") as file:
        file.write(f"{os.getpid()} {time.time()}\n")
    ctx.phase("training")
    begun = time.monotonic()
    while time.monotonic() - begun < spec.seconds or (spec.until and not Path(spec.until).exists()):
        if ctx.stop_requested():
            raise Interrupted
        time.sleep(0.02)
    (ctx.output("report", name=spec.experiment_name) / "report.txt").write_text("done")


operation = Operation(TallySpec, run, slot="train")
