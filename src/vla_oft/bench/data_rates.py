"""Rates of reading demonstrations: the decoder alone, and the loader as training uses it.

Each rate is measured for a fixed time after a warm-up, in as many processes as the loader has workers, so that both have the same cores.
"""

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vla_oft.bench import demonstrations
from vla_oft.data import png
from vla_oft.data.base import Source
from vla_oft.data.chunks import Caching, ChunkDataset, Samples
from vla_oft.data.loader import BatchLoader
from vla_oft.data.mixture import MixtureOrder
from vla_oft.preprocess import Config, Preparation
from vla_oft.statistics import Moments, Normalizer
from vla_oft_client import RobotSpec

CHUNK_LEN = 8
"""Actions in a sample."""

WARMUP_BATCHES = 4
IN_MEMORY = 256
"""Encoded frames that the decoder alone goes through again and again."""

FEW_VIDEOS = 4
"""Of so many, as many frames each, for random order."""

Decode = Callable[[], Iterator[int]]
"""One round of decoding; yields the number of frames done since the last time."""


@dataclass(frozen=True, kw_only=True)
class LoaderRate:
    """frames_per_s, samples_per_s: delivered to this process. setup_s: until the first batch. rss_mb: of all processes, early and late."""

    frames_per_s: float
    samples_per_s: float
    setup_s: float
    rss_mb: tuple[float, float]


def raw_decoder(kind: str, folder: Path, shape: demonstrations.Shape) -> Decode:
    """What reads frames of a made-up dataset without anything around it."""
    if kind.startswith("lerobot") and kind != "lerobot-images":
        return partial(_decode_videos, sorted(folder.rglob("*.mp4")))
    if kind == "libero_hdf5":
        return partial(_read_hdf5, next(folder.glob("*.hdf5")))
    if kind == "lerobot-images":
        return partial(_decode_png, _stored_pngs(next(folder.rglob("data/**/*.parquet"))))
    first = next(demonstrations.demonstrations(shape))
    frames = list(itertools.islice(itertools.chain.from_iterable(first.frames.values()), IN_MEMORY))
    return partial(_decode_jpeg, [demonstrations.jpeg(frame) for frame in frames])


def random_decoder(kind: str, folder: Path) -> Decode | None:
    """The same for frames in random order; None where the order makes no difference: every frame is a picture of its own."""
    if kind.startswith("lerobot") and kind != "lerobot-images":
        return partial(_decode_videos_at_random, sorted(folder.rglob("*.mp4"))[:FEW_VIDEOS])
    return None


def decoder_rate(decode: Decode, processes: int, seconds: float) -> float:
    """Frames a second of `processes` processes together."""
    if processes <= 1:
        return _rate(decode, seconds)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_rate, [(decode, 0.2)] * processes, chunksize=1)  # imports done
        return sum(pool.starmap(_rate, [(decode, seconds)] * processes, chunksize=1))


def loader_rate(
    source: Source,
    *,
    size: int,
    workers: int,
    batch_size: int,
    seconds: float,
    cache: Caching,
    cache_dir: Path | None,
    skip_bad: bool = False,
    neighbours: int = 1,
) -> LoaderRate:
    """Random samples of all cameras of `source`, or random runs of neighbours, resized to `size`, in batches, as training reads them."""
    start = time.perf_counter()
    dataset = ChunkDataset(
        [source],
        robot_of(source),
        prepare=Preparation(Config(image_size=size, resize="lanczos", crop_area=1.0), fast=True),
        action_normalizer=unchanged(source.action_dim),
        state_normalizer=unchanged(source.state_dim) if source.state_dim else None,
        cache=cache,
        cache_dir=cache_dir,
        skip_bad=skip_bad,
    )
    loader = BatchLoader(dataset, MixtureOrder(dataset.sizes, seed=0, neighbours=neighbours), batch_size, share, num_workers=workers)
    batches = iter(loader)
    for _ in range(max(WARMUP_BATCHES, 2 * workers)):
        next(batches)
    setup_s = time.perf_counter() - start
    count, early, begin = 0, 0.0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        next(batches)
        count += batch_size
        early = early or (resident_mb() if elapsed > 0.1 * seconds else 0.0)
    rate = count / (time.perf_counter() - begin)
    memory = (early or resident_mb(), resident_mb())
    batches.close()  # type: ignore[attr-defined]
    return LoaderRate(frames_per_s=rate * len(source.cameras), samples_per_s=rate, setup_s=setup_s, rss_mb=memory)


