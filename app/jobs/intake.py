"""From a request body to a validated spec, with errors that name the field."""

import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from app.catalog import Catalog
from app.documents import parse_json, parse_yaml
from app.errors import BadRequest, Code, UnsupportedMediaType, plainly
from app.specs import NAME_PATTERN, JobSpec, Spec, TrainSpec

_CODES = {
    "missing": Code.MISSING_FIELD,
    "extra_forbidden": Code.UNKNOWN_FIELD,
    "conflict": Code.CONFLICTING_FIELDS,
}
_KINDS = {
    "int_type": "a whole number, without quotes",
    "float_type": "a number, without quotes",
    "bool_type": "true or false, without quotes",
    "string_type": "a text, in quotes",
    "list_type": "a list: [ … ]",
    "dict_type": "an object: { … }",
    "model_type": "an object: { … }",
    "model_attributes_type": "an object: { … }",
}
_CODE = "Code never comes in through the API; an operator adds graders as a package (TUNESMITH_PLUGIN_PACKAGES)."
_NEVER = {"python": _CODE}
_BOUNDS = {
    "ge": "at least {}",
    "gt": "more than {}",
    "le": "at most {}",
    "lt": "less than {}",
    "multiple_of": "a multiple of {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


@dataclass(frozen=True)
class Intake:
    """A spec that holds what the user asked, and what to tell about it."""

    spec: JobSpec
    submitted: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def read_document(body: bytes, content_type: str) -> Any:
    """A JSON or YAML body, by its content type. Raises UnsupportedMediaType or BadRequest."""
    return _parsed(body, content_type)[0]


def read_spec(body: bytes, content_type: str, catalog: Catalog) -> Intake:
    """Parses and validates a ``POST /jobs`` body (JSON, or YAML by its content type)."""
    data, raw = _parsed(body, content_type)
    return validate_spec(data, catalog, raw)


def _parsed(body: bytes, content_type: str) -> tuple[Any, Any]:
    media = content_type.split(";")[0].strip().lower() or "application/json"
    if media in ("application/yaml", "application/x-yaml", "text/yaml"):
        return parse_yaml(body)
    if media == "application/json":
        return parse_json(body), None
    raise UnsupportedMediaType(
        f"{media} is not read here", param="Content-Type", hint="Send application/json or application/yaml."
    )


def validate_spec(data: Any, catalog: Catalog, raw: Any = None) -> Intake:
    """Validates a spec that is already parsed."""
    if not isinstance(data, dict):
        raise BadRequest("a job spec is an object", code=Code.INVALID_TYPE, hint='Start with {"type": "train", …}.')
    spec_class = _choose(data, catalog)
    warnings: list[str] = []
    clean = _old_names(data, spec_class, "", warnings)
    try:
        return _checked(Intake(spec_class.model_validate(clean), data, warnings), catalog)
    except ValidationError as error:
        mended = _text_where_asked(clean, raw, error, spec_class) if raw is not None else None
        if mended is not None:
            try:
                return _checked(Intake(spec_class.model_validate(mended), mended, warnings), catalog)
            except ValidationError as second:
                error = second
        raise describe(error, spec_class) from error


def _checked(intake: Intake, catalog: Catalog) -> Intake:
    """What only the catalog knows: which trackers there are."""
    names = intake.spec.trackers if isinstance(intake.spec, TrainSpec) else []
    installed = [name for name, tracker in catalog.trackers.items() if tracker.installed]
    for place, name in enumerate(names):
        if name not in catalog.trackers:
            raise _unknown(f"trackers.{place}", name, sorted(catalog.trackers), Code.INVALID_VALUE)
        if name not in installed:
            raise BadRequest(
                f"trackers.{place}: {name} is not installed here",
                param=f"trackers.{place}",
                hint=f"Install {catalog.trackers[name].needs} beside the service; here are: {', '.join(installed)}.",
            )
    return intake


def _choose(data: dict[str, Any], catalog: Catalog) -> type[JobSpec]:
    # A model and something to learn from: the guide's config needs no more.
    training = isinstance(data.get("model"), dict) and isinstance(data.get("dataset"), dict)
    type_ = data.get("type", "train" if training else None)
    if type_ is None:
        raise BadRequest(
            "type is missing", param="type", code=Code.MISSING_FIELD, hint=f"One of: {', '.join(catalog.job_types())}."
        )
    if not isinstance(type_, str) or type_ not in catalog.job_types():
        raise _unknown("type", type_, catalog.job_types(), Code.INVALID_VALUE)
    algorithm = None
    if type_ == "train":
        algorithm = data.get("algorithm", "sft" if training else None)
        names = sorted(catalog.recipes)
        if algorithm is None:
            raise BadRequest(
                "algorithm is missing", param="algorithm", code=Code.MISSING_FIELD, hint=f"One of: {', '.join(names)}."
            )
        if not isinstance(algorithm, str) or algorithm not in catalog.recipes:
            raise _unknown("algorithm", algorithm, names, Code.UNKNOWN_ALGORITHM)
    spec_class = catalog.spec_class(type_, algorithm)
    assert spec_class is not None
    return spec_class


def _unknown(param: str, value: Any, names: list[str], code: Code) -> BadRequest:
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return BadRequest(
        f"{param} {str(value)[:64]!r} is unknown", param=param, code=code, hint=f"{hint}One of: {', '.join(names)}."
    )


def _old_names(data: dict[str, Any], spec: type[BaseModel], path: str, warnings: list[str]) -> dict[str, Any]:
    """Renames aliases, drops what has no effect, refuses what has another place here; all the way down."""
    result: dict[str, Any] = {}
    aliases, ignored, refused = (
        (spec.aliases, spec.ignored, spec.refused) if issubclass(spec, Spec) else ({}, frozenset(), {})
    )
    for key, value in data.items():
        where = f"{path}{key}"
        if key in refused:
            raise BadRequest(
                f"{where} is not taken here", param=where, code=Code.REFUSED_FIELD, hint=refused[key].capitalize() + "."
            )
        if key in ignored:
            warnings.append(f"{where} has no effect here and was ignored.")
            continue
        name = aliases.get(key, key)
        if name != key:
            if name in data:
                raise BadRequest(
                    f"{where} and {path}{name} mean the same",
                    param=where,
                    code=Code.CONFLICTING_FIELDS,
                    hint=f"Keep {name}.",
                )
            warnings.append(f"{where} is an older name of {path}{name}.")
        inner = _spec_in(spec.model_fields[name].annotation) if name in spec.model_fields else None
        result[name] = (
            _old_names(value, inner, f"{path}{name}.", warnings) if inner and isinstance(value, dict) else value
        )
    return result


def _spec_in(annotation: Any) -> type[BaseModel] | None:
    """The Spec class in ``X`` or ``X | None``."""
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _text_where_asked(data: Any, raw: Any, error: ValidationError, spec: type[BaseModel]) -> Any:
    """Puts back the text of YAML scalars that a string field wanted; None when there is nothing to put back."""
    changed = False
    for problem in error.errors(include_url=False, include_context=False):
        if problem["type"] != "string_type":
            continue
        target, source = data, raw
        *parents, last = _place(spec, problem["loc"]).steps
        try:
            for step in parents:
                target, source = target[step], source[step]
            if isinstance(source[last], str) and target[last] is not None:
                target[last] = source[last]
                changed = True
        except (KeyError, IndexError, TypeError):
            continue
    return data if changed else None


def describe(error: ValidationError, spec: type[BaseModel]) -> BadRequest:
    """The first problem as our error, with the field's path and the nearest valid name."""
    problems = error.errors(include_url=False)
    first = problems[0]
    context = first.get("ctx") or {}
    place = _place(spec, first["loc"])
    location = [str(step) for step in place.steps]
    code = _CODES.get(first["type"], Code.INVALID_TYPE if first["type"].endswith("_type") else Code.INVALID_VALUE)
    hint = context.get("hint")
    message = plainly(first["msg"])
    if code is Code.CONFLICTING_FIELDS:
        location = [*location, context["field"]]
        message = context["reason"]
    elif first["type"] == "union_tag_not_found":
        code, location = Code.MISSING_FIELD, [*location, "type"]
        message, hint = f"{'.'.join(location)} is missing", f"One of: {', '.join(place.tags)}."
    elif first["type"] == "union_tag_invalid":
        location = [*location, "type"]
        unknown = _unknown(".".join(location), context["tag"], place.tags, code)
        message, hint = unknown.message, _NEVER.get(context["tag"], unknown.hint)
    elif code is Code.UNKNOWN_FIELD:
        near = difflib.get_close_matches(location[-1], place.beside, 1, cutoff=0.5)
        message = f"{'.'.join(location)} is not a field here"
        hint = f"Did you mean {near[0]}?" if near else f"Fields here: {', '.join(place.beside)}."
    elif code is Code.MISSING_FIELD:
        message = f"{'.'.join(location)} is missing"
    param = ".".join(location)
    if param and param not in message and code is not Code.CONFLICTING_FIELDS:
        message = f"{param}: {message}"
    if len(problems) > 1:
        message += f" (and {len(problems) - 1} more problem{'s' if len(problems) > 2 else ''})"
    hint = hint or _what_to_write(code, problems, place, spec)
    return BadRequest(message, param=param or None, code=code, hint=hint)


def _what_to_write(code: Code, problems: list[ErrorDetails], place: "Place", spec: type[BaseModel]) -> str:
    """What the field takes: its type, its range, or else its description."""
    # A union has a problem for each member.
    same = [problem for problem in problems if _place(spec, problem["loc"]).steps == place.steps]
    info = place.info
    location = [str(step) for step in place.steps]
    about = f" {info.description}" if info and info.description else ""
    if code is Code.MISSING_FIELD:
        return f"Add {'.'.join(location)}.{about}"
    kinds = dict.fromkeys(_KINDS[problem["type"]] for problem in same if problem["type"] in _KINDS)
    if code is Code.INVALID_TYPE and kinds:
        return f"Write {' or '.join(kinds)}."
    context = same[0].get("ctx") or {}
    if "expected" in context:
        return f"Allowed: {context['expected']}."
    if context.get("pattern") == NAME_PATTERN:
        return "Letters, digits, dots, dashes and underscores, at most 63; the first is a letter or a digit."
    limits = {name: context[name] for name in _BOUNDS if name in context}
    for rule in info.metadata if info and limits else ():
        limits |= {name: value for name in _BOUNDS if (value := getattr(rule, name, None)) is not None}
    if limits:
        return f"Allowed: {' and '.join(_BOUNDS[name].format(limits[name]) for name in _BOUNDS if name in limits)}."
    return about.strip() or "See /docs for what this field takes."


@dataclass
class Place:
    """Where in a spec something stands."""

    steps: list[str | int] = field(default_factory=list)
    """Names and indices, without the names that pydantic adds for members of a union."""
    info: FieldInfo | None = None
    """The field at the end."""
    beside: list[str] = field(default_factory=list)
    """All fields where the last step stands."""
    tags: list[str] = field(default_factory=list)
    """What ``type`` may be there, where it selects."""


def _place(spec: type[BaseModel], loc: tuple[str | int, ...]) -> Place:
    place = Place()
    options: list[Any] = [spec]
    for step in loc:
        if isinstance(step, str) and ("[" in step or step in ("str", "list")):
            continue
        tagged = _tagged(options)
        if step in tagged:
            options = [tagged[str(step)]]
            continue
        place.steps.append(step)
        models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        place.beside = sorted({name for model in models for name in model.model_fields})
        place.info = next((model.model_fields[step] for model in models if step in model.model_fields), None)
        inner = (
            [place.info.annotation]
            if place.info
            else [typing.get_args(option)[-1] for option in options if typing.get_origin(option) in (list, dict)]
        )
        options = [member for annotation in inner for member in _members(annotation)]
    place.tags = sorted(_tagged(options))
    return place


def _tagged(options: list[Any]) -> dict[str, Any]:
    """Members of a union by their ``type``; empty where there is nothing to choose."""
    models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    if len(models) < 2:
        return {}
    return {model.model_fields["type"].default: model for model in models if "type" in model.model_fields}


def _members(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for option in typing.get_args(annotation) for member in _members(option)]
    return [annotation]
