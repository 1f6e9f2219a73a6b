"""The cost model, against a table that was worked out by hand before there was any code."""

import dataclasses

import pytest
import torch

from vla_oft.bench import ceilings, cost, random_policy, workloads
from vla_oft.heads import diffusion, discrete, pooled

H200, A100 = ceilings.KNOWN["h200"], ceilings.KNOWN["a100"]
L = workloads.PROMPT_LEN


def floors(config) -> list[str]:
    work = cost.stages(config, L)
    chosen = ((H200, "bf16"), (H200, "fp8"), (A100, "bf16"))
    return [f"{1000 * (cost.floor_s(work, device, precision) or 0):.1f}" for device, precision in chosen]


@pytest.mark.parametrize(
    ("name", "length", "reference", "minimum", "expected"),
    [
        ("A", 343, "5.02", "4.81", ["6.2", "3.1", "19.4"]),
        ("B", 600, "8.96", "8.58", ["10.9", "5.6", "34.5"]),
        ("C", 1150, "17.16", "16.53", ["21.0", "11.0", "66.4"]),
    ],
)
def test_the_papers_configurations_cost_what_the_table_says(name, length, reference, minimum, expected):
    config = workloads.load(name).config
    assert cost.sequence_length(config, L) == length
    assert f"{cost.reference_flops(config, L) / 1e12:.2f}" == reference
    assert f"{cost.minimum_flops(config, L) / 1e12:.2f}" == minimum
    assert floors(config) == expected


def autoregressive():
    head = discrete.Config(decoding="autoregressive", any_token=True)
    return dataclasses.replace(workloads.load("A").config, head=head, chunk_len=1)


def test_token_by_token_decoding_costs_what_the_table_says():
    config = autoregressive()
    work = cost.stages(config, L)
    assert cost.sequence_length(config, L) == 286
    assert [s.name for s in work].count("decode") == 6, "the prefill gives the first of seven tokens"
    assert f"{sum(s.flops for s in work if s.name != 'decode') / 1e12:.1f}" == "4.1"
    assert floors(config) == ["23.9", "12.0", "58.7"]


def test_components_cost_what_the_table_says():
    stages = {s.name: s for s in cost.stages(workloads.load("A").config, L)}
    assert f"{stages['dino'].flops / 1e12:.3f}" == "0.158" and f"{stages['siglip'].flops / 1e12:.3f}" == "0.211"
    assert f"{stages['embed'].flops / 1e12:.4f}" == "0.0365"
    body = next(s for s in cost.stages(autoregressive(), L) if s.name == "decode")
    scores = 2 * 4096 * 32064
    assert f"{scores / 1e9:.3f}" == "0.263" and f"{(body.products - scores) / 1e9:.2f}" == "12.95"
    assert round(cost.weight_bytes(workloads.load("B").config, L, "bf16") / 1e9) == 15


@pytest.mark.parametrize("name", ["A", "C", "nano"])
def test_weights_that_an_answer_reads_are_those_of_the_model_but_for_small_ones(name):
    workload = workloads.load(name)
    read = cost.weight_bytes(workload.config, L, "int8")
    vlm = workload.config.vlm
    unread = 2 * vlm.llm.vocab_size * vlm.llm.width  # embeddings (a few rows are) and the vocabulary's scores
    film = sum((tower.depth - 1) * 2 * tower.width * (vlm.llm.width + 1) for tower in (vlm.dino, vlm.siglip)) if vlm.film else 0
    small = random_policy.num_parameters(workload) - unread - film - read  # norms, biases, positions
    assert 0 < small < 0.04 * read


def test_diffusion_sees_the_images_once_and_runs_the_decoder_once_a_step():
    base = workloads.load("A").config
    one, ten = (dataclasses.replace(base, head=diffusion.Config(inference_steps=n)) for n in (1, 10))
    vision = sum(s.flops for s in cost.stages(base, L) if s.part == "vision")
    assert cost.sequence_length(one, L) == cost.sequence_length(base, L) + 1, "the time token"
    assert cost.minimum_flops(ten, L) == pytest.approx(10 * cost.minimum_flops(one, L) - 9 * vision)
    assert cost.weight_bytes(ten, L, "bf16") == cost.weight_bytes(one, L, "bf16")


def test_one_pooled_slot_saves_the_other_slots():
    base = workloads.load("C").config
    config = dataclasses.replace(base, head=pooled.Config())
    assert cost.sequence_length(base, L) - cost.sequence_length(config, L) == 349
    assert cost.minimum_flops(config, L) < 0.72 * cost.minimum_flops(base, L)


def test_only_action_tokens_are_scored_where_no_other_can_win():
    both = [dataclasses.replace(workloads.load("A").config, head=discrete.Config(any_token=any_token)) for any_token in (False, True)]
    few, all_tokens = (cost.stages(config, L)[-1] for config in both)
    assert few.weights / all_tokens.weights == 256 / 32064


def test_a_batch_shares_the_weights():
    config = workloads.load("B").config
    one, four = cost.stages(config, L), cost.stages(config, L, batch=4)
    assert sum(s.flops for s in four) == pytest.approx(4 * sum(s.flops for s in one))
    assert sum(s.weights for s in four) == sum(s.weights for s in one)


def test_precisions_differ_in_what_they_speed_up():
    work = cost.stages(workloads.load("B").config, L)
    times = {p: cost.floor_s(work, H200, p) for p in ("fp32", "bf16", "fp8", "fp8-llm", "int8", "int4", "int8-dynamic")}
    assert times["fp8"] < times["fp8-llm"] < times["bf16"] < times["fp32"]
    assert times["int4"] <= times["int8"] <= times["bf16"], "less to read, but the same arithmetic"
    assert times["int4"] == pytest.approx(times["bf16"], rel=0.01), "not limited by memory"
    assert cost.floor_s(work, A100, "fp8") is None, "it has no fp8"
    with pytest.raises(ValueError, match="precision='fp4' has no cost"):
        cost.floor_s(work, H200, "fp4")


def test_ceilings_are_measured_on_this_machine():
    found = ceilings.measure_ceilings(torch.device("cpu"), (64, 128, 256))
    assert found.flops.keys() >= {"fp32", "bf16"} and "fp8" not in found.flops
    assert all(value > 1e6 for value in found.flops.values()) and found.bytes_per_s > 1e6
    assert "64 x 128 by 128 x 256" in found.source
