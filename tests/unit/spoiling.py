"""Single frames of real datasets, damaged inside files that stay sound otherwise: as found beforehand by nobody but a decoder."""

import struct
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_oft.data.hdf5_source import Hdf5Source
from vla_oft.data.lerobot_source import LeRobotSource
from vla_oft.data.rlds_source import RldsSource
from vla_oft.data.tfrecord import masked_crc


def spoil(source: Any, episode: int, step: int, camera: str) -> Path:
    """Damage one frame in the files of `source`, which is no view; returns the file. Sizes stay as they are."""
    if isinstance(source, LeRobotSource):
        feature = source.camera_features[camera]
        if not source.info.is_video(feature):
            return _spoil_parquet(source.data_file(episode), feature, int(source.index.data.start[episode]) + step)
        first = round(float(source.index.videos[feature].start[episode]) * source.info.fps)
        return _spoil_video(source.video_file(episode, feature), first + step)
    if isinstance(source, RldsSource):
        return _spoil_record(source, episode, step, camera)
    assert isinstance(source, Hdf5Source)
    where = source.episode_info(episode)
    group = f"data/{where['demo']}/obs" if "demo" in where else "observations/images"
    return _spoil_hdf5(source.path / where["file"], f"{group}/{camera}", step)


def _spoil_video(path: Path, number: int) -> Path:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        entry = stream.index_entries[number]
        intact = 0 if "av1" in stream.codec_context.name else entry.size // 3  # AV1 takes nearly any bits behind a header
    data = bytearray(path.read_bytes())
    data[entry.pos + intact : entry.pos + entry.size] = bytes(entry.size - intact)
    path.write_bytes(data)
    return path


def _spoil_parquet(path: Path, column: str, row: int) -> Path:
    file = pq.ParquetFile(path)
    table, groups = file.read(), [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    values = table.column(column).to_pylist()
    values[row]["bytes"] = _spoilt_picture(values[row]["bytes"])
    index = table.schema.get_field_index(column)
    table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table, row_group_size=max(groups))
    return path


def _spoil_record(source: RldsSource, episode: int, step: int, camera: str) -> Path:
    """The record's checksum is made to fit: damaged before it was written."""
    path = source._shards[source._index.records[episode, 0]]
    row = source._index.starts[episode : episode + 1] + step
    offset, size = source._index.columns[source._cameras[camera]].read(row)[0].tolist()
    data, at = bytearray(path.read_bytes()), 0
    data[offset : offset + size] = _spoilt_picture(bytes(data[offset : offset + size]))
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        struct.pack_into("<I", data, at + 12 + length, masked_crc(bytes(data[at + 12 : at + 12 + length])))
        at += 16 + length
    path.write_bytes(data)
    return path


def _spoil_hdf5(path: Path, key: str, step: int) -> Path:
    with h5py.File(path, "r+") as file:
        array = file[key]
        assert isinstance(array, h5py.Dataset)
        if array.ndim == 2:
            array[step] = np.frombuffer(_spoilt_picture(array[step].tobytes()), np.uint8)
            return path
        frames = array[()]  # again, each step compressed alone: nobody can tell damaged raw pixels from others
        del file[key]
        array = file.create_dataset(key, data=frames, chunks=(1, *frames.shape[1:]), compression="gzip")
        chunk = next(c for n in range(len(frames)) if (c := array.id.get_chunk_info(n)).chunk_offset[0] == step)
    data = bytearray(path.read_bytes())
    first, last = chunk.byte_offset + chunk.size // 3, chunk.byte_offset + chunk.size
    data[first:last] = bytes(byte ^ 0x5A for byte in data[first:last])
    path.write_bytes(data)
    return path


def _spoilt_picture(data: bytes) -> bytes:
    """JPEG or PNG of the same size that still begins like one."""
    return data[:8] + bytes(len(data[8:40])) + data[40:]
