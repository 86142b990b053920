"""The states of jobs and deployments, with the moves that are allowed between them (stdlib only)."""

import errno
from enum import StrEnum


class JobState(StrEnum):
    """What the database stores; ``paused`` is shown for a queued job that a user holds."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Final: the database refuses to leave it."""
        return self in TERMINAL


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, *TERMINAL}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class Desired(StrEnum):
    """What the user wants of a deployment."""

    RUNNING = "running"
    SLEEPING = "sleeping"
    STOPPED = "stopped"


class DeploymentState(StrEnum):
    """What a deployment is doing."""

    QUEUED = "queued"
    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    SLEEPING = "sleeping"
    STOPPED = "stopped"
    FAILED = "failed"


DEPLOYMENT_MOVES: dict[DeploymentState, frozenset[DeploymentState]] = {
    DeploymentState.QUEUED: frozenset({DeploymentState.STARTING, DeploymentState.STOPPED, DeploymentState.FAILED}),
    DeploymentState.STARTING: frozenset(
        {DeploymentState.READY, DeploymentState.QUEUED, DeploymentState.STOPPED, DeploymentState.FAILED}
    ),
    DeploymentState.READY: frozenset(
        {
            DeploymentState.UNHEALTHY,
            DeploymentState.SLEEPING,
            DeploymentState.QUEUED,
            DeploymentState.STOPPED,
            DeploymentState.FAILED,
        }
    ),
    DeploymentState.UNHEALTHY: frozenset(
        {DeploymentState.READY, DeploymentState.QUEUED, DeploymentState.STOPPED, DeploymentState.FAILED}
    ),
    DeploymentState.SLEEPING: frozenset({DeploymentState.QUEUED, DeploymentState.STOPPED, DeploymentState.FAILED}),
    DeploymentState.STOPPED: frozenset(),
    DeploymentState.FAILED: frozenset(),
}

DEPLOYMENT_LIVE = frozenset(state for state, moves in DEPLOYMENT_MOVES.items() if moves)
"""Reachable by its name, or about to be."""


WAKING = "waking"
"""Phase of a replica's job, from the request that woke it until its engine answers."""


class AdapterState(StrEnum):
    """How far the engine of a deployment is with one of its adapters."""

    WAITING = "waiting"
    READY = "ready"
    EVICTED = "evicted"
    """Put away for others that were used more recently; the next request brings it back."""
    FAILED = "failed"


# How a runner ends when it leaves no result.json, and what an attempt's exit status says (sysexits(3) where it fits).
DISK_FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})
EXIT_DONE = 0
EXIT_BAD_DATA = 65
EXIT_NON_FINITE = 66
EXIT_UNREACHABLE = 68
EXIT_OUT_OF_MEMORY = 69
EXIT_LIFELINE_CUT = 70
EXIT_DISK_FULL = 74
EXIT_CHECKPOINTED = 75
EXIT_GATED = 77
EXIT_BAD_SPEC = 78
