"""Predicted memory against what torch's own allocator reports, byte by byte, on the CPU: every kind of run that training knows."""

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._C._profiler import _EventType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tests.tiny import tiny_config
from vla_oft.heads import diffusion, discrete, pooled
from vla_oft.policy import PolicyConfig
from vla_oft.train import assemble, memory, memory_fit
from vla_oft.train.config import Dataset, Phase, Pretrained, TrainConfig
from vla_oft.train.lora import Lora
from vla_oft.train.memory import simulate
from vla_oft.train.memory_trace import ANY_BATCH, Recorder
from vla_oft.train.optimizer import Muon
from vla_oft.train.parallel import Parallel
from vla_oft.train.schedule import Cosine

RUNS = {
    "float32": {},
    "bf16 autocast": {"precision": "bf16"},
    "bfloat16 weights": {"precision": "bf16", "weights": "bfloat16"},
    "masters": {"precision": "bf16", "weights": "bfloat16+master"},
    "averaged weights": {"ema_decay": 0.99},
    "selective recomputation": {"recompute": "selective"},
    "full recomputation": {"recompute": "full", "precision": "bf16"},
    "frozen backbone": {"freeze": ("vision", "language")},
    "lora": {"lora": Lora(rank=4, dropout=0.1)},
    "lora on bfloat16": {"lora": Lora(rank=4, base_dtype="bfloat16"), "precision": "bf16"},
    "qlora": {"lora": Lora(rank=4, base_dtype="nf4"), "precision": "bf16", "recompute": "full"},
    "muon": {"optimizer": Muon()},
}
POLICIES = {
    "diffusion": {"head": diffusion.Config()},
    "tokens": {"head": discrete.Config()},
    "autoregressive": {"head": discrete.Config(decoding="autoregressive")},
    "pooled": {"head": pooled.Config()},
    "no FiLM, short chunk": {"film": False, "chunk_len": 3, "grounding": None},
}

QUICK = ("masters", "qlora", "tokens")


def run(**changes) -> TrainConfig:
    given = {"precision": "fp32", "batch_size": 8, **changes}
    return TrainConfig(
        name="tiny",
        robot="tabletop",
        model=Pretrained(path="none"),
        datasets=(Dataset(name="none", path="none"),),
        phases=(Phase(steps=10, mixture=(1.0,)),),
        lr=1e-4,
        schedule=Cosine(warmup_steps=1),
        **given,
    )


def policy(width: int = 96, depth: int = 4, mlp_dim: int = 256, **changes) -> PolicyConfig:
    """Large enough that activations count."""
    config = tiny_config(**changes)
    return dataclasses.replace(
        config, vlm=dataclasses.replace(config.vlm, llm=dataclasses.replace(config.vlm.llm, width=width, depth=depth, mlp_dim=mlp_dim))
    )


class Unwatched:
    """Stands in for a recorder where torch's profiler does the watching."""

    def phase(self, kind: str):
        return nullcontext()

    def follow_gradients(self, parameters) -> None:
        pass


def allocated(config: TrainConfig, what: PolicyConfig, batch: int) -> int:
    """Most bytes that torch's CPU allocator had handed out at a time during one real step."""
    blueprint = assemble.prepare(memory._blueprint(what), config)
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            memory._step(config, blueprint, batch, memory.PROMPT_LEN, Unwatched())
    finally:
        gc.enable()
    return worst(watched)


def worst(watched: profile) -> int:
    """Most bytes alive at a time while a profiler watched."""
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    changes = sorted(_changes(watched.profiler.kineto_results.experimental_event_tree()), key=lambda change: change[0])
    return int(np.cumsum([size for _, size in changes]).max())


def _changes(events) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation, negative where memory is given back, in the order of the program."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _changes(event.children)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS])
def test_the_predicted_peak_is_what_the_allocator_hands_out(name: str) -> None:
    config, what = run(**RUNS[name]), policy()
    assert sum(simulate(config, what, device="cpu").trace.peak(6).values()) == pytest.approx(allocated(config, what, 6), rel=1e-3)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES])
def test_the_predicted_peak_holds_for_every_head(name: str) -> None:
    config, what = run(), policy(**POLICIES[name])
    assert sum(simulate(config, what, device="cpu").trace.peak(5).values()) == pytest.approx(allocated(config, what, 5), rel=1e-3)


def test_one_simulation_holds_for_every_batch_size() -> None:
    trace = simulate(run(), tiny_config(), device="cpu").trace
    for batch in (2, 3, 7):
        assert trace.peak(batch) == memory.real_step(run(), tiny_config(), batch).peak(batch)


def test_more_samples_and_less_recomputation_need_more() -> None:
    peaks = {mode: simulate(run(recompute=mode, batch_size=64, precision="bf16"), policy()) for mode in memory.RECOMPUTES}
    for size in (8, 16, 32):
        none, selective, full = (peaks[mode].predict(size).peak for mode in memory.RECOMPUTES)
        assert none > selective > full
    assert peaks["none"].predict(32).peak > peaks["none"].predict(8).peak


