"""The command line against a real API on a real port; what a program reads is JSON, what fails exits 1 and says why."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from typer.testing import CliRunner, Result

from app.cli import app
from app.db import Database
from app.deployments import replicas
from app.deployments.rollout import Rollouts
from app.models import Deployment, Job, Slot, Worker
from app.queue import SilentDoorbell
from app.settings import Settings
from app.specs import DeploymentOptions
from app.states import DeploymentState
from app.storage import Storage
from tests.artifacts import publish
from tests.deployed import add_deployment, engine_of
from tests.support import GOOD_JSONL, make_lora_folder, make_model_folder, wait_for


def test_a_command_begins_with_little() -> None:
    """What only the service needs takes longer to import than any answer takes to come."""
    heavy = ("alembic", "celery", "fastapi", "num2words", "openai", "redis", "sqlalchemy")
    code = f"import sys, app.cli; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.fixture
def service(api_url: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_URL", api_url)
    monkeypatch.setenv("TUNESMITH_API_KEY", key)


@pytest.fixture
def cli(service: None) -> Callable[..., Result]:
    def cli(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return cli


def test_submit_list_show_cancel(cli: Callable[..., Result], tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("type: sleepy\nexperiment_name: 20241201\n")
    job = json.loads(cli("submit", spec, "--json").stdout)
    assert (job["status"], job["experiment_name"]) == ("queued", "20241201")
    assert json.loads(cli("jobs", "list", "--json").stdout)["data"][0]["id"] == job["id"]
    assert job["id"] in cli("jobs", "list").stdout
    assert json.loads(cli("jobs", "show", job["id"]).stdout) == job
    assert "cancelled" in cli("jobs", "cancel", job["id"]).stdout
    again = cli("jobs", "cancel", job["id"])
    assert again.exit_code == 1
    assert "error: the job is cancelled" in again.stderr
    assert cli("jobs", "follow", job["id"]).exit_code == 1


def test_a_bad_spec_says_what_and_how(cli: Callable[..., Result], tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"type": "sleepy", "secnds": 1}))
    result = cli("submit", spec)
    assert result.exit_code == 1
    assert "secnds is not a field here" in result.stderr
    assert "hint: Did you mean seconds?" in result.stderr


def test_files(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD_JSONL)
    uploaded = json.loads(cli("files", "upload", path, "--json").stdout)
    assert (uploaded["rows"], uploaded["format"]) == (1, "messages")
    assert json.loads(cli("files", "list", "--json").stdout)["data"] == [uploaded]
    path.write_text("{}\n")
    result = cli("files", "upload", path)
    assert result.exit_code == 1
    assert "line 1" in result.stderr


def test_train_from_a_config(cli: Callable[..., Result], tmp_path: Path, models: Path) -> None:
    """Dataset paths are the caller's: they are uploaded. Flags override, with hyphens or underscores."""
    (tmp_path / "data.jsonl").write_bytes(GOOD_JSONL)
    config = tmp_path / "config.yaml"
    block: dict[str, Any] = {"model": {"model_name_or_path": str(models / "tiny")}, "dataset": {"file": "data.jsonl"}}
    config.write_text(json.dumps(block))
    for flag in ("--experiment-name", "--experiment_name"):
        result = cli("train", "--config", config, "--algorithm", "sft", flag, "mine", "--json")
        assert result.exit_code == 0, result.stderr
        job = json.loads(result.stdout)
        assert (job["type"], job["algorithm"], job["experiment_name"]) == ("train", "sft", "mine")
        assert job["spec"]["dataset"]["file"].startswith("file-")
    config.write_text(json.dumps({**block, "dataset": {"file": "missing.jsonl"}}))
    result = cli("train", "--config", config, "--algorithm", "sft")
    assert result.exit_code == 1
    assert "there is no file" in result.stderr
    assert cli("train", "--config", tmp_path / "none.yaml").exit_code == 1


@pytest.mark.parametrize("field", ["tool_call_parser", "reasoning_parser"])
def test_deploy_with_a_parser_that_nobody_has(cli: Callable[..., Result], models: Path, field: str) -> None:
    for flag in (f"--{field}", f"--{field.replace('_', '-')}"):
        result = cli("deploy", models / "tiny", flag, "plugin.py")
        assert result.exit_code == 1
        assert field in result.stderr


