"""What is refused before a model is built or a picture decoded: one line with the field, its value and what to do."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_config, tiny_policy
from tests.unit.test_train import config, write_demos
from vla_oft.data.base import open_source
from vla_oft.data.select import Filters
from vla_oft.heads import diffusion, discrete, l1
from vla_oft.policy import Policy
from vla_oft.train import anatomy, assemble, plan, preflight, setup
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.config import Phase, Pretrained, TrainConfig
from vla_oft.train.loop import train
from vla_oft.train.lora import Lora
from vla_oft.train.optimizer import AdamW, Muon
from vla_oft.train.parallel import Parallel
from vla_oft.train.schedule import Cosine, MultiStep
from vla_oft.train.stopping import EarlyStop
from vla_oft.train.validation import Validation

FSDP = Parallel(strategy="fsdp")


def refused(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, "one line"
    return message


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    return write_demos(tmp_path_factory.mktemp("data") / "demos")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "policy"
    tiny_policy().save(folder)
    return folder


def tuned(demos: Path, base: Path, **changes) -> TrainConfig:
    changes = {"model": Pretrained(path=str(base)), "num_workers": 1, "precision": "bf16", "ema_decay": None, **changes}
    return config(demos, **changes)


def test_a_run_that_can_work_passes_without_a_word(demos, base, tmp_path):
    assert preflight.check(config(demos, num_workers=1), tmp_path / "run") == []
    assert preflight.check(tuned(demos, base, lora=Lora(rank=2)), tmp_path / "run", world_size=4, device="cuda") == []
    assert not (tmp_path / "run").exists(), "nothing is made"


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({"batch_size": 6}, 4, ("batch_size=6", "4 processes")),
        ({"batch_size": 2}, 4, ("batch_size=2", "4 processes")),
        ({"batch_size": 16, "micro_batch": 3}, 2, ("micro_batch=3", "8 samples")),
        ({"parallel": FSDP}, 1, ("parallel.strategy='fsdp'", "torchrun", "parallel.strategy=ddp")),
        ({"batch_size": 6, "parallel": Parallel(strategy="fsdp", shard_size=4)}, 6, ("shard_size=4", "6 processes", "1, 2, 3, 6")),
        ({"weights": "bfloat16", "precision": "fp32", "ema_decay": None}, 1, ("weights='bfloat16'", "precision='bf16'")),
        ({"weights": "bfloat16+master", "precision": "fp32"}, 1, ("weights='bfloat16+master'", "precision='bf16'")),
        ({"stop": EarlyStop(metric="validation_action_l1")}, 1, ("stop.metric='validation_action_l1'", "set validation")),
        ({"freeze": ("language",), "lora": Lora(targets=("q_proj",))}, 1, ("lora.targets", "q_proj", "outside the frozen parts")),
        ({"freeze": ("vision", "projector", "language"), "lora": Lora()}, 1, ("freeze=", "no layer to adapt", "lora=null")),
        ({"lora": Lora(targets=("q_prj",))}, 1, ("lora.targets", "q_prj", "q_proj")),
    ],
)
def test_settings_that_contradict_each_other_are_refused(demos, tmp_path, changes, world_size, words):
    message = refused(preflight.check, config(demos, **changes), tmp_path / "run", world_size=world_size)
    assert all(word in message for word in words), message


def test_shards_may_be_any_divisor_of_the_processes(demos, tmp_path):
    for size in (1, 2, 3, 6, None):
        hsdp = config(demos, batch_size=6, num_workers=1, parallel=Parallel(strategy="fsdp", shard_size=size))
        assert preflight.check(hsdp, tmp_path / "run", world_size=6) == []


def test_the_diffusion_head_measures_no_action_error_to_stop_by(demos, base, tmp_path):
    stopping = tuned(demos, base, model=Pretrained(path=str(base), head=diffusion.Config()), stop=EarlyStop())
    assert "validation_action_l1" in refused(preflight.check, stopping, tmp_path / "run")
    watched = dataclasses.replace(stopping, stop=EarlyStop(metric="validation_action_l1"), validation=Validation())
    assert preflight.check(watched, tmp_path / "run") == []


def test_nothing_left_to_train_is_refused(demos, tmp_path):
    stateless = dataclasses.replace(tiny_config().robot, state_dim=0)
    bare = tiny_policy(head=discrete.Config(), film=False, grounding=None, use_state=False, robot=stateless)
    bare.save(tmp_path / "base")
    frozen = tuned(demos, tmp_path / "base", freeze=("vision", "projector", "language"), use_state=False)
    assert "nothing to train" in refused(preflight.check, frozen, tmp_path / "run")
    with_state = dataclasses.replace(frozen, use_state=True)
    assert preflight.check(with_state, tmp_path / "run") == [], "the state projector is left"


def test_a_base_policy_that_is_absent_broken_or_of_another_robot_is_refused(demos, base, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    assert "is not a checkpoint" in refused(preflight.check, tuned(demos, tmp_path / "empty"), out)
    for file, words in (
        ("statistics.json", "has no statistics.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", "has no model.safetensors"),
    ):
        broken = tmp_path / file
        shutil.copytree(base, broken)
        (broken / file).unlink()
        assert words in refused(preflight.check, tuned(demos, broken), out)
    kept = Pretrained(path=str(base), statistics="base")
    message = refused(preflight.check, tuned(demos, base, model=kept, robot="aloha"), out)
    assert "action_dim=7" in message and "has 14" in message and "model.statistics=own" in message


def test_an_average_that_cannot_move_is_refused(demos, tmp_path):
    still = config(demos, weights="bfloat16", precision="bf16", ema_decay=0.999)
    assert "ema_decay=0.999 stands still" in refused(preflight.check, still, tmp_path / "run")
    assert preflight.check(dataclasses.replace(still, weights="bfloat16+master"), tmp_path / "run") == []


def test_compiling_without_a_compiler_is_refused(demos, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = refused(preflight.check, config(demos, compile=True), tmp_path / "run")
    assert "g++" in message and "compile=false" in message
    compiler = tmp_path / "my-compiler"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", "my-compiler")
    preflight.check(config(demos, compile=True), tmp_path / "run")


def test_muon_needs_a_torch_that_has_it(demos, tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    assert "torch 2.9" in refused(preflight.check, config(demos, optimizer=Muon()), tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_refused(demos, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(preflight.check, config(demos), tmp_path / "file")
    assert "no permission" in refused(preflight.check, config(demos), tmp_path / "file" / "below")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "no permission" in refused(preflight.check, config(demos), tmp_path / "closed" / "run")


def test_a_disk_too_small_for_the_checkpoints_is_refused_with_the_sum(demos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=100_000_000))
    message = refused(preflight.check, config(demos), tmp_path / "run")
    assert re.search(r"checkpoints need \d+ MB \(3 x \d+ MB\)", message) and "100 MB are free" in message and "keep_last=2" in message
    done = tmp_path / "run" / "checkpoints" / "step-000003"
    done.mkdir(parents=True)
    (done / "model.safetensors").write_bytes(bytes(100_000_000))
    os.link(done / "model.safetensors", done / "again.safetensors")
    preflight.check_disk(config(demos), anatomy.parts(config(demos), anatomy.trained_policy(config(demos), None)), tmp_path / "run")


@pytest.mark.parametrize("changes", [{}, {"lora": Lora(rank=4), "save_dtype": "bfloat16", "ema_decay": None}])
def test_the_estimate_of_disk_space_is_near_the_truth(demos, tmp_path, changes):
    settings = config(demos, phases=(Phase(steps=2, mixture=(1.0,)),), save_every=1, batch_size=2, **changes)
    train(settings, tmp_path / "run")
    parts = anatomy.parts(settings, anatomy.trained_policy(settings, None))
    need, taken = plan.disk(settings, parts), preflight._size(tmp_path / "run" / "checkpoints")
    written = need.shared + 2 * need.resumable
    assert 0.97 * taken < plan.MARGIN * written < 1.12 * taken


def test_more_samples_a_step_than_there_are_is_refused(demos):
    sources = [open_source(demos)]
    preflight.check_data(config(demos, batch_size=24), sources)
    message = refused(preflight.check_data, config(demos, batch_size=25), sources)
    assert "batch_size=25" in message and "24 samples" in message and "--batch-size 16" in message and str(demos) in message
    shorter = config(demos, batch_size=11, parity=True)
    assert "all 10 samples" in refused(preflight.check_data, shorter, sources), "8 of 12 steps of an episode start no whole chunk"


def test_a_last_phase_without_demonstrations_is_refused(demos, tmp_path):
    scenes = write_demos(tmp_path / "scenes", kind="scenes")
    both = config(demos)
    both = dataclasses.replace(
        both,
        datasets=(*both.datasets, dataclasses.replace(both.datasets[0], path=str(scenes))),
        phases=(Phase(steps=2, mixture=(0.5, 0.5)), Phase(steps=2, mixture=(0.0, 1.0))),
    )
    sources = [open_source(demos), open_source(scenes)]
    assert "phases.1.mixture mixes in no demonstrations" in refused(preflight.check_data, both, sources)
    preflight.check_data(dataclasses.replace(both, phases=both.phases[:1]), sources)


def test_a_robot_that_did_not_record_the_data_is_refused_by_name(demos):
    for robot, words in (("aloha", "cam_high"), ("bridge", "state dimensions")):
        message = refused(setup.open_datasets, config(demos, robot=robot))
        assert words in message and robot in message


def test_validation_of_a_single_episode_is_refused(demos):
    one = config(demos, validation=Validation(every=2))
    one = dataclasses.replace(one, datasets=(dataclasses.replace(one.datasets[0], filters=Filters(episodes="0")),))
    assert "holds out one and needs another" in refused(setup.split, one, setup.open_datasets(one))


def test_resuming_with_another_architecture_names_what_changed(demos, base, tmp_path):
    settings = tuned(demos, base, model=Pretrained(path=str(base), head=l1.Config()), phases=(Phase(steps=3, mixture=(1.0,)),))
    train(settings, tmp_path / "run")
    assert preflight.check(settings, tmp_path / "run", resume=True) == []
    longer = dataclasses.replace(settings, chunk_len=4)
    message = refused(preflight.check, longer, tmp_path / "run", resume=True)
    assert "cannot resume" in message and "chunk_len was 8, is 4" in message
    deeper = dataclasses.replace(settings, model=Pretrained(path=str(base), head=l1.Config(num_blocks=5)))
    assert "head.num_blocks was 2, is 5" in refused(preflight.check, deeper, tmp_path / "run", resume=True)
    orphan = dataclasses.replace(settings, model=Pretrained(path="gone", head=l1.Config()))
    assert preflight.check(orphan, tmp_path / "run", resume=True) == [], "the checkpoint has all that the base had"


def test_what_was_probably_not_meant_gets_a_warning(demos, tmp_path):
    odd = config(demos, schedule=MultiStep(milestones=(3, 100)), lora=Lora(rank=2), ema_decay=None)
    said = preflight.check(odd, tmp_path / "run", device="cuda")
    assert len(said) == 2 and "falls at step 100, but the run ends at step 6" in said[0] and "random weights" in said[1]
    (slow,) = preflight.warnings(config(demos, schedule=Cosine(warmup_steps=6)), "cpu")
    assert "warmup_steps=6" in slow


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"freeze": ("vision",)},
        {"freeze": ("vision", "projector", "language")},
        {"lora": Lora(rank=3)},
        {"lora": Lora(rank=3, targets="reference")},
        {"lora": Lora(rank=3, targets=("q_proj", "qkv"))},
        {"lora": Lora(rank=3, dora=True)},
        {"lora": Lora(rank=3), "freeze": ("vision",)},
    ],
)
def test_the_count_of_trained_parameters_is_that_of_the_real_run(demos, base, changes):
    settings = tuned(demos, base, optimizer=AdamW(), **changes)
    parts = anatomy.parts(settings, anatomy.trained_policy(settings, anatomy.base_config(Pretrained(path=str(base)))))
    before = Policy.load(base)
    assert sum(p.total for p in parts) == sum(p.numel() for p in before.parameters())
    policy = assemble.prepare(Blueprint.of(before), settings).policy
    assert sum(p.trained + p.adapter for p in parts) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
