"""Bases and adapters as artifacts, a deployment without an engine, and what a worker would say of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments import loaded, replicas
from app.discovery import discover
from app.jobs import claims
from app.models import DeploymentAdapter
from app.queue import SilentDoorbell
from app.reconciler import Reconciler
from app.settings import Settings
from app.states import AdapterState, DeploymentState
from app.storage import Storage
from tests.app.deployments.stage import Stage
from tests.artifacts import publish
from tests.deployed import engine_of, said
from tests.support import make_lora_folder, make_model_folder

ADDED = [{"id": 1, "content": "<eot>"}, {"id": 2, "content": "<else>"}]


@pytest.fixture
def base(database: Database, storage: Storage, tmp_path: Path) -> str:
    folder = make_model_folder(tmp_path / "base")
    whole = {"model": {"vocab": {"a": 0}}, "added_tokens": ADDED, "truncation": None}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return "artifact:" + publish(database, storage, folder, "base", "model")


@pytest.fixture
def adapter(database: Database, storage: Storage, base: str, tmp_path: Path) -> Callable[..., str]:
    """``adapter(name, config=…, rank=…, files={…}, base=…)``: its reference."""

    def adapter(
        name: str = "support",
        *,
        config: dict[str, Any] | None = None,
        rank: int = 2,
        files: dict[str, str] | None = None,
        on: str | None = None,
        **facts: Any,
    ) -> str:
        folder = make_lora_folder(tmp_path / f"{name}-folder", rank, config)
        for file, text in (files or {}).items():
            (folder / file).write_text(text)
        return "artifact:" + publish(database, storage, folder, name, "adapter", base=on or base, **facts)

    return adapter


@pytest.fixture
def deployment(api: TestClient, base: str) -> str:
    answer = api.post("/deployments", json={"name": "plain", "model": base})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def add(api: TestClient, deployment: str) -> Callable[..., Any]:
    def add(reference: str, **fields: Any) -> Any:
        return api.post(f"/deployments/{deployment}/adapters", json={"adapter": reference, **fields})

    return add


@pytest.fixture
def reconciler(settings: Settings, database: Database) -> Reconciler:
    return Reconciler(settings, database, discover(settings.packages), SilentDoorbell())


@pytest.fixture
def ready(database: Database) -> Callable[..., None]:
    """``ready(deployment, *adapters)``: as a worker would say it."""

    def ready(deployment_id: str, *names: str) -> None:
        with database.write() as session:
            claims.claim(session, "w", "serve-0", ["serve"])
            said(session, deployment_id, DeploymentState.STARTING)
            said(session, deployment_id, DeploymentState.READY, socket="/run/s")
            for name in names:
                row = session.get_one(DeploymentAdapter, (deployment_id, name))
                replicas.has_loaded(session, engine_of(session, deployment_id).id, name, row.model)
                assert loaded.move(session, row, AdapterState.READY)

    return ready


@pytest.fixture
def stage(api: TestClient, database: Database, settings: Settings, reconciler: Reconciler) -> Stage:
    return Stage(api, database, settings, reconciler)


@pytest.fixture
def model(models: Path) -> str:
    return str(models / "tiny")


@pytest.fixture
def other(models: Path) -> str:
    return str(make_model_folder(models / "other"))
