"""TFRecord files: records one after the other, each with checksums of its length and of its contents.

8 bytes   length of the data, little endian           |
4 bytes   masked CRC-32C of these 8 bytes             |  one record
...       data                                        |
4 bytes   masked CRC-32C of the data                  |
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    from google_crc32c import value as _crc32c
except ImportError:
    raise ImportError("TFRecord files need the package google-crc32c: pip install 'vla-oft[data]'") from None

_HEAD, _FOOT = struct.Struct("<QI"), struct.Struct("<I")
_LENGTH_SIZE = 8
_MAX_LENGTH = 1 << 31
"""No protocol buffer is larger."""


class Record(NamedTuple):
    """number: its place in the file. offset: of its data, in bytes. checksum: of the data, as stored.

    data: valid until the next record is read: all records share one buffer.
    """

    number: int
    offset: int
    checksum: int
    data: memoryview

    def __str__(self) -> str:
        return _place(self.number, self.offset - _HEAD.size)


def read_records(path: Path, on_damage: Callable[[str], None] | None = None) -> Iterator[Record]:
    """Every record of a file whose checksums are right, in order. No length is believed that the file is too short for.

    on_damage: called with one line (record, byte offset, what is wrong; not the file) for each record that is left out: those whose data
    are damaged, and, once only, everything from a damaged length on. Without it, ValueError naming the file and the fix is raised instead.
    """
    report = on_damage or _raise_for(path)
    buffer = np.empty(1 << 20, np.uint8)
    try:
        with open(path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            at = number = 0
            while at < end:
                head = file.read(_HEAD.size)
                problem, length = _check_head(head, end - at)
                if problem:
                    report(f"{_place(number, at)}: {problem}; it and all after it are lost")
                    return
                if length + _FOOT.size > len(buffer):
                    buffer = np.empty(length + length // 4 + _FOOT.size, np.uint8)
                whole = buffer[: length + _FOOT.size].data
                if file.readinto(whole) != len(whole):
                    report(f"{_place(number, at)}: the file became shorter while it was read")
                    return
                (checksum,) = _FOOT.unpack_from(whole, length)
                if masked_crc(buffer[:length]) == checksum:
                    yield Record(number, at + _HEAD.size, checksum, whole[:length])
                else:
                    report(f"{_place(number, at)}: the checksum of its {length} bytes is wrong")
                at += _HEAD.size + length + _FOOT.size
                number += 1
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); check its permissions and the disk") from None


def masked_crc(data: bytes | np.ndarray) -> int:
    """CRC-32C as TFRecord stores it: rotated and shifted, so that a checksum of checksums is no degenerate case."""
    crc = _crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _check_head(head: bytes, left: int) -> tuple[str, int]:
    """What is wrong with a record's first bytes ("" for nothing), and the length of its data; `left`: bytes from here to the file's end."""
    if len(head) < _HEAD.size:
        return f"the file ends after {len(head)} of its {_HEAD.size} first bytes", 0
    length, checksum = _HEAD.unpack(head)
    if masked_crc(head[:_LENGTH_SIZE]) != checksum:
        return "the checksum of its length is wrong", 0
    if length > _MAX_LENGTH:
        return f"it has {length} bytes, more than any tf.train.Example", 0
    if length > left - _HEAD.size - _FOOT.size:
        return f"it needs {length + _FOOT.size} more bytes, the file ends after {left - _HEAD.size}", 0
    return "", length


def _place(number: int, at: int) -> str:
    return f"record {number} at byte {at}"


def _raise_for(path: Path) -> Callable[[str], None]:
    def report(line: str) -> None:
        raise ValueError(f"{path}: {line}; copy the file again")

    return report
