"""The parent of a run on several GPUs: starts torchrun, tells every rank to stop, and ends as rank 0 did.

Started as ``python -I -m workers.ranks <attempt dir>`` in the runner's place. torchrun starts one runner for each GPU,
wrapped by this module (``--rank``) so that its exit status lies in ``ranks/<rank>.exit``: torchrun itself
knows only 0 and 1. It is told of 0 and of 75 as 0, because it ends the others 30 s after the first failure, and ranks
that save themselves take the time they need.

SIGTERM goes to the ranks, never to torchrun. A rank that fails or dies ends the others within ``ENDS_SECONDS``. When
one died without a word, what rank 0 says of it afterwards (a broken connection) is not the reason, and is dropped.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from app import processes
from app.states import EXIT_CHECKPOINTED, EXIT_DONE, EXIT_LIFELINE_CUT
from workers import runner
from workers.context import ATTEMPT, RANKS, RESULT

ENDS_SECONDS = 10.0
_POLL = 0.1
_FORWARD_EVERY = 1.0
_WELL = (EXIT_DONE, EXIT_CHECKPOINTED)


@dataclass
class Ranks:
    """The ranks of one attempt, as their files and ``/proc`` show them."""

    folder: Path
    token: str
    stopping: bool = False
    failed: tuple[int, int | None] | None = None
    """The rank that ended badly first, with its status; None for one that died without a word."""
    _failed_at: float = 0.0
    _forwarded_at: float = field(default=float("-inf"))

    def run(self, count: int) -> int:
        """Until torchrun has ended; returns the exit status."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        (self.folder / RANKS).mkdir(exist_ok=True)
        torchrun = self._start(count)
        if processes.LIFE_FD in os.environ:
            processes.watch_lifeline(int(os.environ[processes.LIFE_FD]), self._cut)
        while torchrun.poll() is None:
            time.sleep(_POLL)
            self._look()
        self._look()
        while processes.kill_holders(self.token):  # what a rank may have left
            time.sleep(_POLL)
        return self._status()

    def _start(self, count: int) -> "subprocess.Popen[bytes]":
        python = [sys.executable, "-I", "-m"]
        launch = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}", "--no-python"]
        environment = {name: value for name, value in os.environ.items() if name != processes.LIFE_FD}
        return subprocess.Popen(
            [*python, "torch.distributed.run", *launch, *python, "workers.ranks", "--rank", str(self.folder)],
            stdin=subprocess.DEVNULL,
            env=environment,
            # In a group of its own: a SIGTERM for ours would make it end the ranks after 30 s.
            process_group=0,
            preexec_fn=processes.die_with_parent,
        )

    def _look(self) -> None:
        now = time.monotonic()
        pids = _numbers(self.folder, "pid")  # before who lives, and exits after, so that nobody seems to be missing
        alive = set(processes.processes_with_token(self.token))
        if self.stopping and now - self._forwarded_at >= _FORWARD_EVERY:
            # Again and again: a rank that still imports its libraries does not listen yet.
            self._forwarded_at = now
            for pid in set(pids.values()) & alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        if self.failed is None:
            self.failed = _first_failure(pids, alive, _numbers(self.folder, "exit"))
            self._failed_at = now
        elif now - self._failed_at > ENDS_SECONDS:
            processes.kill_holders(self.token)

    def _status(self) -> int:
        exits = _numbers(self.folder, "exit")
        if exits.get(0) in _WELL and (self.failed is None or exits[0] == EXIT_DONE):
            return exits[0]
        if self.failed is None:
            return exits.get(0, 1)
        rank, status = self.failed
        result = self.folder / RESULT
        if status is None:
            print(f"rank {rank} ended without a word", file=sys.stderr, flush=True)
            result.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)  # the parent of a rank that was killed ends the same way
        elif rank != 0:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / RANKS / f"{rank}.json").replace(result)
        return status or 1

    def _cut(self) -> None:
        """The supervisor is gone: nothing computes on."""
        while processes.kill_holders(self.token):
            time.sleep(_POLL)
        os._exit(EXIT_LIFELINE_CUT)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True


def _first_failure(pids: Mapping[int, int], alive: set[int], exits: Mapping[int, int]) -> tuple[int, int | None] | None:
    """Who ended badly. Of several within one look those without a word come first, then those that know a reason."""
    failures: list[tuple[int, int | None]] = [(rank, None) for rank, pid in pids.items() if pid not in alive]
    failures = [(rank, None) for rank, _ in failures if rank not in exits]
    if not failures:
        bad = [(rank, status) for rank, status in exits.items() if status not in _WELL]
        failures = [*sorted(bad, key=lambda failure: (failure[1] == 1, failure[0]))]
    return failures[0] if failures else None


def _numbers(folder: Path, kind: str) -> dict[int, int]:
    found = {}
    for path in sorted((folder / RANKS).glob(f"*.{kind}")):
        with contextlib.suppress(ValueError, OSError):
            found[int(path.stem)] = int(path.read_text())
    return found


def _rank(folder: Path) -> int:
    """One rank: the runner, with its pid and its exit status in files."""
    # The parent dies at once with its worker, and torchrun with the parent: nobody would be left to end us.
    processes.die_with_parent()
    if os.getppid() == 1:
        return EXIT_LIFELINE_CUT
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until the runner listens; the parent says it again
    files = folder / RANKS
    name = os.environ["RANK"]
    _write(files / f"{name}.pid", os.getpid())
    sys.argv = [sys.argv[0], str(folder)]
    status = runner.main()
    _write(files / f"{name}.exit", status)
    return EXIT_DONE if status in _WELL else status


def _write(path: Path, number: int) -> None:
    """Never seen half written."""
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(str(number))
    new.replace(path)


def main(argv: list[str]) -> int:
    """The parent, or with ``--rank`` one of its ranks."""
    if argv[1] == "--rank":
        return _rank(Path(argv[2]))
    processes.harden()
    processes.become_subreaper()
    folder = Path(argv[1])
    attempt = json.loads((folder / ATTEMPT).read_bytes())
    return Ranks(folder, os.environ[processes.TOKEN]).run(attempt["gpus"])


if __name__ == "__main__":
    ended = main(sys.argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)
