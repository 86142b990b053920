"""The socket: what recipes, graders, merges, operations, trackers and engines plug into."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, TypeAdapter

from app.engines import Engine
from app.errors import BadRequest, Code
from app.grading import GraderSpec, Sample, Scoring
from app.specs import DeploymentOptions, DeploySpec, Dtype, JobSpec, TrainSpec

SlotClass = Literal["train", "serve", "light"]
ArtifactKind = Literal["adapter", "model", "reward", "report", "gguf"]
HealthStatus = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Served:
    """The engines that answer for a model now, one or more."""

    sockets: tuple[Path, ...]
    """Where they listen: HTTP over unix sockets."""
    name: str
    """What they call the model."""


class RunContext(Protocol):
    """What a run may know of the world: its directories, its inputs, and where to tell how it goes."""

    job_id: str
    work_dir: Path
    """Scratch space of this attempt."""
    checkpoint_dir: Path
    """Where ``checkpoint-N`` folders go."""
    prepared_dir: Path | None
    """Inputs made ready: ``prepare`` fills it, ``run`` reads it (committed and verified); None without that stage."""
    task_folder: Path | None
    """More suites for evaluations, the operator's own (``TUNESMITH_EVAL_TASKS``)."""
    catalog: "Catalog"
    """All plugs, so that an operation can look up e.g. a merge method."""
    live_socket: Path | None
    """Where a training run answers requests between its steps; None = nobody asks."""

    @property
    def kept_dir(self) -> Path:
        """Outlives the attempt: parts that another attempt of this job can go on with; gone when the job has ended."""
        ...

    def input(self, field: str) -> Path:
        """The local folder or file behind a reference field, e.g. ``model.model_name_or_path`` or ``dataset.file``.

        Hub models are fetched first. Raises RunError (model_unreachable, gated_model) when that fails.
        """
        ...

    def input_info(self, field: str) -> Mapping[str, Any]:
        """What the registry knows of that input: ``artifact_id``, ``name``, ``kind``, ``base_chain`` (may be empty)."""
        ...

    def interpreter(self, name: Literal["quantize"]) -> Path:
        """Python with a library that cannot live beside ours. Raises RunError engine_missing where there is none."""
        ...

    def served(self, field: Literal["model", "baseline"]) -> Served | str:
        """What answers for an input now, or why nothing does at the moment; it is kept awake from then on.

        For jobs with ``deployment``. Raises RunError once the model is not served any more.
        """
        ...

    def phase(self, name: str) -> None:
        """For display: staging, loading, training, evaluating, saving, merging, quantising, validating, uploading."""
        ...

    def event(self, code: str, message: str, *, level: Literal["info", "warn", "error"] = "info", **data: Any) -> None:
        """One line in the job's history."""
        ...

    def health(self, check: str, status: HealthStatus, message: str | None = None, **facts: Any) -> None:
        """How the run fares in one respect: the job's ``health`` shows the last word of each check."""
        ...

    def progress(self, step: int, total_steps: int, **values: float | None) -> None:
        """Where the run is: ``epoch, loss, tokens_per_second, eta_seconds`` (throttled; call it at every step)."""
        ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one logged step."""
        ...

    def checkpoint(
        self,
        path: Path,
        step: int,
        metrics: Mapping[str, float],
        *,
        keep: int | None = None,
        score: float | None = None,
    ) -> None:
        """A complete checkpoint folder is on disk; it is committed while the run goes on, then older ones are thinned.

        The two newest keep everything, of older ones the weights stay: of ``keep`` checkpoints in all, and of the best
        one; None = of all. The best has the lowest ``score``, which is ``eval_loss`` where none is given; infinite =
        not measured.
        """
        ...

    def resolved(self, path: str, value: Any) -> None:
        """A value that the run chose in place of what the spec asked, e.g. a dtype; shown in ``resolved_spec``."""
        ...

    def tick(self) -> None:
        """The run lives, though it has nothing to tell (loading, a long evaluation): resets the stall detector."""
        ...

    def spent_seconds(self) -> float:
        """Time that the job has spent in slots, over all attempts."""
        ...

    def memory_gb(self) -> float | None:
        """What the run was estimated to need of one GPU, in 10⁹ bytes; None = not known."""
        ...

    def stop_requested(self) -> bool:
        """True after SIGTERM: save a checkpoint and raise ``Interrupted``."""
        ...

    def output(self, kind: ArtifactKind, name: str | None = None, **facts: Any) -> Path:
        """A fresh folder that becomes an artifact when the run succeeds; ``facts`` travel with it (base_chain…)."""
        ...

    def written(self, path: Path, sha256: str) -> None:
        """A file of an output is whole and on disk, and this is its hash: it is not read again to be published."""
        ...

    def result(self, **values: Any) -> None:
        """Adds to the job's ``result`` object."""
        ...


