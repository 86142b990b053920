"""JSON objects out of a file, JSONL or one array, streaming, with the place of every fault (stdlib only)."""

import codecs
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

MAX_ROW_BYTES = 16 * 1024 * 1024
CHUNK_BYTES = 256 * 1024
# Deeper than any conversation, and far from the interpreter's own limit, which depends on the caller's stack.
MAX_DEPTH = 100

MAGIC = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"%PDF": "a PDF",
}
_SPACE = re.compile(r"[ \t\r\n]*")

Unit = Literal["line", "row"]
"""What a place counts: lines of JSONL, or elements of a JSON array."""


class Fault(NamedTuple):
    """What is wrong, and in which field ("" for the row as a whole)."""

    field: str
    message: str


class Row(NamedTuple):
    """One row as read: its 1-based place, and either its object or what is wrong with it."""

    unit: Unit
    place: int
    value: dict[str, Any] | None
    fault: Fault | None = None
    counts: bool = True
    """False for a fault of the file that is no row."""


class _Refused(ValueError):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def read_objects(path: Path) -> Iterator[Row]:
    """Every row of the file in order; at most one row of an array is held in memory."""
    with path.open("rb") as file:
        head = file.read(4096)
        wrong = _wrong_encoding(head)
        if wrong:
            yield Row("line", 1, None, Fault("", wrong), counts=False)
            return
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(start)
        if _first_byte(file) == b"[":
            yield from _array_rows(file)
        else:
            file.seek(start)
            yield from _line_rows(file)


def quote(value: Any) -> str:
    """User text made safe to print: ASCII, short."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _wrong_encoding(head: bytes) -> str | None:
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return f"the file is {name}; upload plain JSONL or JSON in UTF-8"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "the file is UTF-16; save it as UTF-8"
    even, odd = head[::2], head[1::2]
    if len(head) >= 4 and (even.count(0) > len(even) // 2) != (odd.count(0) > len(odd) // 2):
        return "the file looks like UTF-16; save it as UTF-8"
    return None


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte that is no white space; the file then stands behind it."""
    while chunk := file.read(CHUNK_BYTES):
        rest = chunk.lstrip(b" \t\r\n")
        if rest:
            file.seek(1 - len(rest), os.SEEK_CUR)
            return rest[:1]
    return b""


def _line_rows(file: BinaryIO) -> Iterator[Row]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(CHUNK_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield _bad_line(number, f"the line is longer than {MAX_ROW_BYTES >> 20} MiB")
        elif not line.strip(b" \t\r\n"):
            continue
        elif b"\x00" in line:
            yield _bad_line(number, "the line contains NUL bytes")
        else:
            yield _parse_line(line, number)


def _parse_line(line: bytes, number: int) -> Row:
    try:
        text = line.decode().rstrip(" \t\r\n")
    except UnicodeDecodeError as error:
        return _bad_line(number, f"not valid UTF-8 at byte {error.start + 1} of the line")
    try:
        value = _decoder().decode(text)
    except _Refused as error:
        return Row("line", number, None, error.fault)
    except json.JSONDecodeError as error:
        hint = "; write each row as one object on one line" if text.strip() in "{}" else ""
        return _bad_line(number, f"not valid JSON: {error.msg} (column {error.colno}){hint}")
    except (ValueError, RecursionError) as error:
        return _bad_line(number, _json_fault(error))
    return _object(value, "line", number)


def _bad_line(number: int, message: str) -> Row:
    return Row("line", number, None, Fault("", message))


class _Window:
    """A moving view on the text of a file: ``text[at:]`` is not used yet."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""
        self.at = 0
        self.ended = False

    def more(self) -> None:
        """Drops what is used and reads at least as much again as is left, so that retries stay linear."""
        left = self.text[self.at :]
        chunk = self._file.read(max(CHUNK_BYTES, len(left)))
        self.ended = not chunk
        self.text, self.at = left + self._decoder.decode(chunk, final=self.ended), 0

    def next_char(self) -> str:
        """The next character that is no white space, not yet used; "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def _array_rows(file: BinaryIO) -> Iterator[Row]:
    """The elements of an array whose opening bracket is read. The first syntax error ends it."""
    window, number = _Window(file), 0
    try:
        while (char := window.next_char()) != "]" or number:
            if number:
                if char == "]":
                    break
                if char != ",":
                    raise _Refused(Fault("", "expected a comma" if char else "the array is not closed"))
                window.at += 1
                if window.next_char() == "]":
                    raise _Refused(Fault("", "trailing comma before the closing bracket"))
            value = _element(window)
            number += 1
            yield _object(value, "row", number)
        window.at += 1
        if window.next_char():
            raise _Refused(Fault("", "text after the closing bracket of the array"))
    except UnicodeDecodeError:
        yield Row("row", number + 1, None, Fault("", "not valid UTF-8"), counts=False)
    except _Refused as error:
        yield Row("row", number + 1, None, error.fault, counts=False)


def _element(window: _Window) -> Any:
    decoder = _decoder()
    while True:
        window.next_char()
        try:
            value, end = decoder.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            fault = f"not valid JSON: {error.msg} (character {error.pos - window.at + 1} of the row)"
        except _Refused:
            raise
        except (ValueError, RecursionError) as error:
            raise _Refused(Fault("", _json_fault(error))) from None
        else:
            # A number at the end of the window may go on behind it.
            if end < len(window.text) or window.ended or isinstance(value, dict):
                window.at = end
                return value
            fault = ""
        if window.ended:
            raise _Refused(Fault("", fault if window.text[window.at :] else "the array is not closed"))
        if len(window.text) - window.at > MAX_ROW_BYTES:
            raise _Refused(Fault("", fault))
        window.more()


def _object(value: Any, unit: Unit, place: int) -> Row:
    if not isinstance(value, dict):
        return Row(unit, place, None, Fault("", f"a row must be a JSON object, not {kind(value)}"))
    if deeper_than(value, MAX_DEPTH):
        return Row(unit, place, None, Fault("", f"nested deeper than {MAX_DEPTH} levels"))
    return Row(unit, place, value)


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise _Refused(Fault(quote(twice), "the key appears twice"))
    return value


def _no_constant(name: str) -> Any:
    raise _Refused(Fault("", f"{name} is no JSON value"))


def _json_fault(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {quote(str(error))}"


def deeper_than(value: Any, limit: int) -> bool:
    """Level by level, so that depth costs no stack."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
