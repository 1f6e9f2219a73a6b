"""Data and video files of a LeRobot v3.0 dataset while it is written: a new file begins where the last would get too large.

An episode is never split. Row groups hold at most `ROWS_PER_GROUP` steps or `GROUP_BYTES`: a picture is read with its row group.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vla_oft.data.clips import Clip, ClipFile

ROWS_PER_GROUP, GROUP_BYTES = 4096, 2**20
MEGABYTE = 2**20
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


class DataFiles:
    """Parquet files of all steps. metadata: what their schema notes, known with the first episode."""

    def __init__(self, folder: Path, max_mb: int, chunks_size: int) -> None:
        self._folder, self._max_bytes, self._chunks_size = folder, max_mb * MEGABYTE, chunks_size
        self._rows: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._index, self._bytes = 0, 0

    def append(self, table: pa.Table, metadata: dict[str, str]) -> tuple[int, int]:
        """Add the steps of one episode; return the numbers of its chunk and file."""
        if self._bytes and self._bytes + table.nbytes > self._max_bytes:
            self.close()
            self._index, self._bytes = self._index + 1, 0
        self._rows.append(table.replace_schema_metadata(metadata))
        self._bytes += table.nbytes
        if sum(len(rows) for rows in self._rows) >= ROWS_PER_GROUP or sum(rows.nbytes for rows in self._rows) >= GROUP_BYTES:
            self._flush()
        return divmod(self._index, self._chunks_size)

    def close(self) -> None:
        """Finish the current file."""
        self._flush()
        self.abandon()

    def abandon(self) -> None:
        """Release the current file as it is."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.concat_tables(self._rows)
        if self._writer is None:
            chunk, file = divmod(self._index, self._chunks_size)
            path = self._folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _parquet_writer(path, table.schema)
        rows = max(1, min(ROWS_PER_GROUP, len(table) * GROUP_BYTES // max(table.nbytes, 1)))
        self._writer.write_table(table, row_group_size=rows)
        self._rows = []


def _parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Pictures are PNG and do not compress: as they are, they are read in place. Files with pictures compress nothing else either."""
    pictures = [field.name for field in schema if pa.types.is_struct(field.type)]
    if not pictures:
        return pq.ParquetWriter(path, schema)
    settings: dict[str, Any] = {"compression": {f"{name}.bytes": "none" for name in pictures}}
    settings["use_dictionary"] = [name for name in schema.names if name not in pictures]
    return pq.ParquetWriter(path, schema, **settings)


class VideoFiles:
    """mp4 files of all cameras."""

    def __init__(self, folder: Path, fps: float, max_mb: int, chunks_size: int) -> None:
        self._folder, self._fps, self._max_bytes, self._chunks_size = folder, fps, max_mb * MEGABYTE, chunks_size
        self._open: dict[str, ClipFile] = {}
        self._index: dict[str, int] = {}

    def append(self, feature: str, clip: Clip) -> dict[str, Any]:
        """Add a clip; return where it lies: `chunk_index`, `file_index`, and `first`, the position of its first frame."""
        file = self._open.get(feature)
        if file is not None and file.num_bytes + len(clip.data) > self._max_bytes:
            file.close()
            self._index[feature] += 1
            file = None
        chunk, number = divmod(self._index.setdefault(feature, 0), self._chunks_size)
        if file is None:
            path = self._folder / VIDEO_PATH.format(video_key=feature, chunk_index=chunk, file_index=number)
            file = self._open[feature] = ClipFile(path, self._fps)
        return {"chunk_index": chunk, "file_index": number, "first": file.append(clip)}

    def close(self) -> None:
        """Finish all files."""
        for file in self._open.values():
            file.close()
        self._open = {}
