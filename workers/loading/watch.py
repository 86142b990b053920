"""What a run has seen of itself: losses, tokens, time; across its attempts where a checkpoint can carry it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.loading.cadence import Cadence
from workers.loading.devices import memory_now
from workers.loading.health import Health, improved
from workers.loading.stopping import Stopping, read_state, write_state


@dataclass
class Watch:
    """Shared between the trainer, its reporter and the recipe."""

    step_loss: float = 0.0
    """Sum over the micro-batches of the running step."""
    step_tokens: int = 0
    """Of the running step, in this process."""
    grad_norm: float | None = None
    """Of the running step, before clipping; None where it is not known."""
    losses: list[float] = field(default_factory=list)
    """Of the steps of this attempt."""
    tokens: int = 0
    """Of this attempt, padding not counted, over all processes."""
    tokens_before: int = 0
    """Of the attempts before."""
    started: float = 0.0
    seconds: float = 0.0
    first_step: int = 0
    """Where this attempt began."""
    stopped: bool = False
    """By a request; the run is to be taken up again."""
    trend: str | None = "loss"
    """The logged number that should fall over the run, or rise; None = none should."""
    rises: bool = False
    # Set by the reporter, or by a loop of one's own.
    cadence: Cadence | None = None
    health: Health | None = None
    stopping: Stopping | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over this attempt, padding not counted."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def tokens_seen(self) -> int:
        """Over all attempts."""
        return self.tokens_before + self.tokens

    def begin(self, step: int) -> None:
        """Training begins, after ``step`` steps of earlier attempts."""
        self.first_step, self.started = step, time.monotonic()
        if self.cadence is not None:
            self.cadence.start()

    def stepped(self, step: int, total: int) -> float | None:
        """A step is done: takes the time. Returns how many seconds are left; None when that is not known."""
        self.seconds = time.monotonic() - self.started
        done = step - self.first_step
        left = self.seconds / done * (total - step) if done else None
        budget = self.stopping.seconds_left() if self.stopping else None
        return left if budget is None or left is None else min(left, budget)

    def numbers(self, step: int, total: int) -> dict[str, float]:
        """What is logged of every step beside the algorithm's own numbers; docs/metrics.md names them."""
        left = self.stepped(step, total)
        found = {
            "tokens_seen": float(self.tokens_seen),
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.seconds / (step - self.first_step) if step > self.first_step else None,
            "memory_bytes": float(memory_now()),
            "eta_seconds": left,
        }
        return {name: value for name, value in found.items() if value is not None}

    def falls(self) -> bool | None:
        """Whether the loss of this attempt fell; None for one too short to tell."""
        return improved(self.losses)

    def save(self, folder: Path, step: int, *, ended: bool) -> None:
        """Into a checkpoint that is being written; ``ended``: no step comes after it."""
        assert self.stopping is not None
        self.stopping.saved(step, folder)
        state = {"ended": ended, "tokens": self.tokens_seen, "stopping": self.stopping.state(folder)}
        write_state(folder, state)

    def restore(self, folder: Path, *, anew: bool = False) -> Mapping[str, Any]:
        """Out of the checkpoint that the run goes on from; ``anew`` when it is another job's, which had its own end."""
        state = read_state(folder)
        self.tokens_before = int(state.get("tokens", 0))
        if self.stopping is not None and "stopping" in state and not anew:
            self.stopping.restore(state["stopping"], folder)
        return state
