"""Whether a run fits into memory, and if not, what to change: asked before anything is loaded, see `memory.py` for how it is known.

    libero_spatial needs 55.6 GB in passes of 8 samples, the GPU has 25.3 GB free; it fits with recompute=full (23.4 GB) or ...

Tried in this order, least invasive first: smaller passes, recomputation, sharding, smaller types, LoRA, 4 bits. The result of a run is the
same with the first three.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from vla_oft.policy import PolicyConfig
from vla_oft.train import anatomy
from vla_oft.train.config import TrainConfig
from vla_oft.train.freeze import PREFIXES
from vla_oft.train.lora import Lora
from vla_oft.train.memory import Prediction, Simulation, free_bytes, gigabytes, simulate

NUM_CHANGES = 3
LARGE = 200_000_000
"""Parameters. On a CPU, smaller policies are not asked about: they fit."""


_WIDTHS = {"float32": 32, "bfloat16": 16, "nf4": 4}


def require(config: TrainConfig, policy: PolicyConfig, device: torch.device, world_size: int = 1) -> Prediction | None:
    """Raise ValueError, before anything is loaded, when `device` has not enough free memory for one process of this run.

    policy: see `anatomy.trained_policy`. Returns the prediction, or None where there is none. Takes ten seconds for 7.5 B parameters.
    """
    free = free_bytes(device)
    if free is None or (device.type == "cpu" and sum(part.total for part in anatomy.parts(config, policy)) < LARGE):
        return None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    return check_fits(simulate(config, policy, device=device.type), free, world_size=world_size, where=where)


def check_fits(simulation: Simulation, free: int, *, world_size: int = 1, where: str = "the GPU") -> Prediction:
    """The prediction for the simulated run. Raises ValueError with what to change when it needs more than `free` bytes."""
    predicted = simulation.predict(world_size=world_size)
    if predicted.needed <= free:
        return predicted
    advice = [f"{change} ({gigabytes(p.needed)})" for change, p in alternatives(simulation, free, world_size)]
    fix = f"it fits with {' or '.join(advice)}" if advice else "no setting makes it fit: use a larger GPU, or more of them with FSDP"
    raise ValueError(
        f"{simulation.config.name} needs {gigabytes(predicted.needed)} in passes of {predicted.micro_batch} samples, "
        f"{where} has {gigabytes(free)} free; {fix}"
    )


def alternatives(simulation: Simulation, free: int, world_size: int = 1, limit: int = NUM_CHANGES) -> list[tuple[str, Prediction]]:
    """Up to `limit` changes of the configuration that fit, the least invasive first, with what they would need."""
    found: list[tuple[str, Prediction]] = []
    for changes, words in _candidates(simulation.config, world_size):
        changed = simulation
        if changes:
            changed = simulate(dataclasses.replace(simulation.config, **changes), simulation.policy, device=simulation.device)
        micro = _largest_that_fits(changed, free, world_size)
        own = changed.predict(world_size=world_size).micro_batch
        if micro is None or (not changes and micro == own):
            continue
        smaller = f"micro_batch={micro}" if micro < own else ""
        found.append((", ".join(filter(None, (words, smaller))), changed.predict(micro, world_size)))
        if len(found) == limit:
            break
    return found


def _largest_that_fits(simulation: Simulation, free: int, world_size: int) -> int | None:
    """Of the sizes of passes that divide a process's share of a step, none above the configuration's."""
    share = max(1, simulation.config.batch_size // world_size)
    most = simulation.predict(world_size=world_size).micro_batch
    fitting = (n for n in range(most, 0, -1) if share % n == 0 and simulation.predict(n, world_size).needed <= free)
    return next(fitting, None)


def _candidates(config: TrainConfig, world_size: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes of fields, and how to ask for them, in the order in which to try them."""
    yield {}, ""
    steps: list[tuple[dict[str, Any], str]] = []
    if config.recompute == "none":
        steps.append(({"recompute": "selective"}, "recompute=selective"))
    if config.recompute != "full":
        steps.append(({"recompute": "full"}, "recompute=full"))
    yield from steps
    full = steps[-1] if steps else ({}, "")
    if world_size > 1 and config.parallel.strategy == "ddp":
        sharded = dataclasses.replace(config.parallel, strategy="fsdp")
        yield full[0] | {"parallel": sharded}, _joined(full[1], "parallel.strategy=fsdp")
    if config.precision == "fp32":
        return
    if config.lora is None and config.weights == "float32":
        yield full[0] | {"weights": "bfloat16"}, _joined(full[1], "weights=bfloat16")
    if set(config.freeze) == set(PREFIXES):
        return  # LoRA would have nothing to adapt
    for dtype in ("bfloat16", "nf4"):
        if config.lora is None:
            yield full[0] | {"lora": Lora(base_dtype=dtype)}, _joined(full[1], f'lora={{"base_dtype": "{dtype}"}}')
        elif _WIDTHS[dtype] < _WIDTHS[config.lora.base_dtype]:
            smaller = dataclasses.replace(config.lora, base_dtype=dtype)
            yield full[0] | {"lora": smaller}, _joined(full[1], f"lora.base_dtype={dtype}")


def _joined(*words: str) -> str:
    return ", ".join(filter(None, words))
