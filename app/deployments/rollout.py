"""From one generation of engines to the next without a failed request; a step of the reconciler.

The new engines start beside the old ones. Once all of them can answer, with the adapters that the old ones have,
requests go to them in one step; the old ones finish what they were asked and end. Until then nothing changes for
anybody, and a new engine that fails leaves everything as it was. Where there is no slot beside the old ones, they go
one by one, the last one excepted, and then as many new engines as there are old ones left are enough for the step; if
the new ones fail after that, others like the old ones start in the place of those that went.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app.crashpoints import reached
from app.db import Database, after_commit
from app.deployments import loaded, replicas
from app.jobs import repository as jobs
from app.jobs.repository import Move
from app.models import Deployment, DeploymentReplica, Job, now
from app.queue import AnyDoorbell
from app.specs import DeploymentOptions
from app.states import DEPLOYMENT_LIVE, AdapterState, DeploymentState, Desired, JobState

log = logging.getLogger(__name__)
CROWDED_SECONDS = 15.0
"""A new engine that has waited so long for a slot will get none beside the old ones."""


REPLACED = "Another engine has taken its place."
_PARITY_SECONDS = 300.0


@dataclass
class _Scene:
    """The engines of a deployment that is being replaced."""

    row: Deployment
    options: DeploymentOptions
    since: datetime
    old: Sequence[DeploymentReplica]
    new: Sequence[DeploymentReplica]
    failed: DeploymentReplica | None


def begin(session: Session, row: Deployment, model: str, artifact_id: str | None, options: dict[str, Any]) -> None:
    """The deployment is to serve this. What was on its way before is given up. The row is locked."""
    _end_coming(session, row, "Something else is to replace the deployment.")
    generation = replicas.next_generation(session, row)
    row.coming = {
        **{"model": model, "artifact_id": artifact_id, "options": options},
        **{"generation": generation, "since": now().isoformat()},
    }
    session.flush()
    for _ in range(int(options["replicas"])):
        replicas.add(session, row, generation, model, artifact_id, options)


def scale(session: Session, row: Deployment, count: int) -> None:
    """So many engines of what is served already; the youngest go first. The row is locked."""
    row.options = {**row.options, "replicas": count}
    living = [one for one in _of(session, row, row.generation) if not one.retiring]
    for _ in range(count - len(living)):
        replicas.add(session, row, row.generation, row.model, row.artifact_id, row.options)
    for one in living[count:]:
        _retire(session, one)
    replicas.settle(session, row)


class Rollouts:
    """Takes every replacement a step further. Any number of processes may do so at once: each step locks its row."""

    def __init__(self, database: Database, doorbell: AnyDoorbell) -> None:
        self._database = database
        self._doorbell = doorbell

    def tick(self) -> None:
        """One look at all of them."""
        unfinished = select(DeploymentReplica.deployment_id).where(
            DeploymentReplica.retiring.is_(True), DeploymentReplica.status.in_(DEPLOYMENT_LIVE)
        )
        query = select(Deployment.id).where(
            Deployment.status.in_(DEPLOYMENT_LIVE), or_(Deployment.coming.is_not(None), Deployment.id.in_(unfinished))
        )
        with self._database.read() as session:
            found = session.scalars(query).all()
        for deployment_id in found:
            with self._database.write() as session:
                row = replicas.lock(session, deployment_id)
                if row is not None and _step(session, row):
                    after_commit(session, self._doorbell.ring)
                reached("rollout.before_commit")


def _step(session: Session, row: Deployment) -> bool:
    """Whether something was changed."""
    # The engine died, or never was: nobody is left who would end its job.
    alone = [one for one in _of(session, row) if one.retiring and one.status not in replicas.ANSWER]
    stopped = [one for one in alone if replicas.stop(session, one, REPLACED)]
    if row.coming is None or row.desired == Desired.STOPPED or row.status not in DEPLOYMENT_LIVE:
        return bool(stopped)
    scene = _scene(session, row)
    if scene.failed is not None:
        _give_up(session, scene, scene.failed.last_error or {"code": "engine_error", "message": "an engine failed"})
        return True
    serving = [one for one in scene.old if not one.retiring]
    answering = [one for one in serving if one.status in replicas.ANSWER]
    # One that sleeps or starts anew has served, and will again; one that never did is nobody's loss.
    served = [one for one in serving if one.ready_at is not None]
    whole = [one for one in scene.new if _counts(session, scene, one)]
    crowded = _crowded(session, scene)
    enough = len(whole) >= scene.options.replicas or (crowded and 0 < len(whole) >= len(answering))
    if scene.new and (enough or not served):
        _take_over(session, scene)
        return True
    if crowded and len(answering) > 1:
        _retire(session, answering[-1])
        return True
    if error := _incomplete(scene) or _late(scene):
        _give_up(session, scene, error)
        return True
    return bool(stopped)


def _incomplete(scene: _Scene) -> dict[str, Any] | None:
    """What is wrong when new engines were ended by somebody else: nobody starts others in their place."""
    gone = scene.options.replicas - len(scene.new)
    if not gone:
        return None
    message = f"{gone} of {scene.options.replicas} new engines ended before they could take over; none of them failed"
    hint = "Somebody stopped them: their jobs tell. PATCH the deployment again for new ones."
    return {"code": "killed", "message": message, "hint": hint}


def _late(scene: _Scene) -> dict[str, Any] | None:
    """What is wrong when the new engines are not there in the time that a start may take."""
    waited, seconds = (now() - scene.since).total_seconds(), scene.options.start_timeout
    if waited > seconds and all(one.status == DeploymentState.QUEUED for one in scene.new):
        hint = "Stop a deployment or a run, or DELETE this deployment and create it anew."
        message = f"no worker had a slot for one more engine within {seconds} s"
        return {"code": "no_capacity", "message": message, "hint": hint}
    if waited > seconds + _PARITY_SECONDS:
        message = f"the new engines were not there with all adapters within {waited:.0f} s"
        return {"code": "start_timeout", "message": message, "hint": "The events of their jobs tell more."}
    return None


def _of(session: Session, row: Deployment, generation: int | None = None) -> list[DeploymentReplica]:
    found = replicas.of(session, [row.id])[row.id]
    return [one for one in found if generation is None or one.generation == generation]


def _scene(session: Session, row: Deployment) -> _Scene:
    assert row.coming is not None
    failed = session.scalars(
        select(DeploymentReplica).where(
            DeploymentReplica.deployment_id == row.id,
            DeploymentReplica.generation == row.coming["generation"],
            DeploymentReplica.status == DeploymentState.FAILED,
        )
    ).first()
    return _Scene(
        row=row,
        options=DeploymentOptions.model_validate(row.coming["options"]),
        since=datetime.fromisoformat(row.coming["since"]),
        old=_of(session, row, row.generation),
        new=_of(session, row, row.coming["generation"]),
        failed=failed,
    )


def _counts(session: Session, scene: _Scene, one: DeploymentReplica) -> bool:
    """Whether an engine could take over: it answers, says what its model says, and has what the old ones have."""
    if one.status != DeploymentState.READY:
        return False
    if scene.options.parity == "required" and replicas.asks_for_parity(session, scene.new[0].id):
        return False
    had = {name for old in scene.old for name in old.loaded}
    wanted = [entry for entry in loaded.of(session, [scene.row.id])[scene.row.id] if entry.name in had]
    return all(one.loaded.get(entry.name) == entry.model for entry in wanted if entry.status == AdapterState.READY)


def _crowded(session: Session, scene: _Scene) -> bool:
    """Whether new engines find no slot while the old ones hold theirs."""
    waiting = [one.id for one in scene.new if one.status == DeploymentState.QUEUED and not one.restarts]
    if not waiting or now() - scene.since < timedelta(seconds=CROWDED_SECONDS):
        return False
    query = select(Job.id).where(Job.id.in_(waiting), Job.state == JobState.QUEUED, Job.attempt == 0)
    return session.scalar(query.limit(1)) is not None


def _take_over(session: Session, scene: _Scene) -> None:
    """From here on requests go to the new engines; those that the old ones have are finished there."""
    row, coming = scene.row, scene.row.coming
    assert coming is not None
    row.model, row.artifact_id, row.options = coming["model"], coming["artifact_id"], coming["options"]
    row.generation, row.coming, row.parity = coming["generation"], None, None
    session.flush()
    for one in scene.old:
        _retire(session, one)
    replicas.settle(session, row)
    for one in scene.new:
        message = f"Requests for {row.name} go to generation {row.generation}."
        jobs.note(session, one.id, Move(JobState.RUNNING, "took_over", message))


def _give_up(session: Session, scene: _Scene, error: dict[str, Any]) -> None:
    """What was to come is let go; what is served goes on."""
    row = scene.row
    log.warning("deployment %s: the replacement failed: %s", row.id, error.get("code"))
    _end_coming(session, row, "The replacement failed.")
    row.last_error = {**error, "message": f"the replacement failed, {row.model} is still served: {error['message']}"}
    scale(session, row, row.options["replicas"])


def _end_coming(session: Session, row: Deployment, why: str) -> None:
    if row.coming is None:
        return
    generation, row.coming = row.coming["generation"], None
    session.flush()
    for one in _of(session, row, generation):
        one.retiring = True
        session.flush()
        replicas.stop(session, one, why)


def _retire(session: Session, one: DeploymentReplica) -> None:
    """It is led to no more; its worker sees to the rest. One that never answered ends at once."""
    one.retiring = True
    session.flush()
    if one.status not in replicas.ANSWER:
        replicas.stop(session, one, REPLACED)
