"""Reading JSON and YAML bodies strictly: what is ambiguous is refused instead of guessed."""

import json
import math
import re
from typing import Any

import yaml

from app.errors import BadRequest, Code

_MAX_DEPTH = 64
_FLATTER = f"At most {_MAX_DEPTH} levels are read."
_FINITE = "Use a finite number or null."


def parse_json(body: bytes) -> Any:
    """A JSON document. Refuses duplicate keys, NaN, infinities, lone surrogates and deep nesting."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except BadRequest:
        raise
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not UTF-8", code=Code.INVALID_JSON, hint="Send UTF-8.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(
            f"the body is not valid JSON: {error.msg} at {where}", code=Code.INVALID_JSON, hint="Mend it there."
        ) from error
    except RecursionError as error:
        raise BadRequest("the body is nested too deeply", code=Code.INVALID_JSON, hint=_FLATTER) from error
    except ValueError as error:  # e.g. an integer of more than 4300 digits
        raise BadRequest(
            f"the body is not valid JSON: {error}", code=Code.INVALID_JSON, hint="Send one JSON document."
        ) from error
    check_text(value)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that reads ``2e-4`` as a number (YAML 1.2) and no ``yes``/``no``/``on`` as booleans."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None):  # an alias event has one too
            raise _yaml_error("anchors and aliases are refused", event.start_mark, "Write the value out.")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise _yaml_error(f"the tag {tag} is refused", event.start_mark, "Remove the tag.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise _yaml_error(f"the key {name!r} stands twice", key.start_mark, "Keep one of the two.")
            seen.add(name)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """The same document with every scalar as its text."""


def _resolvers(pairs: dict[str, tuple[str, str]]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (first, pattern) in pairs.items():
        for character in first or [""]:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{tag}", re.compile(pattern)))
    return table


_Loader.yaml_implicit_resolvers = _resolvers(
    {
        "bool": ("tTfF", r"^(?:true|True|TRUE|false|False|FALSE)$"),
        "int": ("-+0123456789", r"^[-+]?(?:0|[1-9][0-9_]*)$"),
        "float": ("-+0123456789.", r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
        "null": ("~nN", r"^(?:~|null|Null|NULL)$"),
    }
)
_Loader.yaml_implicit_resolvers.setdefault("", []).append(("tag:yaml.org,2002:null", re.compile(r"^$")))
_TextLoader.yaml_implicit_resolvers = {"": [("tag:yaml.org,2002:null", re.compile(r"^$"))]}


def parse_yaml(body: bytes) -> tuple[Any, Any]:
    """A YAML document, and the same with its scalars as text (for string fields such as ``name: 20241201``).

    Refuses duplicate keys, anchors, aliases and tags.
    """
    try:
        text = body.decode("utf-8-sig")
        value = yaml.load(text, Loader=_Loader)
        raw = yaml.load(text, Loader=_TextLoader)
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not UTF-8", code=Code.INVALID_YAML, hint="Send UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadRequest(
            f"the body is not valid YAML: {error.problem}{where}", code=Code.INVALID_YAML, hint="Mend it there."
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadRequest(
            f"the body is not valid YAML: {error}", code=Code.INVALID_YAML, hint="Send one YAML document."
        ) from error
    check_text(value)
    return value, raw


def check_text(value: Any, where: str = "", depth: int = 0) -> None:
    """Refuses what no database can store: lone surrogates, NUL and infinities; and nesting beyond reason.

    ``where`` is the path of the field that the value stands in.
    """
    name, param = where or "the body", where or None
    if depth > _MAX_DEPTH:
        raise BadRequest(f"the body is nested deeper than {_MAX_DEPTH} levels", code=Code.INVALID_JSON, hint=_FLATTER)
    if isinstance(value, str):
        if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise BadRequest(
                f"{name} holds a NUL or half of a surrogate pair", param=param, hint="Remove it, or write whole UTF-8."
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise BadRequest(f"{name}: the number is beyond what a float can hold", param=param, hint=_FINITE)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, where, depth + 1)
            check_text(item, f"{where}.{key}"[:200] if where else str(key)[:200], depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_text(item, where, depth + 1)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(
            f"the key {twice!r} stands twice", param=twice, code=Code.INVALID_JSON, hint="Keep one of the two."
        )
    return result


def _no_constant(name: str) -> None:
    raise BadRequest(f"{name} is not a JSON number", code=Code.INVALID_JSON, hint=_FINITE)


def _yaml_error(problem: str, mark: Any, hint: str) -> BadRequest:
    return BadRequest(f"{problem} (line {mark.line + 1})", code=Code.INVALID_YAML, hint=hint)
