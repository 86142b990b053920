"""One replica of a deployment: an engine kept alive on a slot, and the deployment's state kept true."""

import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app import parsers, processes
from app.artifacts.inspect import read_json, template_of
from app.db import after_commit
from app.deployments import replicas
from app.engines import Engine, EngineLaunch
from app.errors import AppError, Code, RunError
from app.models import Artifact, DeploymentReplica
from app.settings import BadRunDir
from app.specs import DeploymentOptions, ServeSpec
from app.states import DeploymentState
from workers import sleep_mode
from workers.child import Child, environment
from workers.facts import dtype_of, lora_modules
from workers.inputs import follow_model
from workers.keeper import Keeper
from workers.ledger import Flags, Line, persistent
from workers.parity import Parity
from workers.parking import Parked
from workers.supervisor import Supervision

BACKOFF = (1.0, 5.0, 15.0, 60.0)
CRASH_LOOP = 5
STEADY_SECONDS = 600.0
GRACE_SECONDS = 30.0
_EXIT_START_TIMEOUT = 3


class ReplicaSupervision(Supervision):
    """Like a run, but it never succeeds: it serves until it is stopped."""

    def run(self) -> None:
        """From the claim to the settled row."""
        self._ready_since: float | None = None
        self._failure: Line = {}
        self._keeper: Keeper | None = None
        self._parity: Parity | None = None
        self._differs: RunError | None = None
        spec = ServeSpec.model_validate(self.job.resolved_spec)
        if not self._move(DeploymentState.STARTING, last_error=None):
            if not self.ledger.cancelled("The deployment was stopped."):
                self.ledger.fail(RunError(Code.WRONG_STATE, "the deployment is stopped"))
            return
        woken = self._wake()
        try:
            launch, child = (woken.launch, woken.child) if woken is not None else self._start(spec)
        except RunError as error:
            self._give_up(error)
            return
        parked = False
        try:
            if woken is not None:
                self._answers(spec, woken)
            flags = self.listen(
                child, lambda lines: self._hear(spec, launch, child, lines), stop_grace=GRACE_SECONDS + 5
            )
            parked = not flags.lost and not flags.cancel and self.leaves() and self._park(spec, launch, child)
            if not parked:
                self._settle_replica(spec, child, flags)
        except BaseException:
            child.end(0)  # whatever went wrong here, no engine serves on unwatched
            raise
        finally:
            if self._keeper is not None:
                self._keeper.stop()
            if self._parity is not None:
                self._parity.stop()
            if not parked:
                child.close()

    def leaves(self) -> bool:
        """Whether the engine sleeps and is to be parked."""
        asleep = self._keeper is not None and self._keeper.parked
        return asleep and self._differs is None and not self.house.stopping.is_set()

    def makes_room(self, flags: Flags) -> bool:
        """Never by itself: the keeper sees to it once nobody uses the engine."""
        return False

    def _start(self, spec: ServeSpec) -> tuple[EngineLaunch, Child]:
        """A new engine. Raises RunError."""
        with self.beating():  # hashing a large model takes longer than a lease
            launch = self._launch(spec)
        self._make_room(spec)
        engine = self._engine(spec)
        return launch, self.spawn("workers.replica", _attempt(spec, launch, engine.argv(launch), engine.env(launch)))

    def _wake(self) -> Parked | None:
        """The engine that sleeps for this replica, awake; None when there is none, or none that can be used here."""
        found = self.house.parking.take(self.job.id) if self.house.parking is not None else None
        if found is None:
            return None
        reason = None
        if (found.slot_id, found.gpus) != (self.slot_id, self.gpu):
            reason = f"it slept on {found.slot_id} (GPU {found.gpus}), the slot is {self.slot_id} (GPU {self.gpu})"
        else:
            try:
                with self.beating():
                    self._make_room(ServeSpec.model_validate(self.job.resolved_spec))
                    sleep_mode.wake_up(found.launch)
            except sleep_mode.Refused as error:
                reason = str(error)
        if reason is None:
            return found
        found.end()
        self._note("engine_not_woken", f"A new engine starts in place of the one that slept: {reason}.", "warn")
        return None

    def _make_room(self, spec: ServeSpec) -> None:
        """Before an engine takes its share of a GPU."""
        if self.gpu and self.house.parking is not None:
            self.house.parking.make_room(self.gpu, spec.gpu_memory_utilization)

    def _answers(self, spec: ServeSpec, woken: Parked) -> None:
        """An engine that slept is served again."""
        self._ready_since = time.monotonic()
        self._move(DeploymentState.READY, socket=str(woken.launch.socket))
        slept = time.monotonic() - woken.since
        self._note("engine_woken", f"The engine answers again; it slept for {slept:.0f} s.", "info")
        self._keep(spec, woken.launch, woken.child, woken.loaded)
        self._compare(spec, woken.launch, woken.child)

    def _park(self, spec: ServeSpec, launch: EngineLaunch, child: Child) -> bool:
        """The slot goes to others, the engine stays; False when it ended, because the worker stops."""
        assert self.house.parking is not None
        assert self._keeper is not None
        assert self.gpu is not None
        self._keeper.stop()
        # Before the job is anybody's: whoever claims it next finds its engine.
        if not self.house.parking.put(Parked(self.job.id, self.slot_id, self.gpu, child, launch, self._keeper.loaded)):
            child.end(0)
            return False
        try:
            left = self.ledger.sleep(spec.deployment_id)
        except BaseException:
            self.house.parking.take(self.job.id)
            raise
        if not left:  # stopped meanwhile, or given to another worker
            found = self.house.parking.take(self.job.id)
            if found is not None:
                found.end()
            if self.ledger.cancelled("The engine was stopped."):
                self._move(DeploymentState.STOPPED)
        return True

    def _engine(self, spec: ServeSpec) -> Engine:
        """The one that was asked for; auto = vllm where its environment is, else transformers in our own."""
        installed = self.house.settings.engine_python is not None
        name = spec.engine if spec.engine != "auto" else "vllm" if installed else "transformers"
        if name not in self.house.catalog.engines:
            raise RunError(Code.BAD_SPEC, f"this worker does not know the engine {name}")
        return self.house.catalog.engines[name]

    def _launch(self, spec: ServeSpec) -> EngineLaunch:
        settings, engine = self.house.settings, self._engine(spec)
        python = Path(sys.executable) if engine.own_python else settings.engine_python
        if python is None:
            raise RunError(
                Code.ENGINE_MISSING,
                "there is no Python environment with vLLM",
                hint="Run make setup, set TUNESMITH_SERVE_PYTHON, or deploy with engine: transformers.",
            )
        with self.house.database.read() as session:
            found = follow_model(session, settings, self.job, spec.model, "model")
        if found.folder is None:
            raise RunError(
                Code.MODEL_NOT_FOUND,
                f"{spec.model} is not on this machine",
                hint="Import the model first.",
                param="model",
            )
        self._check_folder(found.folder, found.artifact)
        options = DeploymentOptions.model_validate(spec.model_dump(include=set(DeploymentOptions.model_fields)))
        lacks = engine.cannot(options)
        if lacks is not None:  # known only now: engine auto
            field, why = lacks
            raise RunError(
                Code.CONFLICTING_FIELDS,
                f"{field}: the engine {engine.name} {why}",
                hint=f"Install vLLM (make setup), or leave {field} out.",
                param=field,
            )
        if options.quantization is not None and self.gpu is None:
            raise RunError(
                Code.CONFLICTING_FIELDS,
                f"quantization: {options.quantization} is computed on a GPU, and there is none here",
                hint="Leave quantization out, or quantise the model by a job (type: quantize).",
                param="quantization",
            )
        parsed = parsers.chosen(template_of(found.folder), options.tool_call_parser, options.reasoning_parser)
        return EngineLaunch(
            python=python,
            model_dir=found.folder,
            served_name=spec.name,
            socket=self._sockets() / f"{self.job.id[4:12]}{self.job.fence % 10_000}.s",
            options=options.model_copy(update={"hot_load": bool(options.hot_load) and engine.hot_load}),
            has_gpu=self.gpu is not None,
            dtype=dtype_of(spec.dtype, found.folder, has_gpu=self.gpu is not None),
            cpu_threads=len(os.sched_getaffinity(0)),
            tool_call_parser=parsed.tool,
            reasoning_parser=parsed.reasoning,
            lora_modules=lora_modules(found.folder),
            sleep_mode=engine.sleep_mode and bool(self.gpu) and self._may_sleep(options),
        )

    def _sockets(self) -> Path:
        try:
            return self.house.settings.sockets
        except BadRunDir as error:
            hint = "TUNESMITH_RUN_DIR is a short path that the worker may write to; it is read when the worker starts."
            raise RunError(
                Code.STORAGE_ERROR, f"there is no folder for the engine's socket: {error}", hint=hint
            ) from error

    def _may_sleep(self, options: DeploymentOptions) -> bool:
        return self.house.parking is not None and (options.yields or options.idle_timeout is not None)

    def _check_folder(self, folder: Path, artifact: Artifact | None) -> None:
        """A model that was altered after it was published is not served."""
        faults = self.house.storage.verify(artifact.id, sha256=artifact.sha256) if artifact is not None else []
        if faults:
            raise RunError(
                Code.MODEL_INVALID,
                f"not as published: {', '.join(faults[:3])}",
                hint="The files were changed after the job; run the job again.",
                param="model",
            )
        try:
            read_json(folder / "config.json", "model")
        except AppError as error:
            raise RunError(Code.MODEL_INVALID, error.message, hint=error.hint, param="model") from error

    def _hear(self, spec: ServeSpec, launch: EngineLaunch, child: Child, lines: list[Line]) -> None:
        for line in lines:
            if line["kind"] != "status":
                continue
            if line.get("status") == "ready":
                self._ready_since = self._ready_since or time.monotonic()
                self._move(DeploymentState.READY, socket=str(launch.socket))
                name = self._engine(spec).name
                said = f"The engine ({name}) answers, {line.get('seconds')} s after its start."
                self._note("engine_ready", said, "info", engine=name)
                self._keep(spec, launch, child)
                self._compare(spec, launch, child)
            elif line.get("status") == "unhealthy":
                self._move(DeploymentState.UNHEALTHY)
                self._note("engine_unhealthy", "The engine did not answer a probe.", "warn")
            elif line.get("status") == "failed":
                self._failure = line

    def _keep(
        self, spec: ServeSpec, launch: EngineLaunch, child: Child, has: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """From the engine's first answer on, it is made to follow its rows. ``has``: adapters that slept with it."""
        if self._keeper is not None:
            return
        parking, gpus, lie_down = self.house.parking, self.gpu, None
        if launch.sleep_mode and parking is not None and gpus:
            lie_down = partial(sleep_mode.lie_down, launch, gpus, parking.read, parking.available)
        busy, end = self._engine(spec).busy, child.ask_to_stop
        self._keeper = Keeper(self.house, self.job, spec.deployment_id, launch, busy, self._note, end, lie_down, has)
        self._keeper.start()

    def _compare(self, spec: ServeSpec, launch: EngineLaunch, child: Child) -> None:
        """Once for all replicas of a generation, by the oldest: an engine that died is started as it was."""
        if self._parity is not None or spec.parity == "off":
            return
        with self.house.database.read() as session:
            asks = replicas.asks_for_parity(session, self.job.id)
        if not asks:
            return
        engine = self._engine(spec)
        if not engine.comparable or spec.task == "embed":
            reason = "embeddings hold no tokens" if engine.comparable else f"{engine.name} tells nothing to compare"
            self._certify(spec, child, {"verdict": "not_measured", "reason": reason, "engine": engine.name})
            return

        def found(certificate: dict[str, Any]) -> None:
            self._certify(spec, child, certificate)

        # With the attempt's token, so that it goes when the engine goes, whoever is left to see to that.
        reads = {**environment(self.house.settings, None), processes.TOKEN: child.token}
        self._parity = Parity(launch, engine, self.folder, reads, found)
        self._parity.start()

    def _certify(self, spec: ServeSpec, child: Child, certificate: dict[str, Any]) -> None:
        """Keeps what was found, and ends an engine that is another model's. In the thread of the check."""
        self._store_parity(certificate)
        if certificate["verdict"] == "not_measured":
            reason = certificate["reason"].removesuffix(".")
            message = f"Whether the engine says what the model says was not measured: {reason}."
            self._note("parity_not_measured", message, "warn" if spec.parity == "required" else "info")
            return
        said = (
            f"{certificate['agreement']:.1%} of {certificate['tokens']} tokens are transformers' own choice, the first "
            f"ones' log-probabilities are {certificate['mean_distance'] or 0:.2g} nats off"
        )
        if certificate["verdict"] == "same":
            self._note("parity_shown", f"The engine says what the model says: {said}.", "info")
            return
        self._note("parity_missed", f"The engine says something else than the model: {said}.", "error")
        if spec.parity == "required":
            self._differs = RunError(
                Code.PARITY_MISSED,
                f"the engine says something else than the model: {said}",
                hint="Another dtype or engine may be true to it; parity: warn serves it all the same.",
            )
            child.ask_to_stop()

    @persistent
    def _store_parity(self, certificate: dict[str, Any]) -> None:
        with self.house.database.write() as session:
            replicas.certify(session, self.job.id, certificate)

    @persistent
    def _note(self, code: str, message: str, level: str, **data: Any) -> None:
        with self.house.database.write() as session:
            self.ledger.note(session, code, message, level, data or None)

    @persistent
    def _move(self, to: DeploymentState, **values: Any) -> bool:
        with self.house.database.write() as session:
            after_commit(session, self.house.doorbell.ring)  # a replacement may wait for this
            return replicas.move(session, self.job.id, to, **values)

    def _settle_replica(self, spec: ServeSpec, child: Child, flags: Flags) -> None:
        status = child.process.wait()
        if flags.lost:
            return
        if flags.cancel:
            self._move(DeploymentState.STOPPED)
            self.ledger.cancelled("The engine was stopped.")
            return
        if self.house.stopping.is_set():
            self._move(DeploymentState.QUEUED, socket=None)
            self.ledger.requeue("job_interrupted", "The worker is stopping; the engine starts again.", give_back=True)
        elif self._differs is not None:
            self._give_up(self._differs)
        elif self._keeper is not None and self._keeper.slept:
            self.ledger.sleep(spec.deployment_id)
        else:
            self._restart(spec, child, status)
        self.ledger.cancelled("The engine was stopped.")

    def _restart(self, spec: ServeSpec, child: Child, status: int) -> None:
        reason = str(self._failure.get("reason") or f"exit status {status}")
        tail = str(self._failure.get("log_tail") or child.log_tail())
        steady = self._ready_since is not None and time.monotonic() - self._ready_since > STEADY_SECONDS
        with self.house.database.read() as session:
            row = session.get(DeploymentReplica, self.job.id)
            restarts = 0 if steady or row is None else row.restarts
        if status == _EXIT_START_TIMEOUT:
            error = RunError(
                Code.START_TIMEOUT,
                f"the engine was not ready within {spec.start_timeout} s",
                hint=f"Its log ends: {tail}",
            )
            self._give_up(error)
        elif restarts + 1 >= CRASH_LOOP:
            error = RunError(
                Code.ENGINE_CRASH_LOOP, f"the engine died {CRASH_LOOP} times ({reason})", hint=f"Its log ends: {tail}"
            )
            self._give_up(error)
        else:
            delay = BACKOFF[min(restarts, len(BACKOFF) - 1)]
            error_object = {"code": "engine_died", "message": reason, "log_tail": tail[-1500:]}
            self._move(DeploymentState.QUEUED, socket=None, restarts=restarts + 1, last_error=error_object)
            self.ledger.requeue("engine_died", f"The engine died ({reason}); it starts again.", delay=delay)

    def _give_up(self, error: RunError) -> None:
        detail = {"code": str(error.code), "message": error.message, "hint": error.hint}
        self._move(DeploymentState.FAILED, last_error=detail)
        self.ledger.fail(error)


def _attempt(spec: ServeSpec, launch: EngineLaunch, argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    return {
        "argv": argv,
        "env": env,
        "socket": str(launch.socket),
        "probe_path": launch.probe[0],
        "probe_body": launch.probe[1],
        "start_timeout": spec.start_timeout,
        "grace_seconds": GRACE_SECONDS,
        "sleep_mode": launch.sleep_mode,
    }
