"""How a model is spoken to: whether its calls of tools can be read, and an adapter's own chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.deployments import loaded, replicas
from app.deployments.manners import Manner, Manners
from app.deployments.routes import Route, Router, Target
from app.models import Deployment, DeploymentAdapter
from app.settings import Settings
from app.states import AdapterState, DeploymentState
from tests.deployed import engine_of, said
from tests.support import on_sqlite

pytestmark = on_sqlite
HERMES = '<tool_call>\n{"name": "{{ call.name }}"}\n</tool_call>'


@pytest.fixture
def manners(database: Database, settings: Settings) -> Manners:
    return Manners(database, settings)


def to(deployment_id: str, adapter: str | None = None) -> Route:
    return Route((Target("job-1", "/s"),), "m", deployment_id, 1, adapter)


def deployed(api: TestClient, models: Path, **options: str) -> str:
    answer = api.post("/deployments", json={"name": "support", "model": str(models / "tiny"), **options})
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
def test_by_the_template(api: TestClient, models: Path, manners: Manners, files: dict[str, str], reads: bool) -> None:
    for name, text in files.items():
        (models / "tiny" / name).write_text(text)
    assert manners.look_up(to(deployed(api, models))) == Manner(reads)


@pytest.mark.parametrize(
    ("template", "parser", "reads"),
    [("{{ messages }}", "mistral", True), (HERMES, "none", False), (HERMES, "auto", True)],
)
def test_a_parser_that_was_named_takes_the_place_of_the_familys(
    api: TestClient, models: Path, manners: Manners, template: str, parser: str, reads: bool
) -> None:
    (models / "tiny" / "chat_template.jinja").write_text(template)
    assert manners.look_up(to(deployed(api, models, tool_call_parser=parser))) == Manner(reads)


def test_another_engine_decides_for_itself(api: TestClient, models: Path, manners: Manners, database: Database) -> None:
    deployment_id = deployed(api, models)
    with database.write() as session:
        row = session.get_one(Deployment, deployment_id)
        row.options = {**row.options, "engine": "mine"}
    assert manners.look_up(to(deployment_id)).reads_tools
    assert manners.look_up(to("dep-unknown")).reads_tools


def test_transformers_reads_no_calls_of_any_template(api: TestClient, models: Path, manners: Manners) -> None:
    (models / "tiny" / "chat_template.jinja").write_text(HERMES)
    assert manners.look_up(to(deployed(api, models, engine="transformers"))) == Manner(reads_tools=False)


def test_a_request_with_tools_is_refused_before_the_engine_is_asked(
    api: TestClient, models: Path, database: Database
) -> None:
    deployment_id = deployed(api, models)
    with database.write() as session:
        said(session, deployment_id, DeploymentState.STARTING)
        said(session, deployment_id, DeploymentState.READY, socket="/nowhere.sock")
    body: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}
    tool = {"type": "function", "function": {"name": "look"}}
    answer = api.post("/v1/chat/completions", json={**body, "tools": [tool]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "tools_not_supported")
    assert api.post("/v1/chat/completions", json=body).json()["error"]["code"] == "model_not_ready"


@pytest.mark.parametrize(
    ("bases", "own", "expected"),
    [
        ("{{ messages }}", None, Manner(False, None)),
        ("{{ messages }}", "{{ messages }}", Manner(False, None)),
        (HERMES, None, Manner(True, None)),
        (HERMES, "{{ other }}", Manner(False, "{{ other }}")),
        (HERMES, HERMES + "!", Manner(True, HERMES + "!")),
        (HERMES, "[TOOL_CALLS]", Manner(False, "[TOOL_CALLS]")),
        ("{{ messages }}", HERMES, Manner(False, HERMES)),
    ],
)
def test_an_adapter_has_its_own_template_and_the_engines_parser(
    add: Callable[..., Any],
    adapter: Callable[..., str],
    deployment: str,
    ready: Callable[..., None],
    database: Database,
    settings: Settings,
    tmp_path: Path,
    manners: Manners,
    bases: str,
    own: str | None,
    expected: Manner,
) -> None:
    with database.read() as session:
        model = session.get_one(Deployment, deployment).artifact_id
    (settings.data_dir / "artifacts" / str(model) / "chat_template.jinja").write_text(bases)
    added = add(adapter(files={} if own is None else {"chat_template.jinja": own}))
    assert added.status_code == 201, added.text
    ready(deployment, "support")
    route = Router(database).route_for("support", "proj-default")
    assert route.adapter == added.json()["adapter"]
    assert manners.remembered(route) is None
    assert manners.look_up(route) == manners.remembered(route) == expected
    base = Router(database).route_for("plain", "proj-default")
    assert manners.look_up(base) == Manner(bases == HERMES), "the base's own is no business of a request"


def test_another_adapter_under_the_same_name_has_another_template(
    api: TestClient,
    add: Callable[..., Any],
    adapter: Callable[..., str],
    deployment: str,
    ready: Callable[..., None],
    database: Database,
    manners: Manners,
) -> None:
    templates = []
    for number, name in enumerate(("first", "second")):
        assert add(adapter(name, files={"chat_template.jinja": f"{{{{ {name} }}}}"}), name="x").status_code == 201
        if number == 0:
            ready(deployment, "x")
        else:
            with database.write() as session:
                row = session.get_one(DeploymentAdapter, (deployment, "x"))
                replicas.has_loaded(session, engine_of(session, deployment).id, "x", row.model)
                assert loaded.move(session, row, AdapterState.READY)
        templates.append(manners.look_up(Router(database).route_for("x", "proj-default")).template)
        assert api.delete(f"/deployments/{deployment}/adapters/x").status_code == 200
    assert templates == ["{{ first }}", "{{ second }}"]
