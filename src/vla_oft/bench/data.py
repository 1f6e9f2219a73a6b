"""How fast demonstrations are read, beside how fast the decoder alone is: `vla-oft bench data`.

    raw        the decoder and nothing else: simplejpeg or FFmpeg on frames in memory, PyAV from the start of each video to its end
    random     the decoder alone on random frames: of video it has to decode from the keyframe on
    loader     what training gets: random samples of all cameras, prepared, in batches, from that many processes (0: one thread)
    runs       the same where `random` is far below `raw`, with samples drawn in runs of neighbours (`MixtureOrder`)
    cached     the same with frames decoded once and kept on the disk

Made-up demonstrations (`bench.demonstrations`) make formats comparable; a dataset of one's own can be measured instead.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vla_oft.atomic import replace_file
from vla_oft.bench import data_rates, demonstrations
from vla_oft.bench.environment import environment
from vla_oft.bench.report import Table, markdown, percent, print_table, show
from vla_oft.bench.rows import note
from vla_oft.data.base import ReadOptions, Source, open_source
from vla_oft.data.frames import Caching

FAR_BELOW = 0.8
"""Where random frames come at less than this share of the rate of frames in order, runs of neighbours are measured, too."""


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What to measure.

    path: a dataset; None for made-up ones of `kinds`. workers: numbers of worker processes. size: pixels of the prepared images.
    camera_size: pixels of the made-up frames. seconds: for each rate. keep: folder for the made-up datasets, kept for the next time.
    skip_bad: pass over frames of `path` that cannot be decoded, and list them. neighbours: samples in each of the runs.
    """

    path: Path | None = None
    kinds: tuple[str, ...] = tuple(demonstrations.WRITERS)
    workers: tuple[int, ...] = (0, 1, 2)
    size: int = 224
    camera_size: int = 224
    episodes: int = 16
    batch_size: int = 32
    seconds: float = 5.0
    cached: bool = True
    keep: Path | None = None
    out: Path | None = None
    skip_bad: bool = False
    neighbours: int = 4

    def __post_init__(self) -> None:
        if not self.workers or min(self.workers) < 0:
            raise ValueError(f"workers={self.workers}: name at least one number of worker processes, none negative")
        if self.seconds <= 0 or self.batch_size < 1 or self.episodes < 1:
            raise ValueError("seconds, batch_size and episodes must be positive")


@dataclass(frozen=True, kw_only=True)
class DataRow:
    """One dataset at one number of workers. Rates in frames a second; open_s: opening it for the first time.

    ratio, runs_ratio: loader and runs over raw; random_ratio: loader over random.
    """

    kind: str
    workers: int
    raw: float | None
    random: float | None
    loader: float
    ratio: float | None
    random_ratio: float | None
    runs: float | None
    runs_ratio: float | None
    cached: float | None
    samples: float
    rss_early_mb: float
    rss_end_mb: float
    open_s: float
    bytes_per_frame: float


