"""`vla-oft data convert`: read, encode, write, compare; the folder appears when all of that is done.

.OUT.HOST.PID.writing/OUT     written and compared here, then renamed: a kill at any time leaves no OUT
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vla_oft.atomic import require_empty, temporary_beside
from vla_oft.convert.compare import compare
from vla_oft.convert.encoding import Job, encode_episode, picture_sizes
from vla_oft.convert.plan import check_even, check_size, common_size, make_plan
from vla_oft.convert.report import Converted
from vla_oft.convert.workers import Workers, open_workers
from vla_oft.data.base import Source, open_source
from vla_oft.data.clips import KEYINT
from vla_oft.data.lerobot_writer import LeRobotWriter
from vla_oft.data.recording import Schema
from vla_oft.progress import progress
from vla_oft_client import RobotSpec

MAX_CRF = 51


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How to write.

    out: folder, empty or absent. crf: quality of the video, 0 (best) to 51. keyint: frames from one keyframe to the next, at most.
    images: PNG instead of video, without loss. workers: processes, 0 for none; the result is the same. skip_bad: leave out damaged
    episodes, and list them. options: how the source was read, as JSON types, for the record.
    """

    out: Path
    crf: int = 18
    keyint: int = KEYINT
    images: bool = False
    workers: int = 0
    skip_bad: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keyint < 1:
            raise ValueError(f"keyint={self.keyint} must be at least 1")
        if not 0 <= self.crf <= MAX_CRF:
            raise ValueError(f"crf={self.crf} must lie between 0 (best) and {MAX_CRF}")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must be 0 (this process) or more")


def convert(source: Source, config: ConvertConfig, spec: RobotSpec | None = None) -> Converted:
    """Write all of `source`. spec: the robot in whose language it speaks, if any.

    Raises ValueError, before anything is written, for what the format cannot hold, and for damaged episodes unless they are skipped.
    """
    require_empty(config.out)
    if config.out.resolve().is_relative_to(source.path.resolve()):
        raise ValueError(f"output {config.out} lies inside of the dataset {source.path}; choose another folder")
    plan, start = make_plan(source), time.monotonic()
    job = Job(source=source, plan=plan, crf=config.crf, keyint=config.keyint, images=config.images, skip_bad=config.skip_bad)
    with _hidden(config.out) as folder:
        with open_workers(config.workers, job) as workers:
            sizes = _sizes(job, workers)
            written, skipped = _write(folder, job, sizes, _described(source, spec), config, workers)
        encoded_s = time.monotonic() - start
        with progress("comparing", len(written), "episodes") as advance:
            comparison = compare(source, open_source(folder), written, plan, advance)
    return Converted(
        source=str(source.path),
        format=source.format,
        fingerprint=source.fingerprint(),
        out=config.out,
        num_episodes=len(written),
        num_frames=int(source.lengths[written].sum()),
        cameras=source.cameras,
        fps=plan.fps,
        duration_s=encoded_s,
        source_bytes=_num_bytes(source.path) if len(written) == len(source) else None,
        out_bytes=_num_bytes(config.out),
        comparison=comparison,
        remarks=plan.remarks,
        skipped=(*source.skipped, *skipped),
    )


def _sizes(job: Job, workers: Workers) -> dict[str, tuple[int, int]]:
    """Camera -> (height, width), the same in every episode: found out before hours of encoding."""
    source, found = job.source, []
    with progress("looking at image sizes", len(source), "episodes") as advance:
        for sizes in workers.in_order(picture_sizes, range(len(source))):
            found.append(sizes)
            advance(1)
    common = common_size(found)
    if len(common) != len(source.cameras):
        raise ValueError(f"dataset {source.path}: the images of every episode are unreadable; copy the dataset again")
    if not job.images:
        check_even(common, f"dataset {source.path}")
    for episode, sizes in enumerate(found):
        if sizes is not None and not job.skip_bad:
            check_size(sizes, common, f"dataset {source.path}, episode {episode}")
    return common


def _write(
    out: Path, job: Job, sizes: dict[str, tuple[int, int]], what: RobotSpec | Schema, config: ConvertConfig, workers: Workers
) -> tuple[list[int], list[str]]:
    """Encode and write; the numbers of the episodes that were, and why others were not."""
    source, written, skipped = job.source, [], []
    with (
        LeRobotWriter(
            out, what, fps=job.plan.fps, kind=source.kind, provenance=_provenance(source, config), images=config.images
        ) as writer,
        progress("converting", int(source.lengths.sum()), "steps") as advance,
    ):
        for done in workers.in_order(partial(encode_episode, sizes=sizes), range(len(source))):
            if done.block is None:
                skipped.append(done.reason)
            else:
                writer.append(done.block)
                written.append(done.episode)
            advance(int(source.lengths[done.episode]))
        if not written:
            raise ValueError(f"dataset {source.path}: every episode is damaged; the first: {skipped[0]}")
    return written, skipped


def _described(source: Source, spec: RobotSpec | None) -> RobotSpec | Schema:
    """Whose recordings these are: the robot's, if they are whole, or nobody's in particular."""
    recorded = source.recording.get("robot")
    robot = spec if spec is not None else RobotSpec.from_dict(recorded) if recorded else None
    if robot is not None:
        found = (set(source.cameras), source.state_dim, source.action_dim)
        if found == (set(robot.cameras), robot.state_dim, robot.action_dim):
            return robot
    return Schema(
        cameras=source.cameras,
        state_dim=source.state_dim,
        action_dim=source.action_dim,
        state_names=source.state_names,
        action_names=source.action_names,
        robot_type=spec.name if spec is not None else "unknown",
        normalize_mask=spec.normalize_mask if spec is not None else None,
    )


def _provenance(source: Source, config: ConvertConfig) -> dict[str, Any]:
    return {
        "converted_from": {
            "name": source.name,
            "format": source.format,
            "fingerprint": source.fingerprint(),
            "options": config.options,
            "recording": source.recording,
        },
        "images": "png" if config.images else f"h264, crf {config.crf}, keyint {config.keyint}",
    }


@contextmanager
def _hidden(out: Path) -> Iterator[Path]:
    """A path called like `out` in a hidden folder beside it; what is there at the end becomes `out`."""
    out = out.resolve()  # "." has no name
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = temporary_beside(out)
    hidden.mkdir()
    try:
        yield hidden / out.name
        if out.exists():
            out.rmdir()
        (hidden / out.name).rename(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
