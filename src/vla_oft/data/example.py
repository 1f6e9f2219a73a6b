"""tf.train.Example, parsed without protobuf or TensorFlow: a record's bytes -> arrays by name.

    Example   { 1: Features }
    Features  { 1: map entry { 1: key, 2: Feature }, repeated }
    Feature   { 1: BytesList | 2: FloatList | 3: Int64List }       each { 1: value, repeated; numbers packed or one by one }

Byte strings are not copied: an episode's pictures are megabytes, of which an index needs only the places. Damage raises ValueError, time is
linear in the number of bytes, and memory at most about 10 times it (int64 for numbers that take one byte). What a parser of protobuf
accepts means the same here: unknown fields are skipped, the last of duplicate keys counts, pieces of one list are joined.
"""

from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MAX_FEATURES = 4096
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BLOCK = 1 << 16


class Strings(NamedTuple):
    """The byte strings of one feature: where each starts in the record, and its size; int64 (N,)."""

    starts: np.ndarray
    sizes: np.ndarray


Values = Strings | np.ndarray | None
"""Of one feature: byte strings, float32 (N,), int64 (N,), or None where the writer gave it no kind. Floats may be views of the record."""


def parse_example(record: bytes | memoryview) -> dict[str, Values]:
    """The features of a serialised tf.train.Example by name. Raises ValueError naming the byte where it is damaged."""
    data = memoryview(record)
    features: dict[str, Values] = {}
    for _, start, stop in _messages(data, 0, len(data), 1):
        for _, entry, entry_stop in _messages(data, start, stop, 1):
            name, values = _parse_entry(data, entry, entry_stop)
            features[name] = values
            if len(features) > MAX_FEATURES:
                raise ValueError(f"more than {MAX_FEATURES} features")
    return features


def decode_varints(packed: bytes | bytearray | memoryview) -> np.ndarray:
    """Variable-length integers one after the other -> int64 (N,). The last byte must end the last of them."""
    data = np.frombuffer(packed, np.uint8) if len(packed) else np.empty(0, np.uint8)
    last = data < 128
    values = np.empty(np.count_nonzero(last), np.int64)
    if len(values) == len(data):
        values[:] = data
        return values
    done = start = 0
    while start < len(data):
        ends = np.flatnonzero(last[start : start + _BLOCK]) + 1
        if not len(ends):
            raise ValueError("an integer of more than 10 bytes")
        values[done : done + len(ends)] = _decode_block(data[start : start + ends[-1]], ends)
        done, start = done + len(ends), start + int(ends[-1])
    return values


class _Builder:
    """Collects the values of one Feature. Another kind of list replaces what came before, as in any `oneof`."""

    __slots__ = ("kind", "raw", "sizes", "starts")

    def __init__(self) -> None:
        self.set_kind(0)

    def set_kind(self, kind: int) -> None:
        self.kind = kind
        self.starts, self.sizes = array("q"), array("q")
        self.raw: memoryview | bytearray | None = None

    def add_list(self, data: memoryview, kind: int, at: int, end: int) -> None:
        if kind != self.kind:
            self.values()  # what is replaced must be right, too
            self.set_kind(kind)
        if kind == 1:
            _add_strings(data, at, end, self.starts, self.sizes)
            return
        single, width = (_FIXED32, 4) if kind == 2 else (_VARINT, 1)
        for number, wire, start, stop in _fields(data, at, end):
            if number == 1 and wire in (single, _BYTES) and stop > start:
                if (stop - start) % width or (kind == 3 and data[stop - 1] >= 128):
                    raise ValueError(f"at byte {start} of its data, a list of numbers ends within a number")
                self._add_raw(data[start:stop])

    def values(self) -> Values:
        if self.kind == 1:
            return Strings(_int64(self.starts), _int64(self.sizes))
        if self.kind == 2:
            return np.frombuffer(self.raw, "<f4") if self.raw else np.empty(0, np.float32)
        return decode_varints(self.raw or b"") if self.kind else None

    def _add_raw(self, piece: memoryview) -> None:
        if self.raw is None:
            self.raw = piece  # the usual case, not copied
            return
        if isinstance(self.raw, memoryview):
            self.raw = bytearray(self.raw)
        self.raw += piece


def _parse_entry(data: memoryview, at: int, end: int) -> tuple[str, Values]:
    name, builder = "", _Builder()
    for number, wire, start, stop in _fields(data, at, end):
        if number == 1 and wire == _BYTES:
            name = bytes(data[start:stop]).decode()
        elif number == 2 and wire == _BYTES:
            for kind, inner, list_start, list_stop in _fields(data, start, stop):
                if kind in (1, 2, 3) and inner == _BYTES:
                    builder.add_list(data, kind, list_start, list_stop)
    try:
        return name, builder.values()
    except ValueError as error:
        raise ValueError(f"at byte {at} of its data, feature '{name[:80]}': {error}") from None


def _add_strings(data: memoryview, at: int, end: int, starts: array, sizes: array) -> None:
    """The hot loop: one round for every picture and every instruction."""
    while at < end:
        if data[at] != 1 << 3 | _BYTES:
            _, _, _, at = next(_fields(data, at, end))
            continue
        size, at = _varint(data, at + 1, end)
        if size > end - at:
            raise _too_long(at, size, end)
        starts.append(at)
        sizes.append(size)
        at += size


def _messages(data: memoryview, at: int, end: int, wanted: int) -> Iterator[tuple[int, int, int]]:
    for number, wire, start, stop in _fields(data, at, end):
        if number == wanted and wire == _BYTES:
            yield number, start, stop


def _fields(data: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, first byte of the value, byte after it) of each field of a message."""
    while at < end:
        tag, start = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"at byte {at} of its data, no field has number {number}")
        if wire == _BYTES:
            size, start = _varint(data, start, end)
        elif wire == _VARINT:
            size = _varint(data, start, end)[1] - start
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"at byte {at} of its data, no field has wire type {wire}")
        if size > end - start:
            raise _too_long(start, size, end)
        at = start + size
        yield number, wire, start, at


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """A variable-length integer and the byte after it."""
    value = shift = 0
    for place in range(at, min(end, at + 10)):
        byte = data[place]
        if byte < 128:
            return value | byte << shift, place + 1
        value |= (byte & 127) << shift
        shift += 7
    raise ValueError(f"at byte {at} of its data, an integer without an end")


def _decode_block(data: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """uint8 (N,), whose integers end before the bytes `ends` -> int64 (len(ends),)."""
    starts = np.concatenate(([0], ends[:-1]))
    sizes = ends - starts
    longest = int(sizes.max())
    if longest > 10:
        raise ValueError("an integer of more than 10 bytes")
    values = np.zeros(len(ends), np.uint64)
    for place in range(longest):
        has = sizes > place
        values[has] |= (data[starts[has] + place] & 127).astype(np.uint64) << np.uint64(7 * place)
    return values.view(np.int64)


def _int64(values: array) -> np.ndarray:
    return np.frombuffer(values, np.int64) if len(values) else np.empty(0, np.int64)


def _too_long(at: int, size: int, end: int) -> ValueError:
    return ValueError(f"at byte {at} of its data, a field of {size} bytes, {end - at} are left")
