"""Every refusal says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import DataError

from tests.support import train_spec


@pytest.fixture
def backend() -> str:
    return "sqlite"


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("training.max_steps", "sixty", "Write a whole number, without quotes."),
        ("training.learning_rate", "2e-4", "Write a number, without quotes."),
        ("model.use_peft", "yes", "Write true or false, without quotes."),
        ("experiment_name", 5, "Write a text, in quotes."),
        ("training", [], "Write an object: { … }."),
        ("then", "merge", "Write a list: [ … ]."),
        ("model.peft_config.target_modules", 5, "Write a list: [ … ] or a text, in quotes."),
        ("priority", 101, "Allowed: at least -100 and at most 100."),
        ("training.max_steps", 0, "Allowed: at least 1"),
        ("experiment_name", "../../etc", "Letters, digits, dots"),
        ("model.dtype", "float8", "'bfloat16'"),
        ("model.model_name_or_path", "", "Allowed: at least 1 long and at most 512 long."),
        ("metadata.team", 5, "Write a text, in quotes."),
    ],
)
def test_a_bad_value_is_told_what_is_allowed(
    api: TestClient, models: Path, file_id: str, path: str, value: Any, hint: str
) -> None:
    spec = train_spec(str(models / "tiny"), file_id)
    place = spec
    *parents, last = path.split(".")
    for step in parents:
        place = place.setdefault(step, {})
    place[last] = value
    error = api.post("/jobs", json=spec).json()["error"]
    assert error["param"] == path
    assert hint in error["hint"]


def test_a_missing_field_is_described(api: TestClient, models: Path, file_id: str) -> None:
    spec = train_spec(str(models / "tiny"), file_id)
    del spec["dataset"]["file"]
    error = api.post("/jobs", json=spec).json()["error"]
    assert (error["code"], error["hint"]) == ("missing_field", "Add dataset.file. Id of an uploaded file.")


@pytest.mark.parametrize(
    ("media", "body"),
    [
        ("application/json", b'{"type": "sleepy", "seconds": 1e999}'),
        ("application/json", b'{"type": "sleepy", "metadata": {"a": [1, {"b": -1e999}]}}'),
        ("application/yaml", b"type: sleepy\nseconds: 1e999\n"),
        ("application/yaml", b'type: sleepy\nmarker: "a\\0b"\n'),
    ],
)
def test_what_no_database_can_hold(api: TestClient, media: str, body: bytes) -> None:
    answer = api.post("/jobs", content=body, headers={"content-type": media})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_value"
    assert answer.json()["error"]["hint"]


def test_an_infinity_in_a_field_that_has_no_effect(api: TestClient, models: Path, file_id: str) -> None:
    """It would be kept in the submitted spec."""
    spec = json.dumps(train_spec(str(models / "tiny"), file_id, training={"max_steps": 2, "logging_dir": 0.5}))
    body = spec.replace("0.5", "1e999").encode()
    answer = api.post("/jobs", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


def test_a_value_that_only_the_database_refuses(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise DataError("INSERT", {}, ValueError("secret"))

    monkeypatch.setattr("app.files.service.listing", refuse)
    answer = api.get("/files")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert answer.json()["error"]["hint"]
    assert "secret" not in answer.text


def test_bad_requests_have_a_hint(api: TestClient, upload: Callable[..., Any]) -> None:
    many = {f"field{number}": "x" for number in range(9)}
    answers = [
        api.get("/files/file-none"),
        api.get("/artifacts/art-none"),
        api.get("/files/%00"),
        api.get("/jobs", headers={"x-much": "x" * (40 << 10)}),
        api.post("/jobs", content=b"a: [", headers={"content-type": "application/yaml"}),
        api.post("/jobs", content=b"[" * 10_000, headers={"content-type": "application/json"}),
        api.post("/files"),
        api.post("/files", content=b"x", headers={"content-type": "multipart/form-data"}),
        api.post("/files", content=b"x", headers={"content-type": "multipart/form-data; boundary=b"}),
        api.post("/files", files={"purpose": ("a.txt", b"x")}),
        upload(**many),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"].get("hint"), answer.text
