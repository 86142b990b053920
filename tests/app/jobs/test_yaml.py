"""A job's body as YAML: scalars as the field needs them, and what is refused."""

from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from app.documents import parse_yaml
from app.errors import BadRequest
from tests.support import on_sqlite

YAML = {"content-type": "application/yaml"}
GUIDE_BLOCK = """\
model:
  model_name_or_path: "Qwen/Qwen2.5-7B-Instruct"
  use_peft: true
  peft_config:
    r: 16
    lora_alpha: 32
    lora_dropout: 0.1
    target_modules: ["q_proj", "k_proj", "v_proj", "o_proj"]
    bias: "none"
    task_type: "CAUSAL_LM"
  quantization_config:
    load_in_4bit: true
    bnb_4bit_compute_dtype: "float16"
    bnb_4bit_quant_type: "nf4"
    bnb_4bit_use_double_quant: true
"""


def test_the_guides_block_as_it_is(api: TestClient, file_id: str) -> None:
    body = (
        f"type: train\nalgorithm: sft\ndataset: {{file: {file_id}}}\n{GUIDE_BLOCK}training: {{learning_rate: 2e-4}}\n"
    )
    answer = api.post("/jobs", content=body, headers=YAML)
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert job["experiment_name"].startswith("sft_qwen2.5-7b_qlora_r16_alpha32_")
    assert job["resolved_spec"]["training"]["learning_rate"] == 2e-4
    assert job["resolved_spec"]["model"]["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"
    assert job["spec"]["model"] == yaml.safe_load(GUIDE_BLOCK)["model"]


@on_sqlite
def test_yaml_and_json_say_the_same(api: TestClient, spec: dict[str, Any]) -> None:
    by_json = api.post("/jobs", json=spec).json()
    by_yaml = api.post("/jobs", content=yaml.safe_dump(spec), headers=YAML).json()
    assert by_yaml["resolved_spec"] == by_json["resolved_spec"]


@on_sqlite
@pytest.mark.parametrize(
    ("line", "path", "expected"),
    [
        ("experiment_name: 20241201", "experiment_name", "20241201"),
        ("experiment_name: 1e5", "experiment_name", "1e5"),
        ("experiment_name: true", "experiment_name", "true"),
        ("experiment_name: yes", "experiment_name", "yes"),
        ("experiment_name: 012", "experiment_name", "012"),
        ("metadata: {year: 2024, version: 1.10, day: 2024-12-01}", "metadata.version", "1.10"),
        ("metadata: {year: 2024, version: 1.10, day: 2024-12-01}", "metadata.day", "2024-12-01"),
        ("priority: 7", "priority", 7),
        ("priority: -7", "priority", -7),
        ("seconds: 1e1", "seconds", 10.0),
        ("seconds: 2E-4", "seconds", 2e-4),
        ("seconds: .5", "seconds", 0.5),
        ("seconds: 1_000", "seconds", 1000),
        ("marker: ~", "marker", None),
        ("marker:", "marker", None),
        ("marker: null", "marker", None),
        ('marker: "null"', "marker", "null"),
    ],
)
def test_scalars_are_read_as_the_field_needs_them(api: TestClient, line: str, path: str, expected: Any) -> None:
    answer = api.post("/jobs", content=f"type: sleepy\n{line}\n", headers=YAML)
    assert answer.status_code == 201, answer.text
    value = answer.json()["resolved_spec"]
    for step in path.split("."):
        value = value[step]
    assert value == expected
    assert type(value) in (type(expected), float)


@on_sqlite
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("type: sleepy\nseconds: 1\nseconds: 2\n", "'seconds' stands twice (line 3)"),
        ("type: sleepy\nmetadata: {a: x, a: y}\n", "'a' stands twice"),
        ("type: sleepy\nmetadata: &x {a: b}\n", "anchors and aliases"),
        ("type: sleepy\nmetadata: *x\n", "anchors and aliases"),
        ("type: !!python/object/apply:os.system ['id']\n", "the tag"),
        ("type: !!str sleepy\n", "the tag"),
        ("type: sleepy\n  bad: indent\n", "at line 2"),
        ("type: sleepy\n---\ntype: sleepy\n", "not valid YAML"),
        ("type: sleepy\nmarker: \x07\n", "not valid YAML"),
        ("type: sleepy\nmetadata: " + "[" * 5000 + "]" * 5000, ""),
        ("type: sleepy\nmetadata: " + "{a: " * 70 + "1" + "}" * 70, "deeper"),
        ("type: sleepy\nseconds: .inf\n", "seconds"),
        ("type: sleepy\nseconds: 1e999\n", "seconds"),
        ("type: sleepy\n? [a]\n: b\n", ""),
        ("- type: sleepy\n", "object"),
        ("", "object"),
    ],
)
def test_yaml_that_is_refused(api: TestClient, body: str, words: str) -> None:
    answer = api.post("/jobs", content=body.encode(), headers=YAML)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert api.get("/jobs").json()["data"] == []


def test_yaml_that_is_not_utf_8() -> None:
    with pytest.raises(BadRequest, match="UTF-8"):
        parse_yaml(b"type: \xff\xfe")


@on_sqlite
@pytest.mark.parametrize("name", ["1", "null", "true"])
def test_a_yaml_key_that_is_no_text(api: TestClient, name: str) -> None:
    answer = api.post("/jobs", content=f"type: sleepy\n{name}: x\n", headers=YAML)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] in ("unknown_field", "invalid_type", "invalid_value")
    answer = api.post("/jobs", content=f"type: sleepy\nmetadata: {{{name}: x}}\n", headers=YAML)
    assert answer.status_code in (201, 400), answer.text


@on_sqlite
def test_a_revision_of_digits_stays_text(api: TestClient, file_id: str) -> None:
    body = (
        f"type: train\nalgorithm: sft\ndataset: {{file: {file_id}}}\nmodel: {{model_name_or_path: a/b, revision: 12e4}}"
    )
    answer = api.post("/jobs", content=body, headers=YAML)
    assert answer.json()["resolved_spec"]["model"]["model_name_or_path"] == "hub:a/b@12e4"
