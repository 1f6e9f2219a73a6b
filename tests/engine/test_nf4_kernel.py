"""The kernel that unpacks 4-bit weights: the same bits as PyTorch's operations, and no registers wasted on the GPUs that it is for."""

import importlib.util

import pytest
import torch
from torch import Tensor

from tests.engine.interpreter import Call, interpreter
from vla_oft.train import nf4

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)


@pytest.fixture(scope="module")
def call():
    with interpreter() as call:
        yield call


def unpack(codes: Tensor, scales: Tensor, group_scales: Tensor, book: Tensor) -> Tensor:
    from vla_oft.train import nf4_kernel

    return nf4_kernel.unpack(codes, scales, group_scales, book)


@pytest.mark.parametrize("size", [64, 3 * 64 * 256 + 64, 96 * 320])
def test_the_kernel_unpacks_the_same_bits(call: Call, size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(size))
    weight *= 10 ** (-3 * torch.rand(size // 64, 1, generator=torch.Generator().manual_seed(0))).expand(-1, 64).flatten()
    packed = nf4.pack(weight)
    book = torch.tensor(nf4._CODEBOOK).bfloat16()
    found, _ = call(unpack, *packed, book)
    assert torch.equal(found, nf4.unpack(*packed, (size,)))


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_without_spills(capability):
    from tests.engine.compiling import compiled_for

    with compiled_for(capability) as launched:
        empty = lambda size, dtype: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
        count = 4096 * 11008
        unpack(
            empty(count // 2, torch.uint8),
            empty(count // 64, torch.uint8),
            empty(count // 16384, torch.bfloat16),
            empty(16, torch.bfloat16),
        )
    assert len(launched) == 1 and launched[0].spills == 0 and launched[0].registers <= 64
