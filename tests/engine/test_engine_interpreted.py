"""A whole compiled policy on the fused kernels and Triton's products, without a GPU: the paths, shapes and strides that a GPU sees."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from interpreter import DEVICE, Call, interpreter

from tests.engine.test_engine import BATCHES, HEADS, NOISE, actions
from tests.tiny import tiny_policy
from vla_oft import engine
from vla_oft.engine import ops
from vla_oft.engine.kernels.products import Product
from vla_oft.engine.kernels.tiles import Tiles
from vla_oft.engine.tuner import Choice, Tuner

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="test_gpu.py runs the real kernels")


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    pytest.importorskip("triton")
    with interpreter() as call:
        yield call


class Triton(Tuner):
    """Chooses Triton for every product, in every way there is, and split where parts are welcome."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.ways: set[str] = set()

    def choose(self, task) -> Choice:
        if not isinstance(task, Product):
            return Choice()
        gated = task.activation == "swiglu" and task.kind not in ("int8", "int4")
        size = 128 if task.kind == "int4" else 32
        tiles = Tiles(block_m=32, block_n=32, block_k=size, splits=2 if task.parts and task.inner > size else 1)
        self.ways.add("gated" if gated else "split" if tiles.splits > 1 else "matmul")
        return Choice(way="gated" if gated else "matmul", tiles=tiles)


def triton_actions(head: str, precision: engine.Precision, batch: str) -> tuple[np.ndarray, set[str]]:
    """In the interpreter's process: actions, and the ways that were taken."""
    tuner, policy = Triton(), tiny_policy(head=HEADS[head])
    with (
        mock.patch.object(engine.linear_cpu, "available", lambda: False),
        mock.patch.object(engine.factory.ops, "TORCH", ops.fused(tuner)),
        mock.patch.object(engine.factory.Tuner, "for_device", lambda *a, **k: tuner),
    ):
        fast = engine.compile_policy(policy, precision=precision)
    return actions(fast, BATCHES[batch], noise=NOISE), tuner.ways


@pytest.mark.parametrize("batch", ["one", pytest.param("three, two of them padded", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "head", ["l1", *(pytest.param(h, marks=pytest.mark.slow) for h in ("pooled", "discrete", "autoregressive", "diffusion"))]
)
def test_triton_answers_as_the_plain_policy(call, head, batch):
    (found, ways), _ = call(triton_actions, head, "fp32", batch)
    wanted = actions(tiny_policy(head=HEADS[head]), BATCHES[batch], noise=NOISE)
    np.testing.assert_allclose(found, wanted, atol=5e-5, rtol=0)
    assert ways == {"gated", "split", "matmul"}


@pytest.mark.parametrize("precision", ["fp8", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bf16", "int8", "int4", "int8-dynamic"))])
def test_triton_answers_as_torch_at_every_precision(call, precision):
    """Of random weights, which enlarge every rounding: nearer to torch's answer than the precision is to float32's."""
    (found, _), _ = call(triton_actions, "l1", precision, "one")
    policy = tiny_policy()
    torchs = actions(engine.compile_policy(policy, precision=precision), BATCHES["one"])
    exact = actions(policy, BATCHES["one"])
    assert np.linalg.norm(found - torchs) <= 1.5 * np.linalg.norm(torchs - exact) + 0.02 * np.linalg.norm(exact)


def test_torch_is_left_as_it_was():
    assert engine.factory.ops.TORCH.gelu is ops.gelu and torch.get_num_threads() >= 1
