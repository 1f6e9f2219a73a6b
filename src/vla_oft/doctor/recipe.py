"""Will a run fit? Its predicted memory for other sizes of passes and other recomputation, and whether everything that it reads is there.

recompute      1       2       4       8      16     samples in a pass, GB of the GPU's memory
none        26.3    30.7    39.4    55.6 !  92.3 !   ! does not fit
selective   24.4    ...
full        22.1 <  ...                              < this run
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vla_oft.bench import ceilings, cost
from vla_oft.doctor import probes
from vla_oft.doctor.gpus import Gpu
from vla_oft.policy import PolicyConfig
from vla_oft.recipes import base
from vla_oft.recipes.base import Recipe
from vla_oft.train import anatomy, memory, memory_fit, preflight
from vla_oft.train.config import Pretrained, TrainConfig
from vla_oft.train.memory import RECOMPUTES, Prediction, Simulation
from vla_oft.train.precision import faster_precision

MICRO_BATCHES = (1, 2, 4, 8, 16)


def examine(
    recipe: Recipe, config: TrainConfig, gpu: Gpu | None, *, gpus: int, out: Path, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Everything as JSON types. gpu: what it will run on, None for this machine's processor. gpus: how many share the work.

    say: is told what is going on, in words; a policy of 7.5 B parameters takes about ten seconds a row.
    """
    config = dataclasses.replace(config, precision=_precision(config, gpu))
    missing = base.missing(recipe, config)
    policy, assumed = _policy(config, missing)
    device, free = ("cuda", gpu.memory) if gpu else ("cpu", memory.free_bytes(memory.torch.device("cpu")))
    refused = [*preflight.refusals(config, policy, gpus), *_types(config, gpu)]
    simulations: dict[str, Simulation] = {}
    for recompute in RECOMPUTES if not refused else ():
        say(f"simulating one step, recompute={recompute}")
        simulations[recompute] = memory.simulate(dataclasses.replace(config, recompute=recompute), policy, device=device)
    own = simulations[config.recompute].predict(world_size=gpus) if simulations else None
    fits = own is not None and (free is None or own.needed <= free)
    advice = [] if own is None or fits or free is None else memory_fit.alternatives(simulations[config.recompute], free, gpus)
    return {
        "kind": "recipe",
        "name": config.name,
        "device": {"name": gpu.name if gpu else "CPU", "free": free, "count": gpus},
        "base": {"path": getattr(config.model, "path", None), "assumed": assumed},
        "table": [_row(p, recompute, config, own, free) for recompute, s in simulations.items() for p in _sizes(s, gpus)],
        "own": {**own.to_dict(), "recompute": config.recompute} if own else None,
        "fits": fits,
        "advice": [{"change": change, "needed": p.needed} for change, p in advice],
        "samples_per_s_at_most": _rate(config, policy, gpu, gpus),
        "data": [{"name": d.name, "path": d.path, "present": d.path not in missing} for d in config.datasets],
        "missing": missing,
        "disk": probes.disk(out),
        "refused": refused,
        "warnings": preflight.warnings(config, device),
    }


def is_healthy(document: dict[str, Any]) -> bool:
    """Whether the run could begin here as far as its settings and memory are concerned: data may still be missing."""
    return document["fits"] and not document["refused"] and document["disk"]["writable"]


def lines(document: dict[str, Any]) -> list[str]:
    """`examine` for people."""
    device, own, disk = document["device"], document["own"], document["disk"]
    out = [f"{document['name']} on {device['count']} x {device['name']}, {_gb(device['free'])} each"]
    if document["base"]["assumed"]:
        out.append(f"note: {document['base']['path']} is not here: sizes of OpenVLA-7B are taken for granted")
    out += [f"refused: {line}" for line in document["refused"]]
    if own:
        out += ["", *_table(document["table"]), "", "at the worst moment of a step of this run:"]
        out += [
            f"{count / 1e9:8.2f} GB  {memory.KINDS[kind]}"
            for kind, count in own["parts"].items()
            if count > 5e6 or count > own["peak"] / 100
        ]
        out += [f"{own['peak'] / 1e9:8.2f} GB  in all; {own['needed'] / 1e9:.1f} GB with the driver's share and what lies idle between", ""]
        out.append("it fits" if document["fits"] else "it does NOT fit")
        out += [f"  it would with {entry['change']}: {_gb(entry['needed'])}" for entry in document["advice"]]
    if document["samples_per_s_at_most"]:
        out.append(
            f"speed: no more than {document['samples_per_s_at_most']:.0f} samples/s in all, by arithmetic alone (a bound, not a promise)"
        )
    out += [f"data: {entry['path']}" + ("" if entry["present"] else " is not here") for entry in document["data"]]
    out += [f"missing: {path}: {how}" for path, how in document["missing"].items()]
    speed = f", {disk['write_bytes_per_s'] / 1e6:.0f} MB/s" if disk["write_bytes_per_s"] else ""
    out.append(f"disk: {disk['folder']}: {_gb(disk['free'])} free{speed}" + ("" if disk["writable"] else ", NOT writable"))
    return out + [f"warning: {line}" for line in document["warnings"]]


