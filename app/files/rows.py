"""Dataset rows: a file of JSON objects read as conversations, with every fault named by its line (stdlib only)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from app.files.json_rows import Fault, Row, Unit, kind, quote, read_objects
from app.files.preferences import PREFERENCE_FIELDS, from_preference, from_prompt
from app.files.tools import Tool, numbered, tools_of
from app.files.turns import Message, RowError, field_of, items, message, sharegpt_turn, text

Format = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "preference", "prompt", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)
CONVERSATIONS: frozenset[Format] = frozenset({"messages", "prompt_completion", "alpaca", "sharegpt"})
CHATS: frozenset[Format] = CONVERSATIONS - {"prompt_completion"}
"""What only a chat template can make a text of."""
WITH_TOOLS: frozenset[Format] = frozenset({"messages", "sharegpt"})
PAIRS = (("prompt", "completion"), ("question", "answer"))


class Example(NamedTuple):
    """A row: a conversation, or what comes before the two answers of a preference, or a prompt alone, or a text."""

    messages: list[Message]
    chosen: list[Message] = []
    rejected: list[Message] = []
    text: str = ""
    tools: list[Tool] = []
    """What the assistant could call."""


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
    if any(good in row and bad in row for good, bad in PREFERENCE_FIELDS):
        return "preference"
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if any(prompt in row and completion in row for prompt, completion in PAIRS):
        return "prompt_completion"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row:
        return "prompt"
    return "text" if "text" in row else None


def to_example(row: Mapping[str, Any], format: Format) -> Example:
    """The row, checked. Raises RowError naming the field at fault."""
    if format == "preference":
        prompt, chosen, rejected = from_preference(row)
        inside = row.get("input")
        offered = inside if "tools" not in row and isinstance(inside, dict) else row
        return Example(prompt, chosen, rejected, tools=tools_of(offered))
    if format == "prompt":
        return Example(from_prompt(row))
    if format == "text":
        return Example([], text=field_of(row, "text", needed=True))
    return Example(to_messages(row, format), tools=tools_of(row) if format in WITH_TOOLS else [])


def to_messages(row: Mapping[str, Any], format: Format) -> list[Message]:
    """The row as a conversation. Raises RowError naming the field at fault."""
    if format == "preference":
        raise RowError("chosen", "chosen and rejected belong to preference training (reward, dpo), not here")
    if format == "prompt":
        raise RowError("prompt", "a prompt without an answer belongs to ppo and grpo; here an answer is needed")
    if format == "text":
        raise RowError("text", "plain text belongs to pretrain; here a conversation is needed")
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
        raise RowError(name, "no assistant turn, so there is nothing to learn")
    if len(answers) == len(messages):
        raise RowError(name, "only assistant turns; at least one message must come from someone else")
    if all(message.get("weight") == 0 for message in answers):
        raise RowError(name, "every assistant message has weight 0, so there is nothing to learn")
    return numbered(messages)


def check(path: Path, format: Format | Literal["auto"] = "auto", max_problems: int = 20) -> FileReport:
    """Reads the whole file with bounded memory. Never raises for bad content."""
    report = FileReport(format=None if format == "auto" else format, bytes=path.stat().st_size)
    for row in read_objects(path):
        report.unit = row.unit
        report.rows += row.counts
        fault = row.fault
        if row.value is not None:
            try:
                report.format, example = _normalise(row.value, report.format)
            except RowError as error:
                fault = Fault(error.field, error.message)
            else:
                asked = sum(len(turn["content"]) for turn in example.messages) + len(example.text)
                answers = [sum(len(turn["content"]) for turn in part) for part in (example.chosen, example.rejected)]
                report.longest_row = max(report.longest_row, asked + max(answers))
        if fault:
            report.bad_rows += 1
            if len(report.problems) < max_problems:
                report.problems.append(Problem(row.place, fault.field, fault.message))
    if not report.rows and not report.problems:
        report.problems.append(Problem(1, "", "the file is empty: it holds no row"))
    return report


def read(path: Path, format: Format | Literal["auto"] = "auto") -> Iterator[list[Message]]:
    """The conversations of a file in order. Raises RowError with its place at the first bad row."""
    return (example.messages for example in _examples(path, format, CONVERSATIONS))


def read_chats(path: Path, format: Format | Literal["auto"] = "auto") -> Iterator[Example]:
    """As ``read``, with the tools that each row offers. Raises RowError."""
    return _examples(path, format, CONVERSATIONS)


def read_pairs(path: Path) -> Iterator[Example]:
    """The preferences of a file in order. Raises RowError with its place at the first row that is none."""
    return _examples(path, "auto", frozenset({"preference"}))


def read_judged(path: Path, format: Format | Literal["auto"] = "auto") -> Iterator[tuple[Example, bool]]:
    """Conversations with the row's ``label``: whether the last answer is a good one. Raises RowError."""
    for row, example in _rows(path, format, CONVERSATIONS):
        label = row.value.get("label") if row.value is not None else None
        if not isinstance(label, bool):
            said = "is missing" if label is None else f"must be true or false, not {quote(label)}"
            raise RowError("label", f"{said}: each row says whether its answer is a good one", row.place, row.unit)
        if example.messages[-1]["role"] != "assistant":
            raise RowError("messages", "must end with the answer that the label judges", row.place, row.unit)
        yield example, label


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file in order. Raises RowError with its place at the first row that is none."""
    return (example.text for example in _examples(path, "auto", frozenset({"text"})))


def read_prompts(path: Path, format: Format | Literal["auto"] = "auto") -> Iterator[list[Message]]:
    """What each row asks: everything before its last answer. Raises RowError."""
    return (example.messages for _, example in read_asked(path, format))


def read_asked(path: Path, format: Format | Literal["auto"] = "auto") -> Iterator[tuple[Row, Example]]:
    """What each row asks, without its last answer, beside the row with all its columns. Raises RowError."""
    for row, example in _rows(path, format, frozenset(FORMATS) - {"text"}):
        turns = list(example.messages)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        yield row, example._replace(messages=turns)


def _examples(path: Path, format: Format | Literal["auto"], wanted: frozenset[Format]) -> Iterator[Example]:
    return (example for _, example in _rows(path, format, wanted))


def _rows(path: Path, format: Format | Literal["auto"], wanted: frozenset[Format]) -> Iterator[tuple[Row, Example]]:
    shape: Format | None = None if format == "auto" else format
    for row in read_objects(path):
        if row.fault or row.value is None:
            fault = row.fault or Fault("", "no object")
            raise RowError(fault.field, fault.message, row.place, row.unit)
        try:
            if shape is None and detect(row.value) in FORMATS and detect(row.value) not in wanted:
                _refuse(row.value, wanted)
            shape, example = _normalise(row.value, shape)
        except RowError as error:
            raise RowError(error.field, error.message, row.place, row.unit) from None
        yield row, example


def _refuse(row: Mapping[str, Any], wanted: frozenset[Format]) -> None:
    if wanted == {"preference"}:
        raise RowError("chosen", "is missing: each row needs a chosen and a rejected answer to the same prompt")
    if wanted == {"text"}:
        raise RowError("text", f"is missing: this row is {detect(row)}, and plain text is needed")
    to_messages(row, detect(row) or "messages")  # says why


def first_format(path: Path) -> Format | None:
    """The shape of the first readable row; None when there is none."""
    return next((detect(row.value) for row in read_objects(path) if row.value is not None), None)


def _normalise(row: dict[str, Any], shape: Format | None) -> tuple[Format, Example]:
    found = detect(row)
    if shape is None:
        if found is None:
            known = "messages, prompt + completion, instruction + output, conversations, chosen + rejected, or text"
            raise RowError("", f"unknown shape: fields {quote(sorted(row))}; expected {known}")
        shape = found
    elif found not in (shape, None):
        raise RowError("", f"mixed shapes: this row is {found}, the file is {shape}")
    return shape, to_example(row, shape)


# --- shapes -----------------------------------------------------------------------------------------------------------


def _from_messages(row: Mapping[str, Any]) -> list[Message]:
    return [message(turn, f"messages[{index}]") for index, turn in enumerate(items(row, "messages"))]


def _from_pair(row: Mapping[str, Any]) -> list[Message]:
    prompt, completion = next((pair for pair in PAIRS if pair[0] in row or pair[1] in row), PAIRS[0])
    return [
        {"role": "user", "content": field_of(row, prompt, needed=True)},
        {"role": "assistant", "content": field_of(row, completion, needed=True)},
    ]


def _from_alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": field_of(row, "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError("history", f"must be a list of [question, answer] pairs, not {kind(history)}")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{index}]", "must be a pair [question, answer]")
        messages.append({"role": "user", "content": text(pair[0], f"history[{index}][0]")})
        messages.append({"role": "assistant", "content": text(pair[1], f"history[{index}][1]", needed=True)})
    question = field_of(row, "instruction")
    more = field_of(row, "input") if row.get("input") is not None else ""
    question = f"{question}\n{more}" if question and more else question or more
    if not question:
        raise RowError("instruction", "instruction and input are both empty")
    answer = field_of(row, "output", needed=True)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": field_of(row, "system")})
    for index, turn in enumerate(items(row, "conversations")):
        messages.append(sharegpt_turn(turn, f"conversations[{index}]"))
    return messages
