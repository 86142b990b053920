"""Dataset rows: a file of JSON objects read as conversations, with every fault named by its line (stdlib only)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from app.files.json_rows import Fault, Unit, kind, quote, read_objects

Format = Literal["messages", "prompt_completion", "alpaca", "sharegpt"]
FORMATS: tuple[Format, ...] = get_args(Format)
Message = dict[str, Any]
"""``role`` (system, user, assistant, tool), ``content``, and where given ``weight``, ``tool_calls``, ``name``."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
PAIRS = (("prompt", "completion"), ("question", "answer"))


class RowError(ValueError):
    """A row that cannot be learnt from; ``line`` is 0 while the place is not known yet."""

    def __init__(self, field: str, message: str, line: int = 0, unit: Unit = "line") -> None:
        super().__init__(f"{unit} {line}: {field + ': ' if field else ''}{message}")
        self.field = field
        self.message = message
        self.line = line


class Problem(NamedTuple):
    """One fault: 1-based line (or element of a JSON array), the field at fault or "", what is wrong."""

    line: int
    field: str
    message: str


@dataclass
class FileReport:
    """What a dataset file holds. ``ok`` only if every row can be learnt from."""

    format: Format | None = None
    unit: Unit = "line"
    """What ``Problem.line`` counts."""
    rows: int = 0
    bad_rows: int = 0
    bytes: int = 0
    longest_row: int = 0
    """Characters of text in the longest row."""
    problems: list[Problem] = field(default_factory=list)
    """The first ``max_problems``; ``bad_rows`` counts them all."""

    @property
    def ok(self) -> bool:
        """True when there is at least one row and no problem."""
        return not self.problems


