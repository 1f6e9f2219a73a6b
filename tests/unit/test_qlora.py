"""Weights in 4 bits: packing loses little and nothing twice, training sees what the checkpoint holds, memory is what was promised."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.adapting import adapted, shake, write
from tests.tiny import tiny_batch, tiny_policy
from vla_oft.merge import load_unmerged, merge_checkpoint
from vla_oft.policy import Policy
from vla_oft.train import nf4
from vla_oft.train.lora import Lora
from vla_oft.train.nf4 import Nf4Linear

QLORA = Lora(rank=4, base_dtype="nf4")


def weights(kind: str, size: int = 3 * 64 * 256 + 5 * 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(size, generator=generator)
    blocks = torch.rand(size // 64, 1, generator=generator)
    return {
        "normal": 0.02 * normal,
        "outliers": torch.where(torch.rand(size, generator=generator) < 0.001, 50 * normal, normal),
        "unequal blocks": (normal.view(-1, 64) * 10 ** (-5 * blocks)).flatten(),  # all 256 levels, and blocks that vanish
        "uniform": torch.rand(size, generator=generator) - 0.5,
        "zeros": torch.zeros(size),
        "one": torch.eye(64).flatten(),
        "bfloat16": (0.02 * normal).bfloat16(),
        "tiny": 1e-30 * normal,
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "outliers", "unequal blocks", "uniform", "zeros", "one", "bfloat16", "tiny"])
def test_packing_what_was_unpacked_gives_the_same_bits(kind):
    weight = weights(kind)
    once = nf4.unpack(*nf4.pack(weight), tuple(weight.shape))
    assert once.dtype == torch.bfloat16 and torch.isfinite(once).all()
    twice = nf4.unpack(*nf4.pack(once), tuple(weight.shape))
    assert torch.equal(once, twice)


def test_every_weight_becomes_the_nearest_of_sixteen_values_of_its_block():
    weight = weights("normal")
    found = nf4.rounded(weight).view(-1, 64)
    book = torch.tensor(nf4._CODEBOOK)
    for block, rounded in itertools.islice(zip(weight.view(-1, 64), found, strict=True), 0, None, 37):
        scale = rounded.abs().max()
        assert scale.item() == pytest.approx(block.abs().max().item(), rel=0.01)
        exact = book[(block[:, None] / scale - book).abs().argmin(1)] * scale
        assert ((rounded - block).abs() <= (exact - block).abs() + 2**-8 * scale).all()
    error = (found.flatten() - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert 0.08 < error < 0.10  # the format's own error for normal weights in blocks of 64


def test_a_layer_takes_the_bytes_that_it_promises():
    layer = Nf4Linear(nn.Linear(192, 128, device="meta"))
    stored = sum(getattr(layer, part).numel() * getattr(layer, part).element_size() for part in nf4.PARTS)
    assert stored == nf4.stored_bytes(192 * 128)
    assert nf4.stored_bytes(4096 * 11008) * 8 / (4096 * 11008) == pytest.approx(4.126, abs=1e-3)


def test_frozen_linear_layers_of_towers_and_decoder_are_packed_and_nothing_else():
    policy = adapted(tiny_policy(), QLORA)
    packed = {name.removesuffix(".base_layer") for name, module in policy.named_modules() if isinstance(module, Nf4Linear)}
    plain = tiny_policy()
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name.startswith("vlm.")}
    outside = {name for name in linear if name.endswith((".scale", ".shift", "lm_head")) or ".projector." in name}
    assert packed == linear - outside
    assert not any(p.requires_grad for p in nf4.packed_parameters(policy)) and len(nf4.packed_parameters(policy)) == 3 * len(packed)
    kept = {p.dtype for p in policy.parameters() if not p.requires_grad and p not in nf4.packed_parameters(policy)}
    assert kept == {torch.bfloat16}


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_unpacked_layer(bias):
    layer = nn.Linear(128, 64, bias=bias)
    packed = Nf4Linear(layer)
    for part, tensor in zip(nf4.PARTS, nf4.pack(layer.weight), strict=True):
        setattr(packed, part, nn.Parameter(tensor, requires_grad=False))
    x = torch.randn(2, 5, 128).bfloat16()
    one, other = (x.clone().requires_grad_(True) for _ in range(2))
    expected = F.linear(other, packed.weight)
    expected = expected if layer.bias is None else expected + layer.bias.bfloat16()
    torch.testing.assert_close(packed(one), expected, atol=0, rtol=0)
    packed(one).float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=0, rtol=0)


@pytest.mark.parametrize("settings", [QLORA, Lora(rank=4, base_dtype="nf4", dora=True)])
def test_no_unpacked_weight_outlives_its_use(settings):
    policy = adapted(tiny_policy(), settings).train()
    shapes = {(m.out_features, m.in_features) for m in policy.modules() if isinstance(m, Nf4Linear)}
    shapes = {shape for shape in shapes if shape[0] != shape[1]}  # trained projectors are square too
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loss, _ = policy(tiny_batch(policy))
    assert len(saved) > 100 and len(shapes) > 4
    assert not [t.shape for t in saved if tuple(t.shape) in shapes or tuple(t.shape[::-1]) in shapes]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("settings", [QLORA, Lora(rank=4, base_dtype="nf4", dora=True)])
def test_the_checkpoint_holds_what_training_saw_and_resumes_on_the_same_bits(tmp_path, settings):
    policy = shake(adapted(tiny_policy(), settings), 0.1).eval()
    write(policy, tmp_path)
    base = load_unmerged(tmp_path, torch.float32)
    for name, module in policy.named_modules():
        if isinstance(module, Nf4Linear):
            assert torch.equal(base.get_parameter(f"{name.removesuffix('.base_layer')}.weight"), module.weight.float()), name
    again = adapted(base, settings)
    resumed = dict(again.named_modules())
    for name, module in policy.named_modules():
        if isinstance(module, Nf4Linear):
            assert torch.equal(resumed[name].weight, module.weight), name
    loaded, batch = Policy.load(tmp_path), tiny_batch(policy)
    with torch.inference_mode():
        exact = loaded.predict(batch)
        with torch.autocast("cpu", torch.bfloat16):
            trained, rounded = policy.predict(batch), loaded.predict(batch)
    noise = (rounded - exact).abs().max()
    assert (trained - exact).abs().max() < 3 * noise + 1e-3  # of computing in bfloat16
    merge_checkpoint(tmp_path, tmp_path / "merged", tolerance=1e-4)


def test_dora_in_4_bits_starts_at_the_4_bit_base():
    policy = adapted(tiny_policy(), Lora(rank=4, base_dtype="nf4", dora=True))
    layers = [m for m in policy.modules() if isinstance(getattr(m, "base_layer", None), Nf4Linear)]
    assert len(layers) > 20
    for layer in layers:
        lengths = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(lengths.detach(), layer.base_layer.weight.float().norm(dim=1), rtol=1e-6, atol=0)


def test_what_cannot_run_in_4_bits_is_refused():
    with pytest.raises(ValueError, match="dora=True with dropout would keep 16-bit weights"):
        Lora(dora=True, dropout=0.1, base_dtype="nf4")
    with pytest.raises(ValueError, match="base_dtype='nf4' needs precision='bf16', not 'fp32'"):
        QLORA.check("fp32")
