"""`vla-oft data ...`: part of the command line, see `cli.py`."""

import json as json_module
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from vla_oft.cli_reading import AS_IT_IS, ReadingOptions, list_skipped


def data() -> None:
    """Demonstrations: inspect, stats, convert, replay, collect."""


def inspect(
    path: Positional[str],
    *,
    out: Path | None = None,
    reading: ReadingOptions = AS_IT_IS,
    json: bool = False,
) -> None:
    """What a dataset holds, and what is wrong with it.

    Args:
        path: folder of a dataset in any format, or owner/name on the hub.
        out: HTML page to write; none by default.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.inspection import run

    source, spec = reading.open(path)
    found = run(source, out=out, spec=spec, quiet=json)
    if json:
        _print_json(found.to_json())


def stats(
    path: Positional[str],
    *,
    out: Path | None = None,
    reading: ReadingOptions = AS_IT_IS,
    json: bool = False,
) -> None:
    """Exact statistics of actions and states, as training needs them.

    Args:
        path: folder of a dataset in any format, or owner/name on the hub.
        out: JSON file to write, as training and the published checkpoints have it.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.data import stats as statistics

    if out is not None:
        statistics.check_out(out)
    source, spec = reading.open(path)
    found = statistics.measure(source, spec)
    if out is not None:
        statistics.save(found, out)
    if json:
        _print_json(found.to_json())
    else:
        print("\n".join(found.lines()) + (f"\nwritten: {out}" if out is not None else ""))


def convert(
    path: Positional[str],
    out: Positional[Path],
    *,
    to: Literal["lerobot"] = "lerobot",
    crf: int = 18,
    keyint: int = 1,
    images: bool = False,
    workers: int | None = None,
    reading: ReadingOptions = AS_IT_IS,
    json: bool = False,
) -> None:
    """Write any dataset as LeRobot v3.0.

    States and actions stay as they are, bit for bit; pictures become video, or PNG without loss. Both datasets are compared at the end.

    Args:
        path: folder of a dataset in any format, or owner/name on the hub.
        out: dataset folder to write; must be empty or absent.
        to: the format, LeRobotDataset v3.0.
        crf: quality of the video, 0 (best) to 51.
        keyint: frames from one keyframe to the next: 1 is read at random fastest, 10 takes 40 % of the space.
        images: PNG files inside the tables instead of video: without loss, many times larger.
        workers: processes, 0 for none; one per core by default. The result is the same.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.atomic import require_empty
    from vla_oft.convert import ConvertConfig, convert

    workers = (os.cpu_count() or 1) if workers is None else workers
    config = ConvertConfig(
        out=out, crf=crf, keyint=keyint, images=images, workers=workers, skip_bad=reading.skip_bad, options=reading.named()
    )
    require_empty(out)
    source, spec = reading.open(path)
    done = convert(source, config, spec)
    list_skipped(done.skipped[len(source.skipped) :])
    if json:
        _print_json(done.to_json())
    else:
        print("\n".join(done.lines()))


def replay(
    path: Positional[str],
    *,
    suite: str | None = None,
    out: Path | None = None,
    record: int = 0,
    tolerance: float = 0.01,
    reading: ReadingOptions = AS_IT_IS,
    json: bool = False,
) -> None:
    """Execute recorded actions again in their simulator.

    Do they still succeed, and how far do the reached states stray from the recorded ones?

    Args:
        path: folder of a dataset whose episodes name their scene, as those of `vla-oft data collect` do.
        suite: such as tabletop/touch, where the dataset names only the seeds.
        out: folder for replay.json and videos; must be empty or absent.
        record: film the first N episodes, recorded and replayed side by side; needs --out.
        tolerance: from which deviation of the state on, in its units, an episode counts as diverged.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.data.prepare import open_checked
    from vla_oft.replay import ReplayConfig, replay, which_episodes

    source = open_checked(path, reading.options())
    list_skipped(source.skipped)
    config = ReplayConfig(
        episodes=which_episodes(source, reading.filters()),
        suite=suite,
        robot=reading.robot,
        layout=reading.layout,
        out=out,
        record=record,
        tolerance=tolerance,
    )
    found = replay(source, config)
    if json:
        _print_json(found.to_json())
    else:
        print("\n".join(found.lines()))
    if found.sim_errors == len(found.episodes):
        sys.exit(1)


def collect(
    suite: Positional[str],
    *,
    out: Path,
    episodes: int = 50,
    seed: int = 0,
    noise: float = 0.0,
    pushes: float = 0.0,
    camera_size: int = 128,
    grounding_patches: int | None = None,
    workers: int | None = None,
) -> None:
    """Record demonstrations of a simulator's scripted expert.

    Args:
        suite: tasks, for example tabletop/touch, tabletop (all of them), or tabletop/touch,tabletop/push.
        out: dataset folder; must be empty or absent.
        episodes: successful episodes to record of each task.
        seed: of the first scene.
        noise: white DART noise on the executed action (standard deviation, action units); labels stay the expert's, and a chunk
            trains only up to a disturbed step: prefer pushes.
        pushes: chance per step that a push of up to 4 steps begins, for example 0.05.
        camera_size: pixels of the square camera images.
        grounding_patches: also store which of N x N patches show the named object.
        workers: processes, 0 for none; one per core by default.
    """
    from vla_oft.collect import CollectConfig, Noise, collect
    from vla_oft.evaluate.suite import resolve

    done = collect(
        CollectConfig(
            suite=tuple(str(task) for task in resolve(suite)),
            out=out,
            episodes=episodes,
            seed=seed,
            noise=Noise(std=noise, hold_probability=pushes, hold_std=0.5, hold_steps=4),
            camera_size=camera_size,
            grounding_patches=grounding_patches,
            workers=(os.cpu_count() or 1) if workers is None else workers,
        )
    )
    print(f"{done.out}: {done.num_episodes} episodes, {done.num_frames} frames in {done.duration_s:.0f} s; {done.num_failed} failed")


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "stats": stats,
    "convert": convert,
    "replay": replay,
    "collect": collect,
}


def _print_json(document: Any) -> None:
    sys.stdout.write(json_module.dumps(document, default=str) + "\n")