def test_flags_override_the_config(cli: Callable[..., Result], tmp_path: Path, models: Path) -> None:
    """Paths in the config are seen from the config; the rest of the spec can be set too."""
    for name in ("data.jsonl", "held.jsonl"):
        (tmp_path / name).write_bytes(GOOD_JSONL)
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {model_name_or_path: org/other, use_peft: true}\nexperiment_name: 20241201\n"
        "dataset: data.jsonl\ntraining: {max_steps: 9, learning_rate: 2e-4}\n"
    )
    changes = [
        "--model",
        "models/tiny/",
        "--eval_dataset",
        "held.jsonl",
        "--max-steps",
        "3",
        "--set",
        "training.seed=7",
    ]
    with contextlib.chdir(tmp_path):
        result = cli("train", *changes, "--set", "metadata={team: support}", "--json")
    assert result.exit_code == 0, result.stderr
    job = json.loads(result.stdout)
    assert (job["algorithm"], job["experiment_name"]) == ("sft", "20241201")
    assert job["resolved_spec"]["model"]["model_name_or_path"] == str(models / "tiny")
    assert job["spec"]["dataset"].keys() == {"file", "eval_file"}
    training = job["spec"]["training"]
    assert (training["max_steps"], training["seed"], training["learning_rate"]) == (3, 7, 2e-4)
    assert job["metadata"] == {"team": "support"}
    for wrong, words in (("seed", "has no value"), ("experiment_name.x=1", "experiment_name is not a mapping")):
        result = cli("train", "--config", config, "--set", wrong)
        assert result.exit_code == 1
        assert words in result.stderr


def test_without_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATA_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["jobs", "list"])
    assert result.exit_code == 1
    assert "no service runs on" in result.stderr
    assert "hint: Start one with: tunesmith up" in result.stderr
    monkeypatch.setenv("TUNESMITH_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TUNESMITH_API_KEY", "ts_a_b")
    result = CliRunner().invoke(app, ["jobs", "list"])
    assert result.exit_code == 1
    assert "does not answer" in result.stderr


