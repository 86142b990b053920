"""Templates of graders: ``{{item.answer}}`` and ``{{sample.output_text}}`` in a text, filled in and nothing more.

The names are OpenAI's. What stands between the braces is a path, never code: no filters, no conditions, no calls; and
what is filled in is not read again.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from app.grading import Sample

_PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"\s*(item|sample)((?:\.\w+|\[\d+\])+)\s*")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_OPENINGS = ("{{", "{%", "{#")
_MISSING = object()


class IsTemplate:
    """Marks a field whose text is a template, so that the data can be checked against it."""


def _checked(text: str) -> str:
    for inside in _PLACE.findall(text):
        found = _PATH.fullmatch(inside)
        if not found:
            raise _fault(f"{{{{{inside[:64]}}}}} is no path", "Write {{item.<column>}} or {{sample.output_text}}.")
        if found[1] == "sample" and _steps(found[2])[0] not in ("output_text", "output_json"):
            raise _fault(f"{{{{{inside.strip()[:64]}}}}} is not known", "A sample has output_text and output_json.")
        if found[1] == "sample" and _steps(found[2])[0] == "output_text" and len(_steps(found[2])) > 1:
            raise _fault("sample.output_text is a text without parts", "Use sample.output_json for parts of JSON.")
    rest = _PLACE.sub("", text)
    if any(mark in rest for mark in _OPENINGS):
        raise _fault("braces are left open, or a block of code stands there", "Only {{item.…}} and {{sample.…}} work.")
    return text


def _fault(message: str, hint: str) -> PydanticCustomError:
    return PydanticCustomError("template", "{reason}", {"reason": message, "hint": hint})


Template = Annotated[
    str,
    AfterValidator(_checked),
    IsTemplate(),
    Field(max_length=16_384, description="A text with {{item.<column>}} and {{sample.output_text}} filled in."),
]


def fill(template: str, sample: Sample, quoted: Callable[[str], str] = str) -> str | None:
    """The text with every place filled in; None where the answer lacks what is asked for (JSON that it is not).

    ``quoted`` is applied to what is filled in.
    """
    lacking = False

    def value(place: re.Match[str]) -> str:
        nonlocal lacking
        found = _PATH.fullmatch(place[1])
        assert found
        steps = _steps(found[2])
        known: Any = sample.item
        if found[1] == "sample":
            known = {"output_text": sample.output_text}
            if steps[0] == "output_json":
                known = {"output_json": _json(sample.output_text)}
        result = _follow(known, steps)
        if result is _MISSING or result is None:
            lacking = True
            return ""
        return quoted(_text(result))

    text = _PLACE.sub(value, template)
    return None if lacking else text


def item_paths(spec: BaseModel, where: str) -> Iterator[tuple[str, list[str]]]:
    """What the templates of a spec read of a row: where the template stands, and the steps to the value."""
    for name, info in type(spec).model_fields.items():
        yield from _paths_in(
            getattr(spec, name), f"{where}.{name}", any(isinstance(m, IsTemplate) for m in info.metadata)
        )


def _paths_in(value: Any, where: str, marked: bool) -> Iterator[tuple[str, list[str]]]:
    if isinstance(value, BaseModel):
        yield from item_paths(value, where)
    elif isinstance(value, list | dict):
        pairs = enumerate(value) if isinstance(value, list) else value.items()
        for key, inner in pairs:
            yield from _paths_in(inner, f"{where}.{key}", marked)
    elif marked and isinstance(value, str):
        for inside in _PLACE.findall(value):
            if (found := _PATH.fullmatch(inside)) and found[1] == "item":
                yield where, _steps(found[2])


def lacks(item: Mapping[str, Any], steps: list[str]) -> bool:
    """Whether a row has nothing, or null, at the end of these steps."""
    return _follow(item, steps) in (_MISSING, None)


def _steps(path: str) -> list[str]:
    return [name or number for name, number in _STEP.findall(path)]


def _follow(value: Any, steps: list[str]) -> Any:
    for step in steps:
        if isinstance(value, Mapping):
            value = value.get(step, _MISSING)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _MISSING
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
