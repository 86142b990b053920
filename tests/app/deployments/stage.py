"""A deployment of several engines as rows, with what a worker would say of each."""

from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.deployments import replicas
from app.deployments.routes import Route, Router
from app.jobs import claims
from app.jobs import repository as jobs
from app.jobs.repository import Move
from app.models import DeploymentReplica, Job, now
from app.reconciler import Reconciler, reap
from app.settings import Settings
from app.states import DeploymentState, JobState

QUEUED, STARTING, READY, UNHEALTHY, SLEEPING, STOPPED, FAILED = DeploymentState
PROJECT = "proj-default"


class Stage:
    """A deployment, its worker's words, and the reconciler's steps."""

    def __init__(self, api: TestClient, database: Database, settings: Settings, reconciler: Reconciler) -> None:
        self.api = api
        self.database = database
        self.tick = reconciler.tick
        self.router = Router(database)
        self.id = ""

    def create(self, model: str, **fields: Any) -> dict[str, Any]:
        answer = self.api.post("/deployments", json={"name": "support", "model": model, "parity": "off", **fields})
        assert answer.status_code == 201, answer.text
        self.id = answer.json()["id"]
        return self.shown()

    def patch(self, status: int = 200, **fields: Any) -> dict[str, Any]:
        answer = self.api.patch(f"/deployments/{self.id}", json=fields)
        assert answer.status_code == status, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.api.get(f"/deployments/{self.id}").json()
        return shown

    def engines(self, generation: int) -> list[str]:
        return [one["id"] for one in self.shown()["replicas"] if one["generation"] == generation]

    def claim(self) -> str:
        """A worker takes the next one."""
        with self.database.write() as session:
            job = claims.claim(session, "w", "serve-0", ["serve"])
            assert job is not None
            taken = job.id
            assert replicas.move(session, taken, STARTING, last_error=None)
        return taken

    def say(self, replica: str, to: DeploymentState, **values: Any) -> None:
        with self.database.write() as session:
            assert replicas.move(session, replica, to, **values)

    def start(self, count: int = 1) -> list[str]:
        """A worker takes so many and they answer."""
        started = [self.claim() for _ in range(count)]
        for one in started:
            self.say(one, READY, socket=f"/run/{one}")
        return started

    def sleep(self, replica: str) -> None:
        """Nobody used it: its worker ended it, and its job waits."""
        self.say(replica, SLEEPING, socket=None)
        with self.database.write() as session:
            move = Move(JobState.QUEUED, "engine_asleep", "x", values={**jobs.back_in_queue(), "paused_at": now()})
            assert jobs.transition(session, replica, JobState.RUNNING, move)

    def end(self, replica: str) -> None:
        """The worker does what it was asked: the engine ends."""
        with self.database.write() as session:
            job = session.get_one(Job, replica)
            assert job.cancel_requested_at is not None
            reap(session, job)

    def cancel(self, replica: str) -> None:
        """Somebody ends its job behind the deployment's back, and the engine with it."""
        over = Move(JobState.CANCELLED, "job_cancelled", "x")
        with self.database.write() as session:
            origin = JobState(session.get_one(Job, replica).state)
            assert jobs.transition(session, replica, origin, over)

    def route(self) -> set[str]:
        route = self.router.route_for("support", PROJECT)
        assert isinstance(route, Route)
        return {target.id for target in route.targets}

    def job(self, replica: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, replica)

    def states(self) -> dict[str, str]:
        with self.database.read() as session:
            return {row.id: row.status for row in session.scalars(select(DeploymentReplica))}
