"""Exports that cannot work are refused when they are submitted; what an export leaves is no model."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import gguf
from app.db import Database
from app.models import DEFAULT_PROJECT, Artifact
from app.settings import Settings
from tests.support import make_adapter_folder, make_model_folder, on_sqlite, train_spec

pytestmark = on_sqlite
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = next(pattern for pattern, name in gguf._SPLITS.items() if name == "llama-bpe")


def tokenizer(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []} | changes.pop("model", {})
    return {"model": model, "normalizer": None, "pre_tokenizer": BYTES, **changes}


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [cut, {**BYTES, "use_regex": False}]}


def refused(api: TestClient, **spec: Any) -> dict[str, Any]:
    answer = api.post("/jobs", json={"type": "export", **spec})
    assert answer.status_code == 400, answer.text
    assert api.get("/jobs").json()["data"] == []
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.fixture
def model(models: Path) -> Path:
    (models / "tiny" / "tokenizer.json").write_text(json.dumps(tokenizer()))
    return models / "tiny"


def test_an_export_is_stored_with_its_defaults(api: TestClient, model: Path) -> None:
    job = api.post("/jobs", json={"type": "export", "model": str(model)}).json()
    assert {name: job["resolved_spec"][name] for name in ("model", "format", "outtype")} == {
        "model": str(model),
        "format": "gguf",
        "outtype": "f16",
    }


def test_artifact_is_another_name_of_the_field(api: TestClient, model: Path) -> None:
    answer = api.post("/jobs", json={"type": "export", "artifact": str(model)})
    assert answer.status_code == 201, answer.text
    assert answer.json()["resolved_spec"]["model"] == str(model)


@pytest.mark.parametrize("outtype", ["q4_k_m", "Q5_K_S", "q6_k", "iq2_xs"])
def test_quantisations_that_nothing_here_writes(outtype: str, api: TestClient, model: Path) -> None:
    error = refused(api, model=str(model), outtype=outtype)
    assert (error["param"], error["code"]) == ("outtype", "invalid_value")
    assert f"no converter that pip installs writes {outtype}" in error["message"]
    assert "outtype: f16" in error["hint"]


def test_an_outtype_or_format_that_does_not_exist(api: TestClient, model: Path) -> None:
    error = refused(api, model=str(model), outtype="float16")
    assert (error["param"], error["hint"]) == ("outtype", "Allowed: 'f32', 'f16', 'bf16' or 'q8_0'.")
    assert refused(api, model=str(model), format="onnx")["param"] == "format"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gpt_neox"}, "models of type 'gpt_neox'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "generates no text"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope scaling 'dynamic'"),
    ],
)
def test_models_that_the_format_has_no_place_for(
    config: dict[str, Any], says: str, api: TestClient, model: Path
) -> None:
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(plain | config))
    error = refused(api, model=str(model))
    assert (error["param"], error["code"]) == ("model", "model_invalid")
    assert says in error["message"]
    assert error["hint"]


def test_a_quantised_model_and_an_adapter_name_what_to_do(api: TestClient, model: Path, models: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (model / "config.json").write_text(json.dumps(config))
    assert refused(api, model=str(model))["code"] == "quantised_base"
    error = refused(api, model=str(make_adapter_folder(models / "adapter")))
    assert (error["code"], error["param"]) == ("wrong_kind", "model")
    assert '"type": "merge"' in error["hint"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "Unigram"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {**BYTES, "add_prefix_space": True}},
        {"pre_tokenizer": split(r"\w+")},
        {"pre_tokenizer": split(LLAMA3, behavior="Removed")},
        {"model": {"ignore_merges": True}},
        {"model": {"byte_fallback": True}, "pre_tokenizer": {"type": "Whitespace"}},
    ],
    ids=["unigram", "lowercase", "no cut", "prefix", "words", "removed", "ignore_merges", "bytes"],
)
def test_tokenizers_that_no_reader_knows(changes: dict[str, Any], api: TestClient, model: Path) -> None:
    (model / "tokenizer.json").write_text(json.dumps(tokenizer(**changes)))
    error = refused(api, model=str(model))
    assert (error["param"], error["code"]) == ("model", "model_invalid")
    assert "tokenizer" in error["message"]


@pytest.mark.parametrize(
    ("changes", "reader"),
    [
        ({}, "gpt-2"),
        ({"pre_tokenizer": split(LLAMA3), "model": {"ignore_merges": True}}, "llama-bpe"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES],
                }
            },
            "smollm",
        ),
        (
            {
                "model": {"byte_fallback": True},
                "pre_tokenizer": None,
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Prepend", "prepend": "▁"},
                        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                    ],
                },
            },
            "llama",
        ),
    ],
)
def test_tokenizers_by_the_name_that_readers_have_for_them(
    changes: dict[str, Any], reader: str, api: TestClient, model: Path
) -> None:
    document = tokenizer(**changes)
    assert gguf.reader_of(document) == reader
    (model / "tokenizer.json").write_text(json.dumps(document))
    assert api.post("/jobs", json={"type": "export", "model": str(model)}).status_code == 201


def test_jobs_that_leave_no_whole_model_are_refused_as_a_source(api: TestClient, models: Path, file_id: str) -> None:
    train = api.post("/jobs", json=train_spec(str(models / "tiny"), file_id)).json()["id"]
    answer = api.post("/jobs", json={"type": "export", "model": f"job:{train}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_kind")
    merge = api.post("/jobs", json={"type": "merge", "adapter": f"job:{train}"}).json()["id"]
    export = api.post("/jobs", json={"type": "export", "model": f"job:{merge}"}).json()
    assert export["depends_on"] == [merge]
    answer = api.post("/jobs", json={"type": "validate", "model": f"job:{export['id']}"})
    assert answer.json()["error"]["message"] == f"model: job:{export['id']} leaves a GGUF file"
    assert api.post("/jobs", json={"type": "import", "path": f"job:{export['id']}", "name": "back"}).status_code == 201


def test_a_gguf_artifact_is_listed_by_its_kind_and_is_no_model(
    api: TestClient, database: Database, settings: Settings
) -> None:
    with database.write() as session:
        session.add(
            Artifact(id="art-g", name="small", version=1, kind="gguf", bytes=1, sha256="x", project_id=DEFAULT_PROJECT)
        )
    make_model_folder(settings.data_dir / "artifacts" / "art-g")
    assert [row["id"] for row in api.get("/artifacts?kind=gguf").json()["data"]] == ["art-g"]
    for body in ({"type": "validate"}, {"type": "export"}, {"type": "deploy", "name": "d"}):
        answer = api.post("/jobs", json={**body, "model": "small"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_kind"), answer.text
        assert "type import" in answer.json()["error"]["hint"]
    assert "library_name: gguf" in api.get("/artifacts/art-g/card").text
