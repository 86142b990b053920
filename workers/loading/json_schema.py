"""JSON Schema, the part that describes answers: a schema is checked once, then answers are held against it.

The meaning is that of draft 2020-12. A keyword that is not known here is refused instead of passed over.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from workers.loading.patterns import fault_of, found

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_NOTES = {"title", "description", "default", "examples", "$schema", "$comment", "format", "deprecated", "readOnly"}
_ONE = {"items", "additionalProperties", "not", "contains", "propertyNames"}
_MANY = {"anyOf", "oneOf", "allOf"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
_COUNTS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_DEEPEST = 64


def fault_in(schema: Any, root: Any = None, where: str = "", depth: int = 0) -> str | None:
    """The first thing in a schema that could not be held to; None for a good one."""
    root = schema if root is None else root
    place = where or "the schema"
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, dict):
        return f"{place} is no object"
    if depth > _DEEPEST:
        return f"{place[:80]} lies deeper than {_DEEPEST} levels"
    if _circular(schema, root, ()):
        return f"{place} refers to itself in place"
    for word, value in schema.items():
        fault = _fault_of(word, value, root)
        if fault:
            return f"{place}: {fault}"
        for name, inner in _inner(word, value):
            if fault := fault_in(inner, root, f"{where}.{name}".lstrip("."), depth + 1):
                return fault
    return None


def _circular(schema: Any, root: Any, above: tuple[int, ...]) -> bool:
    """Whether judging one value would come back to this schema with the same value."""
    if not isinstance(schema, dict):
        return False
    if id(schema) in above:
        return True
    above = (*above, id(schema))
    here = [_at(root, schema["$ref"])] if "$ref" in schema else []
    here += [one for word in _MANY if isinstance(schema.get(word), list) for one in schema[word]]
    here += [schema["not"]] if "not" in schema else []
    return any(_circular(one, root, above) for one in here)


def _inner(word: str, value: Any) -> Iterator[tuple[str, Any]]:
    if word in _ONE:
        yield word, value
    elif word in _MANY:
        yield from ((f"{word}.{index}", inner) for index, inner in enumerate(value))
    elif word in _NAMED:
        yield from ((f"{word}.{name}", inner) for name, inner in value.items())


def _fault_of(word: str, value: Any, root: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if word == "type":
        kinds = value if isinstance(value, list) else [value]
        good = bool(kinds) and all(kind in _TYPES for kind in kinds)
        return None if good else f"type {json.dumps(value)[:60]} is none of {', '.join(_TYPES)}"
    if word == "$ref":
        return None if _at(root, value) is not None else f"$ref {str(value)[:60]} leads nowhere in this schema"
    if word == "pattern" and isinstance(value, str):
        fault = fault_of(value)
        return f"pattern is no regular expression: {fault}" if fault else None
    if word == "patternProperties" and isinstance(value, dict):
        return next((f"{name} is no regular expression" for name in value if fault_of(name)), None)
    right = (
        (word in _NOTES or word == "const" or word in _ONE)
        or (word == "enum" and isinstance(value, list) and bool(value))
        or (word in _MANY and isinstance(value, list) and bool(value))
        or (word in _NAMED and isinstance(value, dict))
        or (word == "required" and isinstance(value, list) and all(isinstance(name, str) for name in value))
        or (word in _COUNTS and isinstance(value, int) and not isinstance(value, bool) and value >= 0)
        or (word in _NUMBERS and number and (word != "multipleOf" or value > 0))
        or (word == "uniqueItems" and isinstance(value, bool))
    )
    known = _NOTES | _ONE | _MANY | _NAMED | _COUNTS | _NUMBERS
    if right:
        return None
    if word in known or word in ("enum", "required", "uniqueItems", "pattern"):
        return f"{word} does not take {json.dumps(value)[:60]}"
    return f"{word[:60]} is not known here"


def conforms(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a JSON value is as the schema says, which ``fault_in`` found good."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    return all(_RULES[word](value, limit, schema, root) for word, limit in schema.items() if word in _RULES)


def _at(root: Any, reference: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    place = root
    for step in reference[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        place = place.get(step) if isinstance(place, Mapping) else None
    return place if isinstance(place, dict | bool) else None


def _same(left: Any, right: Any) -> bool:
    """JSON's equality: 1 is 1.0 and never true."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return _is(value, "number") and float(value).is_integer()
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
    return isinstance(value, dict)


