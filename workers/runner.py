"""The child that computes: one per attempt, used once; the only process that imports torch.

Started as ``python -I -m workers.runner <attempt dir>``. Reads ``attempt.json``, runs the plug, leaves ``result.json``.
"""

import errno
import json
import logging
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app import states
from app.catalog import Interrupted, Recipe, discover
from app.errors import Code, RunError
from app.processes import LIFE_FD, harden, watch_lifeline
from app.storage import write_private
from workers.context import ATTEMPT, JobContext, result_path

_EXITS = {
    Code.BAD_DATA: states.EXIT_BAD_DATA,
    Code.NON_FINITE_LOSS: states.EXIT_NON_FINITE,
    Code.OUT_OF_MEMORY: states.EXIT_OUT_OF_MEMORY,
    Code.DISK_FULL: states.EXIT_DISK_FULL,
    Code.GATED_MODEL: states.EXIT_GATED,
}


def main() -> int:
    """Runs one attempt; the exit status says how it went (``app.states``)."""
    harden()
    if LIFE_FD in os.environ:
        watch_lifeline(int(os.environ[LIFE_FD]), _parent_died)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    folder = Path(sys.argv[1])
    attempt = json.loads((folder / ATTEMPT).read_bytes())
    catalog = discover(attempt["packages"])
    context = JobContext(folder, attempt, catalog)
    signal.signal(signal.SIGTERM, lambda *_: context.request_stop())
    try:
        spec_class = catalog.spec_class(attempt["type"], attempt["algorithm"])
        if spec_class is None:
            raise RunError(Code.BAD_SPEC, f"this worker does not know {attempt['algorithm'] or attempt['type']}")
        spec = spec_class.model_validate(attempt["spec"])
        plug = (
            catalog.recipes[attempt["algorithm"]] if attempt["type"] == "train" else catalog.operations[attempt["type"]]
        )
        if attempt.get("stage") == "prepare":
            assert isinstance(plug, Recipe)
            assert plug.prepare is not None
            plug.prepare(spec, context)
        else:
            plug.run(spec, context)
        context.settle()
    except Interrupted:
        context.settle()
        return states.EXIT_CHECKPOINTED
    except RunError as error:
        return _failed(folder, error, context)
    except Exception as error:
        traceback.print_exc()
        return _failed(folder, _as_run_error(error), context)
    _write(
        folder, {"status": "ok", "result": context.values, "outputs": [asdict(output) for output in context.outputs]}
    )
    return states.EXIT_DONE


def _parent_died() -> None:
    os.killpg(0, signal.SIGKILL)
    os._exit(states.EXIT_LIFELINE_CUT)


def _as_run_error(error: Exception) -> RunError:
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return RunError(
            Code.OUT_OF_MEMORY,
            f"out of memory: {error}",
            hint="Halve per_device_train_batch_size and double gradient_accumulation_steps, use QLoRA, or lower r.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(Code.DISK_FULL, "the disk is full", hint="Free space in the data directory.")
    return RunError(
        Code.RUN_FAILED, f"{type(error).__name__}: {error}"[:2000], hint="GET /jobs/{id}/logs shows where it happened."
    )


def _failed(folder: Path, error: RunError, context: JobContext) -> int:
    detail = {"code": error.code, "message": error.message, "hint": error.hint, "param": error.param}
    print(f"{error.code}: {error.message}", file=sys.stderr, flush=True)
    _write(folder, {"status": "error", "error": detail, "result": context.values})
    return _EXITS.get(error.code, 1)


def _write(folder: Path, result: dict[str, Any]) -> None:
    write_private(result_path(folder), json.dumps(result, default=str).encode())


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Library threads that hang at interpreter exit must not keep a finished attempt alive.
    os._exit(status)