def share(samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and actions as tensors, which travel between processes through shared memory, as a training batch does."""
    return torch.from_numpy(samples.images), torch.from_numpy(samples.actions)


def resident_mb() -> float:
    """Resident memory of this process and its children, without counting shared pages twice (Linux only; elsewhere 0)."""
    own, total = os.getpid(), 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != own and f"\nPPid:\t{own}\n" not in (folder / "status").read_text():
                continue
            pss = next(line for line in (folder / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
            total += int(pss.split()[1]) / 1024
        except (OSError, StopIteration):  # it has just ended
            continue
    return total


def _rate(decode: Decode, seconds: float) -> float:
    for _ in itertools.islice(decode(), 8):
        pass
    count, start = 0, time.perf_counter()
    while True:
        for done in decode():
            count += done
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                return count / elapsed


def _decode_jpeg(encoded: Sequence[bytes]) -> Iterator[int]:
    import simplejpeg

    for data in encoded:
        simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
        yield 1


def _decode_png(encoded: Sequence[bytes]) -> Iterator[int]:
    for data in encoded:
        frame = png.decode_rgb(data)
        assert frame is not None
        frame.to_ndarray()
        yield 1


def _decode_videos(paths: Sequence[Path]) -> Iterator[int]:
    import av
    from av.video.reformatter import VideoReformatter

    for path in paths:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            converter = VideoReformatter()  # kept, and with one thread: several times as fast as the frame's own
            for frame in container.decode(video=0):
                converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                yield 1


def _decode_videos_at_random(paths: Sequence[Path]) -> Iterator[int]:
    """Each frame from the keyframe before it on, out of packets that lie in memory: what no reader of random frames can do without."""
    import av
    from av.video.reformatter import VideoReformatter

    converter, films = VideoReformatter(), []
    for path in paths:
        container = av.open(str(path))  # stays open: its decoder is used
        container.streams.video[0].codec_context.thread_count = 1
        packets = [(bytes(p), p.is_keyframe) for p in itertools.islice(container.demux(video=0), IN_MEMORY) if p.size]
        films.append((container, container.streams.video[0].codec_context, packets))
    rng = np.random.default_rng(0)
    for _ in range(IN_MEMORY):
        _, decoder, packets = films[rng.integers(len(films))]
        wanted = int(rng.integers(len(packets)))
        first = next(number for number in range(wanted, -1, -1) if packets[number][1])
        decoder.flush_buffers()
        frames: list[av.VideoFrame] = []
        for data, is_keyframe in packets[first : wanted + 1]:
            packet = av.Packet(data)
            packet.is_keyframe = is_keyframe
            frames = decoder.decode(packet)  # type: ignore[assignment]
        converter.reformat(frames[-1], format="rgb24", threads=1).to_ndarray()
        yield 1
    for container, *_ in films:
        container.close()


def _read_hdf5(path: Path) -> Iterator[int]:
    import h5py

    with h5py.File(path) as file:
        for demo in file["data"].values():  # type: ignore[union-attr]
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                frames = demo["obs"][camera]
                for step in range(len(frames)):
                    frames[step]
                    yield 1


def _stored_pngs(path: Path) -> list[bytes]:
    """The pictures themselves: how hard a PNG is to decode depends on who compressed it."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    name = next(name for name in file.schema_arrow.names if name.startswith("observation.images."))
    rows = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in file.iter_batches(16, columns=[name]))
    return [row["bytes"] for row in itertools.islice(rows, IN_MEMORY)]


def robot_of(source: Source) -> RobotSpec:
    """A robot that fits any dataset."""
    dim = source.action_dim
    return RobotSpec(
        name="bench",
        cameras=source.cameras,
        state_dim=source.state_dim,
        action_dim=dim,
        control_hz=source.fps or 10.0,
        chunk_len=CHUNK_LEN,
        action_kind="absolute_joint",
        absolute_mask=(True,) * dim,
        normalize_mask=(True,) * dim,
        normalization="zscore",
        action_limits=((-1e6, 1e6),) * dim,
    )


def unchanged(dim: int) -> Normalizer:
    """Statistics by which nothing changes."""
    zeros, ones = np.zeros(dim), np.ones(dim)
    return Normalizer(Moments(mean=zeros, std=ones, min=-ones, max=ones, q01=-ones, q99=ones), None, "zscore")
