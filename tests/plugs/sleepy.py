"""An operation that behaves as told, without torch: what supervision is tested with."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Interrupted, Operation, RunContext
from app.errors import Code, RunError
from app.specs import JobSpec

Mode = Literal[
    "ok",
    "hang",
    "saves_itself",
    "stubborn",
    "family",
    "crash",
    "segfault",
    "raise",
    "refuse",
    "silent",
    "garbage",
    "checkpoint",
    "empty_output",
    "once",
    "exit",
    "bad_result",
    "ticks",
]
FAMILY = """
import os, signal, time
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


class SleepySpec(JobSpec):
    """Does what ``mode`` says."""

    type: Literal["sleepy"] = "sleepy"
    mode: Mode = "ok"
    seconds: float = Field(600, ge=0, description="How long it hangs, where it hangs.")
    status: int = Field(0, description="The exit status of mode exit.")
    marker: str | None = Field(None, description="A file that it makes once it is under way.")


def run(spec: SleepySpec, ctx: RunContext) -> None:
    """From the quick to the nasty."""
    ctx.phase("training")
    marker = Path(spec.marker) if spec.marker else None
    been_here = marker is not None and marker.exists()
    if marker:
        marker.write_text(str(os.getpid()))
    if spec.mode in ("ok", "garbage", "checkpoint", "empty_output"):
        _succeed(spec, ctx)
    elif spec.mode == "hang":
        time.sleep(spec.seconds)
    elif spec.mode == "once" and been_here:
        _succeed(spec, ctx)
    elif spec.mode in ("once", "saves_itself"):
        while not ctx.stop_requested():
            time.sleep(0.02)
        raise Interrupted
    elif spec.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(spec.seconds)
    elif spec.mode == "family":
        child = subprocess.Popen([sys.executable, "-c", FAMILY])
        (ctx.work_dir / "child").write_text(str(child.pid))
        time.sleep(spec.seconds)
    elif spec.mode == "crash":
        print("about to crash", flush=True)
        os._exit(9)
    elif spec.mode == "segfault":
        ctypes.string_at(0)
    elif spec.mode == "raise":
        raise ValueError("an unforeseen thing")
    elif spec.mode == "refuse":
        raise RunError(Code.BAD_DATA, "row 3 makes no sense", hint="Mend row 3.", param="dataset.file")
    elif spec.mode == "exit":
        os._exit(spec.status)
    elif spec.mode == "bad_result":
        (ctx.work_dir.parent / "result.json").write_text('{"status": "ok", "outputs": ["nothing"]}')
        os._exit(0)
    elif spec.mode == "ticks":
        while not ctx.stop_requested():
            ctx.tick()
            time.sleep(0.05)
        raise Interrupted
    elif spec.mode == "silent":
        os._exit(0)


def _succeed(spec: SleepySpec, ctx: RunContext) -> None:
    if spec.mode == "garbage":
        with (ctx.work_dir.parent / "events.jsonl").open("ab") as journal:
            journal.write(b"not json\n[1]\n\xff\xfe\n" + b"x" * 200_000 + b"\n" + b'{"kind": 3}\n')
    for step in range(1, 4):
        ctx.metrics(step, {"loss": 1 / step, "odd": float("nan")})
    ctx.progress(3, 3, loss=0.25, tokens_per_second=10.0)
    ctx.event("half_way", "Half of it is done.", level="warn", share=0.5)
    ctx.resolved("seconds", 1.5)
    if spec.mode == "checkpoint":
        folder = ctx.checkpoint_dir / "checkpoint-2"
        folder.mkdir()
        (folder / "weights").write_bytes(b"12345")
        ctx.checkpoint(folder, 2, {"loss": 0.5})
    folder = ctx.output("model", name=spec.experiment_name, base_chain=["root"])
    if spec.mode != "empty_output":
        (folder / "config.json").write_text("{}")
        (folder / "deep").mkdir()
        (folder / "deep" / "weights.bin").write_bytes(bytes(1000))
    ctx.result(answer=42)


operation = Operation(SleepySpec, run)
