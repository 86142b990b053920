"""The migrations on every database: up, down, up; the same as the models; and the rules that only a database keeps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import DatabaseError

from app import schema
from app.db import Database, make_engine
from app.models import Base
from app.settings import Settings
from tests.conftest import BACKENDS

CHECKS = {
    "job": {
        "ck_job_state",
        "ck_job_running_has_worker",
        "ck_job_succeeded_has_result",
        "ck_job_finished",
        "ck_job_blocked_by",
    },
    "artifact": {"ck_artifact_kind"},
    "deployment": {"ck_deployment_desired", "ck_deployment_status"},
    "deployment_adapter": {"ck_deployment_adapter_status"},
    "deployment_replica": {"ck_deployment_replica_status"},
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bare(bare_database_url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=bare_database_url)


@pytest.fixture
def engine(bare: Settings) -> Iterator[Engine]:
    engine = make_engine(bare.database)
    yield engine
    engine.dispose()


def rules(engine: Engine) -> tuple[dict[str, set[str]], list[str]]:
    """Names of the CHECKs of each table, and of the triggers."""
    found = inspect(engine)
    checks = {
        table: {str(check["name"]) for check in found.get_check_constraints(table)} for table in found.get_table_names()
    }
    sqlite = engine.dialect.name == "sqlite"
    query = (
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        if sqlite
        else "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
    )
    with engine.connect() as connection:
        triggers = [row[0] for row in connection.execute(text(query))]
    return {table: names for table, names in checks.items() if names}, triggers


def test_up_down_and_up_again(bare: Settings, engine: Engine) -> None:
    config = schema.alembic_config(bare.database)
    for _ in range(2):
        schema.upgrade(bare)
        assert set(Base.metadata.tables) <= set(inspect(engine).get_table_names())
        assert rules(engine) == (CHECKS, ["job_final"])
        command.downgrade(config, "base")
        assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
        assert rules(engine) == ({}, [])


def test_the_models_match(bare: Settings) -> None:
    schema.upgrade(bare)
    schema.drift(bare)


def test_a_table_that_is_made_anew_loses_nothing_that_points_to_it(bare: Settings, engine: Engine) -> None:
    config = schema.alembic_config(bare.database)
    command.upgrade(config, "0003")
    rows = [
        "INSERT INTO project (id, name, created_at) VALUES ('p', 'p', '2026-01-01')",
        "INSERT INTO artifact (id, name, version, kind, bytes, sha256, base_chain, facts, project_id, created_at)"
        " VALUES ('a', 'a', 1, 'model', 1, 'x', '[]', '{}', 'p', '2026-01-01')",
        "INSERT INTO artifact_tag VALUES ('a', 'reviewed')",
        "INSERT INTO alias (project_id, name, artifact_id, moved_at, created_at)"
        " VALUES ('p', 'prod', 'a', '2026-01-01', '2026-01-01')",
    ]
    with engine.execution_options(write=True).begin() as connection:
        for row in rows:
            connection.execute(text(row))
    found = "SELECT a.kind, t.tag, n.name FROM artifact a JOIN artifact_tag t ON t.artifact_id = a.id JOIN alias n"
    for revision, kind in (("0004", "gguf"), ("0003", "report"), ("0004", "report")):
        (command.downgrade if revision == "0003" else command.upgrade)(config, revision)
        with engine.execution_options(write=True).begin() as connection:
            if kind == "gguf":
                connection.execute(text("UPDATE artifact SET kind = 'gguf'"))
            assert connection.execute(text(f"{found} ON n.artifact_id = a.id")).all() == [(kind, "reviewed", "prod")]


def test_upgrading_twice_changes_nothing(bare: Settings, engine: Engine) -> None:
    schema.upgrade(bare)
    before = rules(engine)
    schema.upgrade(bare)
    assert rules(engine) == before


def test_another_schema_is_refused(bare: Settings) -> None:
    database = Database(bare.database)
    assert not schema.at_head(database)
    with pytest.raises(schema.Unusable, match="tunesmith migrate"):
        schema.require_head(database)
    schema.upgrade(bare)
    schema.require_head(database)
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(schema.WrongSchema):
        schema.require_head(database)
    database.close()


INSERT = """
INSERT INTO job (id, type, experiment_name, spec, spec_sha256, resolved_spec, state, priority, slot_class, blocked_by,
    fence, attempt, max_attempts, hb_seq, next_seq, delay_seconds, ckpt_step, prev_attempt_step, metadata, project_id,
    created_at, finished_at, result, worker_id)
VALUES (:id, 'x', 'x', '{}', '', '{}', :state, 0, 'light', 0, 0, 0, 3, 0, 0, 0, -1, -1, '{}', 'p', '2026-01-01',
    :finished, :result, :worker)
