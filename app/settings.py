"""Settings: the only reader of the environment (``TUNESMITH_*``)."""

import hashlib
import os
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PROJECT_ROOT = Path(__file__).resolve().parent.parent
SLOT_CLASSES = ("train", "serve", "light", "gpu")


def _default_data_dir() -> Path:
    """``./data`` of the checkout, wherever in it one stands; the user's data folder for an installed wheel."""
    if (PROJECT_ROOT / "pyproject.toml").is_file():
        return PROJECT_ROOT / "data"
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "tunesmith"


def _interpreter(named: Path | None, environment: str) -> Path | None:
    path = named or PROJECT_ROOT / environment / "bin" / "python"
    return path if path.is_file() else None


class BadRunDir(RuntimeError):
    """The folder for sockets cannot be used; the message says what to set."""


class Settings(BaseSettings):
    """Everything that an operator can set. Each field is ``TUNESMITH_<NAME>`` in the environment."""

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="ignore", frozen=True, env_ignore_empty=True)

    data_dir: Path = Field(default_factory=_default_data_dir, description="Where everything lives.")
    run_dir: Path | None = Field(None, description="Sockets; default a private folder for this data directory.")
    database_url: str | None = Field(None, description="Default SQLite in DATA_DIR; postgresql+psycopg://… too.")
    broker_url: str | None = Field(None, description="Default an embedded Valkey; redis://… too.")
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port that the API listens on.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Host headers that are answered, separated by commas; default the bound address and localhost."
    )
    url: str | None = Field(None, description="For the CLI: the service to talk to.")
    api_key: str | None = Field(None, repr=False, description="For the CLI: the key to use.")
    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders, separated by ':', that a local model may come from."
    )
    allowed_hub_repos: Annotated[tuple[str, ...], NoDecode] = Field(
        ("*",), description="Patterns of hub repositories that may be used, separated by commas."
    )
    serve_python: Path | None = Field(None, description="Interpreter that has vLLM; default .venv-serve's.")
    quantize_python: Path | None = Field(
        None, description="Interpreter that has llm-compressor; default .venv-quantize's."
    )
    slots: str | None = Field(
        None, description="Default: each GPU one, light:1; without a GPU train:1,serve:2,light:1."
    )
    heartbeat_seconds: float = Field(5.0, gt=0, description="How often a worker says that a job is alive.")
    lease_seconds: float = Field(30.0, gt=0, description="Silence after which a job is given to another worker.")
    grace_seconds: float = Field(120.0, gt=0, description="Time that a run gets to save itself after SIGTERM.")
    wake_seconds: float = Field(
        120.0, ge=0, le=3600, description="How long a request waits for a model that is being woken or loaded."
    )
    max_upload_bytes: int = Field(2 << 30, gt=0, description="Largest file that can be uploaded.")
    max_body_bytes: int = Field(1 << 20, gt=0, description="Largest JSON or YAML body.")
    min_free_bytes: int = Field(1 << 30, ge=0, description="Below this much free disk, new work is refused with 507.")
    disk_reserve_bytes: int | None = Field(
        None, ge=0, description="Below this much free disk nothing starts; default 5 % of it, 2 GB at most."
    )
    ballast_bytes: int = Field(64 << 20, ge=0, description="A file given up so that a full disk can still be said.")
    checkpoint_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="Days from a run's end until all checkpoints but its best go; default never.",
    )
    share_gpu: int = Field(1, ge=1, le=16, description="Jobs that may share a GPU when their estimates fit.")
    reserved_slots: int = Field(0, ge=0, le=1024, description="GPU slots of each worker that only engines may take.")
    warm_runners: int = Field(
        1, ge=0, le=64, description="Runners that wait with their libraries imported, 350 MB each; 0 = none."
    )
    preempt_after_seconds: float = Field(
        600.0, ge=0, description="A preemptible run is left alone for so long before another may take its slot."
    )
    yield_idle_seconds: float = Field(
        60.0, ge=0, description="How long an engine must have been idle before a job without a slot may have its GPU."
    )
    key_requests_per_minute: int | None = Field(
        None, ge=1, description="Requests to models that a key may make a minute; default no limit."
    )
    key_tokens_per_minute: int | None = Field(
        None, ge=1, description="Tokens, read and written, that a key may use a minute; default no limit."
    )
    key_concurrent_requests: int | None = Field(
        None, ge=1, description="Requests to models that a key may have open at once; default no limit."
    )
    eval_tasks: Path | None = Field(
        None, description="Folder with suites of your own for evaluations (lm-evaluation-harness); its Python is run."
    )
    plugin_packages: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="More packages with recipes, merges, operations or engines, separated by commas."
    )
    bootstrap_key_file: Path | None = Field(
        None, description="Where the first key is written; default DATA_DIR/api_key."
    )

    @field_validator("allowed_hosts", "allowed_hub_repos", "plugin_packages", mode="before")
    @classmethod
    def _commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("model_roots", mode="before")
    @classmethod
    def _colons(cls, value: object) -> object:
        return tuple(Path(part) for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("slots")
    @classmethod
    def _check_slots(cls, value: str | None) -> str | None:
        if value is not None:
            parse_slots(value)
        return value

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().resolve())
        object.__setattr__(self, "model_roots", tuple(root.expanduser().resolve() for root in self.model_roots))
        return self

    @cached_property
    def instance(self) -> str:
        """Eight hex digits that tell this installation's processes from another's."""
        return hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:8]

    @property
    def sockets(self) -> Path:
        """RUN_DIR, made 0700 whenever it is not there: what cleans up temporary folders may have taken it away.

        A unix socket's path holds 107 bytes, so it is short.
        """
        base = os.environ.get("XDG_RUNTIME_DIR")
        default = Path(base if base and os.access(base, os.W_OK) else tempfile.gettempdir())
        path = (self.run_dir or default / f"ts-{os.getuid()}-{self.instance}").absolute()
        if len(os.fsencode(path)) + 17 > 107:
            raise BadRunDir(f"{path} is too long for unix sockets; set TUNESMITH_RUN_DIR to a shorter folder")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_uid != os.getuid():
                raise BadRunDir(f"{path} belongs to another user; set TUNESMITH_RUN_DIR")
            path.chmod(0o700)
        except OSError as error:
            raise BadRunDir(f"{path} cannot be used ({error.strerror}); set TUNESMITH_RUN_DIR") from error
        return path

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data_dir / 'tunesmith.db'}"

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that hold plugs: ours, then the operator's."""
        ours = ("recipes", "graders", "operations", "trackers", "merges", "engines")
        return (*(f"workers.{name}" for name in ours), *self.plugin_packages)

    @property
    def engine_python(self) -> Path | None:
        """The interpreter that has vLLM, or None."""
        return _interpreter(self.serve_python, ".venv-serve")

    @property
    def quantizer_python(self) -> Path | None:
        """The interpreter that has llm-compressor, or None."""
        return _interpreter(self.quantize_python, ".venv-quantize")

    @property
    def base_url(self) -> str:
        """Where this service is reached from this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def hosts(self) -> list[str]:
        """Host headers that are answered."""
        return list(self.allowed_hosts) or sorted({"127.0.0.1", "localhost", "[::1]", "testserver", self.host})


def what_is_wrong(error: ValidationError) -> str:
    """Each variable that cannot be used, and why; what it was set to is not repeated, it may be a secret."""
    found = []
    for problem in error.errors(include_url=False, include_input=False):
        name = "_".join(str(part) for part in problem["loc"]).upper()
        found.append(f"TUNESMITH_{name}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(found)


def parse_slots(text: str) -> list[tuple[str, str]]:
    """``train:1,serve:2`` as ``[("train-0", "train"), ("serve-0", "serve"), ("serve-1", "serve")]``."""
    slots: list[tuple[str, str]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+):(\d{1,3})\s*", part)
        if not match or match[1] not in SLOT_CLASSES:
            raise ValueError(f"{part.strip()!r} is not a slot; write e.g. train:1,serve:2,light:1")
        slots += [(f"{match[1]}-{index}", match[1]) for index in range(int(match[2]))]
    if not slots:
        raise ValueError("no slots")
    return slots