class Interrupted(Exception):
    """The run stopped because it was asked to; the attempt is given back."""


@dataclass(frozen=True)
class Recipe:
    """One training algorithm."""

    spec: type[TrainSpec]
    run: Callable[[Any, RunContext], None]
    slot: SlotClass = "train"
    prepare: Callable[[Any, RunContext], None] | None = None
    """Fetches and tokenises into ``ctx.prepared_dir`` in a light slot, before a GPU slot is taken."""

    @property
    def name(self) -> str:
        """The value of ``algorithm``."""
        return _literal(self.spec, "algorithm")


@dataclass(frozen=True)
class Operation:
    """One job type beside training."""

    spec: type[JobSpec]
    run: Callable[[Any, RunContext], None]
    slot: SlotClass = "light"
    slot_of: Callable[[Any], SlotClass] | None = None
    """The class of slot by the spec, where it is not the same for all."""
    variables: tuple[str, ...] = ()
    """Beginnings of environment variables of the worker that its runner gets beside those that all get: secrets."""
    wants_card: bool = False
    """Whether ``ctx.input_info`` of an artifact holds its model card: ``card``, Markdown."""
    offline: bool = False
    """Whether it reads foreign files and asks nothing of a network: its runner has none where the machine allows it."""

    @property
    def name(self) -> str:
        """The value of ``type``."""
        return _literal(self.spec, "type")


class Bench(Protocol):
    """What a grader may use that is no pure function of its samples."""

    ctx: RunContext
    field: str
    """Where the grader stands in the spec, e.g. ``graders.0``: ``ctx.input(f"{field}.model")`` is its model."""
    device: str
    dtype: Dtype
    batch_size: int
    """Answers that are judged at a time."""

    def scoring(self, spec: GraderSpec, place: str) -> Scoring:
        """Another grader, which stands at ``place`` within this one, e.g. ``graders.format``."""
        ...


@dataclass(frozen=True)
class Grader:
    """One way to score answers: a pure function, or one that is made once for a run (``load``)."""

    spec: type[GraderSpec]
    grade: Callable[[Any, Sequence[Sample]], list[float]] | None = None
    """``grade(spec, samples)``: one finite number for each sample; needs no torch."""
    load: Callable[[Any, Bench], Scoring] | None = None

    def __post_init__(self) -> None:
        if (self.grade is None) == (self.load is None):
            raise CatalogError(f"{self.spec.__name__}: a grader has either grade or load")

    @property
    def name(self) -> str:
        """The value of ``type``."""
        return _literal(self.spec, "type")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may know of the job whose numbers it gets."""

    job_id: str
    service: str
    """What the runs of this service belong to, where a tracker has projects."""
    name: str
    config: Mapping[str, Any]
    """The spec with every default filled in."""
    folder: Path
    """Of the job, shared by its attempts; a tracker makes a folder of its own in it."""


class Sink(Protocol):
    """One attempt's numbers on their way into a tracker. May be slow, may raise: training does not notice."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one logged step, all finite."""
        ...

    def close(self, status: str, summary: Mapping[str, float | str]) -> None:
        """The attempt is over: ``succeeded``, ``failed`` or ``interrupted`` (it goes on later)."""
        ...