def _for(kind: str, rule: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Any, Any], bool]:
    """A rule that only speaks of values of one type."""
    return lambda value, limit, *_: not _is(value, kind) or rule(value, limit)


def _additional(value: Any, limit: Any, schema: Any, root: Any) -> bool:
    if not isinstance(value, dict):
        return True
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    rest = [key for key in value if key not in named and not any(found(pattern, key) for pattern in patterns)]
    return all(conforms(value[key], limit, root) for key in rest)


def _multiple(value: Any, limit: Any) -> bool:
    if isinstance(value, int) and isinstance(limit, int):
        return value % limit == 0
    quotient = value / limit
    return math.isfinite(quotient) and float(quotient).is_integer()


_RULES: dict[str, Callable[[Any, Any, Any, Any], bool]] = {
    "type": lambda value, limit, *_: any(_is(value, kind) for kind in (limit if isinstance(limit, list) else [limit])),
    "enum": lambda value, limit, *_: any(_same(value, one) for one in limit),
    "const": lambda value, limit, *_: _same(value, limit),
    "$ref": lambda value, limit, _, root: conforms(value, _at(root, limit), root),
    "anyOf": lambda value, limit, _, root: any(conforms(value, one, root) for one in limit),
    "oneOf": lambda value, limit, _, root: sum(conforms(value, one, root) for one in limit) == 1,
    "allOf": lambda value, limit, _, root: all(conforms(value, one, root) for one in limit),
    "not": lambda value, limit, _, root: not conforms(value, limit, root),
    "properties": lambda value, limit, _, root: (
        not isinstance(value, dict) or all(conforms(value[key], limit[key], root) for key in limit if key in value)
    ),
    "patternProperties": lambda value, limit, _, root: (
        not isinstance(value, dict)
        or all(conforms(value[key], limit[name], root) for name in limit for key in value if found(name, key))
    ),
    "additionalProperties": _additional,
    "propertyNames": lambda value, limit, _, root: (
        not isinstance(value, dict) or all(conforms(key, limit, root) for key in value)
    ),
    "items": lambda value, limit, _, root: (
        not isinstance(value, list) or all(conforms(one, limit, root) for one in value)
    ),
    "contains": lambda value, limit, _, root: (
        not isinstance(value, list) or any(conforms(one, limit, root) for one in value)
    ),
    "required": _for("object", lambda value, limit: all(name in value for name in limit)),
    "minProperties": _for("object", lambda value, limit: len(value) >= limit),
    "maxProperties": _for("object", lambda value, limit: len(value) <= limit),
    "minItems": _for("array", lambda value, limit: len(value) >= limit),
    "maxItems": _for("array", lambda value, limit: len(value) <= limit),
    "uniqueItems": _for(
        "array",
        lambda value, limit: not limit or not any(_same(one, two) for i, one in enumerate(value) for two in value[:i]),
    ),
    "minLength": _for("string", lambda value, limit: len(value) >= limit),
    "maxLength": _for("string", lambda value, limit: len(value) <= limit),
    "pattern": _for("string", lambda value, limit: found(limit, value)),
    "minimum": _for("number", lambda value, limit: value >= limit),
    "maximum": _for("number", lambda value, limit: value <= limit),
    "exclusiveMinimum": _for("number", lambda value, limit: value > limit),
    "exclusiveMaximum": _for("number", lambda value, limit: value < limit),
    "multipleOf": _for("number", _multiple),
}
