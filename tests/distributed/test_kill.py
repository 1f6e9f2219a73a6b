"""SIGKILL at any moment, also in the middle of writing a checkpoint, changes nothing that a resumed run learns."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from tests.distributed.processes import PATIENCE_S, run_and_kill, run_ranks
from tests.training import config, rows, write_demos
from vla_oft import checksums
from vla_oft.data.augment import AugmentConfig
from vla_oft.policy import Policy
from vla_oft.train import checkpoint
from vla_oft.train.config import Phase, TrainConfig
from vla_oft.train.loop import train
from vla_oft.train.parallel import Parallel
from vla_oft.train.validation import Validation

STEPS = 12


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    return write_demos(tmp_path_factory.mktemp("data") / "demos")


def plan(demos: Path, **changes) -> TrainConfig:
    """Two phases, several passes in a step, an average, augmentation, validation, and a checkpoint after every other step."""
    phases = (Phase(steps=5, mixture=(1.0,)), Phase(steps=STEPS - 5, mixture=(1.0,)))
    settings = {"phases": phases, "batch_size": 4, "micro_batch": 2, "save_every": 2, "log_every": 3, "keep_last": 3}
    settings |= {"augment": AugmentConfig(crop_area=0.9), "validation": Validation(every=2, share=0.5, samples=4), "keep_best": True}
    return config(demos, **{**settings, **changes})


def learned(run: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Everything but the time that it took."""
    timing = ("time_s", "samples_per_s", "data_wait")
    return [{k: v for k, v in row.items() if k not in timing} for row in rows(run)], Policy.load(run).state_dict()


def check_equal(run: Path, whole: Path) -> None:
    (ours, weights), (theirs, expected) = learned(run), learned(whole)
    assert ours == theirs
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    assert checkpoint.steps(run) == checkpoint.steps(whole)
    assert (run / "checkpoints/best").resolve().name == (whole / "checkpoints/best").resolve().name
    for step in checkpoint.steps(run):
        checksums.verify(run / f"checkpoints/step-{step:06d}")
    assert not list((run / "checkpoints").glob(".*"))


def train_from_here(settings: TrainConfig, out: Path) -> None:
    train(settings, out, resume=True)


def whole_run(settings: TrainConfig, out: Path) -> float:
    """An uninterrupted run, in a process like those that are killed; the seconds that it took."""
    start = time.monotonic()
    assert run_and_kill(PATIENCE_S, train_from_here, settings, out)
    return time.monotonic() - start


def kill_again_and_again(settings: TrainConfig, out: Path, kills: int, rng: np.random.Generator, longest_s: float) -> list[int]:
    """Start, kill after a random time, start again until it ends. Returns the newest checkpoint's step after each kill, 0 for none."""
    reached: list[int] = []
    while len(reached) < kills and not run_and_kill(rng.uniform(0.1, 1.0) * longest_s, train_from_here, settings, out):
        reached.append((checkpoint.steps(out) or [0])[-1])
    assert run_and_kill(PATIENCE_S, train_from_here, settings, out)
    return reached


def test_a_run_that_was_killed_equals_one_that_was_not(demos, tmp_path):
    took_s = whole_run(plan(demos), tmp_path / "whole")
    reached: list[int] = []
    for seed in range(5):
        out = tmp_path / f"run{seed}"
        reached += kill_again_and_again(plan(demos), out, 3, np.random.default_rng(seed), took_s)
        check_equal(out, tmp_path / "whole")
        if any(0 < step < STEPS for step in reached):
            return
    raise AssertionError(f"no kill came in the middle: {reached}")


@pytest.mark.slow
def test_twenty_kills_at_random_moments(demos, tmp_path):
    took_s = whole_run(plan(demos), tmp_path / "whole")
    rng, reached = np.random.default_rng(1), []
    while len(reached) < 20:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        reached += kill_again_and_again(plan(demos), tmp_path / "run", 20 - len(reached), rng, took_s)
        check_equal(tmp_path / "run", tmp_path / "whole")
    assert len(set(reached)) > 3, reached


WRITING = ["policy", "rename", "prune"]


