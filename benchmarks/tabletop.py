"""Success of the embedded simulator's experts and the cost of a step; prints the tables of benchmarks/tabletop.md.

MUJOCO_GL=egl python benchmarks/tabletop.py --seeds 200 --out benchmarks/tabletop.csv
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vla_oft.sims import tabletop
from vla_oft.sims.experts.tabletop import Expert

# name: (white noise per step, standard deviation of pushes that begin in 4 % of the steps and last 3-6), action units
NOISES = {"none": (0.0, 0.0), "0.15": (0.15, 0.0), "0.1 + pushes 0.2": (0.1, 0.2), "0.2 + pushes 0.3": (0.2, 0.3)}


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, help="CSV of every episode")
    parser.add_argument("--skip-timing", action="store_true", help="only the experts: no picture is drawn")
    args = parser.parse_args()
    rows = []
    print("| family | " + " | ".join(f"noise {name}" for name in NOISES) + " |\n|" + " --- |" * (len(NOISES) + 1))
    for family in tabletop.FAMILIES:
        env, cells = tabletop.TabletopEnv(family), []
        for name, noise in NOISES.items():
            episodes = [run_episode(env, seed, *noise) for seed in range(args.seeds)]
            rows += [(family, name, seed, *episode) for seed, episode in enumerate(episodes)]
            successes, lengths = zip(*episodes, strict=True)
            cells.append(f"{sum(successes)}/{args.seeds}, {np.mean(lengths):.1f} steps (max {max(lengths)})")
        print(f"| {family} | " + " | ".join(cells) + " |", flush=True)
        env.close()
    with args.out.open("w", newline="") as file:
        csv.writer(file).writerows([("family", "noise", "seed", "success", "steps"), *rows])
    if not args.skip_timing:
        time_steps()


def run_episode(env: tabletop.TabletopEnv, seed: int, std: float, push_std: float) -> tuple[bool, int]:
    """Success and length of one disturbed episode of the expert."""
    env.reset(seed)
    expert, rng = Expert(env), np.random.default_rng(seed)
    push, steps_left = np.zeros(3), 0
    while not env.outcome().success and env.num_steps < env.max_steps:
        if push_std and not steps_left and rng.random() < 0.04:
            push, steps_left = rng.normal(0, push_std, 3), int(rng.integers(3, 7))
        action = expert()
        action[:3] += rng.normal(0, std, 3) + (push if steps_left else 0)
        steps_left = max(0, steps_left - 1)
        env.step(action)
    return env.outcome().success, env.num_steps


def time_steps() -> None:
    """CPU milliseconds of each part (all threads together, so other programs on the machine do not count)."""
    print("\n| what | CPU ms |\n| --- | --- |")
    for size in (64, 128, 224):
        env = tabletop.TabletopEnv("pick_place", camera_size=size)
        expert = Expert(env)
        if size == 64:
            print(f"| reset | {_cpu_ms(lambda env=env, seeds=itertools.count(): env.reset(next(seeds))):.2f} |")
            print(f"| expert's action | {_cpu_ms(expert):.2f} |")
            env.reset(0)
            print(f"| step (10 physics steps) | {_cpu_ms(lambda env=env, expert=expert: env.step(expert())) - _cpu_ms(expert):.2f} |")
        print(f"| observe, two cameras at {size} px | {_cpu_ms(env.observe):.2f} |")
        print(f"| patch_masks(16), two cameras at {size} px | {_cpu_ms(lambda env=env: env.patch_masks(16)):.2f} |")
        if size == 64:
            print(f"| frame(480, 640) for people | {_cpu_ms(lambda env=env: env.frame(480, 640), 20):.1f} |", flush=True)
        env.close()


def _cpu_ms(call: Callable[[], object], repeats: int = 200) -> float:
    call()
    start = time.process_time()
    for _ in range(repeats):
        call()
    return 1e3 * (time.process_time() - start) / repeats


if __name__ == "__main__":
    main()
