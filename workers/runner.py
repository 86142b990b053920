"""The child that computes: one per attempt, used once; the only process that imports torch.

Started as ``python -I -m workers.runner <attempt dir>``, or with ``--warm`` to be given one later. Reads
``attempt.json``, runs the plug, leaves ``result.json``.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app import disk, states
from app.catalog import Interrupted, Recipe
from app.discovery import discover
from app.errors import Code, RunError
from app.processes import LIFE_FD, harden, watch_lifeline
from app.specs import TrainSpec
from app.storage import write_private
from workers import ladder
from workers.context import ATTEMPT, JobContext, result_path
from workers.isolation import Network, leave_network
from workers.warm import WARM, await_attempt

# Where torch has no exception of its own for it: on the CPU, and below its allocator.
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")
_ROOM_TO_WRITE = 1 << 20
_EXITS = {
    Code.BAD_DATA: states.EXIT_BAD_DATA,
    Code.NON_FINITE_LOSS: states.EXIT_NON_FINITE,
    Code.OUT_OF_MEMORY: states.EXIT_OUT_OF_MEMORY,
    Code.DISK_FULL: states.EXIT_DISK_FULL,
    Code.GATED_MODEL: states.EXIT_GATED,
    Code.HUB_REFUSED: states.EXIT_GATED,
    Code.MODEL_UNREACHABLE: states.EXIT_UNREACHABLE,
}


def main() -> int:
    """Runs one attempt; the exit status says how it went (``app.states``)."""
    harden()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    folder = await_attempt() if sys.argv[1] == WARM else Path(sys.argv[1])
    attempt = json.loads((folder / ATTEMPT).read_bytes())
    network = leave_network() if attempt.get("offline") else None  # before the first thread
    if LIFE_FD in os.environ:
        watch_lifeline(int(os.environ[LIFE_FD]), _parent_died)
    try:
        return _run(folder, attempt, network)
    except OSError as error:
        if not disk.is_full(error):
            raise
        return states.EXIT_DISK_FULL  # there was not even room to say so


def _run(folder: Path, attempt: dict[str, Any], network: Network | None) -> int:
    catalog = discover(attempt["packages"])
    context = JobContext(folder, attempt, catalog)
    if network is not None:
        context.result(network=network)
    signal.signal(signal.SIGTERM, lambda *_: context.request_stop())
    spec: Any = None
    try:
        spec_class = catalog.spec_class(attempt["type"], attempt["algorithm"])
        if spec_class is None:
            raise RunError(Code.BAD_SPEC, f"this worker does not know {attempt['algorithm'] or attempt['type']}")
        spec = spec_class.model_validate(attempt["spec"])
        plug = (
            catalog.recipes[attempt["algorithm"]] if attempt["type"] == "train" else catalog.operations[attempt["type"]]
        )
        try:
            if attempt.get("stage") == "prepare":
                assert isinstance(plug, Recipe)
                assert plug.prepare is not None
                plug.prepare(spec, context)
            else:
                plug.run(spec, context)
        except Interrupted:
            context.settle()
            return states.EXIT_CHECKPOINTED
        context.settle()
        outputs = [asdict(output) for output in context.outputs]
        _write(folder, {"status": "ok", "result": context.values, "outputs": outputs})
        context.drop_kept()
    except RunError as error:
        return _failed(folder, error, context)
    except Exception as error:
        traceback.print_exc()
        told = _as_run_error(error, folder)
        if told.code is not Code.OUT_OF_MEMORY or not isinstance(spec, TrainSpec):
            return _failed(folder, told, context)
        rung = ladder.next_rung(spec)
        if rung is None:
            base = (attempt["inputs"].get("model.model_name_or_path") or {}).get("path")
            told = RunError(told.code, told.message, hint=ladder.advice(spec, base and Path(base), ladder.room_gb()))
        return _failed(folder, told, context, rung)
    return states.EXIT_DONE


def _parent_died() -> None:
    os.killpg(0, signal.SIGKILL)
    os._exit(states.EXIT_LIFELINE_CUT)


def _as_run_error(error: Exception, folder: Path) -> RunError:
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(text in str(error) for text in _NO_MEMORY):
        return RunError(
            Code.OUT_OF_MEMORY,
            f"out of memory: {error}"[:2000],
            hint="Use a machine with more memory, or run fewer jobs beside it.",
        )
    # Libraries have words of their own for it, or none. What fails on a full disk is tried again when there is room.
    if disk.is_full(error) or disk.free_bytes(folder) < _ROOM_TO_WRITE:
        return RunError(Code.DISK_FULL, "the disk is full", hint="Free space in the data directory.")
    return RunError(
        Code.RUN_FAILED, f"{type(error).__name__}: {error}"[:2000], hint="GET /jobs/{id}/logs shows where it happened."
    )


def _failed(folder: Path, error: RunError, context: JobContext, rung: ladder.Rung | None = None) -> int:
    detail = {"code": error.code, "message": error.message, "hint": error.hint, "param": error.param}
    print(f"{error.code}: {error.message}", file=sys.stderr, flush=True)
    if error.code not in (Code.DISK_FULL, Code.OUT_OF_MEMORY) and not error.transient:
        context.drop_kept()
    left: dict[str, Any] = {"status": "error", "error": detail, "result": context.values}
    if error.transient:
        left["transient"] = True
    if rung is not None:
        left["adjust"] = rung._asdict()
    _write(folder, left)
    return _EXITS.get(error.code, 1)


def _write(folder: Path, result: dict[str, Any]) -> None:
    write_private(result_path(folder), json.dumps(result, default=str).encode())


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Library threads that hang at interpreter exit must not keep a finished attempt alive.
    os._exit(status)
