"""Who makes a request, and how much of it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class KeyLimits:
    """What a key may ask of models. None: as the settings have it; 0: without a limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    def over(self, defaults: "KeyLimits") -> "KeyLimits":
        """With the gaps filled from ``defaults``; None then means: without a limit."""

        def pick(own: int | None, default: int | None) -> int | None:
            return (default if own is None else own) or None

        return KeyLimits(
            pick(self.requests_per_minute, defaults.requests_per_minute),
            pick(self.tokens_per_minute, defaults.tokens_per_minute),
            pick(self.concurrent_requests, defaults.concurrent_requests),
        )


@dataclass(frozen=True)
class Caller:
    """A key's project, id, scopes and limits."""

    project_id: str
    key_id: str
    scopes: frozenset[str]
    limits: KeyLimits = field(default_factory=KeyLimits)
