"""Whether a deployment's engine can read calls of tools: told by the model's chat template and the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments.tools import ToolTable
from app.models import Deployment
from app.settings import Settings
from tests.support import on_sqlite

pytestmark = on_sqlite
HERMES = '<tool_call>\n{"name": "{{ call.name }}"}\n</tool_call>'


@pytest.fixture
def table(database: Database, settings: Settings) -> ToolTable:
    return ToolTable(database, settings)


def deployed(api: TestClient, models: Path) -> str:
    answer = api.post("/deployments", json={"name": "support", "model": str(models / "tiny")})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize(
    ("files", "reads"),
    [
        ({}, False),
        ({"chat_template.jinja": "{{ messages }}"}, False),
        ({"chat_template.jinja": HERMES}, True),
        ({"tokenizer_config.json": json.dumps({"chat_template": HERMES})}, True),
        ({"tokenizer_config.json": "{"}, False),
    ],
)
def test_by_the_template(api: TestClient, models: Path, table: ToolTable, files: dict[str, str], reads: bool) -> None:
    for name, text in files.items():
        (models / "tiny" / name).write_text(text)
    assert table.reads_tools(deployed(api, models)) is reads


def test_another_engine_decides_for_itself(api: TestClient, models: Path, table: ToolTable, database: Database) -> None:
    deployment_id = deployed(api, models)
    with database.write() as session:
        row = session.get_one(Deployment, deployment_id)
        row.options = {**row.options, "engine": "mine"}
    assert table.reads_tools(deployment_id)
    assert table.reads_tools("dep-unknown")


def test_a_request_with_tools_is_refused_before_the_engine_is_asked(
    api: TestClient, models: Path, database: Database
) -> None:
    deployment_id = deployed(api, models)
    with database.write() as session:
        row = session.get_one(Deployment, deployment_id)
        row.status, row.socket = "ready", "/nowhere.sock"
    body: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}
    tool = {"type": "function", "function": {"name": "look"}}
    answer = api.post("/v1/chat/completions", json={**body, "tools": [tool]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "tools_not_supported")
    assert api.post("/v1/chat/completions", json=body).json()["error"]["code"] == "model_not_ready"
