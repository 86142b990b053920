"""A RunContext on a temporary folder: records what a run says, answers from a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from app.catalog import ArtifactKind, Catalog, HealthStatus, Served


class RecordingContext:
    """``inputs`` maps reference fields to paths; what the run reports lies in the lists."""

    def __init__(
        self,
        root: Path,
        inputs: Mapping[str, Path] | None = None,
        info: Mapping[str, Mapping[str, Any]] | None = None,
        catalog: Catalog | None = None,
    ) -> None:
        self.job_id = "job-test"
        self.work_dir = root / "work"
        self.checkpoint_dir = root / "checkpoints"
        self.kept_dir = root / "kept"
        self.catalog = catalog or Catalog()
        self.prepared_dir: Path | None = None
        self.task_folder: Path | None = None
        self.resume_from: Path | None = None
        self.live_socket: Path | None = None
        self.ways: dict[str, Served] = {}
        self.interpreters: dict[str, Path] = {}
        self.stop_after: int | None = None
        self.events: list[dict[str, Any]] = []
        self.phases: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.checkpoints: list[tuple[Path, int]] = []
        self.announced: list[dict[str, float]] = []
        self.scores: list[float | None] = []
        self.checks: dict[str, dict[str, Any]] = {}
        self.spent = 0.0
        self.estimate: float | None = None
        self.resolutions: dict[str, Any] = {}
        self.outputs: list[tuple[str, Path, dict[str, Any]]] = []
        self.results: dict[str, Any] = {}
        self.hashed: dict[Path, str] = {}
        self._root = root
        self._inputs = dict(inputs or {})
        self._info = dict(info or {})
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.checkpoint_dir.mkdir(exist_ok=True)
        self.kept_dir.mkdir(exist_ok=True)

    def input(self, field: str) -> Path:
        return self._inputs[field]

    def input_info(self, field: str) -> Mapping[str, Any]:
        return self._info.get(field, {})

    def interpreter(self, name: str) -> Path:
        return self.interpreters[name]

    def served(self, field: Literal["model", "baseline"]) -> Served | str:
        return self.ways[field]

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def event(self, code: str, message: str, *, level: Literal["info", "warn", "error"] = "info", **data: Any) -> None:
        self.events.append({"code": code, "message": message, "level": level, **data})

    def health(self, check: str, status: HealthStatus, message: str | None = None, **facts: Any) -> None:
        self.checks[check] = {"status": status, "message": message, **facts}

    def progress(self, step: int, total_steps: int, **values: float | None) -> None:
        self.steps.append({"step": step, "total": total_steps, **values})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def checkpoint(
        self,
        path: Path,
        step: int,
        metrics: Mapping[str, float],
        *,
        keep: int | None = None,
        score: float | None = None,
    ) -> None:
        assert any(path.iterdir()), "announced before it was written"
        self.checkpoints.append((path, step))
        self.announced.append(dict(metrics))
        self.scores.append(score)

    def resolved(self, path: str, value: Any) -> None:
        self.resolutions[path] = value

    def tick(self) -> None:
        """Nobody watches."""

    def spent_seconds(self) -> float:
        return self.spent

    def memory_gb(self) -> float | None:
        return self.estimate

    def stop_requested(self) -> bool:
        return self.stop_after is not None and len(self.steps) >= self.stop_after

    def output(self, kind: ArtifactKind, name: str | None = None, **facts: Any) -> Path:
        folder = self._root / f"output-{len(self.outputs)}"
        folder.mkdir()
        self.outputs.append((kind, folder, {"name": name, **facts}))
        return folder

    def written(self, path: Path, sha256: str) -> None:
        self.hashed[path] = sha256

    def result(self, **values: Any) -> None:
        self.results.update(values)

    # what tests ask

    def codes(self) -> list[str]:
        """The codes of the events, in order."""
        return [event["code"] for event in self.events]

    @property
    def folder(self) -> Path:
        """The one output."""
        assert len(self.outputs) == 1
        return self.outputs[0][1]

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [step["loss"] for step in self.steps]
