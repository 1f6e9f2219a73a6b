"""Training on a real GPU: whole runs, no step that waits for the device, resume, several processes where there are several GPUs."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import run_ranks
from tests.training import config, rows
from vla_oft.bench import demonstrations
from vla_oft.data.augment import AugmentConfig
from vla_oft.heads import diffusion, l1
from vla_oft.train import checkpoint
from vla_oft.train.config import Fresh, Phase, TrainConfig
from vla_oft.train.loop import train
from vla_oft.train.lora import Lora
from vla_oft.train.parallel import Parallel
from vla_oft.train.step import Stepper
from vla_oft.train.validation import Validation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """In a format that needs neither pyarrow nor FFmpeg, which GPU machines may lack."""
    shape = demonstrations.Shape(episodes=3, length=24, size=64)
    return demonstrations.write(tmp_path_factory.mktemp("data"), "libero_hdf5", shape)


def plan(demos: Path, **changes) -> TrainConfig:
    settings = {"robot": "libero", "model": Fresh(size="nano", head=l1.Config(), grounding=None), "batch_size": 8}
    settings |= {"phases": (Phase(steps=12, mixture=(1.0,)),), "save_every": 4, "keep_last": 9, "augment": AugmentConfig(crop_area=0.9)}
    return config(demos, **{**settings, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "weights": "bfloat16+master", "recompute": "selective"},
        {"precision": "bf16", "recompute": "full", "compile": True},
        {"precision": "bf16", "lora": Lora(rank=4, base_dtype="bfloat16"), "weights": "bfloat16+master", "ema_decay": None},
        {"precision": "bf16", "lora": Lora(rank=4, base_dtype="nf4"), "ema_decay": None},
        {"validation": Validation(every=4, share=0.5, samples=8), "keep_best": True},
    ],
    ids=["float32", "masters", "compiled", "lora", "qlora", "validated"],
)
def test_a_run_on_a_gpu_learns_and_resumes(demos, tmp_path, changes):
    settings = plan(demos, **changes)
    train(settings, tmp_path / "run", device="cuda")
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0]
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
    train(settings, tmp_path / "run", device="cuda", resume=True)
    again = [row["loss"] for row in rows(tmp_path / "run")]
    assert again == pytest.approx(losses, rel=2e-3) and again[:4] == losses[:4]
    assert checkpoint.steps(tmp_path / "run") == [4, 8, 12]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": Lora(rank=4, base_dtype="nf4"), "ema_decay": None},
        {"model": Fresh(size="nano", head=diffusion.Config(), grounding=None)},
        {"augment": AugmentConfig(method="reference")},
    ],
    ids=["l1", "qlora", "diffusion", "reference augmentation"],
)
def test_no_step_waits_for_the_gpu(demos, tmp_path, monkeypatch, changes):
    call, steps = Stepper.__call__, 0

    def strict(self, *arguments, **named):
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error" if steps > 2 else "default")
        try:
            return call(self, *arguments, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "__call__", strict)
    train(plan(demos, precision="bf16", micro_batch=4, **changes), tmp_path / "run", device="cuda")
    assert steps == 12


def test_a_gpu_trains_as_the_cpu_does(demos, tmp_path):
    settings = plan(demos, precision="fp32", ema_decay=None)
    train(settings, tmp_path / "cpu")
    train(settings, tmp_path / "cuda", device="cuda")
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_does(demos, tmp_path, strategy):
    settings = plan(demos, precision="fp32", ema_decay=None)
    train(settings, tmp_path / "one", device="cuda")
    both = dataclasses.replace(settings, parallel=Parallel(strategy=strategy))
    run_ranks(2, _on_gpus, both, tmp_path / "two")
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def _on_gpus(settings: TrainConfig, out: Path) -> None:
    train(settings, out, device="cuda")
