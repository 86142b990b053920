"""The OpenAPI document: valid, described, with a worked example for each body."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from app.discovery import discover
from app.documents import parse_yaml
from app.jobs.intake import validate_spec
from app.main import create_app
from app.settings import Settings


def published(data_dir: Path) -> dict[str, Any]:
    """As a client sees it."""
    found: dict[str, Any] = json.loads(json.dumps(create_app(Settings(data_dir=data_dir)).openapi()))
    return found


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return published(tmp_path_factory.mktemp("data"))


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(target := value.get("$ref"), str):
                assert target.removeprefix("#/components/schemas/") in schemas, target
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)
    for name, schema in schemas.items():
        jsonschema_rs.meta.validate({**schema, "$schema": "https://json-schema.org/draft/2020-12/schema"}), name


def test_every_operation_is_described_and_named_once(document: dict[str, Any]) -> None:
    ids = []
    for name, operation in operations(document):
        assert operation.get("summary"), name
        assert operation.get("description"), name
        assert operation.get("tags"), name
        ids.append(operation["operationId"])
    assert len(ids) == len(set(ids)) >= 20


def test_every_operation_tells_of_errors_in_our_shape(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert "422" not in operation["responses"], name
        schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Error"}
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_either_way_to_send_a_key_suffices(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    kinds = {
        name: {key: scheme.get(key) for key in ("type", "in", "name", "scheme")} for name, scheme in schemes.items()
    }
    assert kinds == {
        "HTTPBearer": {"type": "http", "in": None, "name": None, "scheme": "bearer"},
        "APIKeyHeader": {"type": "apiKey", "in": "header", "name": "x-api-key", "scheme": None},
    }
    # As a list of two: one or the other. Two names in one entry would ask for both.
    either = [{"HTTPBearer": []}, {"APIKeyHeader": []}]
    for name, operation in operations(document):
        assert operation.get("security") == (None if name in ("GET /healthz", "GET /readyz") else either), name


def examples(document: dict[str, Any], media: str, content: dict[str, Any]) -> list[Any]:
    found = [example["value"] for example in content.get("examples", {}).values()]
    schema = content["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if media != "multipart/form-data":
        found += schema.get("examples", [])
    return found


def test_every_body_has_a_worked_example(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        for media, content in operation.get("requestBody", {}).get("content", {}).items():
            if media != "multipart/form-data":
                assert examples(document, media, content), (name, media)


def test_every_example_of_a_job_is_valid(document: dict[str, Any], tmp_path: Path) -> None:
    """For our own reader, and for the published schema."""
    catalog = discover(Settings(data_dir=tmp_path).packages)
    schema = {**document["components"]["schemas"]["JobSpec"], "components": document["components"]}
    validator = jsonschema_rs.validator_for(schema)
    content = document["paths"]["/jobs"]["post"]["requestBody"]["content"]
    values = examples(document, "application/json", content["application/json"])
    values += [parse_yaml(text.encode())[0] for text in examples(document, "", content["application/yaml"])]
    assert len(values) >= 5
    for value in values:
        validate_spec(value, catalog)
        validator.validate(value)
        with pytest.raises(jsonschema_rs.ValidationError):
            validator.validate({**value, "type": "nonsense"})


def test_the_document_says_which_plug_is_meant_by_its_name(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["JobSpec"]
    assert schema["discriminator"]["propertyName"] == "type"
    assert set(schema["discriminator"]["mapping"]) >= {"train", "merge", "validate", "deploy"}
    assert "serve" not in schema["discriminator"]["mapping"]


def test_other_examples_are_valid_too(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is None or name == "POST /jobs":
            continue
        schema = {**content["schema"], "components": document["components"]}
        for example in examples(document, "application/json", content):
            jsonschema_rs.validator_for(schema).validate(example)


def test_the_document_is_the_same_each_time(document: dict[str, Any], tmp_path: Path) -> None:
    assert published(tmp_path) == document


def test_a_discriminator_leads_to_names_alone(document: dict[str, Any]) -> None:
    """As OpenAPI has it, else programs that make clients from the document fail."""
    schemas = document["components"]["schemas"]
    unions = [schema for schema in schemas.values() if "discriminator" in schema]
    assert {"train", "merge"} <= set(schemas["JobSpec"]["discriminator"]["mapping"])
    for union in unions:
        named = set(union["discriminator"]["mapping"].values())
        assert named == {one["$ref"] for one in union["oneOf"]}
        assert {name.removeprefix("#/components/schemas/") for name in named} <= set(schemas)
    assert "#/components/schemas/SftSpec" in schemas["TrainSpec"]["discriminator"]["mapping"].values()
