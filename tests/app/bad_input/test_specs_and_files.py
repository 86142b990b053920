"""Bad specs and files: the right status, an error that names the field and says what to do, nothing half-created."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.settings import Settings
from tests.support import make_adapter_folder, on_sqlite

PEFT = "model.peft_config"


def changed(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(spec))
    place = copy
    *parents, last = path.split(".")
    for step in parents:
        place = place.setdefault(step, {})
    place[last] = value
    return copy


@on_sqlite
@pytest.mark.parametrize(
    ("path", "value", "code", "hint"),
    [
        ("trainning", {}, "unknown_field", "Did you mean training?"),
        ("training.learningrate", 1e-4, "unknown_field", "Did you mean learning_rate?"),
        ("model.peft_config.lora_alfa", 8, "unknown_field", "Did you mean lora_alpha?"),
        ("model.peft_config.zzzzzzzz", 8, "unknown_field", "Fields here: alpha_pattern, bias, "),
        ("training.max_steps", "sixty", "invalid_type", None),
        ("training.max_steps", True, "invalid_type", None),
        ("training.max_steps", 2.5, "invalid_type", None),
        ("training.max_steps", 0, "invalid_value", None),
        ("training.max_steps", 10**30, "invalid_value", None),
        ("training.learning_rate", -1, "invalid_value", None),
        ("training.learning_rate", "2e-4", "invalid_type", None),
        ("training", [], "invalid_type", None),
        ("model", None, "invalid_type", None),
        ("model.use_peft", "yes", "invalid_type", None),
        ("experiment_name", "../../etc", "invalid_value", None),
        ("experiment_name", "x" * 64, "invalid_value", None),
        ("experiment_name", 5, "invalid_type", None),
        ("priority", 101, "invalid_value", None),
        ("metadata.team", 5, "invalid_type", None),
        ("model.peft_config.target_modules", [], "conflicting_fields", "standard"),
        ("model.peft_config.target_modules", "everything", "conflicting_fields", "all-linear"),
        ("model.peft_config.r", 0, "invalid_value", None),
        ("model.peft_config.init_lora_weights", "eva", "conflicting_fields", "pissa"),
        ("model.peft_config.init_lora_weights", "pizza", "conflicting_fields", "pissa_niter_<n>"),
        ("model.peft_config.init_lora_weights", "pissa_niter_", "conflicting_fields", "pissa_niter_<n>"),
        ("model.peft_config.rank_pattern.k_proj", 0, "invalid_value", None),
        ("model.peft_config.rank_pattern.(a+)+$", 8, "invalid_value", None),
        ("model.peft_config.modules_to_save", [], "invalid_value", None),
        ("model.quantization_config.load_in_4bit", False, "invalid_value", None),
        ("training.push_to_hub", True, "refused_field", "push_to_hub"),
        ("training.hub_token", "secret", "refused_field", "tokens never stand in a spec"),
        ("training.resume_from_checkpoint", True, "refused_field", "resumes by itself"),
        ("training.deepspeed", "zero3.json", "refused_field", "the service decides"),
    ],
)
def test_a_bad_field_is_named(
    api: TestClient,
    spec: dict[str, Any],
    refused: Callable[..., Any],
    path: str,
    value: Any,
    code: str,
    hint: str | None,
) -> None:
    error = refused(api.post("/jobs", json=changed(spec, path, value)), 400, code, path)
    if hint:
        assert hint in error["hint"]
    assert "secret" not in json.dumps(error)


@on_sqlite
@pytest.mark.parametrize("field", ["model", "dataset", "model.model_name_or_path", "dataset.file"])
def test_a_missing_field_is_named(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any], field: str
) -> None:
    *parents, last = field.split(".")
    place = spec
    for step in parents:
        place = place[step]
    del place[last]
    refused(api.post("/jobs", json=spec), 400, "missing_field", field)


@on_sqlite
@pytest.mark.parametrize("field", ["type", "algorithm"])
def test_without_a_model_and_a_dataset_nothing_says_what_a_spec_is(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any], field: str
) -> None:
    del spec["dataset"], spec[field]
    refused(api.post("/jobs", json=spec), 400, "missing_field", field)


def test_an_unknown_algorithm_gets_the_nearest_one(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any]
) -> None:
    error = refused(api.post("/jobs", json={**spec, "algorithm": "stf"}), 400, "unknown_algorithm", "algorithm")
    assert "Did you mean sft?" in error["hint"]


@on_sqlite
@pytest.mark.parametrize("value", ["serve", "tarin", 5, None, ["train"], {"a": 1}])
def test_an_unknown_type_is_refused(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any], value: Any
) -> None:
    """Replicas (type serve) are made by deployments alone."""
    code = "missing_field" if value is None else "invalid_value"
    error = refused(api.post("/jobs", json={**spec, "type": value}), 400, code, "type")
    assert "train" in error["hint"]


@on_sqlite
@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model.use_peft": False, "model.peft_config": {"r": 8}}, "model.peft_config"),
        ({"model.use_peft": False, "model.quantization_config": {}}, "model.quantization_config"),
        (
            {"model.peft_config.init_lora_weights": "mica", "model.peft_config.use_dora": True},
            f"{PEFT}.init_lora_weights",
        ),
        ({"model.peft_config.init_lora_weights": "orthogonal", "model.peft_config.r": 7}, f"{PEFT}.init_lora_weights"),
        *(
            (
                {"model.quantization_config": {}, "model.peft_config.init_lora_weights": start},
                "model.peft_config.init_lora_weights",
            )
            for start in ("pissa", "pissa_niter_2", "olora", "mica", "orthogonal")
        ),
        *(
            ({"algorithm": algorithm, f"{PEFT}.{field}": value}, f"{PEFT}.{field}")
            for algorithm in ("dpo", "kto")
            for field, value in (("bias", "all"), ("init_lora_weights", "pissa"), ("init_lora_weights", False))
        ),
        ({"model.peft_config.init_lora_weights": "pissa", "model.peft_config.r": 64}, f"{PEFT}.r"),
        ({"model.peft_config.modules_to_save": ["q_proj"]}, f"{PEFT}.modules_to_save"),
        ({"model.use_peft": False, "then": ["merge"]}, "then"),
        ({"then": ["deploy", "merge"]}, "then"),
        ({"then": ["merge", "merge"]}, "then"),
        ({"training.eval_strategy": "steps"}, "training.eval_steps"),
        ({"algorithm": "dpo", "training.packing": True}, "training.packing"),
        ({"algorithm": "dpo", "training.activation_offloading": True}, "training.activation_offloading"),
        ({"algorithm": "ppo", "training.optim": "adamw_8bit"}, "training.optim"),
        ({"algorithm": "ppo", "training.use_liger_kernel": True}, "training.use_liger_kernel"),
        ({"training.eval_strategy": "no", "training.evaluation_strategy": "no"}, "training.evaluation_strategy"),
    ],
)
def test_fields_that_exclude_each_other(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any], changes: dict[str, Any], param: str
) -> None:
    for path, value in changes.items():
        spec = changed(spec, path, value)
    error = refused(api.post("/jobs", json=spec), 400, "conflicting_fields", param)
    assert error["hint"]


BAD_REFERENCES = [
    ("{models}/missing", 404, "model_not_found"),
    ("{models}/" + "x" * 300, 404, "model_not_found"),
    ("/etc/hostname", 400, "model_outside_roots"),
    ("{models}/../other", 400, "model_outside_roots"),
    ("{models}/escape", 400, "model_outside_roots"),
    ("./models/tiny", 400, "model_outside_roots"),
    ("~/model", 400, "model_outside_roots"),
    ("artifact:art-000000000000000000000000", 404, "model_not_found"),
    ("job:ftjob-000000000000000000000000", 404, "model_not_found"),
    ("{data}/artifacts/art-1", 404, "model_not_found"),
    ("{data}/tunesmith.db", 404, "model_not_found"),
    ("support:v7", 404, "model_not_found"),
    ("a/b/c", 400, "invalid_value"),
    ("hub:../x", 400, "invalid_value"),
    ("org/name;rm -rf", 400, "invalid_value"),
    ("{models}/empty", 400, "model_invalid"),
    ("{models}/torn", 400, "model_invalid"),
    ("{models}/adapter", 400, "model_invalid"),
    ("{models}/gptq", 400, "quantised_base"),
]


def test_a_model_that_cannot_be_used(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any], models: Path, settings: Settings
) -> None:
    for name in ("empty", "torn", "gptq"):
        (models / name).mkdir()
    (models / "torn" / "config.json").write_text('{"model_type": "lla')
    (models / "gptq" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (models / "escape").symlink_to("/etc")
    make_adapter_folder(models / "adapter")
    for reference, status, code in BAD_REFERENCES:
        value = reference.format(models=models, data=settings.data_dir)
        body = changed(spec, "model.model_name_or_path", value)
        refused(api.post("/jobs", json=body), status, code, "model.model_name_or_path")


def test_conversations_for_a_model_without_a_chat_template(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any], models: Path
) -> None:
    config = models / "tiny" / "tokenizer_config.json"
    config.write_text('{"eos_token": "</s>"}')
    param = "model.model_name_or_path"
    error = refused(api.post("/jobs", json=spec), 400, "conflicting_fields", param)
    assert "no chat template" in error["message"]
    assert "chat_template.jinja" in error["hint"]


def test_target_modules_that_the_model_does_not_have(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any]
) -> None:
    body = changed(spec, "model.peft_config.target_modules", ["q_proj", "c_attn"])
    param = "model.peft_config.target_modules"
    error = refused(api.post("/jobs", json=body), 400, "target_modules_not_found", param)
    assert "c_attn" in error["message"]
    assert "q_proj" not in error["message"]
    assert "k_proj, o_proj, q_proj, v_proj" in error["hint"]


@on_sqlite
def test_a_torn_safetensors_file(
    api: TestClient, spec: dict[str, Any], refused: Callable[..., Any], models: Path
) -> None:
    path = models / "tiny" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    error = refused(api.post("/jobs", json=spec), 400, "model_invalid", "model.model_name_or_path")
    assert "model.safetensors" in error["message"]


def test_a_hub_model_that_the_operator_does_not_allow(
    settings: Settings, key: str, spec: dict[str, Any], refused: Callable[..., Any]
) -> None:
    from app.main import create_app  # noqa: PLC0415

    narrow = settings.model_copy(update={"allowed_hub_repos": ("Qwen/*",)})
    with TestClient(create_app(narrow), headers={"authorization": f"Bearer {key}"}) as api:
        body = changed(spec, "model.model_name_or_path", "evil/model")
        refused(api.post("/jobs", json=body), 400, "model_not_allowed", "model.model_name_or_path")


def test_a_file_that_does_not_exist(api: TestClient, spec: dict[str, Any], refused: Callable[..., Any]) -> None:
    body = changed(spec, "dataset.file", "file-000000000000000000000000")
    error = refused(api.post("/jobs", json=body), 404, "not_found", "dataset.file")
    assert "POST /files" in error["hint"]


@on_sqlite
@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "empty_file", ["empty"]),
        (b"\n\n", "invalid_file", ["line 1", "holds no row"]),
        (b'{"messages": [\n', "invalid_file", ["line 1"]),
        (b'{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": "a"}\n', "invalid_file", ["line 2", "line 3"]),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n', "invalid_file", ["line 1", "no assistant turn"]),
        (b'{"messages": []}\n', "invalid_file", ["line 1"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "invalid_file", ["line 1"]),
    ],
)
def test_a_file_that_cannot_be_learnt_from(
    upload: Callable[..., Any], refused: Callable[..., Any], content: bytes, code: str, words: list[str]
) -> None:
    error = refused(upload(content), 400, code, "file")
    assert all(word in error["message"] for word in words), error["message"]
    assert error["hint"]


@on_sqlite
def test_an_archive_is_no_data_file(upload: Callable[..., Any], refused: Callable[..., Any]) -> None:
    refused(upload(b"PK", "data.zip"), 400, "invalid_file", "file")


@on_sqlite
def test_a_purpose_that_is_unknown(upload: Callable[..., Any], refused: Callable[..., Any]) -> None:
    refused(upload(purpose="fun"), 400, "invalid_value", "purpose")


@on_sqlite
def test_an_upload_without_a_file(api: TestClient, refused: Callable[..., Any]) -> None:
    refused(api.post("/files", files={"other": ("a.jsonl", b"{}")}), 400, "missing_field", "file")
    refused(api.post("/files", files={"file": (None, b"text")}), 400, "invalid_value", "file")
    refused(api.post("/files"), 400, "missing_field", "file")
