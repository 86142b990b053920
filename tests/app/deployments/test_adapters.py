"""Adapters of a deployment, without an engine: what is refused and why, names, and what a deploy job makes of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.db import Database
from app.deployments import loaded, replicas
from app.deployments.routes import Router
from app.errors import Conflict, Unavailable
from app.models import Deployment, DeploymentAdapter, Job, JobEvent, now
from app.reconciler import Reconciler
from app.states import AdapterState, DeploymentState
from app.storage import Storage
from tests.app.deployments.conftest import ADDED
from tests.artifacts import publish
from tests.deployed import engine_of, said
from tests.support import make_lora_folder, make_model_folder, on_sqlite

PROJECT = "proj-default"
THINKS = "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"


# Refusals


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3, not LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "a part of its base"),
        ({"use_qalora": True}, "QALoRA"),
        ({"task_type": "SEQ_CLS"}, "judges"),
    ],
)
@on_sqlite
def test_what_no_engine_can_load_is_refused_with_the_reason(
    add: Callable[..., Any], adapter: Callable[..., str], config: dict[str, Any], words: str
) -> None:
    answer = add(adapter(config=config))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "adapter_not_servable", "adapter")
    assert words in error["message"]
    assert "merge" in error["hint"]


@on_sqlite
def test_a_rank_that_the_engine_has_no_room_for(
    add: Callable[..., Any], adapter: Callable[..., str], api: TestClient, base: str
) -> None:
    wide = adapter(rank=65)
    assert "its rank 65 is above 64" in add(wide).json()["error"]["message"]
    body = {"name": "wide", "model": base, "max_lora_rank": 128, "adapters": [wide]}
    assert api.post("/deployments", json=body).status_code == 201
    assert api.post("/deployments", json={**body, "max_lora_rank": 65}).status_code == 400


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer.json": '{"model": {"vocab": {"b": 0}}}'}, "tokenizer"),
        ({"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": ADDED, "truncation": {}})}, None),
        ({"chat_template.jinja": "{{ other }}"}, None),
        ({"chat_template.jinja": "{{ messages }}"}, None),
        ({"chat_template.jinja": THINKS}, "opens thoughts otherwise"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "a", "template": "x"}]}'},
            "several chat templates",
        ),
        ({"chat_template.jinja": "{{ other }}", "tokenizer_config.json": '{"eos_token": "<end>"}'}, None),
        ({"chat_template.jinja": "{{ other }}", "tokenizer_config.json": '{"eos_token": "<eot>"}'}, None),
        (
            {"chat_template.jinja": "{{ other }}", "tokenizer_config.json": '{"eos_token": {"content": "<else>"}}'},
            "end with <else>",
        ),
        ({"tokenizer_config.json": '{"eos_token": "<else>"}'}, None),
    ],
)
@on_sqlite
def test_its_words_must_be_the_bases_but_for_the_template(
    add: Callable[..., Any], adapter: Callable[..., str], files: dict[str, str], words: str | None
) -> None:
    answer = add(adapter(files=files))
    if words is None:
        assert answer.status_code == 201, answer.text
    else:
        assert words in answer.json()["error"]["message"]


@on_sqlite
def test_it_must_have_been_trained_on_what_is_served(
    add: Callable[..., Any], adapter: Callable[..., str], database: Database, storage: Storage, tmp_path: Path
) -> None:
    other = "artifact:" + publish(database, storage, make_model_folder(tmp_path / "other"), "other", "model")
    assert f"it was trained on {other}" in add(adapter(on=other)).json()["error"]["message"]
    on_another = adapter("second", on=adapter("first"))
    assert "on top of another adapter" in add(on_another).json()["error"]["message"]


@on_sqlite
def test_a_deployment_that_loads_none(
    api: TestClient, adapter: Callable[..., str], database: Database, storage: Storage, tmp_path: Path, base: str
) -> None:
    tuned = publish(
        database,
        storage,
        make_model_folder(tmp_path / "t"),
        "tuned",
        "model",
        base_chain=[base, "sft:job", "merge:job"],
    )
    row = api.post("/deployments", json={"name": "t", "model": f"artifact:{tuned}"}).json()
    assert row["options"]["hot_load"] is False
    answer = api.post(f"/deployments/{row['id']}/adapters", json={"adapter": adapter()})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "wrong_state")
    assert api.post("/deployments/dep-none/adapters", json={"adapter": adapter("b")}).status_code == 404
    assert api.post("/deployments", json={"name": "x", "model": base, "adapters": [base]}).status_code == 400


# Names


def test_a_name_leads_to_one_thing(
    api: TestClient, add: Callable[..., Any], adapter: Callable[..., str], deployment: str, base: str
) -> None:
    first = add(adapter())
    assert (first.status_code, first.json()["name"]) == (201, "support")
    assert add(first.json()["adapter"]).json() == first.json(), "the same again is the same"
    other = adapter("other")
    for answer in (
        add(other, name="support"),
        add(other, name="plain"),
        api.post("/deployments", json={"name": "support", "model": base}),
        api.post("/jobs", json={"type": "deploy", "name": "support", "model": base}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "name_taken"), answer.text
    assert [entry["name"] for entry in api.get(f"/deployments/{deployment}/adapters").json()["data"]] == ["support"]
    assert api.delete(f"/deployments/{deployment}/adapters/support").status_code == 200
    assert api.delete(f"/deployments/{deployment}/adapters/support").status_code == 404
    assert add(other, name="support").status_code == 201
    assert api.delete(f"/deployments/{deployment}").status_code == 200
    assert api.post("/deployments", json={"name": "support", "model": base}).status_code == 201


def test_another_project_sees_none_of_it(
    api: TestClient, add: Callable[..., Any], adapter: Callable[..., str], deployment: str, make_key: Callable[..., str]
) -> None:
    add(adapter())
    stranger = {"authorization": f"Bearer {make_key('proj-other')}"}
    assert api.get(f"/deployments/{deployment}/adapters", headers=stranger).status_code == 404
    assert api.delete(f"/deployments/{deployment}/adapters/support", headers=stranger).status_code == 404
    assert api.get("/v1/models", headers=stranger).json()["data"] == []


def test_an_artifact_that_is_loaded_is_not_deleted(
    api: TestClient, add: Callable[..., Any], adapter: Callable[..., str]
) -> None:
    reference = adapter()
    add(reference)
    answer = api.delete(f"/artifacts/{reference.removeprefix('artifact:')}")
    assert answer.status_code == 409
    assert "the adapter support" in answer.json()["error"]["message"] + (answer.json()["error"].get("hint") or "")


def test_the_gateway_is_led_to_the_bases_engine(
    add: Callable[..., Any], adapter: Callable[..., str], deployment: str, ready: Any, database: Database
) -> None:
    router = Router(database)
    add(adapter())
    with pytest.raises(Unavailable) as caught:
        router.route_for("support", PROJECT)
    assert caught.value.code == "model_not_ready"
    ready(deployment)
    with pytest.raises(Unavailable) as caught:
        router.route_for("support", PROJECT)
    assert caught.value.code == "model_waking"
    with database.write() as session:
        row = session.get_one(DeploymentAdapter, (deployment, "support"))
        replicas.has_loaded(session, engine_of(session, deployment).id, "support", row.model)
        loaded.move(session, row, AdapterState.READY)
    route = router.route_for("support", PROJECT)
    assert (route.targets[0].socket, route.served_name, route.deployment_id) == ("/run/s", "support", deployment)
    with database.read() as session:
        used = session.get_one(DeploymentAdapter, (deployment, "support")).used_at
    assert used is not None
    router.route_for("support", PROJECT)
    with database.read() as session:
        assert session.get_one(DeploymentAdapter, (deployment, "support")).used_at == used, "never a write a request"
    with database.write() as session:
        session.execute(update(DeploymentAdapter).values(status="failed", error={"message": "it is odd"}))
    with pytest.raises(Conflict, match="it is odd"):
        router.route_for("support", PROJECT)


# Deploy jobs


def test_a_deploy_job_loads_an_adapter_into_the_base_that_runs(
    api: TestClient, adapter: Callable[..., str], deployment: str, ready: Any, reconciler: Reconciler
) -> None:
    ready(deployment)
    job_id = api.post("/jobs", json={"type": "deploy", "name": "support", "model": adapter()}).json()["id"]
    reconciler.tick()
    assert api.get(f"/jobs/{job_id}").json()["status"] == "running"
    ready(deployment, "support")
    reconciler.tick()
    job = api.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["result"]["adapter_of"], job["result"]["name"]) == ("succeeded", "plain", "support")
    assert len(api.get("/deployments").json()["data"]) == 1


@on_sqlite
def test_a_deploy_job_that_names_a_parser_gets_an_engine_with_it(
    api: TestClient, adapter: Callable[..., str], deployment: str, ready: Any, reconciler: Reconciler
) -> None:
    ready(deployment)
    body = {"type": "deploy", "model": adapter(), "tool_call_parser": "mistral"}
    api.post("/jobs", json={**body, "name": "first"})
    reconciler.tick()
    newest, _ = api.get("/deployments").json()["data"]
    assert newest["options"]["tool_call_parser"] == "mistral"
    api.post("/jobs", json={**body, "name": "second"})
    reconciler.tick()
    shown = {row["id"]: [entry["name"] for entry in row["adapters"]] for row in api.get("/deployments").json()["data"]}
    assert shown == {newest["id"]: ["first", "second"], deployment: []}


def test_where_none_runs_the_base_is_started(
    api: TestClient, adapter: Callable[..., str], base: str, reconciler: Reconciler
) -> None:
    body = {"type": "deploy", "name": "support", "model": adapter(rank=100), "max_model_len": 64}
    job_id = api.post("/jobs", json=body).json()["id"]
    reconciler.tick()
    (row,) = api.get("/deployments").json()["data"]
    assert (row["name"], row["model"]) == ("base", base)
    assert (row["options"]["max_lora_rank"], row["options"]["max_model_len"]) == (128, 64)
    assert [entry["name"] for entry in row["adapters"]] == ["support"]
    assert api.post(f"/jobs/{job_id}/cancel").status_code == 202
    reconciler.tick()
    assert api.get(f"/jobs/{job_id}").json()["status"] == "cancelled"
    assert api.get(f"/deployments/{row['id']}").json()["status"] == "stopped", "nobody else had anything of it"


def test_a_base_that_sleeps_is_woken_for_it(
    api: TestClient,
    adapter: Callable[..., str],
    base: str,
    ready: Any,
    reconciler: Reconciler,
    database: Database,
) -> None:
    row = api.post("/deployments", json={"name": "plain", "model": base, "idle_timeout": 60}).json()
    ready(row["id"])
    with database.write() as session:
        assert said(session, row["id"], DeploymentState.SLEEPING, socket=None)
        session.execute(update(Job).where(Job.type == "serve").values(paused_at=now()))
    answer = api.post(f"/deployments/{row['id']}/adapters", json={"adapter": adapter("quiet")})
    assert answer.status_code == 201
    assert api.get(f"/deployments/{row['id']}").json()["status"] == "sleeping", "to be there at the next request"
    job_id = api.post("/jobs", json={"type": "deploy", "name": "support", "model": adapter()}).json()["id"]
    reconciler.tick()
    assert api.get(f"/deployments/{row['id']}").json()["status"] == "queued"
    with database.read() as session:
        assert session.scalars(select(Job.paused_at).where(Job.type == "serve")).all() == [None]
    assert api.get(f"/jobs/{job_id}").json()["status"] == "running"


def test_what_cannot_be_loaded_is_merged_first_and_the_job_says_why(
    api: TestClient, adapter: Callable[..., str], reconciler: Reconciler, database: Database
) -> None:
    job_id = api.post("/jobs", json={"type": "deploy", "name": "s", "model": adapter(config={"use_dora": True})}).json()
    job_id = job_id["id"]
    reconciler.tick()
    job = api.get(f"/jobs/{job_id}").json()
    (merge,) = api.get("/jobs?type=merge").json()["data"]
    assert (job["status"], job["hold_reason"], job["depends_on"]) == ("queued", "dependency", [merge["id"]])
    assert merge["resolved_spec"]["output_name"] == "s_merged"
    with database.read() as session:
        event = session.scalars(
            select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.code == "merged_first")
        ).one()
    assert "DoRA" in event.message
    assert api.get("/deployments").json()["data"] == []


def test_what_the_engine_refuses_is_merged_after_all(
    api: TestClient,
    adapter: Callable[..., str],
    deployment: str,
    ready: Any,
    reconciler: Reconciler,
    database: Database,
) -> None:
    ready(deployment)
    job_id = api.post("/jobs", json={"type": "deploy", "name": "support", "model": adapter()}).json()["id"]
    reconciler.tick()
    with database.write() as session:
        session.execute(update(DeploymentAdapter).values(status="failed", error={"message": "odd modules"}))
    reconciler.tick()
    job = api.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["hold_reason"]) == ("queued", "dependency")
    assert api.get(f"/deployments/{deployment}/adapters").json()["data"] == []


def test_an_adapter_of_the_output_layer_is_merged(
    add: Callable[..., Any], database: Database, storage: Storage, base: str, tmp_path: Path
) -> None:
    """Engines keep that layer as it is: the log-probabilities that they tell of a prompt know nothing of adapters."""
    folder = make_lora_folder(tmp_path / "head")
    weights = folder / "adapter_model.safetensors"
    # As long a name as the one that it replaces: the header's length stands before it.
    weights.write_bytes(
        weights.read_bytes().replace(b"model.model.layers.0.self_attn.q_proj.", b"model.lm_head." + b"default." * 3)
    )
    answer = add("artifact:" + publish(database, storage, folder, "head", "adapter", base=base))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_not_servable")
    assert "output layer" in answer.json()["error"]["message"]


def test_then_deploy_needs_no_merge(api: TestClient, file_id: str, base: str) -> None:
    body = {
        "type": "train",
        "algorithm": "sft",
        "experiment_name": "quick",
        "model": {"model_name_or_path": base},
        "dataset": {"file": file_id},
        "then": ["deploy"],
    }
    answer = api.post("/jobs", json=body)
    assert answer.status_code == 201, answer.text
    (deploy,) = api.get("/jobs?type=deploy").json()["data"]
    assert deploy["resolved_spec"]["model"] == f"job:{answer.json()['id']}"
    assert api.get("/jobs?type=merge").json()["data"] == []


def test_rows_go_with_their_deployment(
    api: TestClient, add: Callable[..., Any], adapter: Callable[..., str], deployment: str, database: Database
) -> None:
    add(adapter())
    with database.write() as session:
        assert said(session, deployment, DeploymentState.FAILED)
    with database.read() as session:
        assert session.scalars(select(DeploymentAdapter)).all() == []
        assert session.get_one(Deployment, deployment).status == "failed"
        assert session.scalars(select(Job.type)).all() == ["serve"]