def _policy(config: TrainConfig, missing: dict[str, str]) -> tuple[PolicyConfig, bool]:
    """What the run trains, and whether its base was not here and had to be assumed."""
    if not isinstance(config.model, Pretrained):
        return anatomy.trained_policy(config, None), False
    here = Path(config.model.path).exists()
    found = anatomy.base_config(config.model) if here else anatomy.published_base(config)
    return anatomy.trained_policy(config, found), not here


def _precision(config: TrainConfig, gpu: Gpu | None) -> Literal["fp32", "bf16"]:
    """What `auto` comes to."""
    if config.precision != "auto":
        return config.precision
    if config.lora is not None and config.lora.base_dtype != "float32":
        return "bf16"
    return faster_precision("cpu") if gpu is None else "bf16" if gpu.bfloat16 else "fp32"


def _types(config: TrainConfig, gpu: Gpu | None) -> list[str]:
    """Whether the GPU has the arithmetic."""
    if gpu is None or gpu.bfloat16 or config.precision != "bf16":
        return []
    return [f"precision='bf16': {gpu.name} does not multiply bfloat16 numbers; set precision=fp32, or use a GPU of compute capability 8"]


def _sizes(simulation: Simulation, gpus: int) -> list[Prediction]:
    """Predictions for every pass of the table that divides a process's share of the step."""
    share = max(1, simulation.config.batch_size // gpus)
    return [simulation.predict(size, gpus) for size in MICRO_BATCHES if share % size == 0]


def _row(prediction: Prediction, recompute: str, config: TrainConfig, own: Prediction | None, free: int | None) -> dict[str, Any]:
    assert own is not None
    return {
        "recompute": recompute,
        "micro_batch": prediction.micro_batch,
        "peak": prediction.peak,
        "needed": prediction.needed,
        "fits": free is None or prediction.needed <= free,
        "own": recompute == config.recompute and prediction.micro_batch == own.micro_batch,
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    sizes = sorted({row["micro_batch"] for row in rows})
    out = [f"{'recompute':<12}" + "".join(f"{size:>8}  " for size in sizes) + " samples in a pass; GB needed; ! does not fit, < this run"]
    for recompute in RECOMPUTES:
        cells = {row["micro_batch"]: row for row in rows if row["recompute"] == recompute}
        text = "".join(f"{cells[size]['needed'] / 1e9:>8.1f}{_mark(cells[size])}" for size in sizes)
        out.append(f"{recompute:<12}{text}".rstrip())
    return out


def _mark(row: dict[str, Any]) -> str:
    return ("" if row["fits"] else "!").ljust(1) + ("<" if row["own"] else " ")


def _rate(config: TrainConfig, policy: PolicyConfig, gpu: Gpu | None, gpus: int) -> float | None:
    """Samples per second that arithmetic alone allows, over all GPUs; None where the GPU's speed is not known.

    A backward pass costs one forward pass for the inputs and, where weights train in full, one for the weights; recomputation another.
    """
    if gpu is None or gpu.ceilings is None:
        return None
    speed = ceilings.KNOWN[gpu.ceilings].flops["fp32" if config.precision == "fp32" else "bf16"]
    backward = 1 if config.lora or set(config.freeze) >= {"vision", "projector", "language"} else 2
    passes = 1 + backward + (config.recompute == "full")
    return gpus * speed / (passes * cost.minimum_flops(policy, memory.PROMPT_LEN))


def _gb(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
