"""`vla-oft bench ...`: part of the command line, see `cli.py`."""

import json as json_module
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from vla_oft.cli_reading import AS_IT_IS, ReadingOptions


def bench() -> None:
    """Speed: latency, table2, table3, ablation, profile, data, train."""


def latency(
    checkpoint: Positional[str | None] = None,
    *,
    workload: str | None = None,
    precision: tuple[str, ...] | None = None,
    eager: bool = True,
    calls: int = 200,
    warmup: int = 20,
    batch: int = 1,
    device: str | None = None,
    camera_size: tuple[int, int] | None = None,
    instruction: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """How long one answer takes, of the plain policy and of the engine, beside the shortest time that the hardware allows.

    Args:
        checkpoint: a checkpoint or run folder, or a hub id; without one, random weights of --workload.
        workload: A, B, C (the paper's configurations, 7.5 B parameters), cpu or nano; B on a GPU, cpu elsewhere.
        precision: of the engine, several allowed: fp32, bf16, fp8, fp8-llm, int8, int4, int8-dynamic. None after the flag: no engine.
        eager: also time the policy as it is.
        calls: timed calls of each kind.
        warmup: untimed calls before.
        batch: observations per call.
        device: "cpu" or "cuda"; the GPU if there is one.
        camera_size: height and width of the raw images.
        instruction: what the robot is told; decides the length of the prompt.
        seed: of random weights and inputs.
        out: folder for JSON, table, chart and the time of every call.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.bench import latency

    request = latency.LatencyRequest(
        checkpoint=checkpoint,
        workload=workload,
        precision=precision,
        eager=eager,
        calls=calls,
        warmup=warmup,
        batch=batch,
        device=device,
        camera_size=camera_size,
        instruction=instruction,
        seed=seed,
        out=out,
    )
    _finish(latency.run(request, quiet=json), json)


def table2(
    *,
    workload: str | None = None,
    precision: tuple[str, ...] | None = None,
    eager: bool = True,
    calls: int = 200,
    warmup: int = 20,
    budget_s: float = 6.0,
    device: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """The paper's Table II, efficiency on LIBERO: autoregressive, parallel decoding, action chunks, L1, diffusion, additional inputs.

    Args:
        workload: whose model size: A (7.5 B, on a GPU), cpu or nano.
        precision: of the engine, several allowed; bf16 on a GPU, fp32 and bf16 elsewhere.
        eager: also time the policy as it is.
        calls: timed calls of each kind, at most.
        warmup: untimed calls before, at most.
        budget_s: time for one subject in one row; slow rows get fewer calls, at least 2.
        device: "cpu" or "cuda"; the GPU if there is one.
        seed: of random weights and inputs.
        out: folder for JSON, table, chart and the time of every call.
        json: print one JSON object on stdout and nothing else.
    """
    settings = {"workload": workload, "precision": precision, "eager": eager, "calls": calls, "warmup": warmup}
    _table("table2", json, **settings, budget_s=budget_s, device=device, seed=seed, out=out)


def table3(
    *,
    workload: str | None = None,
    precision: tuple[str, ...] | None = None,
    eager: bool = True,
    calls: int = 200,
    warmup: int = 20,
    budget_s: float = 6.0,
    device: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """The paper's Table III, efficiency on ALOHA: three cameras, chunks of 25, FiLM, and variants.

    Args:
        workload: whose model size: A (7.5 B, on a GPU), cpu or nano.
        precision: of the engine, several allowed; bf16 on a GPU, fp32 and bf16 elsewhere.
        eager: also time the policy as it is.
        calls: timed calls of each kind, at most.
        warmup: untimed calls before, at most.
        budget_s: time for one subject in one row; slow rows get fewer calls, at least 2.
        device: "cpu" or "cuda"; the GPU if there is one.
        seed: of random weights and inputs.
        out: folder for JSON, table, chart and the time of every call.
        json: print one JSON object on stdout and nothing else.
    """
    settings = {"workload": workload, "precision": precision, "eager": eager, "calls": calls, "warmup": warmup}
    _table("table3", json, **settings, budget_s=budget_s, device=device, seed=seed, out=out)


def ablation(
    *,
    workload: str | None = None,
    precision: str = "bf16",
    calls: int = 100,
    warmup: int = 20,
    budget_s: float = 8.0,
    device: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """What each optimisation of the engine gains: it is left out, one at a time.

    Args:
        workload: A, B, C, cpu or nano; B on a GPU, cpu elsewhere.
        precision: of the engine.
        calls: timed calls of each kind, at most.
        warmup: untimed calls before, at most.
        budget_s: time for each variant; slow ones get fewer calls, at least 2.
        device: "cpu" or "cuda"; the GPU if there is one.
        seed: of random weights and inputs.
        out: folder for JSON, table, chart and the time of every call.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.bench import ablation

    request = ablation.AblationRequest(
        workload=workload, precision=precision, calls=calls, warmup=warmup, budget_s=budget_s, device=device, seed=seed, out=out
    )
    _finish(ablation.run(request, quiet=json), json)


def profile(
    *,
    workload: str | None = None,
    precision: str = "bf16",
    calls: int = 5,
    top: int = 40,
    device: str | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Which kernels a call spends its time in.

    Args:
        workload: A, B, C, cpu or nano; B on a GPU, cpu elsewhere.
        precision: of the engine, or "eager".
        calls: profiled calls.
        top: kernels to list.
        device: "cpu" or "cuda"; the GPU if there is one.
        seed: of random weights and inputs.
        out: folder for the text.
    """
    from vla_oft.bench import profiling

    profiling.run(profiling.ProfileRequest(workload=workload, precision=precision, calls=calls, top=top, device=device, seed=seed, out=out))


def data(
    path: Positional[Path | None] = None,
    *,
    kinds: tuple[str, ...] | None = None,
    workers: tuple[int, ...] = (0, 1, 2),
    size: int = 224,
    camera_size: int = 224,
    made_up: int = 16,
    batch_size: int = 32,
    seconds: float = 5.0,
    cached: bool = True,
    neighbours: int = 4,
    keep: Path | None = None,
    out: Path | None = None,
    reading: ReadingOptions = AS_IT_IS,
    json: bool = False,
) -> None:
    """How fast demonstrations of every format are read, beside how fast the decoder alone is.

    Args:
        path: a dataset to measure; made-up ones of --kinds without it.
        kinds: rlds, lerobot, lerobot-images, lerobot-v2.1-av1, libero_hdf5, aloha_hdf5; all of them by default.
        workers: numbers of worker processes; 0 is one thread.
        size: pixels of the prepared images.
        camera_size: pixels of the made-up frames.
        made_up: episodes of 120 steps in each made-up dataset.
        batch_size: samples in a batch.
        seconds: for each rate.
        cached: also measure with decoded frames on the disk.
        neighbours: successive samples drawn together where that is measured, of video with few keyframes.
        keep: folder for the made-up datasets, to be used again; by default they are deleted.
        out: folder for JSON and table.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.bench import data as bench_data

    request = bench_data.DataRequest(
        path=path,
        kinds=bench_data.DataRequest.kinds if kinds is None else kinds,
        workers=workers,
        size=size,
        camera_size=camera_size,
        episodes=made_up,
        batch_size=batch_size,
        seconds=seconds,
        cached=cached,
        neighbours=neighbours,
        keep=keep,
        out=out,
        skip_bad=reading.skip_bad,
    )
    if path is None and reading != AS_IT_IS:
        raise ValueError(f"{reading.named()} are about a dataset of your own: name its folder")
    _finish(bench_data.run(request, quiet=json, open_own=lambda: reading.open(str(path))[0]), json)


def train(
    *,
    workload: tuple[str, ...] | None = None,
    tuning: tuple[str, ...] = ("lora",),
    batch: tuple[int, ...] = (8,),
    recompute: tuple[str, ...] = ("none",),
    compile: bool = False,
    plain: bool = False,
    steps: int = 20,
    warmup: int = 5,
    budget_s: float = 30.0,
    device: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    name: str = "train",
    json: bool = False,
) -> None:
    """How fast and in how much memory a policy trains, with random weights: samples/s, TFLOP/s, share of the device's rate, peak memory.

    Args:
        workload: A, B, C (the paper's configurations, 7.5 B parameters), cpu or nano; without it, a set of rows made for the device.
        tuning: what trains, several allowed: lora, qlora (frozen weights in 4 bits), full, heads.
        batch: samples in a step, several allowed.
        recompute: activations computed again instead of kept, several allowed: none, selective, full.
        compile: torch.compile, block by block.
        plain: also time the step as it is usually written.
        steps: timed steps of each row.
        warmup: untimed steps before.
        budget_s: fewer steps when these seconds are over.
        device: "cpu" or "cuda"; the GPU if there is one.
        seed: of the batches.
        out: folder for JSON and table.
        name: of these files.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.bench import train as bench_train

    request = bench_train.TrainRequest(
        settings=bench_train.settings(workload, tuning, batch, recompute, compile=compile, plain=plain),
        steps=steps,
        warmup=warmup,
        budget_s=budget_s,
        device=device,
        seed=seed,
        out=out,
        name=name,
    )
    _finish(bench_train.run(request, quiet=json), json)


COMMANDS: dict[str, Callable[..., None]] = {
    "latency": latency,
    "table2": table2,
    "table3": table3,
    "ablation": ablation,
    "profile": profile,
    "data": data,
    "train": train,
}


def _table(table: str, json: bool, **settings: Any) -> None:
    from vla_oft.bench import tables

    _finish(tables.run(tables.TableRequest(table=table, **settings), quiet=json), json)


def _finish(document: dict[str, Any], as_json: bool) -> None:
    """Print the document if asked; exit code 1 when a row failed."""
    if as_json:
        sys.stdout.write(json_module.dumps(document, default=str) + "\n")
    if document["failures"]:
        sys.exit(1)
