"""One replica of a deployment: an engine kept alive on a slot, and the deployment's state kept true."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from app import parsers, processes
from app.artifacts.inspect import read_json, template_of
from app.catalog import Engine, EngineLaunch
from app.deployments import loaded, repository
from app.errors import AppError, Code, RunError
from app.models import Deployment, now
from app.specs import DeploymentOptions, ServeSpec
from app.states import DeploymentState
from workers.child import Child, environment
from workers.inputs import follow_model
from workers.keeper import Keeper
from workers.ledger import Flags, Line, persistent
from workers.parity import Parity
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
        if not self._move(DeploymentState.STARTING, spec, last_error=None):
            self.ledger.fail(RunError(Code.WRONG_STATE, "the deployment is stopped"))
            return
        try:
            with self.beating():  # hashing a large model takes longer than a lease
                launch = self._launch(spec)
            engine = self._engine(spec)
            child = self.spawn("workers.replica", _attempt(spec, launch, engine.argv(launch), engine.env(launch)))
        except RunError as error:
            self._give_up(spec, error)
            return
        try:
            flags = self.listen(
                child, lambda lines: self._hear(spec, launch, child, lines), stop_grace=GRACE_SECONDS + 5
            )
            self._settle_replica(spec, child, flags)
        except BaseException:
            child.end(0)  # whatever went wrong here, no engine serves on unwatched
            raise
        finally:
            if self._keeper is not None:
                self._keeper.stop()
            if self._parity is not None:
                self._parity.stop()
            child.close()

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
        self._check_folder(found.folder, found.artifact.id if found.artifact else None)
        parsed = parsers.for_template(template_of(found.folder))
        options = DeploymentOptions.model_validate(spec.model_dump(include=set(DeploymentOptions.model_fields)))
        return EngineLaunch(
            python=python,
            model_dir=found.folder,
            served_name=spec.name,
            socket=settings.sockets / f"{self.job.id[4:12]}{self.job.fence % 10_000}.s",
            options=options.model_copy(update={"hot_load": bool(options.hot_load) and engine.hot_load}),
            has_gpu=self.gpu is not None,
            dtype=_dtype(spec.dtype, found.folder, has_gpu=self.gpu is not None),
            cpu_threads=len(os.sched_getaffinity(0)),
            tool_call_parser=parsed.tool,
            reasoning_parser=parsed.reasoning,
        )

    def _check_folder(self, folder: Path, artifact_id: str | None) -> None:
        """A model that was altered after it was published is not served."""
        try:
            read_json(folder / "config.json", "model")
        except AppError as error:
            raise RunError(Code.MODEL_INVALID, error.message, hint=error.hint, param="model") from error
        if artifact_id is not None:
            try:
                differing = self.house.storage.verify(artifact_id)
            except (OSError, ValueError, KeyError) as error:
                differing = [f"MANIFEST.json ({error})"]
            if differing:
                raise RunError(
                    Code.MODEL_INVALID,
                    f"{', '.join(differing[:3])} differ from the manifest",
                    hint="The files were changed after the job; run the job again.",
                )

    def _hear(self, spec: ServeSpec, launch: EngineLaunch, child: Child, lines: list[Line]) -> None:
        for line in lines:
            if line["kind"] != "status":
                continue
            if line.get("status") == "ready":
                self._ready_since = self._ready_since or time.monotonic()
                self._move(DeploymentState.READY, spec, socket=str(launch.socket), ready_at=now())
                self._note("engine_ready", f"The engine answers, {line.get('seconds')} s after its start.", "info")
                self._keep(spec, launch, child)
                self._compare(spec, launch, child)
            elif line.get("status") == "unhealthy":
                self._move(DeploymentState.UNHEALTHY, spec)
                self._note("engine_unhealthy", "The engine did not answer a probe.", "warn")
            elif line.get("status") == "failed":
                self._failure = line

    def _keep(self, spec: ServeSpec, launch: EngineLaunch, child: Child) -> None:
        """From the engine's first answer on, it is made to follow its rows."""
        if self._keeper is None:
            busy = self._engine(spec).busy
            self._keeper = Keeper(self.house, self.job, spec.deployment_id, launch, busy, self._note, child.ask_to_stop)
            self._keeper.start()

    def _compare(self, spec: ServeSpec, launch: EngineLaunch, child: Child) -> None:
        """Once for a deployment: its model never changes, and an engine that died is started as it was."""
        with self.house.database.read() as session:
            row = session.get(Deployment, spec.deployment_id)
        if self._parity is not None or spec.parity == "off" or row is None or row.parity is not None:
            return
        if not self._engine(spec).comparable:
            return

        def found(certificate: dict[str, Any]) -> None:
            self._certify(spec, child, certificate)

        # With the attempt's token, so that it goes when the engine goes, whoever is left to see to that.
        reads = {**environment(self.house.settings, None), processes.TOKEN: child.token}
        self._parity = Parity(launch, self.folder, reads, found)
        self._parity.start()

    def _certify(self, spec: ServeSpec, child: Child, certificate: dict[str, Any]) -> None:
        """Keeps what was found, and ends an engine that is another model's. In the thread of the check."""
        self._store_parity(spec, certificate)
        if certificate["verdict"] == "not_measured":
            message = f"Whether the engine says what the model says was not measured: {certificate['reason']}."
            self._note("parity_not_measured", message, "info")
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
    def _store_parity(self, spec: ServeSpec, certificate: dict[str, Any]) -> None:
        with self.house.database.write() as session:
            repository.certify(session, spec.deployment_id, certificate)

    @persistent
    def _note(self, code: str, message: str, level: str) -> None:
        with self.house.database.write() as session:
            self.ledger.note(session, code, message, level)

    @persistent
    def _move(self, to: DeploymentState, spec: ServeSpec, **values: Any) -> bool:
        with self.house.database.write() as session:
            moved = repository.transition(session, spec.deployment_id, to, replica=self.job.id, **values)
            if moved and to in (DeploymentState.STARTING, DeploymentState.QUEUED):
                loaded.none_is_loaded(session, spec.deployment_id)
            return moved

    def _settle_replica(self, spec: ServeSpec, child: Child, flags: Flags) -> None:
        status = child.process.wait()
        if flags.lost:
            return
        if flags.cancel:
            self._move(DeploymentState.STOPPED, spec)
            self.ledger.cancelled("The engine was stopped.")
            return
        if self.house.stopping.is_set():
            self._move(DeploymentState.QUEUED, spec, socket=None)
            self.ledger.requeue("job_interrupted", "The worker is stopping; the engine starts again.", give_back=True)
        elif self._differs is not None:
            self._give_up(spec, self._differs)
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
            row = session.get(Deployment, spec.deployment_id)
            restarts = 0 if steady or row is None else row.restarts
        if status == _EXIT_START_TIMEOUT:
            error = RunError(
                Code.START_TIMEOUT,
                f"the engine was not ready within {spec.start_timeout} s",
                hint=f"Its log ends: {tail}",
            )
            self._give_up(spec, error)
        elif restarts + 1 >= CRASH_LOOP:
            error = RunError(
                Code.ENGINE_CRASH_LOOP, f"the engine died {CRASH_LOOP} times ({reason})", hint=f"Its log ends: {tail}"
            )
            self._give_up(spec, error)
        else:
            delay = BACKOFF[min(restarts, len(BACKOFF) - 1)]
            error_object = {"code": "engine_died", "message": reason, "log_tail": tail[-1500:]}
            self._move(DeploymentState.QUEUED, spec, socket=None, restarts=restarts + 1, last_error=error_object)
            self.ledger.requeue("engine_died", f"The engine died ({reason}); it starts again.", delay=delay)

    def _give_up(self, spec: ServeSpec, error: RunError) -> None:
        detail = {"code": str(error.code), "message": error.message, "hint": error.hint}
        self._move(DeploymentState.FAILED, spec, last_error=detail)
        self.ledger.fail(error)


def _dtype(asked: str, folder: Path, *, has_gpu: bool) -> str:
    """float32 unless a GPU computes in less, or somebody asked.

    Of a quantised model bfloat16: vLLM's products with 4-bit weights are not made for float32.
    """
    if asked != "auto":
        return asked
    quantised = bool(read_json(folder / "config.json", "model").get("quantization_config"))
    return "bfloat16" if has_gpu or quantised else "float32"


def _attempt(spec: ServeSpec, launch: EngineLaunch, argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    return {
        "argv": argv,
        "env": env,
        "socket": str(launch.socket),
        "served_name": launch.served_name,
        "start_timeout": spec.start_timeout,
        "grace_seconds": GRACE_SECONDS,
    }
