"""The kernels against their plain-torch twins: same numbers, same roundings. On a GPU if there is one, else under Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from interpreter import Call, interpreter
from torch.nn import functional as F

from vla_oft.engine import ops
from vla_oft.engine.kernels import packing
from vla_oft.engine.kernels.tiles import Tiles
from vla_oft.vlm import llama

STORAGE = [torch.float32, torch.float16, torch.bfloat16]
TO = [torch.int8, torch.float8_e4m3fn]
KINDS = [*((dtype, None) for dtype in STORAGE), *((torch.bfloat16, to) for to in TO), (torch.float32, torch.int8)]
IMAGES, ROWS_PER_IMAGE = 2, 4


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    pytest.importorskip("triton")
    with interpreter() as call:
        yield call


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same rows, further apart in memory."""
    apart = x.new_full((*x.shape[:-1], x.shape[-1] + 24), torch.nan if x.is_floating_point() else 77)
    apart[..., : x.shape[-1]] = x
    return apart[..., : x.shape[-1]]


def assert_same(found, expected, ulps: int = 1) -> None:
    """Equal to a unit in the last place: sums may be taken in another order. Quantised rows: to one step of the values."""
    if isinstance(expected, tuple):
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
        step = 1.01 if expected[0].dtype == torch.int8 else expected[0].float().abs().clamp(min=2**-6) * 2**-3
        assert ((found[0].float() - expected[0].float()).abs() <= step).all()
        assert (found[0].float() == expected[0].float()).float().mean() > 0.97
        return
    assert found.dtype == expected.dtype and found.shape == expected.shape
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=ulps * eps, atol=2e-6 if expected.dtype == torch.float32 else eps / 8)


@pytest.mark.parametrize("dtype,quantize", KINDS)
@pytest.mark.parametrize("parts", [None, 0, 1, 3], ids=["alone", "delta", "1 part", "3 parts"])
def test_a_sum_and_its_rms_norm_equal_the_plain_ones(call, dtype, quantize, parts):
    x, weight = strided(rows(0, 5, 96, dtype=dtype)), 1 + rows(1, 96, dtype=dtype) / 8
    delta = None if parts is None else strided(rows(2, 5, 96, dtype=dtype)) if parts == 0 else rows(2, parts, 5, 96)
    (total, normed), _ = call("norms.add_rms_norm", x, delta, weight, 1e-6, quantize)
    expected_total, expected = ops.add_rms_norm(x, delta, weight, 1e-6, quantize)
    assert_same(total, expected_total)
    assert_same(normed, expected)


@pytest.mark.parametrize("dtype,quantize", KINDS)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_modulated_sum_and_its_layer_norm_equal_the_plain_ones(call, dtype, quantize, modulated, moved):
    M, W = IMAGES * ROWS_PER_IMAGE, 144
    x = strided(rows(0, M, W, dtype=dtype) + 3)  # a mean to remove
    weight, bias = 1 + rows(1, W, dtype=dtype) / 8, rows(2, W, dtype=dtype)
    delta = rows(3, M, W, dtype=dtype) if moved else None
    film = (1 + rows(4, IMAGES, W, dtype=dtype) / 4, rows(5, IMAGES, W, dtype=dtype)) if modulated else None
    args = (x, delta, weight, bias, 1e-6, film, ROWS_PER_IMAGE, quantize)
    (total, normed), _ = call("norms.add_layer_norm", *args)
    expected_total, expected = ops.add_layer_norm(*args)
    assert_same(total, expected_total, ulps=0)
    assert_same(normed, expected, ulps=2)


def test_rows_that_nothing_is_added_to_are_not_copied(call):
    x = rows(0, 3, 48)
    (total, _), (given, *_) = call("norms.add_rms_norm", x, None, torch.ones(48), 1e-6, None)
    assert total.data_ptr() == given.data_ptr()
    (total, _), (given, *_) = call("norms.add_layer_norm", x, None, torch.ones(48), torch.zeros(48), 1e-6, None, 3, None)
    assert total.data_ptr() == given.data_ptr()


