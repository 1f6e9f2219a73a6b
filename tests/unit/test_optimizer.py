"""Optimizers: what changes in a step and what does not, float32 masters, exact resume, averages; on one process and divided among two."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from vla_oft.train.ema import Ema
from vla_oft.train.optimizer import AdamW, Muon

KINDS = [AdamW(), AdamW(decay="all", betas=(0.9, 0.999)), Muon()]
if not hasattr(torch.optim, "Muon"):
    KINDS.pop()


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def run(model: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step(0.01)


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_adamw_is_torchs_own():
    ours, theirs = net(), net()
    decayed, spared = [theirs[0].weight, theirs[2].weight], [theirs[0].bias, *theirs[1].parameters(), theirs[2].bias]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    optimizer = AdamW().build(ours, 0.01)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(0.01)
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)
        assert one.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masters", [False, True])
def test_a_skipped_step_changes_neither_weights_nor_state(kind, masters):
    model = net(torch.bfloat16 if masters else torch.float32)
    optimizer = kind.build(model, 0.01, masters=masters)
    run(model, optimizer, range(2))
    before = bits(model), {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(0.01, skip=torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before[0], bits(model), strict=True))
    assert all(torch.equal(before[1][name], tensor) for name, tensor in optimizer.tensors().items())
    set_gradients(model, 7)
    optimizer.step(0.01, skip=torch.tensor(False))
    assert not any(torch.equal(a, b) for a, b in zip(before[0], bits(model), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masters", [False, True])
def test_a_resumed_optimizer_continues_bit_for_bit(kind, masters):
    model = net(torch.bfloat16 if masters else torch.float32)
    optimizer = kind.build(model, 0.01, masters=masters)
    run(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = kind.build(other, 0.01, masters=masters)
    assert resumed.tensors().keys() == optimizer.tensors().keys()
    resumed.load_tensors({name: tensor.clone() for name, tensor in optimizer.tensors().items()})
    run(model, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(bits(model), bits(other), strict=True))


def test_state_is_named_after_its_parameter():
    names = AdamW().build(net(torch.bfloat16), 0.01, masters=True).tensors()
    assert {name.split("/")[0] for name in names} == {"master", "exp_avg", "exp_avg_sq", "step"}
    assert {name.split("/")[1] for name in names} == {name for name, _ in net().named_parameters()}
    assert names["exp_avg/0.weight"].shape == (5, 6) and names["step/0.weight"].shape == (1,)
    with pytest.raises(ValueError, match=r"another configuration: master/0.bias is unknown"):
        AdamW().build(net(), 0.01).load_tensors(names)


def test_masters_keep_updates_that_bfloat16_loses():
    exact, plain, kept = net(), net(torch.bfloat16), net(torch.bfloat16)
    for one, other in zip(exact.parameters(), kept.parameters(), strict=True):
        one.data.copy_(other)
    optimizers = [AdamW().build(m, 1e-5, masters=m is kept) for m in (exact, plain, kept)]
    start = bits(kept)
    for _ in range(100):
        for model, optimizer in zip((exact, plain, kept), optimizers, strict=True):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step(1e-5)
    weights = optimizers[2].weights()
    for (name, a), b, c, s in zip(exact.named_parameters(), plain.parameters(), kept.parameters(), start, strict=True):
        torch.testing.assert_close(weights[name], a.detach(), atol=1e-6, rtol=0)
        assert torch.equal(c, weights[name].bfloat16())
        if "weight" in name and a.ndim == 2:
            large = s.abs() > 0.1
            assert torch.equal(b[large], s[large]) and not torch.equal(c[large], s[large]), "steps of 1e-5 are below half a bit of 0.1"


def test_gradients_of_masters_are_cast_a_few_at_a_time(monkeypatch):
    whole = net(torch.bfloat16)
    run(whole, AdamW().build(whole, 0.01, masters=True), range(3))
    monkeypatch.setattr("vla_oft.train.optimizer.CAST_BYTES", 64)
    parts = net(torch.bfloat16)
    optimizer = AdamW().build(parts, 0.01, masters=True)
    assert len(optimizer.members) > 3
    run(parts, optimizer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(parts), strict=True))


def test_parameters_without_a_gradient_stay():
    model = net()
    optimizer = AdamW().build(model, 0.01)
    set_gradients(model, 0)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    optimizer.step(0.01)
    state = optimizer.tensors()
    assert torch.equal(model[0].weight, before) and state["step/0.weight"] == 0 and state["step/2.weight"] == 1


def test_averages_are_taken_of_the_masters_and_skip_what_is_skipped():
    model = net(torch.bfloat16)
    optimizer = AdamW().build(model, 1e-4, masters=True)
    ema = Ema(dict(model.named_parameters()), optimizer.weights(), 0.5)
    wanted = {name: tensor.clone() for name, tensor in optimizer.weights().items()}
    for step, skip in enumerate((False, True, False)):
        set_gradients(model, step)
        optimizer.step(1e-4, skip=torch.tensor(skip))
        ema.update(skip=torch.tensor(skip))
        if not skip:
            share = 1 - min(0.5, (2 + step // 2) / (11 + step // 2))
            wanted = {name: old + share * (optimizer.weights()[name] - old) for name, old in wanted.items()}
    for name, tensor in wanted.items():
        torch.testing.assert_close(ema.average[name], tensor, atol=1e-7, rtol=1e-6)
    raw = bits(model)
    with ema.applied():
        assert all(torch.equal(p, ema.average[name].bfloat16()) for name, p in model.named_parameters())
    assert all(torch.equal(p, r) for p, r in zip(model.parameters(), raw, strict=True))


def test_a_resumed_average_continues_bit_for_bit():
    model = net()
    named = dict(model.named_parameters())
    optimizer, ema, other = AdamW().build(model, 0.01), Ema(named, named, 0.999), Ema(named, named, 0.999)
    for step in range(6):
        if step == 3:
            for name, saved in ema.average.items():
                other.average[name].copy_(saved)
            other.load_state_dict({"updates": torch.tensor(ema.state_dict()["updates"].item())})
        run(model, optimizer, range(step, step + 1))
        ema.update()
        if step >= 3:
            other.update()
    assert all(torch.equal(average, other.average[name]) for name, average in ema.average.items())


def test_divided_among_two_processes_the_same_steps_are_taken(tmp_path):
    mp.spawn(_divided, args=(str(tmp_path / "store"),), nprocs=2)


def _divided(rank: int, store: str) -> None:
    """One of two processes that train a sharded copy beside a whole one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=Path(store).as_uri(), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind, masters in itertools.product(KINDS, (False, True)):
        dtype = torch.bfloat16 if masters else torch.float32
        whole, parted = net(dtype), fully_shard(net(dtype), mesh=mesh)
        optimizers = [kind.build(m, 0.01, masters=masters) for m in (whole, parted)]
        ema = [Ema(dict(m.named_parameters()), o.weights(), 0.9) for m, o in zip((whole, parted), optimizers, strict=True)]
        for step in range(4):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
            for model, optimizer, average in zip((whole, parted), optimizers, ema, strict=True):
                model(x).square().sum().backward()
                skip = torch.tensor(step == 2)
                optimizer.step(0.01, skip=skip)
                average.update(skip=skip)
        state, parts = (optimizer.tensors() for optimizer in optimizers)
        assert state.keys() == parts.keys()
        for name, tensor in parts.items():
            if not name.startswith("step/"):
                assert isinstance(tensor, DTensor) and tensor.placements == dict(parted.named_parameters())[name.split("/")[1]].placements
                tensor = tensor.full_tensor()
            torch.testing.assert_close(tensor, state[name], atol=1e-5, rtol=1e-4)
        for mine, other in zip(parted.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.full_tensor(), other.detach(), atol=1e-2 if masters else 1e-5, rtol=0)
        for name, average in ema[0].average.items():
            torch.testing.assert_close(ema[1].average[name].full_tensor(), average, atol=1e-5, rtol=1e-4)
    dist.destroy_process_group()
