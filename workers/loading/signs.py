"""Signs that a policy games its judge: it runs away from where it began, or its answers no longer end."""

from workers.loading.health import Health

KL_RUNAWAY = 30.0
"""Nats per answer, from which on a policy has usually left what its judge knows."""
_HELD = 0.5
_EXPLODED = 0.9


class Signs:
    """Told of every step; each sign is a warning once, in the history and in the job's health."""

    def __init__(self, health: Health, room: str) -> None:
        """``room``: the field that says how long answers may be."""
        self._health = health
        self._room = room
        self._first: float | None = None

    def began(self, unended: float) -> None:
        """Share of the answers that did not end in time, in the run's first step, an earlier attempt's too."""
        self._first = unended

    def step(self, step: int, kl: float | None, unended: float) -> None:
        """``kl``: nats per answer from where the policy began; None where that is not measured."""
        if self._first is None:
            self._first = unended
        if kl is not None and kl > KL_RUNAWAY:
            message = f"step {step}: the policy is {kl:.0f} nats an answer from where it began"
            self._health.warn("kl_runaway", message, check="kl", step=step, kl=kl)
        if unended > _EXPLODED and self._first < _HELD:
            message = f"step {step}: answers that used to end now run to {self._room}"
            self._health.warn("length_explosion", message, check="length", step=step, unended=unended)