@pytest.fixture(scope="module")
def bare(demos, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A run without validation, of which one checkpoint stays."""
    settings, out = plan(demos, validation=None, keep_best=False, keep_last=1), tmp_path_factory.mktemp("bare") / "whole"
    whole_run(settings, out)
    return settings, out


@pytest.mark.parametrize("moment", WRITING)
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(bare, tmp_path, moment):
    settings, whole = bare
    assert not run_and_kill(120, _die_while_saving, settings, tmp_path / "run", moment)
    before = checkpoint.newest(tmp_path / "run")
    assert before is not None and before.name == ("step-000004" if moment == "prune" else "step-000002")
    whole_run(settings, tmp_path / "run")
    assert learned(tmp_path / "run")[0] == learned(whole)[0]
    assert checkpoint.steps(tmp_path / "run") == [STEPS] and not list((tmp_path / "run/checkpoints").glob(".*"))


def _die_while_saving(settings: TrainConfig, out: Path, moment: str) -> None:
    """SIGKILL in the second save, just before this moment of it."""
    import os
    import signal

    from vla_oft.train import checkpoint

    saves = 0

    def dying(function):
        def call(*arguments, **named):
            nonlocal saves
            saves += 1
            if saves == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    places = {
        "policy": (checkpoint.Checkpoints, "_write_whole"),
        "rename": (checkpoint, "sync"),
        "prune": (checkpoint.Checkpoints, "_prune"),
    }
    owner, name = places[moment]
    if moment == "rename":  # of many files in each save: the first of the second
        publish = checkpoint.Checkpoints._publish
        checkpoint.Checkpoints._publish = lambda self, writing, final: (
            setattr(checkpoint, "sync", dying(checkpoint.sync)) if final.name == "step-000004" else None,
            publish(self, writing, final),
        )[1]
        saves = 1
    else:
        setattr(owner, name, dying(getattr(owner, name)))
    train(settings, out)


def test_a_damaged_checkpoint_is_passed_over_and_said(demos, tmp_path, capsys):
    settings = plan(demos)
    train(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run", symlinks=True)
    newest = tmp_path / f"run/checkpoints/step-{STEPS:06d}"
    file = newest / "trainer/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    train(settings, tmp_path / "run", resume=True)
    assert f"{file} is damaged" in capsys.readouterr().out
    check_equal(tmp_path / "run", tmp_path / "whole")


def test_no_good_checkpoint_at_all_is_an_error_with_a_way_out(bare, tmp_path):
    settings, whole = bare
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    (tmp_path / f"run/checkpoints/step-{STEPS:06d}/trainer/state.json").unlink()
    with pytest.raises(ValueError, match=r"has no checkpoint to resume from .*--set model.path="):
        train(settings, tmp_path / "run", resume=True)


def test_two_processes_that_were_killed_go_on_exactly(demos, tmp_path):
    settings = plan(demos, parallel=Parallel(strategy="fsdp"), micro_batch=1)
    run_ranks(2, train, settings, tmp_path / "whole")
    with pytest.raises(AssertionError):
        run_ranks(2, _die_at_step_seven, settings, tmp_path / "run")
    run_ranks(2, train_from_here, settings, tmp_path / "run")
    check_equal(tmp_path / "run", tmp_path / "whole")


def _die_at_step_seven(settings: TrainConfig, out: Path) -> None:
    import os
    import signal

    from vla_oft.train.guard import StepGuard

    check, steps = StepGuard.check, 0

    def dying(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return check(self, *arguments)

    StepGuard.check = dying
    train(settings, out)


def test_a_second_process_is_kept_out_of_the_folder(bare):
    settings, out = bare
    with FileLock(out / ".lock"), pytest.raises(ValueError, match="another process is training in"):
        train(settings, out, resume=True)


def test_milestones_stay_without_what_only_resuming_needs(demos, tmp_path):
    train(plan(demos, keep_last=1, keep_every=4), tmp_path / "run")
    folders = {step: tmp_path / f"run/checkpoints/step-{step:06d}" for step in checkpoint.steps(tmp_path / "run")}
    best = int(json.loads((tmp_path / "run/checkpoints/best/run.json").read_text())["step"])
    assert set(folders) == {4, 8, 12, best}
    assert [step for step, folder in folders.items() if (folder / "trainer").exists()] == [12]
    for folder in folders.values():
        checksums.verify(folder)
        Policy.load(folder)
