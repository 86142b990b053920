"""TensorBoard: event files in the job's folder, written here, so that nothing has to be installed.

A file is a row of records: length, its masked CRC-32C, an ``Event`` message of protobuf, its masked CRC-32C; the
messages have few enough fields to be put together by hand (tensorflow/core/util/event.proto).
"""

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from app.catalog import TrackedRun, Tracker

FOLDER = "tensorboard"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SESSION_START = 1


def _table() -> Iterator[int]:
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        yield value


_CRC = tuple(_table())


def masked_crc(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecord does, so that checksums of checksums do not cancel out."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _field(number: int, kind: int, data: bytes) -> bytes:
    return _varint(number << 3 | kind) + (_varint(len(data)) if kind == _BYTES else b"") + data


def _event(step: int, content: bytes) -> bytes:
    return _field(1, _FIXED64, struct.pack("<d", time.time())) + _field(2, _VARINT, _varint(step)) + content


class EventFile:
    """One attempt's numbers. Its first step says that what earlier files have from there on is void."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        host = "".join(letter for letter in socket.gethostname() if letter.isalnum() or letter in "-_") or "host"
        name = f"events.out.tfevents.{time.time_ns() // 1000:019d}.{host}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._begun = False
        self._write(_event(0, _field(3, _BYTES, b"brain.Event:2")))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One event with a scalar for each number."""
        if not self._begun:
            self._begun = True
            self._write(_event(step, _field(7, _BYTES, _field(1, _VARINT, _varint(_SESSION_START)))))
        summary = b"".join(
            _field(1, _BYTES, _field(1, _BYTES, name.encode()) + _field(2, _FIXED32, struct.pack("<f", value)))
            for name, value in values.items()
        )
        self._write(_event(step, _field(5, _BYTES, summary)))

    def close(self, status: str, summary: Mapping[str, float | str]) -> None:
        """The file is complete."""
        self._file.close()

    def _write(self, message: bytes) -> None:
        length = struct.pack("<Q", len(message))
        self._file.write(length + struct.pack("<I", masked_crc(length)))
        self._file.write(message + struct.pack("<I", masked_crc(message)))
        self._file.flush()


def start(run: TrackedRun) -> EventFile:
    """A new file beside those of earlier attempts."""
    return EventFile(run.folder / FOLDER)


tracker = Tracker("tensorboard", start)
