"""What a serving engine is: a file in ``workers/engines`` each, which names how it is started and what it can do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.specs import DeploymentOptions


@dataclass(frozen=True)
class EngineLaunch:
    """What an engine needs to know to be started; made by us, never by a client."""

    python: Path
    model_dir: Path
    served_name: str
    socket: Path
    options: DeploymentOptions
    has_gpu: bool
    dtype: str
    cpu_threads: int = 2
    chat_template: Path | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    lora_modules: tuple[str, ...] = ()
    """What adapters may be on, by the last part of the name; empty = whatever the engine takes."""
    sleep_mode: bool = False
    """Whether the engine may be asked to sleep."""

    @property
    def probe(self) -> tuple[str, dict[str, Any]]:
        """The least that a ready engine does: a path, and the body that is posted there."""
        if self.options.task == "embed":
            return "/v1/embeddings", {"model": self.served_name, "input": "Hi"}
        return "/v1/completions", {"model": self.served_name, "prompt": "Hi", "max_tokens": 1}


@dataclass(frozen=True)
class Engine:
    """One serving engine: pure functions from a launch to an argv list and environment."""

    name: str
    argv: Callable[[EngineLaunch], list[str]]
    env: Callable[[EngineLaunch], dict[str, str]]
    health_path: str = "/health"
    hot_load: bool = False
    """Whether it loads adapters while it serves: ``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``."""
    comparable: bool = False
    """Whether its answers are to be held against transformers': texts and chats, greedy, with log-probabilities."""
    sleep_mode: bool = False
    """Whether it can give its GPU's memory back and stay: ``POST /sleep``, ``POST /wake_up``, ``GET /is_sleeping``."""
    own_python: bool = False
    """Whether it runs in the worker's own environment; else in the one that has vLLM."""
    parses: bool = False
    """Whether it has vLLM's parsers for calls of tools and for thoughts."""
    busy: tuple[str, ...] = ()
    """Series of ``/metrics`` whose sum is above zero while it has something to do."""

    quantizes: bool = False
    """Whether it can make fewer bits of a model's weights when it loads them."""
    embeds: bool = False
    """Whether it can make embeddings: ``POST /v1/embeddings`` in place of the routes that answer."""

    def cannot(self, options: DeploymentOptions) -> tuple[str, str] | None:
        """The name of an option that asks for something this engine does not have, and what that is."""
        if options.task == "embed" and not self.embeds:
            return "task", "makes no embeddings"
        named = {name: getattr(options, name) for name in ("tool_call_parser", "reasoning_parser")}
        for name, value in named.items():
            if value not in ("auto", "none") and not self.parses:
                return name, "has no parsers"
        return ("quantization", "loads weights as they are") if options.quantization and not self.quantizes else None