"""


@pytest.fixture
def run(database_url: str) -> Iterator[Callable[..., None]]:
    """Plain SQL, past every guard of ours."""
    engine = make_engine(database_url)

    def run(statement: str, **values: object) -> None:
        with engine.execution_options(write=True).begin() as connection:
            connection.execute(text(statement), values)

    run("INSERT INTO project (id, name, created_at) VALUES ('p', 'p', '2026-01-01')")
    for state in ("queued", "succeeded", "failed", "cancelled"):
        finished = None if state == "queued" else "2026-01-01"
        result = "{}" if state == "succeeded" else None
        run(INSERT, id=state, state=state, finished=finished, result=result, worker=None)
    yield run
    engine.dispose()


@pytest.mark.fault
@pytest.mark.parametrize("origin", ["succeeded", "failed", "cancelled"])
def test_a_final_state_is_final_whoever_asks(run: Callable[..., None], origin: str) -> None:
    for to in {"queued", "running", "succeeded", "failed", "cancelled"} - {origin}:
        worker = "'w'" if to == "running" else "NULL"
        finished = "NULL" if to in ("queued", "running") else "finished_at"
        with pytest.raises(DatabaseError, match="terminal state"):
            run(
                f"UPDATE job SET state = '{to}', worker_id = {worker}, finished_at = {finished}, result = '{{}}' "
                f"WHERE id = '{origin}'"
            )
    run(f"UPDATE job SET hold_reason = 'still writable', state = '{origin}' WHERE id = '{origin}'")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("statement", "check"),
    [
        ("UPDATE job SET state = 'running' WHERE id = 'queued'", "ck_job_running_has_worker"),
        ("UPDATE job SET worker_id = 'w' WHERE id = 'queued'", "ck_job_running_has_worker"),
        ("UPDATE job SET state = 'failed' WHERE id = 'queued'", "ck_job_finished"),
        ("UPDATE job SET finished_at = '2026-01-01' WHERE id = 'queued'", "ck_job_finished"),
        (
            "UPDATE job SET state = 'succeeded', finished_at = '2026-01-01' WHERE id = 'queued'",
            "ck_job_succeeded_has_result",
        ),
        ("UPDATE job SET state = 'done' WHERE id = 'queued'", "ck_job_state"),
        ("UPDATE job SET blocked_by = -1 WHERE id = 'queued'", "ck_job_blocked_by"),
    ],
)
def test_rows_that_cannot_be(run: Callable[..., None], statement: str, check: str) -> None:
    with pytest.raises(DatabaseError, match=check):
        run(statement)


def test_two_live_deployments_of_one_name_cannot_be(run: Callable[..., None]) -> None:
    insert = """
    INSERT INTO deployment (id, name, model, options, desired, status, restarts, project_id, created_at)
    VALUES (:id, 'support', 'm', '{}', 'running', :status, 0, 'p', '2026-01-01')
    """
    run(insert, id="d1", status="ready")
    run(insert, id="d2", status="stopped")
    with pytest.raises(DatabaseError, match=r"uq_deployment_live_name|deployment\.name"):
        run(insert, id="d3", status="queued")
    run("UPDATE deployment SET status = 'failed' WHERE id = 'd1'")
    run(insert, id="d3", status="queued")


def test_a_deployment_that_serves_keeps_its_engine(bare: Settings, engine: Engine) -> None:
    config = schema.alembic_config(bare.database)
    command.upgrade(config, "0007")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO project (id, name, created_at) VALUES ('p', 'p', '2026-01-01')"))
        jobs = inspect(engine).get_columns("job")
        kinds = {column["name"]: column for column in jobs if not column["nullable"] and column["default"] is None}
        values = {name: _any(name, column["type"]) for name, column in kinds.items()} | {"id": "j", "project_id": "p"}
        names = ", ".join(f'"{name}"' for name in values)
        marks = ", ".join(f":{name}" for name in values)
        connection.execute(text(f"INSERT INTO job ({names}) VALUES ({marks})"), values)
        connection.execute(
            text(
                "INSERT INTO deployment (id, name, model, options, desired, status, replica_job_id, socket, restarts,"
                " project_id, created_at) VALUES"
                " ('d', 'd', 'm', '{}', 'running', 'ready', 'j', '/s', 2, 'p', '2026-01-01')"
            )
        )
    query = text("SELECT id, deployment_id, generation, status, socket, loaded, restarts FROM deployment_replica")
    for _ in range(2):
        command.upgrade(config, "0008")
        with engine.connect() as connection:
            (row,) = connection.execute(query).all()
        assert (row[:5], row[6]) == (("j", "d", 1, "ready", "/s"), 2)
        assert row[5] in ("{}", {})
        command.downgrade(config, "0007")
        with engine.connect() as connection:
            assert connection.execute(text("SELECT replica_job_id, socket FROM deployment")).one() == ("j", "/s")


def _any(name: str, kind: Any) -> Any:
    """A value that the column takes."""
    if name == "state":
        return "queued"
    if name.endswith("_at"):
        return "2026-01-01"
    if name in ("spec", "resolved_spec", "metadata"):
        return "{}"
    return {int: 0, float: 0.0, bool: False}.get(kind.python_type, "x")
