"""A million frames: how long the index takes to open, and whether the loader's memory stays flat.

    python scripts/measure_data_scale.py FOLDER [--episodes 10000] [--length 100]

writes (once) a LeRobot v3.0 dataset of small pictures into FOLDER, then measures in a fresh process each: opening, one pass over states and
actions, the statistics, and an epoch of random batches with two workers. Prints Markdown.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIZE, BATCH = 32, 64


def make(folder: Path, episodes: int, length: int) -> None:
    from vla_oft.bench.demonstrations import ACTION_DIM, CAMERAS, FPS, STATE_DIM
    from vla_oft.data.lerobot_writer import LeRobotWriter
    from vla_oft.data.recording import Episode, Schema, encode

    rng = np.random.default_rng(0)
    frames = {c: rng.integers(0, 255, (1, SIZE, SIZE, 3), np.uint8).repeat(length, 0) for c in CAMERAS}
    schema = Schema(cameras=CAMERAS, state_dim=STATE_DIM, action_dim=ACTION_DIM)

    def numbers() -> dict[str, np.ndarray]:
        return {name: rng.normal(size=(length, dim)).astype(np.float32) for name, dim in (("states", STATE_DIM), ("actions", ACTION_DIM))}

    block = encode([Episode(images=frames, instructions="do it", **numbers())], FPS)
    with LeRobotWriter(folder, schema, fps=FPS) as writer:
        for number in range(episodes):
            episode = dataclasses.replace(block.episodes[0], instructions=f"task {number % 50}", **numbers())
            writer.append(dataclasses.replace(block, episodes=(episode,)))


def resident_mb() -> float:
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024


def measure(folder: Path, cache: Path, seconds: float) -> dict[str, float]:
    from vla_oft.bench import data_rates
    from vla_oft.data.base import ReadOptions, open_source
    from vla_oft.data.check import source_statistics

    before, start = resident_mb(), time.perf_counter()
    source = open_source(folder, ReadOptions(cache_dir=cache))
    found = {"frames": int(source.lengths.sum()), "episodes": len(source), "open_s": time.perf_counter() - start}
    found["open_mb"] = resident_mb() - before
    start = time.perf_counter()
    source_statistics(source, [True] * source.action_dim)
    found["statistics_s"], found["statistics_mb"] = time.perf_counter() - start, resident_mb() - before
    rate = data_rates.loader_rate(source, size=SIZE, workers=2, batch_size=BATCH, seconds=seconds, cache="none", cache_dir=cache)
    found |= {"frames_per_s": rate.frames_per_s, "early_mb": rate.rss_mb[0], "late_mb": rate.rss_mb[1], "setup_s": rate.setup_s}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder / f"set-{arguments.episodes}x{arguments.length}"
    if arguments.measure:
        print(json.dumps(measure(folder, arguments.folder / "cache", arguments.seconds)))
        return
    if not folder.is_dir():
        make(folder, arguments.episodes, arguments.length)
    rows = []
    for what in ("first time", "second time"):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure"], stdout=subprocess.PIPE, check=True, env=os.environ)
        rows.append((what, json.loads(done.stdout.splitlines()[-1])))
    names = list(rows[0][1])
    print("| | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for what, found in rows:
        print(
            f"| {what} | "
            + " | ".join(f"{found[name]:.4g}" if isinstance(found[name], float) else str(found[name]) for name in names)
            + " |"
        )


if __name__ == "__main__":
    main()