def test_a_gpu_never_holds_the_scores_of_attention() -> None:
    """On the CPU, small attention is written out."""
    long = {"prompt_len": 300}
    gpu, cpu = (sum(simulate(run(), policy(), device=device, **long).trace.peak(8).values()) for device in ("cuda", "cpu"))
    heads, layers, rows = 4, 3, 8 + 300 + 57
    assert cpu - gpu > layers * 8 * heads * rows**2 * 4


def test_autocast_on_a_gpu_normalises_layers_in_float32() -> None:
    with Recorder(cuda=True), torch.autocast("cpu", torch.bfloat16):
        x = torch.zeros(2, 8, dtype=torch.bfloat16)
        assert F.layer_norm(x, (8,)).dtype == torch.float32
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::layer_norm", "AutocastCUDA")
    with torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(torch.zeros(2, 8, dtype=torch.bfloat16), (8,)).dtype == torch.bfloat16


def test_storages_are_followed_to_their_death() -> None:
    with Recorder() as recorder:
        kept = torch.zeros(ANY_BATCH, 100)
        with recorder.phase("passing"):
            (kept + 1).sum()
        same = kept.view(-1)
        trace = recorder.trace(ANY_BATCH)
    assert same.shape == (100 * ANY_BATCH,)
    assert trace.peak(5) == {"other": 2000, "passing": 2004}
    assert sorted(np.sign(trace.events)) == [-1, -1, 1, 1, 1]


def test_nothing_is_left_changed_behind() -> None:
    before = (F.scaled_dot_product_attention, F.rms_norm, F.layer_norm, gc.isenabled())
    with pytest.raises(ZeroDivisionError), Recorder(cuda=True):
        raise ZeroDivisionError
    assert before == (F.scaled_dot_product_attention, F.rms_norm, F.layer_norm, gc.isenabled())
    simulate(run(), tiny_config(head=diffusion.Config(train_steps=17, inference_steps=17)))
    assert isinstance(diffusion.alphas_cumprod(17).tolist()[0], float)


def test_gradients_of_earlier_passes_stay() -> None:
    simulation = simulate(run(batch_size=8), policy())
    one, several = simulation.predict(8), simulation.predict(4)
    assert several.parts["gradients"] >= simulation.gradients > one.parts.get("gradients", 0)
    assert simulation.predict(4, world_size=2).parts["gradients"] >= simulation.gradients  # DDP's buckets


def test_fsdp_divides_what_the_optimizer_needs() -> None:
    config = run(parallel=Parallel(strategy="fsdp"), batch_size=8)
    simulation = simulate(config, policy())
    alone, four = simulation.predict(2), simulation.predict(2, world_size=4)
    assert four.parts["optimizer"] == pytest.approx(alone.parts["optimizer"] / 4, rel=0.01)
    assert four.parts["weights"] == pytest.approx(alone.parts["weights"] / 4, rel=0.01)
    assert four.parts["sharding"] > 0 and "sharding" not in alone.parts
    half = dataclasses.replace(config, parallel=Parallel(strategy="fsdp", shard_size=2))
    assert simulate(half, policy()).predict(2, world_size=4).parts["optimizer"] == pytest.approx(2 * four.parts["optimizer"], rel=0.01)


def test_a_run_that_does_not_fit_is_refused_with_settings_that_do() -> None:
    simulation = simulate(run(batch_size=64, precision="bf16"), policy())
    needed, least = simulation.predict().needed, simulation.predict(8).needed
    assert memory_fit.check_fits(simulation, needed).needed == needed
    with pytest.raises(
        ValueError, match=r"tiny needs .* GB in passes of 64 samples, the GPU has .* free; it fits with micro_batch="
    ) as refused:
        memory_fit.check_fits(simulation, least)
    assert "micro_batch=8 (" in str(refused.value) and "recompute=" in str(refused.value)
    for change, predicted in memory_fit.alternatives(simulation, least):
        assert predicted.needed <= least, change


def test_what_never_fits_is_said_so() -> None:
    with pytest.raises(ValueError, match="no setting makes it fit"):
        memory_fit.check_fits(simulate(run(freeze=("vision", "projector", "language")), tiny_config()), 1000)


@pytest.mark.slow
def test_advice_can_be_typed_as_it_is() -> None:
    from vla_oft.recipes.base import override, parse_changes

    simulation = simulate(run(batch_size=2, precision="bf16"), tiny_config())
    smallest = min(p.needed for _, p in memory_fit.alternatives(simulation, simulation.predict().needed - 1, limit=9))
    for change, predicted in memory_fit.alternatives(simulation, smallest + 100_000, limit=9):
        changed = override(simulation.config, parse_changes(change.split(", ")))
        assert simulate(changed, simulation.policy).predict().peak == predicted.peak


def test_small_policies_are_not_simulated_for_a_cpu() -> None:
    assert memory_fit.require(run(), tiny_config(), torch.device("cpu")) is None
