"""Answers held against a JSON schema: by hand, and as the jsonschema library reads it. No torch."""

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.loading.json_schema import conforms, fault_in

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 1]}, "uniqueItems": True, "maxItems": 2},
        "next": {"$ref": "#"},
        "size": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/size"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"size": {"type": "number", "multipleOf": 0.5, "not": {"const": 3}}},
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"name": "Ann", "age": 7, "tags": ["a"], "size": 2.5}', 1),
        ('{"name": "Ann", "next": {"name": "Bob", "next": {"name": "Cy"}}}', 1),
        ('  {"name": "Ann"}\n', 1),
        ('{"name": "ann"}', 0),
        ('{"age": 7}', 0),
        ('{"name": "Ann", "age": 150}', 0),
        ('{"name": "Ann", "age": 7.5}', 0),
        ('{"name": "Ann", "age": true}', 0),
        ('{"name": "Ann", "tags": ["a", "a"]}', 0),
        ('{"name": "Ann", "tags": [true]}', 0),
        ('{"name": "Ann", "more": 1}', 0),
        ('{"name": "Ann", "next": {"name": "bob"}}', 0),
        ('{"name": "Ann", "size": 3}', 0),
        ('Here it is: {"name": "Ann"}', 0),
        ("[" * 2000, 0),
        ('{"name": NaN}', 0),
        ("", 0),
    ],
)
def test_json_schema(score: Any, answer: str, expected: float) -> None:
    assert score({"type": "json_schema", "json_schema": SCHEMA}, answer) == expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, -2.0]) | st.text("Ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "xa"]), inner, max_size=3),
    max_leaves=5,
)
SCHEMAS = st.recursive(
    st.booleans()
    | st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["null", "boolean", "integer", "number", "string", "array", ["object", "null"]]),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "minimum": st.integers(-2, 2),
            "exclusiveMaximum": st.integers(-2, 2),
            "multipleOf": st.sampled_from([1, 2, 0.5]),
            "minLength": st.integers(0, 2),
            "maxLength": st.integers(0, 2),
            "pattern": st.sampled_from(["^A", "b"]),
            "uniqueItems": st.booleans(),
            "minItems": st.integers(0, 2),
            "maxProperties": st.integers(0, 2),
            "required": st.lists(st.sampled_from(["a", "b"]), max_size=2),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "items": inner,
            "contains": inner,
            "properties": st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
            "patternProperties": st.dictionaries(st.sampled_from(["^x", "a$"]), inner, max_size=2),
            "additionalProperties": inner,
            "propertyNames": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "not": inner,
        },
    ),
    max_leaves=4,
)


@given(SCHEMAS, VALUES)
def test_a_schema_means_what_the_jsonschema_library_reads_in_it(schema: Any, value: Any) -> None:
    assert fault_in(schema) is None
    assert conforms(value, schema) == jsonschema.Draft202012Validator(schema).is_valid(value)
