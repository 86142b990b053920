"""An operation that breaks what it can, without torch unless a mode says so: for the faults of a runner."""

import itertools
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from app.catalog import Operation, RunContext
from app.specs import JobSpec

Mode = Literal[
    "doomed",
    "daemon",
    "daemon_once",
    "scrambles",
    "chatters",
    "hogs",
    "cuda_oom",
    "cpu_oom",
    "fork_bomb",
    "forks",
    "leaks_files",
    "keeps_saving",
]
MEGABYTE = 1 << 20
_LAST_STEP = 10


class UnrulySpec(JobSpec):
    """Does what ``mode`` says."""

    type: Literal["unruly"] = "unruly"
    mode: Mode
    amount: int = Field(100, ge=1, le=4096, description="Megabytes; files of mode leaks_files, children of mode forks.")
    marker: str = Field(description="A file that it makes once it is under way.")


def run(spec: UnrulySpec, ctx: RunContext) -> None:
    """Whatever it survives ends in a success."""
    ctx.phase("training")
    been_here = Path(spec.marker).exists()
    if spec.mode not in ("daemon", "daemon_once"):
        Path(spec.marker).write_text(str(os.getpid()))
    if not (spec.mode == "daemon_once" and been_here):
        _MODES[spec.mode](spec, ctx)
    (ctx.output("model", name=spec.experiment_name) / "config.json").write_text("{}")


def _doomed(spec: UnrulySpec, ctx: RunContext) -> None:
    """A checkpoint at step 3, and kill -9 at step 5, each time."""
    first = int(ctx.resume_from.name.partition("-")[2]) + 1 if ctx.resume_from else 1
    for step in range(first, _LAST_STEP + 1):
        if step == 3:
            _save(ctx, step)
            ctx.settle()  # or else the kill comes before it is committed
        if step == 5:
            ctx.progress(step, step)  # the last step is told at once
            os.kill(os.getpid(), signal.SIGKILL)


def _keeps_saving(spec: UnrulySpec, ctx: RunContext) -> None:
    for step in itertools.count(1):
        _save(ctx, step)
        time.sleep(0.05)


def _save(ctx: RunContext, step: int) -> None:
    folder = ctx.checkpoint_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(step))
    ctx.checkpoint(folder, step, {})


def _daemon(spec: UnrulySpec, ctx: RunContext) -> None:
    """A grandchild in a session of its own that holds nothing of ours and ignores SIGTERM; we may go on or hang."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 4096)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            temporary = Path(f"{spec.marker}.new")
            temporary.write_text(str(os.getpid()))
            temporary.rename(spec.marker)
            time.sleep(600)
        os._exit(0)
    os.wait()
    while not Path(spec.marker).exists():
        time.sleep(0.01)
    if spec.mode == "daemon_once":
        time.sleep(600)


def _scrambles(spec: UnrulySpec, ctx: RunContext) -> None:
    """Everything that a journal must not hold, and one good line behind it."""
    with (ctx.work_dir.parent / "events.jsonl").open("ab") as journal:
        journal.write(
            b"not json\n\n[1]\n\xff\xfe\xc0\n\0\0\0\n" + b"[" * 50_000 + b'\n{"kind": 3}\n{"kind": "eve\0nt"\n'
        )
        for _ in range(spec.amount):
            journal.write(b"x" * MEGABYTE)
        journal.write(b"\n")
    ctx.event("after_all", "A text with \0, \ud800 and an \x1b[31mescape.", number=10**400)


def _chatters(spec: UnrulySpec, ctx: RunContext) -> None:
    """To the log, as quick as a disk that takes 200 MB a second."""
    block = (b"y" * 1023 + b"\n") * 1024
    begun = time.monotonic()
    for _ in range(spec.amount):
        os.write(1, block)
        time.sleep(0.005)
    ctx.result(seconds=time.monotonic() - begun)


def _hogs(spec: UnrulySpec, ctx: RunContext) -> None:
    """Memory, until the kernel has had enough; at most ``amount`` megabytes."""
    held = [bytearray(os.urandom(4096) * (4 * MEGABYTE // 4096)) for _ in range(spec.amount // 4)]
    ctx.result(held=len(held))


def _cuda_oom(spec: UnrulySpec, ctx: RunContext) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")


def _cpu_oom(spec: UnrulySpec, ctx: RunContext) -> None:
    import torch

    torch.empty(1 << 50, dtype=torch.uint8)


def _fork_bomb(spec: UnrulySpec, ctx: RunContext) -> None:
    """Each process makes more of them: a thousand at most, so that it does no harm where nothing stops it."""
    leader = os.getpid()
    for _ in range(9):
        try:
            os.fork()
        except OSError:
            if os.getpid() == leader:
                raise
            time.sleep(0.05)
    # The leader may have had its nine before the others ran into the limit; it is the one that must.
    for _ in range(512 if os.getpid() == leader else 0):
        if os.fork() == 0:
            break
    time.sleep(600)


def _forks(spec: UnrulySpec, ctx: RunContext) -> None:
    """``amount`` children in our own group, as data loaders are, and none of them ends by itself."""
    for _ in range(spec.amount):
        if os.fork() == 0:
            break
    time.sleep(600)


def _leaks_files(spec: UnrulySpec, ctx: RunContext) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (spec.amount, spec.amount))
    held = [open(os.devnull) for _ in itertools.count()]  # noqa: SIM115
    ctx.result(held=len(held))


_MODES: dict[str, Callable[[UnrulySpec, RunContext], None]] = {
    "doomed": _doomed,
    "keeps_saving": _keeps_saving,
    "daemon": _daemon,
    "daemon_once": _daemon,
    "scrambles": _scrambles,
    "chatters": _chatters,
    "hogs": _hogs,
    "cuda_oom": _cuda_oom,
    "cpu_oom": _cpu_oom,
    "fork_bomb": _fork_bomb,
    "forks": _forks,
    "leaks_files": _leaks_files,
}
operation = Operation(UnrulySpec, run)