def test_a_wrong_key(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_API_KEY", "ts_wrong_key")
    result = cli("jobs", "list")
    assert result.exit_code == 1
    assert "the API key is not valid" in result.stderr


def test_migrate_checks_that_models_and_migrations_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATA_DIR", str(tmp_path / "data"))
    result = CliRunner().invoke(app, ["migrate", "--check", "--json"])
    assert json.loads(result.stdout)["checked"]
    assert not (tmp_path / "data" / "tunesmith.db").exists()
    assert CliRunner().invoke(app, ["migrate"]).exit_code == 0
    assert (tmp_path / "data" / "tunesmith.db").exists()


def test_workers_and_their_slots(cli: Callable[..., Result], database: Database) -> None:
    with database.write() as session:
        session.add(Worker(id="box-1", host="box", pid=1))
        session.flush()
        gpu = {"gpu": 0, "vram_gb": 24.0, "name": "RTX", "reserved": True}
        session.add(Slot(worker_id="box-1", slot_id="gpu-0", slot_class="gpu", facts=gpu))
    shown = cli("workers").stdout
    for word in ("box-1", "alive", "gpu-0", "gpu (reserved)", "RTX", "24.0"):
        assert word in shown
    assert json.loads(cli("workers", "--json").stdout)["data"][0]["slots"][0]["slot_id"] == "gpu-0"


def test_keys(cli: Callable[..., Result]) -> None:
    made = json.loads(cli("keys", "create", "bot", "--scope", "serve", "--requests-per-minute", 60, "--json").stdout)
    assert made["key"].startswith(f"ts_{made['id']}_")
    cli("keys", "limit", made["id"], "--tokens-per-minute", 500)
    listed = {row["id"]: row for row in json.loads(cli("keys", "list", "--json").stdout)["data"]}
    row = listed[made["id"]]
    assert (row["scopes"], row["requests_per_minute"], row["tokens_per_minute"]) == (["serve"], 60, 500)
    assert "bot" in cli("keys", "list").stdout
    assert cli("keys", "revoke", made["id"]).exit_code == 0
    assert "there is no key nothing" in cli("keys", "revoke", "nothing").stderr


def test_models_side_by_side_and_what_that_used(
    cli: Callable[..., Result], database: Database, run_dir: Path, settings: Settings
) -> None:
    engine = Path(__file__).parents[1] / "workers" / "fake_engine.py"
    with contextlib.ExitStack() as stack:
        for name in ("base", "tuned"):
            path = run_dir / f"{name}.sock"
            command = [sys.executable, engine, path, "ok", f"--served={name}"]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            stack.callback(process.kill)
            wait_for(path.exists)
            with database.write() as session:
                add_deployment(session, name, socket=str(path))
        result = cli("chat", "base", "--vs", "tuned", "--prompt", "hi")
        assert result.exit_code == 0, result.output
        assert result.stdout.count("Hello there, friend.") == 2
        assert result.stdout.index("base (") < result.stdout.index("tuned (")
        alone = cli("chat", "nobody", "--prompt", "hi")
        assert (alone.exit_code, alone.stdout.strip()) == (1, "")
        assert "error: the model 'nobody' is not being served" in " ".join(alone.stderr.split())
        assert "hint: GET /v1/models lists what is" in " ".join(alone.stderr.split())
        failed = cli("chat", "base", "--vs", "nobody", "--prompt", "hi")
        assert failed.exit_code == 1
        assert "Hello there, friend." in failed.stdout
        assert "'nobody' is not being served" in failed.stdout

    def used() -> dict[str, int]:
        rows = json.loads(cli("usage", "--by", "model", "--json").stdout)["data"]
        return {row["model"]: row["requests"] for row in rows}

    wait_for(lambda: used() == {"base": 2, "tuned": 1})
    assert "tuned" in cli("usage").stdout


def test_an_adapter_is_loaded_and_taken_off(
    cli: Callable[..., Result], database: Database, storage: Storage, tmp_path: Path
) -> None:
    base = publish(database, storage, make_model_folder(tmp_path / "base"), "base", "model")
    publish(database, storage, make_lora_folder(tmp_path / "lora"), "support", "adapter", base=f"artifact:{base}")
    with httpx.Client(base_url=os.environ["TUNESMITH_URL"]) as client:
        client.headers["authorization"] = f"Bearer {os.environ['TUNESMITH_API_KEY']}"
        deployment = client.post("/deployments", json={"name": "plain", "model": "base"}).json()["id"]
    loaded = json.loads(cli("deployments", "load", deployment, "support", "--json").stdout)
    assert (loaded["name"], loaded["status"]) == ("support", "waiting")
    assert cli("deployments", "load", deployment, "base").exit_code == 1
    assert "no longer served" in cli("deployments", "unload", deployment, "support").stdout
    assert cli("deployments", "unload", deployment, "support").exit_code == 1


def test_a_deployment_is_shown(cli: Callable[..., Result], database: Database) -> None:
    """By its name or its id; of several of one name the one that serves."""
    with database.write() as session:
        old = add_deployment(session, "old", status=DeploymentState.STOPPED)
        row = add_deployment(session, "plain")
        old.name = row.name
        row.options = DeploymentOptions(parity="warn", idle_timeout=600).model_dump(mode="json")
        row.parity = {"verdict": "not_measured", "reason": "it is quantised", "engine": "vllm"}
        row.last_error = {"code": "engine_died", "message": "it fell over", "hint": "Try another."}
    assert json.loads(cli("deployments", "show", "plain", "--json").stdout)["id"] == "dep-plain"
    assert json.loads(cli("deployments", "show", "dep-old", "--json").stdout)["status"] == "stopped"
    shown = cli("deployments", "show", "plain").stdout
    for words in ("ready", "auto (vllm)", "generation 1", "not_measured: it is quantised", "engine_died: it fell over"):
        assert words in shown
    assert "parity=warn" in shown
    assert "idle_timeout=600" in shown
    nobody = cli("deployments", "show", "plane")
    assert (nobody.exit_code, "there is no deployment plane" in nobody.stderr) == (1, True)
    assert cli("deployments", "show", "dep-none").exit_code == 1


def test_options_of_a_new_deployment(cli: Callable[..., Result], models: Path, database: Database) -> None:
    chosen = ("--option", "parity=warn", "--option", "idle_timeout=600")
    refused = cli("deploy", models / "tiny", *chosen, "--option", "engine=nobody")
    assert (refused.exit_code, "engine 'nobody' is unknown" in refused.stderr) == (1, True), refused.output
    assert "NAME=VALUE" in cli("deploy", models / "tiny", "--option", "parity").stderr
    assert "not YAML" in cli("deploy", models / "tiny", "--option", "parity={").stderr
    assert "model is no option" in cli("deploy", models / "tiny", "--option", "model=other").stderr

    def cancel() -> None:
        job = wait_for(lambda: [job for job in _jobs(database) if job.type == "deploy"])[0]
        assert (job.resolved_spec["parity"], job.resolved_spec["idle_timeout"]) == ("warn", 600)
        cli("jobs", "cancel", job.id)

    worker = threading.Thread(target=cancel)
    worker.start()
    assert cli("deploy", models / "tiny", *chosen, "--replicas", 2, "--option", "replicas=3").exit_code == 1
    worker.join()
    (job,) = _jobs(database)
    assert job.resolved_spec["replicas"] == 2


def _jobs(database: Database) -> list[Job]:
    with database.read() as session:
        return list(session.scalars(select(Job)))


def test_a_deployment_is_changed(cli: Callable[..., Result], database: Database) -> None:
    with database.write() as session:
        row = add_deployment(session, "duo")
        row.options = DeploymentOptions(hot_load=False).model_dump(mode="json")
    assert "--model, --replicas or --option" in cli("deployments", "update", "dep-duo").stderr
    assert "NAME=VALUE" in cli("deployments", "update", "dep-duo", "--option", "dtype").stderr
    refused = cli("deployments", "update", "dep-duo", "--replicas", 40)
    assert (refused.exit_code, "replicas" in refused.stderr) == (1, True)
    assert "duo: 2 x m" in cli("deployments", "update", "dep-duo", "--replicas", 2).stdout
    changed = cli("deployments", "update", "dep-duo", "--option", "max_model_len=64", "--no-wait", "--json")
    shown = json.loads(changed.stdout)
    assert (shown["coming"]["options"]["max_model_len"], shown["options"]["replicas"]) == (64, 2)

    def fail() -> None:
        wait_for(lambda: coming() == 32)
        error = {"code": "x", "message": "it is broken"}
        with database.write() as session:
            newest = engine_of(session, "dep-duo").id
            replicas.move(session, newest, DeploymentState.STARTING)
            replicas.move(session, newest, DeploymentState.FAILED, last_error=error)
        Rollouts(database, SilentDoorbell()).tick()

    def coming() -> Any:
        with database.read() as session:
            return (session.get_one(Deployment, "dep-duo").coming or {}).get("options", {}).get("max_model_len")

    worker = threading.Thread(target=fail)
    worker.start()
    failed = cli("deployments", "update", "dep-duo", "--option", "max_model_len=32")
    worker.join()
    assert (failed.exit_code, "it is broken" in failed.stderr) == (1, True), failed.output


def test_merge_passes_on_how_it_is_proved(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr("app.client.Client.submit", lambda _, spec: sent.append(spec))
    monkeypatch.setattr("app.commands.adapters.submitted", lambda *_: {})
    for more in ([], ["--proof-prompts", 0, "--nf4-round-trip"]):
        result = cli("merge", "--adapter-path", "numbers_lora", *more)
        assert result.exit_code == 0, result.output
    plain = {"type": "merge", "adapter": "numbers_lora"}
    assert sent == [plain, {**plain, "proof_prompts": 0, "nf4_round_trip": True}]
    assert cli("merge", "--adapter-path", "numbers_lora", "--proof-prompts", 9).exit_code == 2
