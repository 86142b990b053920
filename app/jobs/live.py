"""Chatting with a run in training: where it listens, and by which model name it is asked for."""

from pathlib import Path

from app.settings import Settings

SUFFIX = ":ckpt-live"


def live_socket(settings: Settings, job_id: str) -> Path:
    """A training run answers here between its steps; there only while it trains."""
    return settings.sockets / f"{job_id[-10:]}.l"
