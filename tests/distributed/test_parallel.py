"""Several real processes train like one: same losses, same gradients, whatever divides the work."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import run_ranks
from tests.tiny import INSTRUCTIONS, tiny_batch, tiny_policy
from tests.training import config, rows, write_demos
from vla_oft import cli_train
from vla_oft.policy import Policy
from vla_oft.train import checkpoint, folder, parallel
from vla_oft.train.blueprint import Blueprint, fill
from vla_oft.train.config import Phase, TrainConfig
from vla_oft.train.loop import train
from vla_oft.train.parallel import Parallel

STEPS = 20
DDP, FSDP = Parallel(), Parallel(strategy="fsdp")


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    return write_demos(tmp_path_factory.mktemp("data") / "demos")


@pytest.fixture(scope="module")
def alone(demos, tmp_path_factory) -> Path:
    """One process, whole batches."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(plan(demos), out)
    return out


def plan(demos: Path, **changes) -> TrainConfig:
    return config(demos, **{"batch_size": 8, "phases": (Phase(steps=STEPS, mixture=(1.0,)),), "save_every": 10, **changes})


def losses(run: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["action_l1"]) for row in rows(run)]


def check_same(run: Path, alone: Path) -> None:
    assert losses(run) == [(pytest.approx(loss, rel=1e-5), pytest.approx(l1, rel=1e-4)) for loss, l1 in losses(alone)]
    ours, theirs = (Policy.load(folder).state_dict() for folder in (run, alone))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("way", "micro_batch"), [(DDP, None), (FSDP, 2)], ids=["ddp", "fsdp in two passes"])
def test_two_processes_train_as_one_does(demos, alone, tmp_path, way, micro_batch):
    run_ranks(2, train, plan(demos, parallel=way, micro_batch=micro_batch), tmp_path / "run")
    check_same(tmp_path / "run", alone)


def test_passes_of_a_few_samples_add_up_to_the_batch(demos, alone, tmp_path):
    train(plan(demos, micro_batch=2), tmp_path / "run")
    check_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_copies_on_two_machines_of_two_processes_each_train_as_one_does(demos, alone, tmp_path):
    run_ranks(4, train, plan(demos, parallel=Parallel(strategy="fsdp", shard_size=2)), tmp_path / "run")
    check_same(tmp_path / "run", alone)


def test_a_run_goes_on_with_other_numbers_of_processes_and_another_strategy(demos, alone, tmp_path):
    out = tmp_path / "run"
    for number, (world_size, way, until) in enumerate([(1, DDP, 5), (2, FSDP, 10), (2, DDP, 15), (1, DDP, STEPS)]):
        run_ranks(world_size, _train_until, plan(demos, parallel=way, keep_last=9), out, bool(number), until)
    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    check_same(out, alone)


def _train_until(some: TrainConfig, out: Path, resume: bool, step: int) -> None:
    """Stop after a step as a signal would."""
    import os
    import signal

    from vla_oft.train import tracking

    write = tracking.Tracker.add

    def add(self, number, *arguments, **named):
        row = write(self, number, *arguments, **named)
        if number == step - 1 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    tracking.Tracker.add = add
    try:
        train(some, out, resume=resume)
    except SystemExit as leaving:
        assert leaving.code == 128 + signal.SIGTERM and step < STEPS


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_gradient_is_the_mean_over_the_processes(tmp_path, kind):
    """The head's, the state projector's and FiLM's as well as the backbone's."""
    run_ranks(2, _save_gradients, kind, tmp_path / "gradients.pt")
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    policy = tiny_policy().train()
    for seed in (0, 5):
        (policy(tiny_batch(policy, seed=seed))[0] / 2).backward()
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and any("action_head" in name for name in found) and any(".scale." in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.abs().max() > 0, name


def _save_gradients(kind: str, out: Path) -> None:
    with parallel.start("cpu") as ranks:
        policy = tiny_policy()
        batch = tiny_batch(policy, INSTRUCTIONS, seed=5 * ranks.rank)
        blueprint = Blueprint.of(policy)
        if kind == "fsdp":
            parallel.shard(policy, FSDP, ranks, None)
        fill(blueprint, ranks.device)
        module = policy.train() if kind == "fsdp" else parallel.replicate(policy.train(), ranks)
        module(batch)[0].backward()
        gradients = {name: parallel.whole(p.grad) for name, p in policy.named_parameters() if p.grad is not None}
        if ranks.is_main:
            torch.save(gradients, out)
        dist.barrier()


def test_the_command_line_counts_the_processes(demos, tmp_path):
    folder.write(plan(demos, parallel=FSDP, phases=(Phase(steps=1, mixture=(1.0,)),)), tmp_path)
    run_ranks(2, _by_command_line, tmp_path / folder.CONFIG, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [1]


def _by_command_line(config: Path, out: Path) -> None:
    cli_train.train(config=config, out=out, device="cpu")


def test_an_error_in_the_first_process_is_everybodys(demos, tmp_path):
    with pytest.raises(AssertionError, match="batch_size=9 cannot be divided among 2 processes"):
        run_ranks(2, train, dataclasses.replace(plan(demos), batch_size=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()
