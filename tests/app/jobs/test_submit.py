"""From a body to rows: defaults, follow-ups, pinned references, older names, idempotency."""

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db import Database
from app.discovery import discover
from app.errors import AppError
from app.jobs.intake import read_spec
from app.main import create_app
from app.models import Job, JobDependency
from app.settings import Settings
from tests.support import make_adapter_folder, make_model_folder, on_sqlite, train_spec


def test_a_job_is_queued_with_every_default_filled_in(api: TestClient, spec: dict[str, Any]) -> None:
    answer = api.post("/jobs", json=spec)
    assert answer.status_code == 201
    job = answer.json()
    assert job["id"].startswith("ftjob-")
    assert (job["status"], job["queue_position"], job["attempt"], job["depends_on"]) == ("queued", 1, 0, [])
    assert job["spec"] == spec
    resolved = job["resolved_spec"]
    assert resolved["model"]["peft_config"]["lora_alpha"] == 32
    assert resolved["training"]["learning_rate"] == 2e-4
    assert resolved["training"]["num_train_epochs"] == 3.0
    assert api.get(f"/jobs/{job['id']}").json() == job
    (event,) = api.get(f"/jobs/{job['id']}/events").json()["data"]
    assert (event["seq"], event["code"], event["data"]["to"]) == (1, "job_queued", "queued")


@on_sqlite
def test_a_full_fine_tune_learns_slower(api: TestClient, spec: dict[str, Any]) -> None:
    spec["model"]["use_peft"] = False
    resolved = api.post("/jobs", json=spec).json()["resolved_spec"]
    assert resolved["training"]["learning_rate"] == 2e-5
    assert resolved["model"]["peft_config"] is None


@on_sqlite
@pytest.mark.parametrize(
    ("peft", "expected"),
    [
        ({"preset": "conservative"}, (8, 16, 0.1)),
        ({"preset": "aggressive"}, (32, 64, 0.05)),
        ({"preset": "balanced", "r": 4}, (4, 32, 0.1)),
        ({"r": 4}, (4, 8, 0.1)),
    ],
)
def test_presets(api: TestClient, spec: dict[str, Any], peft: dict[str, Any], expected: tuple[Any, ...]) -> None:
    spec["model"]["peft_config"] = peft
    got = api.post("/jobs", json=spec).json()["resolved_spec"]["model"]["peft_config"]
    assert (got["r"], got["lora_alpha"], got["lora_dropout"]) == expected


@on_sqlite
@pytest.mark.parametrize("preset", [{}, [], ["balanced"], 1, "bold"])
def test_what_is_no_preset(api: TestClient, spec: dict[str, Any], preset: Any) -> None:
    spec["model"]["peft_config"] = {"preset": preset}
    answer = api.post("/jobs", json=spec)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model.peft_config.preset")


@on_sqlite
def test_a_name_is_made_up(api: TestClient, spec: dict[str, Any]) -> None:
    del spec["experiment_name"]
    name = api.post("/jobs", json=spec).json()["experiment_name"]
    assert name.startswith("sft_tiny_lora_r16_alpha32_20")
    assert len(name.rpartition("_")[2]) == 8


