"""An operation that writes as much as it is told, where it is told, once somebody says go: what full disks are for."""

import errno
import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Interrupted, Operation, RunContext
from app.specs import JobSpec

WEIGHTS = "weights.bin"


class WriterSpec(JobSpec):
    """A checkpoint at step 1; then, after ``go``, the large thing; then its result, which says where it began."""

    type: Literal["writer"] = "writer"
    where: Literal["checkpoint", "output", "log", "scratch", "quota", "nothing"] = "nothing"
    size: int = Field(4 << 20, ge=0, description="Bytes, or files in its scratch space.")
    go: str = Field(description="A file that the run waits for; its own mark is this with .ready at the end.")


def run(spec: WriterSpec, ctx: RunContext) -> None:
    """Goes on from a checkpoint only if that one is whole."""
    ctx.phase("training")
    resume: Path | None = getattr(ctx, "resume_from", None)
    begun = int(resume.name.partition("-")[2]) if resume is not None else 0
    if resume is not None:
        assert set((resume / WEIGHTS).read_bytes()) == {begun}
    for step in range(begun + 1, 3):
        _checkpoint(ctx, step, 1000)
    Path(f"{spec.go}.ready").write_text(str(os.getpid()))
    while not Path(spec.go).exists():
        if ctx.stop_requested():
            raise Interrupted
        time.sleep(0.02)
    if spec.where == "checkpoint":
        _checkpoint(ctx, 3, spec.size)
    elif spec.where == "log":
        for _ in range(0, spec.size, 1 << 16):
            print("x" * (1 << 16), flush=True)
    elif spec.where == "scratch":
        for number in range(spec.size):
            (ctx.work_dir / str(number)).touch()
    elif spec.where == "quota" and resume is None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    folder = ctx.output("model", name=spec.experiment_name)
    (folder / WEIGHTS).write_bytes(bytes(spec.size if spec.where == "output" else 1000))
    ctx.result(begun=begun)


def _checkpoint(ctx: RunContext, step: int, size: int) -> None:
    folder = ctx.checkpoint_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(bytes([step]) * size)
    ctx.checkpoint(folder, step, {})
    ctx.settle()  # type: ignore[attr-defined]  # committed now, not some time later


operation = Operation(WriterSpec, run)