def run(request: DataRequest, quiet: bool = False, open_own: Callable[[], Source] | None = None) -> dict[str, Any]:
    """Measure, print a table unless `quiet`, write files if `request.out`; the document has `rows`, `request`, `environment`.

    open_own: opens the dataset `request.path`; by default without any options.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place, rows = request.keep or Path(temporary), []
        if request.path is not None:
            own = open_own or (lambda: open_source(request.path or ""))
            rows += _measure(request, request.path.name, request.path, own, None, Path(temporary))
        for kind in request.kinds if request.path is None else ():
            note(f"{kind}: making demonstrations")
            shape = demonstrations.Shape(episodes=request.episodes, size=request.camera_size)
            folder = demonstrations.write(place, kind, shape)
            opened = partial(open_source, folder, _options(kind, Path(temporary)))
            rows += _measure(request, kind, folder, opened, data_rates.raw_decoder(kind, folder, shape), Path(temporary))
    facts = environment(torch.device("cpu"))
    document = {
        "benchmark": "data",
        "request": {name: str(value) for name, value in vars(request).items() if name not in ("path", "keep", "out")},
        "rows": [dataclasses.asdict(row) for row in rows],
        "environment": facts,
        "failures": 0,
    }
    table = _table(request, rows, facts)
    if not quiet:
        print_table(table)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        replace_file(request.out / "data.json", json.dumps(document, indent=1) + "\n")
        replace_file(request.out / "data.md", markdown(table))
    return document


def _options(kind: str, scratch: Path) -> ReadOptions:
    if kind == "aloha_hdf5":
        return ReadOptions(colour_order="rgb", instruction=demonstrations.INSTRUCTION, cache_dir=scratch)
    return ReadOptions(cache_dir=scratch)


def _measure(
    request: DataRequest, kind: str, folder: Path, opened: Callable[[], Source], decode: data_rates.Decode | None, scratch: Path
) -> list[DataRow]:
    start = time.perf_counter()
    source = opened()
    open_s = time.perf_counter() - start
    num_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    bytes_per_frame = num_bytes / (int(source.lengths.sum()) * len(source.cameras))
    at_random = None if decode is None else data_rates.random_decoder(kind, folder) or decode
    return [_row(request, kind, source, workers, decode, at_random, scratch, open_s, bytes_per_frame) for workers in request.workers]


def _row(
    request: DataRequest,
    kind: str,
    source: Source,
    workers: int,
    decode: data_rates.Decode | None,
    at_random: data_rates.Decode | None,
    scratch: Path,
    open_s: float,
    bytes_per_frame: float,
) -> DataRow:
    def loader(cache: Caching = "none", neighbours: int = 1) -> data_rates.LoaderRate:
        return data_rates.loader_rate(
            source,
            size=request.size,
            workers=workers,
            batch_size=request.batch_size,
            seconds=request.seconds,
            cache=cache,
            cache_dir=scratch,
            skip_bad=request.skip_bad,
            neighbours=neighbours,
        )

    raw, random = (None if d is None else data_rates.decoder_rate(d, workers, request.seconds) for d in (decode, at_random))
    rate = loader()
    slow = raw is not None and random is not None and random < FAR_BELOW * raw
    runs = loader(neighbours=request.neighbours).frames_per_s if slow else None
    note(f"{kind}, {workers} workers: loader {rate.frames_per_s:.0f} frames/s" + ("" if raw is None else f", raw {raw:.0f}"))
    return DataRow(
        kind=kind,
        workers=workers,
        raw=raw,
        random=random,
        loader=rate.frames_per_s,
        ratio=None if raw is None else rate.frames_per_s / raw,
        random_ratio=None if random is None else rate.frames_per_s / random,
        runs=runs,
        runs_ratio=None if runs is None or raw is None else runs / raw,
        cached=loader("disk").frames_per_s if request.cached else None,
        samples=rate.samples_per_s,
        rss_early_mb=rate.rss_mb[0],
        rss_end_mb=rate.rss_mb[1],
        open_s=open_s,
        bytes_per_frame=bytes_per_frame,
    )


_RATES = ("raw", "random", "loader", "loader / raw", "loader / random", "runs", "runs / raw", "cached")


def _table(request: DataRequest, rows: list[DataRow], facts: dict[str, Any]) -> Table:
    made = "made-up demonstrations" if request.path is None else str(request.path.name)
    pixels = f"{request.camera_size} to {request.size}" if request.path is None else f"to {request.size}"
    return Table(
        title=f"Reading {made}, {pixels} pixels, {facts.get('cpu', 'unknown CPU')}: frames a second",
        columns=("dataset, workers", *_RATES, "memory MB", "at the end", "open s", "kB a frame"),
        rows=[
            (
                f"{row.kind}, {row.workers}",
                show(row.raw),
                show(row.random),
                show(row.loader),
                percent(row.ratio),
                percent(row.random_ratio),
                show(row.runs),
                percent(row.runs_ratio),
                show(row.cached),
                f"{row.rss_early_mb:.0f}",
                f"{row.rss_end_mb:.0f}",
                f"{row.open_s:.2f}",
                f"{row.bytes_per_frame / 1e3:.1f}",
            )
            for row in rows
        ],
        notes=[
            "raw: the decoder alone (simplejpeg, FFmpeg for PNG, PyAV in order), in as many processes; random: the decoder alone on random "
            "frames, which of video means from the keyframe on; loader: random samples, prepared, "
            f"in batches of {request.batch_size}; runs: the same, drawn in runs of {request.neighbours} neighbours, where random is below "
            f"{FAR_BELOW:.0%} of raw; cached: frames decoded once and kept on the disk",
            "0 workers: one background thread. Memory: all processes, shared pages counted once, after a tenth of the time and at the end",
            ", ".join(f"{name} {value}" for name, value in facts.items()),
        ],
    )