def test_a_row_of_zeros_stays_zero_when_quantised(call):
    for quantize in (torch.int8, torch.float8_e4m3fn):
        (values, scale), _ = call("activations.quantize_rows", torch.zeros(2, 48), quantize)
        assert (values.float() == 0).all() and (scale > 0).all()


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("num_heads,num_kv_heads,head_dim", [(4, 2, 12), (20, 20, 8), (1, 1, 64)])
def test_queries_and_keys_are_turned_in_place_and_values_are_left_alone(call, dtype, num_heads, num_kv_heads, head_dim):
    T, width = 3, (num_heads + 2 * num_kv_heads) * head_dim
    qkv = strided(rows(0, 2 * T, width, dtype=dtype))
    angles = 7 * rows(1, T, head_dim // 2)
    cos, sin = (torch.cat([t, t], dim=-1).repeat(2, 1)[:, None] for t in (angles.cos(), angles.sin()))
    q_and_k = qkv[:, : (num_heads + num_kv_heads) * head_dim].float().unflatten(1, (-1, head_dim))
    expected = torch.cat([llama.apply_rope(q_and_k, cos, sin).flatten(1).to(dtype), qkv[:, (num_heads + num_kv_heads) * head_dim :]], dim=1)
    _, (turned, *_) = call("rotary.rope_", qkv, angles.cos(), angles.sin(), num_heads, num_kv_heads)
    assert_same(turned, expected)
    values = slice((num_heads + num_kv_heads) * head_dim, None)
    assert torch.equal(turned[:, values], expected[:, values]) and not torch.equal(turned[:, :head_dim], rows(0, 2 * T, width, dtype=dtype))


@pytest.mark.parametrize("dtype,quantize", KINDS)
@pytest.mark.parametrize("name,width", [("swiglu", 2 * 48), ("gelu", 160), ("gelu", 1100)])
def test_activations_equal_the_plain_ones(call, name, width, dtype, quantize):
    x = strided(4 * rows(0, 3, width, dtype=dtype))
    found, _ = call(f"activations.{name}", x, quantize)
    assert_same(found, getattr(ops, name)(x, quantize), ulps=2)


@pytest.mark.parametrize("to", TO)
def test_quantised_rows_equal_the_plain_ones(call, to):
    x = strided(rows(0, 5, 144, dtype=torch.bfloat16))
    found, _ = call("activations.quantize_rows", x, to)
    assert_same(found, ops.quantize_rows(x, to))


def test_arguments_that_do_not_fit_are_named(call):
    x = rows(0, 4, 48)
    with pytest.raises(ValueError, match=r"quantize=torch\.int16"):
        call("activations.gelu", x, torch.int16)
    with pytest.raises(ValueError, match=r"gate_up has 47 columns"):
        call("activations.swiglu", x[:, :47], None)
    with pytest.raises(ValueError, match=r"x has shape \(48, 4\)"):
        call("activations.gelu", x.T, None)
    with pytest.raises(ValueError, match=r"delta has shape \(4, 47\)"):
        call("norms.add_rms_norm", x, x[:, :47], torch.ones(48), 1e-6, None)
    with pytest.raises(ValueError, match=r"does not cover 4 rows"):
        call("norms.add_layer_norm", x, None, x[0], x[0], 1e-6, (x[:1], x[:1]), 3, None)
    with pytest.raises(ValueError, match=r"qkv has 48 columns"):
        call("rotary.rope_", x, torch.ones(2, 4), torch.ones(2, 4), 4, 2)


SMALL = Tiles(block_m=16, block_n=32, block_k=32)
"""Several tiles in each direction of the products below, none of which is full at the end."""
WAYS = {
    "plain": SMALL,
    "two accumulators": replace(SMALL, extra_n=16),
    "split": replace(SMALL, splits=3),
    "split and two accumulators": replace(SMALL, splits=2, extra_n=16),
    "persistent": replace(SMALL, programs=2),
    "tma": replace(SMALL, tma=True),
    "tma, persistent, split": replace(SMALL, tma=True, programs=3, splits=2),
    "specialized": Tiles(block_m=128, block_n=32, block_k=32, tma=True, programs=2, extra_n=16, specialized=True),
}
M, N, K = 20, 72, 80


def matmul(call: Call, *args, **kwargs) -> torch.Tensor:
    """The product, with the parts of a split one summed as `norms` does."""
    out, (x, *_) = call("gemm.matmul", *args, **kwargs)
    splits = kwargs["tiles"].splits
    assert out.dtype == (torch.float32 if splits > 1 else kwargs.get("dtype", x.dtype)) and out.ndim == (3 if splits > 1 else 2)
    return out.sum(0).to(kwargs.get("dtype") or x.dtype) if splits > 1 else out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_torch_however_they_are_cut(call, way, dtype):
    x, weight, bias = strided(rows(0, M, K, dtype=dtype)), strided(rows(1, N, K, dtype=dtype) / 8), rows(2, N, dtype=dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    found = matmul(call, x, weight, bias, tiles=WAYS[way])
    assert_close_to(found, expected)
    assert_close_to(matmul(call, x, weight, tiles=WAYS[way]), expected - bias.double())


def assert_close_to(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Within one rounding to the storage dtype of the float64 value, and a float32 sum's own error."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * eps if eps > 1e-4 else 4 * eps, atol=4e-6)


@pytest.mark.parametrize("shape", [(1, 1, 48), (17, 33, 37), (16, 32, 64)])
def test_sizes_need_not_be_multiples_of_anything(call, shape):
    x, weight = rows(0, shape[0], shape[2]), rows(1, shape[1], shape[2])
    for tiles in (SMALL, WAYS["split and two accumulators"]):
        assert_close_to(matmul(call, x, weight, tiles=tiles), x.double() @ weight.double().T)


@pytest.mark.parametrize("way", ["plain", "two accumulators", "tma"])
def test_the_activation_is_applied_to_the_rounded_product(call, way):
    x, weight, bias = rows(0, M, K, dtype=torch.bfloat16), rows(1, N, K, dtype=torch.bfloat16) / 8, rows(2, N, dtype=torch.bfloat16)
    product = matmul(call, x, weight, bias, tiles=WAYS[way])
    assert_same(matmul(call, x, weight, bias, "gelu", tiles=WAYS[way]), F.gelu(product))


@pytest.mark.parametrize("way", ["plain", "persistent", "tma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_equals_two_products_and_an_activation(call, way, dtype):
    x, merged = rows(0, M, K, dtype=dtype), rows(1, 2 * N, K, dtype=dtype) / 8
    found, _ = call("gemm.gated_matmul", x, merged[:N], merged[N:], tiles=WAYS[way])
    gate_up = matmul(call, x, merged, tiles=WAYS[way])
    assert_same(found, ops.swiglu(gate_up, None), ulps=2)


@pytest.mark.parametrize("way", ["plain", "split and two accumulators", "tma"])
@pytest.mark.parametrize("to", TO)
def test_products_of_8_bit_rows_equal_those_of_the_values_they_stand_for(call, way, to):
    x, weight = (ops.quantize_rows(rows(seed, size, K), to) for seed, size in ((0, M), (1, N)))
    bias = rows(2, N, dtype=torch.bfloat16)
    exact = F.linear(x.values.double() * x.scale, weight.values.double() * weight.scale, bias.double())
    scales = {"x_scale": x.scale, "weight_scale": weight.scale[:, 0], "dtype": torch.bfloat16}
    assert_close_to(matmul(call, x.values, weight.values, bias, tiles=WAYS[way], **scales), exact)


@pytest.mark.parametrize("to", TO)
def test_a_gated_product_of_8_bit_rows_has_a_scale_for_each_weight(call, to):
    x, gate, up = (ops.quantize_rows(rows(seed, size, K), to) for seed, size in ((0, M), (1, N), (2, N)))
    scales = {"x_scale": x.scale, "gate_scale": gate.scale[:, 0], "up_scale": up.scale[:, 0], "dtype": torch.float32}
    found, _ = call("gemm.gated_matmul", x.values, gate.values, up.values, tiles=SMALL, **scales)
    x, gate, up = (q.values.double() * q.scale for q in (x, gate, up))
    torch.testing.assert_close(found.double(), F.silu(x @ gate.T) * (x @ up.T), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_8_bit_weights_round_nothing_but_the_result(call, dtype, splits):
    x, bias, weight = strided(rows(0, M, K, dtype=dtype)), rows(2, N, dtype=dtype), ops.quantize_rows(rows(1, N, K), torch.int8)
    found, _ = call("weight_only.int8_matmul", x, weight.values, weight.scale[:, 0], bias, tiles=replace(SMALL, splits=splits))
    found = found.sum(0).to(dtype) if splits > 1 else found
    assert_close_to(found, F.linear(x.double(), weight.values.double() * weight.scale, bias.double()))


@pytest.mark.parametrize("width", [96, 256, 300])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_4_bit_weights_equal_those_of_the_unpacked_weight(call, dtype, splits, width):
    x, (packed, scales) = strided(rows(0, M, width, dtype=dtype)), packing.pack_int4(rows(1, N, width))
    tiles = Tiles(block_m=16, block_n=64, block_k=128, splits=splits)
    found, _ = call("weight_only.int4_matmul", x, packed, scales, tiles=tiles)
    found = found.sum(0).to(dtype) if splits > 1 else found
    assert_close_to(found, x.double() @ packing.unpack_int4(packed, scales, width, dtype).double().T)


@pytest.mark.parametrize("width", [96, 128, 300])
def test_a_weight_packed_to_4_bits_is_off_by_at_most_half_a_step(width):
    weight = rows(0, 5, width)
    weight[1] = 0
    packed, scales = packing.pack_int4(weight)
    groups = -(-width // 128)
    assert packed.shape == (5, groups * 64) and packed.dtype == torch.uint8 and scales.shape == (5, groups)
    restored = packing.unpack_int4(packed, scales, width, torch.float32)
    steps = scales.repeat_interleave(128, dim=1)[:, :width]
    assert ((restored - weight).abs() <= 0.5001 * steps).all()
    assert (weight.abs() - 6.999 * steps > 0).sum() >= 4 * groups, "the largest of each group is stored as 7"
    with pytest.raises(ValueError, match=r"not those of a weight of width=400"):
        packing.unpack_int4(packed, scales, 400, torch.float32)


def test_a_split_product_goes_straight_into_the_norm(call):
    x, weight, residual = rows(0, M, K, dtype=torch.bfloat16), rows(1, 96, K, dtype=torch.bfloat16), rows(2, M, 96, dtype=torch.bfloat16)
    parts, _ = call("gemm.matmul", x, weight, tiles=WAYS["split"])
    (total, _), _ = call("norms.add_rms_norm", residual, parts, torch.ones(96, dtype=torch.bfloat16), 1e-6, None)
    assert_same(total, residual + F.linear(x, weight), ulps=2)


def test_products_name_what_does_not_fit(call):
    x, weight = rows(0, 4, 48), rows(1, 32, 48)
    refused = {
        r"one dtype": lambda: call("gemm.matmul", x, weight.bfloat16(), tiles=SMALL),
        r"pass x_scale": lambda: call("gemm.matmul", x.to(torch.int8), weight.to(torch.int8), tiles=SMALL),
        r"activation='relu'": lambda: call("gemm.matmul", x, weight, None, "relu", tiles=SMALL),
        r"splits=2 with activation": lambda: call("gemm.matmul", x, weight, None, "gelu", tiles=replace(SMALL, splits=2)),
        r"16-byte multiples": lambda: call("gemm.matmul", x[:, :47], weight[:, :47].contiguous(), tiles=WAYS["tma"]),
        r"same shape and strides": lambda: call("gemm.gated_matmul", x, weight, weight[:16], tiles=SMALL),
        r"two accumulators already": lambda: call("gemm.gated_matmul", x, weight, weight, tiles=WAYS["two accumulators"]),
        r"block_k=32 must be 128": lambda: call("weight_only.int4_matmul", x, *packing.pack_int4(weight), tiles=SMALL),
        r"block_m=48 must be one of": lambda: replace(SMALL, block_m=48),
        r"specialized=True needs": lambda: replace(SMALL, specialized=True),
    }
    for message, attempt in refused.items():
        with pytest.raises(ValueError, match=message):
            attempt()
