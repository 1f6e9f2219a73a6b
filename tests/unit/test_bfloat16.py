"""A policy whose weights are all bfloat16 trains without autocast: losses in float32, gradients close to the exact ones."""

import pytest
import torch

from tests.adapting import adapted
from tests.tiny import tiny_batch, tiny_policy
from vla_oft.heads import diffusion, discrete, l1, pooled
from vla_oft.train.lora import Lora

HEADS = [l1.Config(), l1.Config(loss="huber"), diffusion.Config(), discrete.Config(), pooled.Config(dropout=0.0)]


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_float32_and_gradients_close(head):
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        policy = tiny_policy(head=head).to(dtype).train()
        torch.manual_seed(0)
        loss, metrics = policy(tiny_batch(policy))
        loss.backward()
        assert loss.dtype == torch.float32 and {m.dtype for m in metrics.values()} == {torch.float32}
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
        assert {g.dtype for g in gradients[-1].values()} == {dtype}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert gradients[0].keys() == gradients[1].keys()
    exact, rounded = (torch.cat([g.float().flatten() for g in found.values()]) for found in gradients)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.98


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_lora_on_a_bfloat16_or_4_bit_base_needs_no_autocast(base):
    policy = adapted(tiny_policy(), Lora(rank=4, base_dtype=base), trained=torch.bfloat16).train()
    assert {p.dtype for p in policy.parameters() if p.is_floating_point()} == {torch.bfloat16}
    dtypes: set[torch.dtype] = set()
    for module in policy.vlm.modules():
        module.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype) if isinstance(out, torch.Tensor) else None)
    loss, _ = policy(tiny_batch(policy))
    loss.backward()
    assert dtypes == {torch.bfloat16}
    assert loss.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.requires_grad)
