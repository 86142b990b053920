"""vLLM's sleep mode: an engine that gives its GPU's memory back, keeps its weights in the host's, and wakes in place.

Whether the memory came back is not believed but read from the driver, which is asked by the GPU's index.
"""

import http.client
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.engines import EngineLaunch
from workers.replica import UnixConnection

FREE_PART = 0.9
"""So much of a GPU must be free while an engine sleeps on it: what jobs and other engines count on."""
FREED_SECONDS = 5.0
"""Until then the driver may still show what was let go."""
SLEEP_SECONDS = 120.0
WAKE_SECONDS = 120.0
HOST_RESERVE = 2 * 10**9
"""Bytes of the host's memory that a sleeping engine leaves to others."""
_STEP = 0.2
_QUERY = ("nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits")


class Refused(Exception):
    """The engine does not sleep, or does not wake; says why."""


@dataclass(frozen=True)
class GpuMemory:
    """What the driver says of one GPU, in 10⁹ bytes."""

    gpu: int
    used_gb: float
    total_gb: float

    @property
    def free_part(self) -> float:
        """0 to 1."""
        return 1 - self.used_gb / self.total_gb


ReadGpus = Callable[[str], Sequence[GpuMemory]]
"""By the numbers of GPUs, separated by commas; nothing where one of them cannot be read."""


def gpu_memory(gpus: str) -> Sequence[GpuMemory]:
    """Asks nvidia-smi."""
    try:
        listing = subprocess.run([*_QUERY, f"--id={gpus}"], capture_output=True, text=True, timeout=20, check=True)
        rows = [[float(value) for value in line.split(",")] for line in listing.stdout.splitlines()]
        found = [GpuMemory(int(index), used * 1.048576e-3, total * 1.048576e-3) for index, used, total in rows]
    except (OSError, subprocess.SubprocessError, ValueError):  # "[N/A]" where GPU and CPU share their memory
        return ()
    return found if len(found) == len(gpus.split(",")) and all(one.total_gb > 0 for one in found) else ()


def lie_down(launch: EngineLaunch, gpus: str, read: ReadGpus, available: Callable[[], int]) -> str:
    """Puts an engine that answers nobody to sleep and makes sure that its memory is free; a sentence with the figures.

    ``available``: bytes of the host's memory that are free. Raises Refused: then the engine has to end.
    """
    weights = sum(file.stat().st_size for file in launch.model_dir.iterdir() if file.is_file())
    if available() < weights + HOST_RESERVE:
        room = f"{available() / 1e9:.1f} GB of the host's memory are free, the weights take {weights / 1e9:.1f} GB"
        raise Refused(f"{room} and {HOST_RESERVE / 1e9:.0f} GB are left to others")
    before = read(gpus)
    # wait: should somebody ask after all, that is answered first.
    status, answer = _ask(launch.socket, "POST", "/sleep?level=1&mode=wait", SLEEP_SECONDS)
    if status != 200:
        raise Refused(f"the engine refused to sleep: {status} {answer}")
    until = time.monotonic() + FREED_SECONDS
    while not (after := read(gpus)) or any(one.free_part < FREE_PART for one in after):
        if time.monotonic() >= until:
            raise Refused(_kept(before, after))
        time.sleep(_STEP)
    return f"The engine sleeps; {_figures(before, after)}."


def wake_up(launch: EngineLaunch) -> None:
    """Wakes an engine that sleeps and proves that it answers. Raises Refused."""
    status, answer = _ask(launch.socket, "POST", "/wake_up", WAKE_SECONDS)
    if status != 200:
        raise Refused(f"the engine refused to wake: {status} {answer}")
    path, body = launch.probe
    status, answer = _ask(launch.socket, "POST", path, WAKE_SECONDS, body)
    if status != 200:
        raise Refused(f"the engine woke and does not answer: {status} {answer}")


def _kept(before: Sequence[GpuMemory], after: Sequence[GpuMemory]) -> str:
    if not after:
        return "nvidia-smi does not say how much memory is free"
    return f"the memory was not freed: {_figures(before, after)}; {1 - FREE_PART:.0%} may be used at most"


def _figures(before: Sequence[GpuMemory], after: Sequence[GpuMemory]) -> str:
    was = {one.gpu: f"{one.used_gb:.1f} GB" for one in before}
    return ", ".join(
        f"GPU {one.gpu} used {was.get(one.gpu, 'an unknown part')} before and {one.used_gb:.1f} GB "
        f"of {one.total_gb:.1f} GB after"
        for one in after
    )


def _ask(socket: Path, method: str, path: str, timeout: float, body: Any = None) -> tuple[int, str]:
    """Status and the answer's beginning. Raises Refused when none comes."""
    connection = UnixConnection(str(socket), timeout)
    try:
        connection.request(method, path, json.dumps(body or {}), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")[:300]
    except (OSError, http.client.HTTPException) as error:
        raise Refused(f"the engine does not answer to {path.partition('?')[0]}: {error!r}") from error
    finally:
        connection.close()