@dataclass(frozen=True)
class Tracker:
    """Somewhere else that the numbers of runs are sent to, in a process of its own."""

    name: str
    open: Callable[[TrackedRun], Sink]
    needs: str | None = None
    """The module that must be installed."""
    variables: tuple[str, ...] = ()
    """Beginnings of the environment variables that it reads; its process gets them, and no other one does."""

    @property
    def installed(self) -> bool:
        """Whether this environment has what it needs."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


MergeInput = Literal["adapter", "adapters", "models"]


@dataclass(frozen=True)
class MergeMethod:
    """One way to make a model of a base and adapters, or of models; ``run`` fills ``ctx.output("model")``."""

    name: str
    run: Callable[[Any, RunContext], None]
    takes: tuple[MergeInput, ...] = ("adapter",)
    """The fields of the spec that it merges, one of them at a time."""
    uses: tuple[str, ...] = ()
    """Of weights, density, majority_sign_method, svd_rank, t: those that mean something to it. With base_model, models
    cannot be merged without one."""
    equal_ranks: bool = False
    """Whether adapters must have the same rank where they meet."""
    exactly: int | None = None
    """How many are merged; None = two or more."""
    normalised: bool = False
    """Whether weights are divided by their sum, which cannot be zero then."""


class CatalogError(Exception):
    """A plug file that is broken: it stops the process at start-up."""


@dataclass(frozen=True)
class Catalog:
    """Everything that was plugged in, by name."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    graders: dict[str, Grader] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    trackers: dict[str, Tracker] = field(default_factory=dict)
    merges: dict[str, MergeMethod] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)

    def job_types(self) -> list[str]:
        """What ``type`` may be in a ``POST /jobs``."""
        return ["train", *sorted(self.operations), "deploy"]

    def spec_class(self, type_: str, algorithm: str | None) -> type[JobSpec] | None:
        """The spec of a job type and, for train, of an algorithm; None when there is no such thing."""
        if type_ == "train":
            return self.recipes[algorithm].spec if algorithm in self.recipes else None
        if type_ == "deploy":
            return DeploySpec
        return self.operations[type_].spec if type_ in self.operations else None

    def check_engine(self, options: DeploymentOptions) -> None:
        """Raises BadRequest for an engine that nobody plugged in, or that cannot do what is asked of it, and for
        options that contradict each other.

        ``auto`` is left to the worker.
        """
        name = options.engine
        if name not in ("auto", *self.engines):
            names = ", ".join(("auto", *self.engines))
            raise BadRequest(f"engine {name!r} is unknown", param="engine", hint=f"One of: {names}.")
        contradiction = options.contradiction()
        if contradiction is not None:
            field, why = contradiction
            raise BadRequest(
                f"{field}: with task: embed {why}",
                param=field,
                code=Code.CONFLICTING_FIELDS,
                hint=f"Leave {field} out, or task.",
            )
        lacks = self.engines[name].cannot(options) if name in self.engines else None
        if lacks is not None:
            field, why = lacks
            raise BadRequest(
                f"{field}: the engine {name} {why}",
                param=field,
                code=Code.CONFLICTING_FIELDS,
                hint=f"Leave {field} out, or deploy with engine: vllm.",
            )

    def slot_class(self, spec: JobSpec) -> SlotClass:
        """Which class of slot a job runs in."""
        if isinstance(spec, TrainSpec):
            return self.recipes[spec.algorithm].slot
        plug = self.operations[spec.type]
        return plug.slot if plug.slot_of is None else plug.slot_of(spec)

    def prepares(self, type_: str, algorithm: str | None) -> bool:
        """Whether a light slot makes the inputs ready before the job takes its own."""
        return type_ == "train" and algorithm is not None and self.recipes[algorithm].prepare is not None

    def schema_adapter(self) -> TypeAdapter[Any]:
        """All specs as one union: ``type`` selects, within train ``algorithm`` selects. For OpenAPI."""
        trains = [recipe.spec for recipe in self.recipes.values()]
        others = [operation.spec for operation in self.operations.values()]
        train: Any = reduce(or_, trains)
        if len(trains) > 1:
            train = Annotated[train, Field(discriminator="algorithm")]
        union: Any = reduce(lambda left, right: left | right, [train, *others, DeploySpec])
        return TypeAdapter(Annotated[union, Field(discriminator="type")])


def _literal(spec: type[JobSpec] | type[GraderSpec], name: str) -> str:
    default = spec.model_fields[name].default
    if not isinstance(default, str):
        raise CatalogError(f"{spec.__name__}.{name} needs a Literal with a default")
    return default
