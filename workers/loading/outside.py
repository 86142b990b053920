"""A program in another interpreter, for a library that cannot live beside ours: lines of JSON come back."""

import contextlib
import json
import os
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app.errors import Code, RunError

_TICK = 5.0
_TAIL = 30


def run_outside(
    python: Path,
    script: Path,
    job: Mapping[str, Any],
    folder: Path,
    *,
    told: Callable[[Mapping[str, Any]], None],
    tick: Callable[[], None],
) -> None:
    """Runs ``script`` with ``job`` as a file in ``folder``; ``told`` gets each line.

    It stays in our process group and carries the attempt's token, so it ends with us. Raises RunError run_failed with
    the end of what it said when it fails, out_of_memory where memory was the reason.
    """
    described = folder / "job.json"
    described.write_text(json.dumps(job))
    last: deque[str] = deque(maxlen=_TAIL)
    with subprocess.Popen(
        [str(python), "-I", str(script), str(described)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as process:
        readers = [
            threading.Thread(target=_hear, args=(process.stdout, told, last), daemon=True),
            threading.Thread(target=_keep, args=(process.stderr, last), daemon=True),
        ]
        try:
            for reader in readers:
                reader.start()
            status = None
            while status is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(_TICK)
                tick()
        finally:
            process.kill()
            for reader in readers:
                reader.join(10)
    if status:
        said = "".join(last).strip()
        starved = "OutOfMemory" in said or "can't allocate memory" in said or status == -9
        raise RunError(
            Code.OUT_OF_MEMORY if starved else Code.RUN_FAILED,
            f"{script.stem} ended with status {status}: {said[-1500:]}",
            hint="GET /jobs/{id}/logs shows all that it said.",
        )


def _hear(stream: Any, told: Callable[[Mapping[str, Any]], None], last: deque[str]) -> None:
    for line in stream:
        try:
            told(json.loads(line))
        except ValueError:
            last.append(line)


def _keep(stream: Any, last: deque[str]) -> None:
    for line in stream:
        print(line, end="", flush=True)  # into the attempt's log
        last.append(line)