def detect(row: Mapping[str, Any]) -> Format | None:
    """The shape of a row by its field names; None for a shape that we do not know."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if any(prompt in row and completion in row for prompt, completion in PAIRS):
        return "prompt_completion"
    if "instruction" in row and "output" in row:
        return "alpaca"
    return None


def to_messages(row: Mapping[str, Any], format: Format) -> list[Message]:
    """The row as a conversation. Raises RowError naming the field at fault."""
    convert = {
        "messages": _from_messages,
        "prompt_completion": _from_pair,
        "alpaca": _from_alpaca,
        "sharegpt": _from_sharegpt,
    }[format]
    messages = convert(row)
    answers = [message for message in messages if message["role"] == "assistant"]
    name = "conversations" if format == "sharegpt" else "messages"
    if not answers:
        hint = "; chosen and rejected belong to preference training" if {"chosen", "rejected"} <= row.keys() else ""
        raise RowError(name, f"no assistant turn, so there is nothing to learn{hint}")
    if len(answers) == len(messages):
        raise RowError(name, "only assistant turns; at least one message must come from someone else")
    if all(message.get("weight") == 0 for message in answers):
        raise RowError(name, "every assistant message has weight 0, so there is nothing to learn")
    return messages


def check(path: Path, format: Format | Literal["auto"] = "auto", max_problems: int = 20) -> FileReport:
    """Reads the whole file with bounded memory. Never raises for bad content."""
    report = FileReport(format=None if format == "auto" else format, bytes=path.stat().st_size)
    for row in read_objects(path):
        report.unit = row.unit
        report.rows += row.counts
        fault = row.fault
        if row.value is not None:
            try:
                report.format, messages = _normalise(row.value, report.format)
            except RowError as error:
                fault = Fault(error.field, error.message)
            else:
                report.longest_row = max(report.longest_row, sum(len(message["content"]) for message in messages))
        if fault:
            report.bad_rows += 1
            if len(report.problems) < max_problems:
                report.problems.append(Problem(row.place, fault.field, fault.message))
    if not report.rows and not report.problems:
        report.problems.append(Problem(1, "", "the file is empty: it holds no row"))
    return report


def read(path: Path, format: Format | Literal["auto"] = "auto") -> Iterator[list[Message]]:
    """The conversations of a file in order. Raises RowError with its place at the first bad row."""
    shape: Format | None = None if format == "auto" else format
    for row in read_objects(path):
        if row.fault or row.value is None:
            fault = row.fault or Fault("", "no object")
            raise RowError(fault.field, fault.message, row.place, row.unit)
        try:
            shape, messages = _normalise(row.value, shape)
        except RowError as error:
            raise RowError(error.field, error.message, row.place, row.unit) from None
        yield messages


def first_format(path: Path) -> Format | None:
    """The shape of the first readable row; None when there is none."""
    return next((detect(row.value) for row in read_objects(path) if row.value is not None), None)


def _normalise(row: dict[str, Any], shape: Format | None) -> tuple[Format, list[Message]]:
    found = detect(row)
    if shape is None:
        if found is None:
            known = "messages, prompt + completion, instruction + output, or conversations"
            raise RowError("", f"unknown shape: fields {quote(sorted(row))}; expected {known}")
        shape = found
    elif found not in (shape, None):
        raise RowError("", f"mixed shapes: this row is {found}, the file is {shape}")
    return shape, to_messages(row, shape)


# --- shapes -----------------------------------------------------------------------------------------------------------


def _from_messages(row: Mapping[str, Any]) -> list[Message]:
    return [_message(turn, f"messages[{index}]") for index, turn in enumerate(_list(row, "messages"))]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(where, f"must be an object with role and content, not {kind(turn)}")
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        what = "role is missing" if role is None else f"unknown role {quote(role)}"
        raise RowError(f"{where}.role", f"{what}; known are {known}")
    message: Message = {"role": ROLES[role]}
    calls = turn.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        raise RowError(f"{where}.tool_calls", "must be a list of objects")
    content = turn.get("content")
    if isinstance(content, list):
        content = _join_parts(content, f"{where}.content")
    if content is None and calls:
        content = ""
    if content is None:
        raise RowError(f"{where}.content", "content is missing")
    message["content"] = _text(content, f"{where}.content", needed=role == "assistant" and not calls)
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = _text(turn[key], f"{where}.{key}")
    weight = turn.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise RowError(f"{where}.weight", f"must be 0 or 1, not {quote(weight)}")
        message["weight"] = int(weight)
    return message


def _join_parts(parts: list[Any], where: str) -> str:
    for index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"{where}[{index}]", 'only text parts {"type": "text", "text": …} can be learnt from')
    return "".join(part["text"] for part in parts)


def _from_pair(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = next((pair for pair in PAIRS if pair[0] in row or pair[1] in row), PAIRS[0])
    return [
        {"role": "user", "content": _field(row, prompt, needed=True)},
        {"role": "assistant", "content": _field(row, completion, needed=True)},
    ]


def _from_alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _field(row, "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("history", f"must be a list of [question, answer] pairs, not {kind(history)}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{index}]", "must be a pair [question, answer]")
        messages.append({"role": "user", "content": _text(pair[0], f"history[{index}][0]")})
        messages.append({"role": "assistant", "content": _text(pair[1], f"history[{index}][1]", needed=True)})
    question = _field(row, "instruction")
    more = _field(row, "input") if row.get("input") is not None else ""
    question = f"{question}\n{more}" if question and more else question or more
    if not question:
        raise RowError("instruction", "instruction and input are both empty")
    answer = _field(row, "output", needed=True)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _field(row, "system")})
    for index, turn in enumerate(_list(row, "conversations")):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowError(where, f"must be an object with from and value, not {kind(turn)}")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            what = "from is missing" if speaker is None else f"unknown speaker {quote(speaker)}"
            raise RowError(f"{where}.from", f"{what}; known are {', '.join(SHAREGPT_ROLES)}")
        role = SHAREGPT_ROLES[speaker]
        if turn.get("value") is None:
            raise RowError(f"{where}.value", "value is missing")
        messages.append({"role": role, "content": _text(turn["value"], f"{where}.value", needed=role == "assistant")})
    return messages


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise RowError(name, "is missing" if value is None else f"must be a list, not {kind(value)}")
    if not value:
        raise RowError(name, "is empty")
    return value


def _field(row: Mapping[str, Any], name: str, *, needed: bool = False) -> str:
    if row.get(name) is None:
        raise RowError(name, "is missing")
    return _text(row[name], name, needed=needed)


def _text(value: Any, where: str, *, needed: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError(where, f"must be a string, not {kind(value)}")
    if needed and not value.strip():
        raise RowError(where, "is empty, so there is nothing to learn")
    if "\x00" in value:
        raise RowError(where, "contains a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(where, f"contains a lone surrogate at character {error.start + 1}") from None
    return value
