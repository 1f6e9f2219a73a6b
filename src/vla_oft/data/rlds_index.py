"""Where everything lies in an RLDS split: built by reading every record once, then one frame costs one read and one decode.

    index.json      features, instructions, problems, a digest of all records
    episodes.jsonl  what the recorder noted for each episode
    records.npy     int64 (E, 4): shard, record, steps and first byte in episodes.jsonl of each episode, in the order on disk
    tasks.npy       int32 (N,): the instruction of each step of all episodes, N steps in all
    K.npy           feature K: values (N, *shape), or for pictures int64 (N, 2): first byte in the shard, and size

Everything is checked on the way: checksums, sizes, that an episode's features have equally many steps. What is damaged is left out and
noted; whether that is an error is for the reader to decide, and costs no second pass.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft.data.example import Strings, Values, parse_example
from vla_oft.data.rlds_layout import Feature
from vla_oft.data.rows import FileRows
from vla_oft.data.tfrecord import Record, read_records
from vla_oft.progress import progress

VERSION = 1
_MB = 1 << 20


class Index:
    """An index on disk. Opens in milliseconds whatever its size; picklable, safe after a fork.

    records: int64 (E, 4), see above. columns: the rows of every feature by key. tasks: the instructions. problems: one line for everything
    that was left out. digest: of the contents of all records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = json.loads((folder / "index.json").read_text())
            self.records = np.load(folder / "records.npy", allow_pickle=False)
            self.task_rows = FileRows(folder / "tasks.npy")
            self.columns = {key: FileRows(folder / f"{number}.npy") for number, key in enumerate(facts["features"])}
            self.tasks: tuple[str, ...] = tuple(facts["tasks"])
            self.problems: tuple[str, ...] = tuple(facts["problems"])
            self.digest = str(facts["digest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"index {folder} is damaged ({error}); delete this folder, it is made anew") from None
        self.starts = np.concatenate([[0], np.cumsum(self.records[:, 2])])

    def rows(self, key: str, episode: int) -> np.ndarray:
        """Values of one feature, (T, *shape)."""
        return self.columns[key].read(np.arange(self.starts[episode], self.starts[episode + 1]))

    def task_indices(self, episode: int) -> np.ndarray:
        """int64 (T,)."""
        return self.task_rows.read(np.arange(self.starts[episode], self.starts[episode + 1])).astype(np.int64)

    def notes(self, episode: int) -> dict[str, Any]:
        """What the recorder noted."""
        with open(self.folder / "episodes.jsonl", "rb") as file:
            file.seek(int(self.records[episode, 3]))
            return json.loads(file.readline())


def build_index(
    folder: Path, title: str, shards: Sequence[tuple[Path, int]], features: Sequence[Feature], language: Feature | None
) -> None:
    """Read `shards` (path, number of records) and write the index into the empty `folder`. title: what is indexed.

    language: the feature that holds the instruction, if any; other texts of steps are not read.
    """
    writer = _Writer(folder, features, language)
    total = sum(path.stat().st_size for path, _ in shards)
    with progress(f"indexing {title}", -(-total // _MB), "MB") as advance:
        read = shown = 0
        for number, (path, count) in enumerate(shards):
            problems: list[str] = []
            seen = 0
            for record in read_records(path, problems.append):
                try:
                    writer.add(number, record)
                except ValueError as error:
                    problems.append(f"{record}: {error}")
                seen = record.number + 1
                read += len(record.data)
                if read // _MB > shown:
                    advance(read // _MB - shown)
                    shown = read // _MB
            if not problems and seen != count:
                problems.append(f"holds {seen} records, dataset_info.json lists {count}")
            writer.problems += [f"{path.name}: {problem}" for problem in problems]
        advance(-(-total // _MB) - shown)
    writer.finish()


class _Writer:
    def __init__(self, folder: Path, features: Sequence[Feature], language: Feature | None) -> None:
        self._folder, self._language = folder, language
        self._features = [feature for feature in features if feature.per_step and feature.kind != "text"]
        self._noted = [feature for feature in features if not feature.per_step and feature.kind != "image"]
        self._files = [_GrowingRows(folder / f"{k}.npy", *_row_format(feature)) for k, feature in enumerate(self._features)]
        self._task_file = _GrowingRows(folder / "tasks.npy", (), np.dtype(np.int32))
        self._tasks: dict[bytes, int] = {}
        self._records: list[tuple[int, int, int, int]] = []
        self._notes = open(folder / "episodes.jsonl", "wb")  # noqa: SIM115  (closed by `finish`)
        self._digest = hashlib.sha256()
        self.problems: list[str] = []

    def add(self, shard: int, record: Record) -> None:
        """Nothing is written before everything of the episode is known to be right."""
        values = parse_example(record.data)
        rows = [_rows(feature, values.get(feature.key), record.offset) for feature in self._features]
        counts = {len(row) for row in rows}
        if len(counts) > 1:
            listed = ", ".join(f"{feature.name} {len(row)}" for feature, row in zip(self._features, rows, strict=True))
            raise ValueError(f"its features have different numbers of steps ({listed})")
        steps = counts.pop() if counts else 0
        if not steps:
            raise ValueError("an empty episode, without steps")
        notes = {feature.name: _note(feature, values.get(feature.key), record.data) for feature in self._noted}
        tasks = self._task_numbers(values, steps, record)
        for file, row in zip(self._files, rows, strict=True):
            file.append(row)
        self._task_file.append(tasks)
        self._records.append((shard, record.number, steps, self._notes.tell()))
        self._notes.write(json.dumps(notes).encode() + b"\n")
        self._digest.update(record.checksum.to_bytes(4, "little"))

    def finish(self) -> None:
        for file in (*self._files, self._task_file, self._notes):
            file.close()
        np.save(self._folder / "records.npy", np.array(self._records, np.int64).reshape(-1, 4))
        facts = {
            "features": [feature.key for feature in self._features],
            "tasks": [task.decode() for task in self._tasks],
            "problems": self.problems,
            "digest": self._digest.hexdigest(),
        }
        (self._folder / "index.json").write_text(json.dumps(facts))

    def _task_numbers(self, values: dict[str, Values], steps: int, record: Record) -> np.ndarray:
        if self._language is None:
            return np.zeros(steps, np.int32)
        key = self._language.key
        texts = _texts(key, values.get(key), record.data)
        if len(texts) != (steps if self._language.per_step else 1):
            raise ValueError(f"{len(texts)} instructions in '{key}' for {steps} steps")
        for text in set(texts) - self._tasks.keys():
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"'{key}' is not UTF-8 ({error})") from None
        numbers = [self._tasks.setdefault(text, len(self._tasks)) for text in texts]
        return np.array(numbers if self._language.per_step else numbers * steps, np.int32)


class _GrowingRows:
    """A new `.npy` file of so far unknown length."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by `close`)
        self._shape, self._dtype, self._count = shape, dtype, 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        assert rows.shape[1:] == self._shape
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self._count += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        """numpy leaves room in it for any number of rows."""
        shape = (self._count, *self._shape)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _row_format(feature: Feature) -> tuple[tuple[int, ...], np.dtype]:
    return ((2,), np.dtype(np.int64)) if feature.kind == "image" else (feature.shape, np.dtype(feature.dtype))


def _rows(feature: Feature, values: Values, offset: int) -> np.ndarray:
    """What is stored of a feature: one row for each step. `offset`: of the record's data in its file."""
    if values is None:
        raise ValueError(f"it has no '{feature.key}'")
    if feature.kind == "image":
        if not isinstance(values, Strings):
            raise ValueError(f"'{feature.key}' holds numbers, not pictures")
        return np.stack([values.starts + offset, values.sizes], axis=1)
    wanted = "float32" if feature.dtype == "float32" else "int64"
    if isinstance(values, Strings) or values.dtype != wanted:
        found = "texts" if isinstance(values, Strings) else str(values.dtype)
        raise ValueError(f"'{feature.key}' holds {found}, features.json says {feature.dtype}")
    size = int(np.prod(feature.shape))
    if len(values) % size:
        raise ValueError(f"'{feature.key}' has {len(values)} values, not a multiple of {size}")
    return values.reshape(-1, *feature.shape)


def _texts(key: str, values: Values, record: memoryview) -> list[bytes]:
    if not isinstance(values, Strings):
        raise ValueError(f"it has no '{key}'")
    return [bytes(record[at : at + size]) for at, size in zip(values.starts.tolist(), values.sizes.tolist(), strict=True)]


def _note(feature: Feature, values: Values, record: memoryview) -> Any:
    """One value of an episode, as JSON can hold it."""
    size = int(np.prod(feature.shape))
    if isinstance(values, Strings) and len(values.sizes) == 1 and feature.kind == "text":
        return _texts(feature.key, values, record)[0].decode(errors="replace")
    if isinstance(values, np.ndarray) and len(values) == size and feature.kind == "array":
        return values.reshape(feature.shape).astype(feature.dtype).tolist()
    raise ValueError(f"'{feature.key}' holds something else than features.json says")
