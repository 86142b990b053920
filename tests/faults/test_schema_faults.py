"""The database is of another version, or its migration is killed on the way: rows stay, and starts are refused."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import inspect, text

from app import schema
from app.crashpoints import VARIABLE
from app.db import Database
from app.jobs import claims, repository
from app.main import create_app
from app.models import Artifact, Job, Project
from app.settings import Settings
from tests.faults.service import ApiProcess
from tests.faults.timeline import Timeline

pytestmark = pytest.mark.fault
OLDEST = "0001"
Rows = dict[str, list[dict[str, Any]]]
CARRIED = {"project": "id", "job": "id", "job_event": "seq", "artifact": "id"}
"""Tables, and what orders their rows."""


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bare(bare_database_url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=bare_database_url)


def migrate(settings: Settings, point: str = "") -> subprocess.CompletedProcess[str]:
    """``tunesmith migrate`` that dies at a point."""
    environment = {
        **os.environ,
        "TUNESMITH_DATA_DIR": str(settings.data_dir),
        "TUNESMITH_DATABASE_URL": settings.database,
        **({VARIABLE: point} if point else {}),
    }
    command = [sys.executable, "-I", "-c", "from app.cli import main; main()", "migrate"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def some_rows(database: Database) -> None:
    """Projects, and a job that runs, with its history and what it left."""
    with database.write() as session:
        session.add_all([Project(id=f"proj-{number}", name=f"n{number}") for number in range(50)])
        session.flush()
        spec = {"type": "sleepy", "mode": "ok", "limits": {"wall_seconds": 1.5}, "tags": ["ä", None]}
        columns = {"type": "sleepy", "experiment_name": "nap", "spec": spec, "spec_sha256": "s", "resolved_spec": spec}
        repository.add(session, Job(id="job-1", project_id="proj-1", slot_class="light", priority=3, **columns))
        facts = {"sha256": "a" * 64, "bytes": 1 << 40, "base_chain": ["root", "sft:job-1"], "facts": {"rank": 4}}
        session.add(
            Artifact(id="art-1", job_id="job-1", project_id="proj-1", name="nap", version=1, kind="adapter", **facts)
        )
    with database.write() as session:
        assert claims.claim(session, "w", "light-0", ["light"])


def rows(database: Database) -> Rows:
    """Of the tables of the oldest revision that people would miss first; not the project that a migration makes."""
    with database.engine.connect() as connection:
        found = {
            table: connection.execute(text(f"SELECT * FROM {table} ORDER BY {by}")).mappings().all()
            for table, by in CARRIED.items()
        }
    return {table: [dict(row) for row in found[table] if row.get("id") != "proj-default"] for table in found}


def oldest_columns(found: Rows, database: Database) -> Rows:
    """The rows without what later revisions added; ``database`` is at the oldest one."""
    known = {table: {column["name"] for column in inspect(database.engine).get_columns(table)} for table in CARRIED}
    return {table: [{name: row[name] for name in known[table]} for row in found[table]] for table in CARRIED}


def test_a_migration_that_is_killed(bare: Settings, timeline: Timeline) -> None:
    """Case 42. At each revision after the first, and after the last: as before, or done; old rows stay."""
    schema.upgrade(bare)
    with contextlib.closing(Database(bare.database)) as database:
        some_rows(database)
        newest = rows(database)
        assert {table: len(found) for table, found in newest.items()} == {
            "project": 50,
            "job": 1,
            "job_event": 2,
            "artifact": 1,
        }
        config = schema.alembic_config(bare.database)
        command.downgrade(config, OLDEST)
        before = rows(database)
        assert before == oldest_columns(newest, database)
        for point in (*(f"migrate.revision:{number + 1}" for number in range(later())), "migrate.after_upgrade"):
            with pytest.raises(schema.WrongSchema, match="run tunesmith migrate"):
                schema.require_head(database)
            killed = migrate(bare, point)
            assert killed.returncode == -9, killed.stderr
            if point != "migrate.after_upgrade":
                assert (schema.revision(database), rows(database)) == (OLDEST, before)
            timeline.say(f"killed at {point}: {schema.revision(database)}")
        assert schema.revision(database) == schema.head()
        done = migrate(bare)
        assert done.returncode == 0, done.stderr
        schema.require_head(database)
        after = rows(database)
        for table, found in before.items():
            assert [{name: row[name] for name in found[0]} for row in after[table]] == found, table
        schema.drift(bare)


def later() -> int:
    """How many revisions came after the oldest."""
    known = {
        script.revision for script in schema.ScriptDirectory.from_config(schema.alembic_config("")).walk_revisions()
    }
    return len(known - {OLDEST})


@pytest.mark.long
def test_a_first_migration_that_is_killed(bare: Settings) -> None:
    """Case 42. At each revision. Nothing was there before, so nothing is lost; nothing half-made is in the way."""
    for number in range(1 + later()):
        assert migrate(bare, f"migrate.revision:{number + 1}").returncode == -9
        with contextlib.closing(Database(bare.database)) as database:
            assert schema.revision(database) is None
    done = migrate(bare)
    assert done.returncode == 0, done.stderr
    schema.drift(bare)


def test_a_database_of_a_newer_program(bare: Settings) -> None:
    """Case 42. Left as it is, and said which of the two is to be upgraded."""
    schema.upgrade(bare)
    with contextlib.closing(Database(bare.database)) as database:
        with database.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        refused = migrate(bare)
        assert refused.returncode == 1
        said = " ".join(refused.stderr.split())
        assert "(9999) is newer than this program" in said
        assert "upgrade the program" in said
        assert schema.revision(database) == "9999"
        with TestClient(create_app(bare)) as client:
            assert client.get("/readyz").json()["reasons"] == ["schema is not current; run tunesmith migrate"]


def test_nothing_starts_on_an_older_schema(
    settings: Settings, database: Database, worker: Any, service: ApiProcess, api: TestClient, until: Any
) -> None:
    """Case 42. Neither the API nor a worker, and both say what is to be done; after it they start."""
    command.downgrade(schema.alembic_config(settings.database), "-1")
    old = schema.revision(database)
    service.spawn()
    worker.start()
    reason = "the database's schema is not this program's; run tunesmith migrate"
    assert service.ended(40) == 1
    assert f"the API does not start: {reason}" in service.log()
    assert worker.process.wait(40) == 1
    assert f"the worker does not start: {reason}" in worker.log()
    assert schema.revision(database) == old
    done = migrate(settings)
    assert done.returncode == 0, done.stderr
    service.start()
    worker.start()
    job_id = api.post("/jobs", json={"type": "sleepy"}).json()["id"]
    until(job_id, "succeeded")
    worker.ends_well()
