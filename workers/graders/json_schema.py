"""Whether an answer is JSON of a given shape."""

import json
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from app.catalog import Grader
from app.grading import GraderSpec, Sample
from app.specs import conflict
from workers.loading.json_schema import conforms, fault_in
from workers.loading.templates import Template, fill


class JsonSchemaSpec(GraderSpec):
    """1 when the text is JSON and conforms to the schema, else 0."""

    type: Literal["json_schema"] = "json_schema"
    input: Template = "{{sample.output_text}}"
    json_schema: dict[str, Any] = Field(
        description="A JSON Schema (draft 2020-12): types, enum, const, numbers, lengths, pattern, properties, items, "
        "anyOf, oneOf, allOf, not, $ref within the schema."
    )

    @model_validator(mode="after")
    def _can_be_held_to(self) -> Self:
        fault = fault_in(self.json_schema)
        if fault:
            raise conflict("json_schema", f"json_schema: {fault}", "Write it as JSON Schema, draft 2020-12.")
        return self


def grade(spec: JsonSchemaSpec, samples: Sequence[Sample]) -> list[float]:
    """JSON alone: an answer with words around it is none."""
    return [float(_holds(spec, fill(spec.input, sample))) for sample in samples]


def _holds(spec: JsonSchemaSpec, text: str | None) -> bool:
    if text is None:
        return False
    try:
        return conforms(json.loads(text, parse_constant=_refuse), spec.json_schema)
    except (ValueError, RecursionError):
        return False


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


grader = Grader(JsonSchemaSpec, grade)
