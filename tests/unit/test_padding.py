"""Instructions of different lengths in one batch: nothing depends on the company, with a mask or on the kernel for ragged sequences."""

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_batch, tiny_config, tiny_policy
from vla_oft.heads import diffusion, discrete, l1
from vla_oft.policy import Policy
from vla_oft.vlm import attention, prismatic
from vla_oft.vlm.attention import Padding, attend

TEXTS = ["red", "stack the green block on the blue block now", "touch the red block"]
HEADS = [
    l1.Config(),
    discrete.Config(decoding="autoregressive"),
    pytest.param(diffusion.Config(), marks=pytest.mark.slow),
    pytest.param(discrete.Config(), marks=pytest.mark.slow),
]


def looped(q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, max_q: int, max_k: int) -> Tensor:
    """What torch's kernel for ragged sequences computes: each stretch of rows sees the keys of its own stretch."""
    out = torch.zeros_like(q)
    for i in range(len(q_bounds) - 1):
        rows, keys = (slice(int(bounds[i]), int(bounds[i + 1])) for bounds in (q_bounds, k_bounds))
        assert rows.stop - rows.start <= max_q and keys.stop - keys.start <= max_k
        if rows.stop > rows.start:
            scores = torch.einsum("rhd,khd->hrk", q[rows], k[keys]) * q.shape[-1] ** -0.5
            out[rows] = torch.einsum("hrk,khd->rhd", scores.softmax(-1), v[keys])
    return out


@pytest.fixture
def ragged(monkeypatch) -> None:
    """As on a GPU: padded batches take the path of ragged sequences."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no kernel for ragged sequences")
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    monkeypatch.setattr(varlen, "varlen_attn", looped)
    monkeypatch.setattr(attention, "_has_ragged_kernel", lambda device: True)
    monkeypatch.setattr(attention, "RAGGED_DTYPES", (torch.float32,))


def mask(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size)[None] >= size - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("rows", [4, 9])
def test_ragged_rows_are_those_that_a_mask_gives(ragged, rows):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 9, 8, generator=generator) for _ in range(3))
    real = mask([9, 4, 6], 9)
    out = attend(q[:, :, -rows:], k, v, Padding.of(real))
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, -rows:], k, v, attn_mask=real[:, None, None])
    for i, length in enumerate((9, 4, 6)):
        torch.testing.assert_close(out[i, :, -min(length, rows) :], expected[i, :, -min(length, rows) :])


def loss_and_gradients(policy: Policy, texts: list[str]) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    policy.zero_grad()
    loss, _ = policy(tiny_batch(policy, texts))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("head", HEADS)
def test_a_padded_batch_on_the_ragged_path_trains_as_with_a_mask(head, request):
    policy = tiny_policy(head=head, vlm=_equal_heads()).train()
    loss, gradients = loss_and_gradients(policy, TEXTS)
    request.getfixturevalue("ragged")
    other_loss, other_gradients = loss_and_gradients(policy, TEXTS)
    torch.testing.assert_close(other_loss, loss, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("path", ["masked", "ragged"])
def test_no_answer_depends_on_the_other_instructions_of_the_batch(head, path, request):
    policy = tiny_policy(head=head, vlm=_equal_heads())
    noise = torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(0))
    together = tiny_batch(policy, TEXTS)
    alone = [policy.predict(tiny_batch(policy, [text], seed=i), noise=noise[i : i + 1]) for i, text in enumerate(TEXTS)]
    if path == "ragged":
        request.getfixturevalue("ragged")
    torch.testing.assert_close(policy.predict(together, noise=noise), torch.cat(alone), atol=1e-4, rtol=0)


def test_grounding_reads_the_same_patches_whatever_the_padding():
    policy = tiny_policy()
    metrics = [policy(tiny_batch(policy, [text], seed=i))[1] for i, text in enumerate(TEXTS)]
    together = policy(tiny_batch(policy, TEXTS))[1]
    for name in ("grounding_loss", "landmark_error_m"):
        torch.testing.assert_close(together[name], torch.stack([m[name] for m in metrics]).mean(), atol=1e-5, rtol=1e-4)


def _equal_heads() -> prismatic.Config:
    """The kernel's condition."""
    vlm = tiny_config().vlm
    return dataclasses.replace(vlm, llm=dataclasses.replace(vlm.llm, num_kv_heads=vlm.llm.num_heads))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [57, 300])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_gpu_the_kernel_answers_as_the_mask_does(rows, head_dim):
    pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no kernel for ragged sequences")
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda size: torch.randn(3, 4, size, head_dim, device="cuda", generator=generator).bfloat16()  # noqa: E731
    q, k, v = draw(rows), draw(300), draw(300)
    lengths = [300, 57, 128]
    padding, found = Padding.of(mask(lengths, 300).cuda()), []
    assert padding.bounds is not None
    for which in (padding, padding.mask):
        inputs = [t.clone().requires_grad_(True) for t in (q, k, v)]
        out = attend(*inputs, which)
        seen = [out[i, :, -min(length, rows) :] for i, length in enumerate(lengths)]
        torch.cat([part.float().square().flatten() for part in seen]).sum().backward()
        found.append([*seen, *(t.grad for t in inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)
