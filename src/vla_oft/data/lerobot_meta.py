"""The metadata that a LeRobotDataset v3.0 carries beside its frames: per-episode statistics, task table, schema notes.

LeRobot normalises with these statistics; vla-oft never reads them (their quantiles are averages of per-episode quantiles).
Statistics are arrays (10, D) in the order of `STATS`, `count` last.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa

STATS = ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99", "count")
_QUANTILES = [0.01, 0.10, 0.50, 0.90, 0.99]
_MAX_IMAGES, _MAX_PIXELS = 8, 1024


def array_stats(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics (10, size) of every column (T, size) or (T,), in one pass over all of them."""
    flat = {name: values.reshape(len(values), -1) for name, values in columns.items()}
    joined = _stats(np.concatenate(list(flat.values()), axis=1, dtype=np.float64))
    ends = np.cumsum([values.shape[1] for values in flat.values()])
    return dict(zip(flat, np.split(joined, ends[:-1], axis=1), strict=True))


def image_stats(images: np.ndarray) -> np.ndarray:
    """Statistics (10, 3) per channel in [0, 1] of uint8 (T, H, W, 3), from a spread of frames and pixels; count is in frames."""
    chosen = images[np.linspace(0, len(images) - 1, min(len(images), _MAX_IMAGES)).astype(int)]
    stride = max(1, int((chosen.shape[1] * chosen.shape[2] / _MAX_PIXELS) ** 0.5))
    stats = _stats(chosen[:, ::stride, ::stride].reshape(-1, 3) / 255.0)
    stats[-1] = len(chosen)
    return stats


def _stats(values: np.ndarray) -> np.ndarray:
    quantiles = np.quantile(values, _QUANTILES, axis=0) if len(values) > 1 else np.repeat(values, len(_QUANTILES), axis=0)
    rows = [values.min(0), values.max(0), values.mean(0), values.std(0), *quantiles, np.full(values.shape[1], len(values))]
    return np.stack(rows)


def aggregate(stats: np.ndarray) -> np.ndarray:
    """Statistics of the whole dataset from those of its episodes (E, 10, D): moments exactly, quantiles as lerobot averages them."""
    weight = stats[:, -1] / stats[:, -1].sum(0)
    mean = (weight * stats[:, 2]).sum(0)
    variance = (weight * (stats[:, 3] ** 2 + (stats[:, 2] - mean) ** 2)).sum(0)
    quantiles = (weight[:, None] * stats[:, 4:9]).sum(0)
    return np.stack([stats[:, 0].min(0), stats[:, 1].max(0), mean, variance**0.5, *quantiles, stats[:, -1].sum(0)])


def stats_json(stats: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """The contents of `meta/stats.json`."""
    result: dict[str, dict[str, Any]] = {}
    for name, values in stats.items():
        shape = (-1, 1, 1) if _is_image(name) else (-1,)
        result[name] = {stat: row.reshape(shape).tolist() for stat, row in zip(STATS, values, strict=True)}
        result[name]["count"] = [int(values[-1, 0])]
    return result


def episodes_table(columns: dict[str, list[Any]], stats: dict[str, np.ndarray]) -> pa.Table:
    """`meta/episodes`: one row per episode; stats (E, 10, D) become the columns `stats/FEATURE/STAT`."""
    arrays = {name: pa.array(values) for name, values in columns.items()}
    for name, values in stats.items():
        for index, stat in enumerate(STATS):
            if stat == "count":
                arrays[f"stats/{name}/count"] = _lists(values[:, -1, :1].astype(np.int64))
            else:
                column = values[:, index]
                arrays[f"stats/{name}/{stat}"] = _lists(column[:, :, None, None] if _is_image(name) else column)
    zeros = pa.array(np.zeros(len(columns["length"]), np.int64))
    return pa.table({**arrays, "meta/episodes/chunk_index": zeros, "meta/episodes/file_index": zeros})


def tasks_table(tasks: list[str]) -> pa.Table:
    """`meta/tasks.parquet`: as pandas writes a frame whose index is called `task`."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks)})
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ]
    column_index = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": {"encoding": "UTF-8"}}
    pandas = {"index_columns": ["task"], "column_indexes": [column_index], "columns": columns, "attributes": {}, "pandas_version": "2.3.3"}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def feature_entry(dtype: str, shape: tuple[int, ...], names: tuple[str, ...] = (), fps: float | None = None) -> dict[str, Any]:
    """One feature of `info.json`. names: of its dimensions, where known."""
    entry: dict[str, Any] = {"dtype": dtype, "shape": list(shape), "names": list(names) or None}
    if dtype in ("video", "image"):
        entry["names"] = ["height", "width", "channel"]
    if dtype == "video":
        assert fps is not None
        entry["info"] = {
            "video.height": shape[0],
            "video.width": shape[1],
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.fps": int(fps) if float(fps).is_integer() else fps,
            "video.channels": 3,
            "has_audio": False,
            "is_depth_map": False,
        }
    return entry


def table_metadata(features: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The note by which the `datasets` library recognises column types."""
    described: dict[str, Any] = {}
    for name, feature in features.items():
        value = {"dtype": feature["dtype"], "_type": "Value"}
        if feature["dtype"] == "image":
            described[name] = {"_type": "Image"}
        elif feature["dtype"] != "video":
            (size,) = feature["shape"]
            described[name] = value if size == 1 else {"feature": value, "length": size, "_type": "List"}
    return {"huggingface": json.dumps({"info": {"features": described}})}


def _is_image(name: str) -> bool:
    return name.startswith("observation.images.")


def _lists(values: np.ndarray) -> pa.Array:
    """(E, a, b, ...) -> E nested lists, without passing through Python objects."""
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        offsets = np.arange(0, len(array) + 1, values.shape[axis], dtype=np.int32)
        array = pa.ListArray.from_arrays(pa.array(offsets), array)
    return array