def test_a_model_without_a_chat_template_learns_prompts_and_preferences(
    api: TestClient, spec: dict[str, Any], models: Path, upload: Callable[..., Any]
) -> None:
    (models / "tiny" / "tokenizer_config.json").write_text("{}")
    assert api.post("/jobs", json=spec).status_code == 400
    pairs = upload(b'{"prompt": "2 + 2 =", "completion": " four"}\n').json()["id"]
    assert api.post("/jobs", json={**spec, "dataset": {"file": pairs}}).status_code == 201
    assert api.post("/jobs", json={**spec, "algorithm": "dpo"}).status_code == 201
    (models / "tiny" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert api.post("/jobs", json=spec).status_code == 201


def test_follow_ups_are_jobs_of_their_own(api: TestClient, spec: dict[str, Any]) -> None:
    train = api.post("/jobs", json={**spec, "then": ["merge", "validate", "deploy"], "priority": 5}).json()
    deploy, validate, merge, first = api.get("/jobs").json()["data"]
    assert first["id"] == train["id"]
    assert [job["type"] for job in (merge, validate, deploy)] == ["merge", "validate", "deploy"]
    assert merge["depends_on"] == [train["id"]]
    assert merge["resolved_spec"]["adapter"] == f"job:{train['id']}"
    assert merge["resolved_spec"]["output_name"] == "run_merged"
    assert validate["resolved_spec"]["model"] == f"job:{merge['id']}"
    assert set(validate["depends_on"]) == {merge["id"]}
    assert deploy["resolved_spec"]["name"] == "run"
    assert set(deploy["depends_on"]) == {merge["id"], validate["id"]}
    for job in (merge, validate, deploy):
        assert (job["hold_reason"], job["queue_position"], job["priority"]) == ("dependency", None, 5)


def test_follow_ups_fall_with_their_parent(api: TestClient, spec: dict[str, Any]) -> None:
    train = api.post("/jobs", json={**spec, "then": ["merge", "validate", "deploy"]}).json()
    api.post(f"/jobs/{train['id']}/cancel")
    jobs = api.get("/jobs").json()["data"]
    assert [job["status"] for job in jobs] == ["cancelled"] * 4
    assert [job["error"]["code"] for job in jobs[:3]] == ["dependency_failed"] * 3


@on_sqlite
def test_a_full_model_is_validated_and_deployed_without_a_merge(api: TestClient, spec: dict[str, Any]) -> None:
    spec["model"]["use_peft"] = False
    train = api.post("/jobs", json={**spec, "then": ["validate", "deploy"]}).json()
    deploy, validate, _ = api.get("/jobs").json()["data"]
    assert validate["resolved_spec"]["model"] == deploy["resolved_spec"]["model"] == f"job:{train['id']}"


def test_a_job_waits_for_the_job_that_it_names(api: TestClient, spec: dict[str, Any]) -> None:
    train = api.post("/jobs", json=spec).json()
    merge = api.post("/jobs", json={"type": "merge", "adapter": f"job:{train['id']}"}).json()
    assert merge["depends_on"] == [train["id"]]
    assert merge["hold_reason"] == "dependency"


@on_sqlite
def test_a_merge_into_a_quantised_base_is_refused_with_its_sibling(api: TestClient, models: Path) -> None:
    make_adapter_folder(models / "adapter")
    make_model_folder(models / "Tiny-1B-AWQ")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (models / "Tiny-1B-AWQ" / "config.json").write_text(json.dumps(config))
    spec = {"type": "merge", "adapter": str(models / "adapter"), "base_model": str(models / "Tiny-1B-AWQ")}
    error = api.post("/jobs", json=spec).json()["error"]
    assert (error["code"], error["param"]) == ("quantised_base", "base_model")
    assert "stored quantised (awq)" in error["message"]
    assert error["hint"].endswith("Tiny-1B.")


@on_sqlite
def test_an_adapter_field_takes_only_an_adapter(api: TestClient, models: Path) -> None:
    make_adapter_folder(models / "adapter")
    spec = {"type": "merge", "base_model": str(models / "tiny")}
    answer = api.post("/jobs", json={**spec, "adapter": str(models / "tiny")})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "adapter_invalid"
    assert api.post("/jobs", json={**spec, "adapter": str(models / "adapter")}).status_code == 201


@on_sqlite
@pytest.mark.parametrize(
    ("reference", "pinned"),
    [
        ("Qwen/Qwen2.5-0.5B", "hub:Qwen/Qwen2.5-0.5B"),
        ("hub:Qwen/Qwen2.5-0.5B@main", "hub:Qwen/Qwen2.5-0.5B@main"),
        ("gpt2", "hub:gpt2"),
        ("{models}/tiny/", "{models}/tiny"),
        ("{models}/x/../tiny", "{models}/tiny"),
    ],
)
def test_references_are_pinned(
    api: TestClient, spec: dict[str, Any], models: Path, reference: str, pinned: str
) -> None:
    spec["model"]["model_name_or_path"] = reference.format(models=models)
    resolved = api.post("/jobs", json=spec).json()["resolved_spec"]
    assert resolved["model"]["model_name_or_path"] == pinned.format(models=models)


@on_sqlite
def test_a_revision_is_pinned_too(api: TestClient, spec: dict[str, Any]) -> None:
    spec["model"] = {"model_name_or_path": "org/name", "revision": "abc123"}
    resolved = api.post("/jobs", json=spec).json()["resolved_spec"]
    assert resolved["model"]["model_name_or_path"] == "hub:org/name@abc123"
    spec["model"]["revision"] = "../../etc"
    assert api.post("/jobs", json=spec).status_code == 400


# Older names


@on_sqlite
@pytest.mark.parametrize(
    ("block", "old", "value", "new"),
    [
        ("training", "evaluation_strategy", "no", "eval_strategy"),
        ("training", "warmup_ratio", 0.1, "warmup_steps"),
        ("training", "max_seq_length", 64, "max_length"),
        ("model", "torch_dtype", "float16", "dtype"),
    ],
)
def test_an_older_name_works_and_is_told(
    api: TestClient, spec: dict[str, Any], block: str, old: str, value: Any, new: str
) -> None:
    spec[block][old] = value
    job = api.post("/jobs", json=spec).json()
    assert job["resolved_spec"][block][new] == value
    assert job["spec"][block][old] == value
    warning = api.get(f"/jobs/{job['id']}/events").json()["data"][0]
    assert (warning["code"], warning["level"]) == ("spec_warning", "warn")
    assert warning["message"] == f"{block}.{old} is an older name of {block}.{new}."


@on_sqlite
def test_names_without_effect_are_ignored_and_told(api: TestClient, spec: dict[str, Any]) -> None:
    names = ["output_dir", "overwrite_output_dir", "logging_dir", "save_safetensors", "run_name", "group_by_length"]
    spec["training"] |= dict.fromkeys(names, True)
    job = api.post("/jobs", json=spec).json()
    warnings = [event["message"] for event in api.get(f"/jobs/{job['id']}/events?order=asc").json()["data"][1:]]
    assert warnings == [f"training.{name} has no effect here and was ignored." for name in names]
    assert not set(names) & set(job["resolved_spec"]["training"])


# Idempotency


def test_the_same_key_and_body_give_the_same_job(api: TestClient, spec: dict[str, Any]) -> None:
    headers = {"idempotency-key": "k1"}
    body = {**spec, "then": ["merge"]}
    first = api.post("/jobs", json=body, headers=headers)
    second = api.post("/jobs", content=json.dumps(body, indent=4), headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] == second.json()["id"]
    assert len(api.get("/jobs").json()["data"]) == 2
    other = api.post("/jobs", json={**spec, "priority": 1}, headers=headers)
    assert other.status_code == 422
    error = other.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    assert api.post("/jobs", json=body, headers={"idempotency-key": "k2"}).json()["id"] != first.json()["id"]


@pytest.mark.parametrize("value", ["", "x" * 256])
@on_sqlite
def test_an_idempotency_key_of_the_wrong_length(api: TestClient, value: str) -> None:
    answer = api.post("/jobs", json={"type": "sleepy"}, headers={"idempotency-key": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "idempotency-key"


def test_the_same_key_at_the_same_moment(settings: Settings, key: str, database: Database) -> None:
    """Eight clients retry at once: one job, and everybody hears of it."""
    app = create_app(settings)
    answers: list[Any] = []
    start = threading.Barrier(8)

    with TestClient(app, headers={"authorization": f"Bearer {key}", "idempotency-key": "same"}) as client:

        def post() -> None:
            start.wait()
            answers.append(client.post("/jobs", json={"type": "sleepy"}))

        threads = [threading.Thread(target=post) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [201] * 8, [answer.text for answer in answers]
    assert len({answer.json()["id"] for answer in answers}) == 1
    with database.read() as session:
        assert len(session.scalars(select(Job)).all()) == 1
        assert session.scalars(select(JobDependency)).all() == []


def test_intake_never_raises_anything_else() -> None:
    """Whatever JSON comes, the answer is a spec or an error of ours."""
    catalog = discover(("workers.recipes", "tests.plugs"))
    values: list[Any] = [None, True, 0, -1, 1.5, "", "x", [], [1], {}, {"a": 1}, {"type": "train"}]
    good: dict[str, Any] = train_spec("a/b", "file-1", then=["merge"], metadata={"a": "b"}, resources={"gpus": 1})
    good["model"] |= {"peft_config": {"target_modules": ["a"]}, "quantization_config": {"load_in_4bit": True}}

    def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = [path] if path else []
        if isinstance(value, dict):
            for name, inner in value.items():
                found += places(inner, (*path, name))
        return found

    for path in places(good):
        for value in values:
            copy = json.loads(json.dumps(good))
            place = copy
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
            for body, media in ((json.dumps(copy), "application/json"), (yaml.safe_dump(copy), "application/yaml")):
                with contextlib.suppress(AppError):
                    read_spec(body.encode(), media, catalog)
