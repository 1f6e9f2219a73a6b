"""Recomputed activations change no bit and no name and save memory; compiled blocks of a kind share one graph."""

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.adapting import adapted, shake
from tests.tiny import INSTRUCTIONS, tiny_batch, tiny_policy
from vla_oft.policy import Policy
from vla_oft.train.lora import Lora
from vla_oft.train.parallel import blocks
from vla_oft.train.recompute import apply_recompute, compile_blocks

MODES = ["none", "selective", "full"]
SETTINGS = [
    Lora(rank=4, dropout=0.2),
    *(pytest.param(s, marks=pytest.mark.slow) for s in (None, Lora(rank=4, base_dtype="nf4", dropout=0.2), Lora(rank=4, dora=True))),
]


def trainee(settings: Lora | None) -> Policy:
    policy = tiny_policy()
    return (shake(adapted(policy, settings)) if settings else policy).train()


def step(policy: Policy, settings: Lora | None) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings is not None and settings.base_dtype == "nf4"):
        loss, _ = policy(tiny_batch(policy))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", SETTINGS)
def test_losses_and_gradients_are_the_same_bits(settings):
    wanted_loss, wanted = step(trainee(settings), settings)
    for mode in MODES[1:]:
        policy = trainee(settings)
        names = [name for name, _ in policy.named_parameters()], list(policy.state_dict())
        apply_recompute(policy, mode)
        assert names == ([name for name, _ in policy.named_parameters()], list(policy.state_dict()))
        loss, gradients = step(policy, settings)
        assert torch.equal(loss, wanted_loss) and gradients.keys() == wanted.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted.items())


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside that something still refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def num_bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@pytest.mark.parametrize("settings", SETTINGS[:3])
def test_selective_keeps_less_than_everything_and_full_keeps_least(settings):
    kept, computed = {}, {}
    for mode in MODES:
        policy = trainee(settings)
        batch = tiny_batch(policy, INSTRUCTIONS[:1] * 4)
        apply_recompute(policy, mode)
        calls: list[int] = []
        for block in blocks(policy):
            block.mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings is not None and settings.base_dtype == "nf4"), Alive() as alive:
            loss, _ = policy(batch)
            kept[mode] = alive.num_bytes()
        loss.backward()
        computed[mode] = len(calls)
    assert kept["full"] < 0.75 * kept["selective"] < 0.75 * 0.75 * kept["none"]
    assert computed["none"] == len(blocks(policy)) and computed["full"] > computed["none"]


def test_without_gradients_nothing_is_recorded():
    policy, plain = trainee(None), trainee(None)
    apply_recompute(policy, "full")
    batch = tiny_batch(policy)
    with torch.inference_mode():
        assert torch.equal(policy.eval().predict(batch), plain.eval().predict(batch))
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    assert not policy.train()(batch)[0].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_a_kind_share_one_graph_for_every_prompt_length(mode):
    graphs: list[nn.Module] = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    policy, plain = trainee(None), trainee(None)
    apply_recompute(policy, mode)
    compile_blocks(policy, backend=backend)  # type: ignore[arg-type]
    counts = []
    first, second = INSTRUCTIONS
    mixed = [(first, second), ("red block", second), ("touch the block", first), ("red", "red block")]
    for texts in ((first,) * 2, (second,) * 2, ("red block",) * 2, *mixed):
        batch = tiny_batch(policy, list(texts))
        loss, _ = policy(batch)
        loss.backward()
        wanted, _ = plain(batch)
        wanted.backward()
        torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=0)
        counts.append(len(graphs))
    for one, other in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
    assert counts[:3] == [4, 6, 6], "two kinds of ViT block, decoder layers, and the last one, which computes fewer rows"
    assert counts[3:] == [8, 8, 10, 10], "with padding: two of one length, then two others"


def test_dora_is_not_compiled():
    with pytest.raises(ValueError, match="compile=True does not work with lora.dora=True"):
        compile_blocks(trainee(Lora(rank=4, dora=True)))
