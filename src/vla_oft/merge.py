"""A LoRA adapter becomes part of the weights: `vla-oft ckpt merge`, refused when the policy would act otherwise afterwards.

Sums are taken in float32 and rounded once, to the type that is stored. The check compares two forward passes in float32:

    before   W x + alpha / r * B (A x)      the stored base, the update computed beside it; with DoRA scaled row by row
    after    W' x                           W' as it will be stored

The reference adds in bfloat16 without looking: recorded checkpoints move by 1e-2 of the normalised range.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft import __version__, hub
from vla_oft.adapter import Adapter, Factors, load_adapter
from vla_oft.atomic import atomic_directory, require_empty
from vla_oft.policy import Policy, checkpoint_folder, load_config, load_weights, some_dataset
from vla_oft.statistics import load_statistics
from vla_oft.vlm import tokens
from vla_oft.weights import LazyTensor, write_shards
from vla_oft_client import Observation

DType = Literal["float32", "bfloat16"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest change of a normalised action (range -1 to 1) that passes by default."""
INSTRUCTIONS = ("pick up the red block and place it on the plate", "open the middle drawer of the cabinet", "push the green block forward")
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged checkpoint. difference: largest change of a normalised action; typical: mean size of the actions' changes."""

    folder: Path
    difference: float
    typical: float
    tolerance: float


def merge_checkpoint(source: str | Path, out: Path, *, dtype: DType = "float32", tolerance: float | None = None) -> Merged:
    """Write checkpoint `out` with the adapter of checkpoint, run folder or hub id `source` merged into weights of type `dtype`.

    tolerance: largest change of a normalised action, by default `TOLERANCE[dtype]`. Peak memory: one float32 copy of the model and one
    output shard. Raises ValueError, with nothing written, when there is no adapter or the actions move by more.
    """
    require_empty(out)
    folder = checkpoint_folder(hub.resolve(source))
    if not (folder / "adapter").is_dir():
        raise ValueError(f"{folder} has no adapter/: there is nothing to merge")
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    adapter, policy = load_adapter(folder / "adapter"), load_unmerged(folder, torch.float32).eval()
    adapter.check({name: tensor.shape for name, tensor in policy.state_dict().items()})
    with unmerged(policy, adapter):
        before = _actions(policy)
    merge(policy, adapter, getattr(torch, dtype))
    moved = (_actions(policy) - before).abs()
    result = Merged(folder=out, difference=moved.max().item(), typical=moved.mean().item(), tolerance=limit)
    if not result.difference <= limit:  # NaN is refused too
        raise ValueError(
            f"merged in {dtype}, the policy acts otherwise: normalised actions of {len(moved)} random observations move by up to "
            f"{result.difference:.1e} ({result.typical:.1e} on average), more than the tolerance {limit:.1e}; nothing was written. "
            + ("Use --dtype float32, or allow it with --tolerance" if dtype != "float32" else "Allow it with --tolerance")
        )
    with atomic_directory(out) as temporary:
        _copy_facts(folder, temporary, _facts(result, str(source), dtype))
        weights = policy.state_dict()
        write_shards({name: LazyTensor.of(tensor).to(getattr(torch, dtype)) for name, tensor in weights.items()}, temporary)
    return result


def load_unmerged(folder: Path, dtype: torch.dtype) -> Policy:
    """The policy of a checkpoint folder WITHOUT its adapter, on the CPU, every weight in `dtype`."""
    config = load_config(folder, some_dataset(folder))
    with torch.device("meta"):
        policy = Policy(config, load_statistics(folder / "statistics.json")[config.dataset], tokens.load_tokenizer(folder))
    load_weights(policy, folder, "cpu", dtype, merge=False)
    return policy


@contextmanager
def unmerged(policy: Policy, adapter: Adapter) -> Iterator[None]:
    """Inside, every adapted layer adds its update beside its own weights; nothing is merged, and peft is not needed."""
    hooks = []
    for name, factors in adapter.factors.items():
        layer = policy.get_submodule(name)
        hooks.append(layer.register_forward_hook(_update(factors, _lengths(layer, factors))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def merge(policy: Policy, adapter: Adapter, dtype: torch.dtype) -> None:
    """Add the adapter to the float32 weights of `policy` in place; all weights then hold what `dtype` can, still as float32."""
    for name, parameter in policy.named_parameters():
        merged = adapter.merged(name.removesuffix(".weight"), parameter.data)
        parameter.copy_(merged.to(dtype))


def _update(factors: Factors, lengths: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    a, b, scaling = factors.a.float(), factors.b.float(), factors.scaling

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        channels = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(inputs[0], a, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)  # type: ignore[arg-type]
            total = output + scaling * F.conv2d(low, b)
        else:
            total = output + scaling * F.linear(F.linear(inputs[0], a), b)
        if lengths is None:
            return total
        bias = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros_like(lengths)
        return (total - bias.view(channels)) * lengths.view(channels) + bias.view(channels)

    return add


def _lengths(layer: nn.Module, factors: Factors) -> Tensor | None:
    """DoRA's factor of each row (out,), from the norms of B A and W alone: |W + s B A|^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2."""
    if factors.magnitude is None:
        return None
    weight, a, b = (tensor.detach().double().flatten(1) for tensor in (layer.get_parameter("weight"), factors.a, factors.b))
    squares = weight.square().sum(1) + 2 * factors.scaling * ((weight @ a.T) * b).sum(1)
    squares += factors.scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
    return (factors.magnitude.double() / squares.sqrt()).float()


@torch.inference_mode()
def _actions(policy: Policy) -> Tensor:
    """Normalised actions (B, K, D) for random observations, always the same ones."""
    inputs = policy.prepare(list(random_observations(policy)))
    return policy.predict(inputs, torch.Generator().manual_seed(SEED))


def random_observations(policy: Policy) -> Iterator[Observation]:
    """One observation for each of `INSTRUCTIONS`: blurred noise as images, a state between the data's quantiles."""
    rng, robot, size = np.random.default_rng(SEED), policy.config.robot, policy.config.preprocess.image_size
    for instruction in INSTRUCTIONS:
        coarse = rng.integers(0, 256, (len(robot.cameras), 8, 8, 3))
        tiles = np.kron(coarse, np.ones((1, -(-size // 8), -(-size // 8), 1)))[:, :size, :size]
        images = np.clip(tiles + rng.normal(0, 16, tiles.shape), 0, 255).astype(np.uint8)
        moments = policy.statistics.state
        state = None if moments is None else rng.uniform(np.minimum(moments.q01, moments.q99), np.maximum(moments.q01, moments.q99))
        yield Observation(dict(zip(robot.cameras, images, strict=True)), state, instruction)


def _facts(result: Merged, source: str, dtype: DType) -> dict[str, Any]:
    return {
        "merged_from": source,
        "dtype": dtype,
        "largest_difference": result.difference,
        "mean_difference": result.typical,
        "tolerance": result.tolerance,
        "observations": len(INSTRUCTIONS),
        "versions": {"vla-oft": __version__},
    }


def _copy_facts(source: Path, folder: Path, merging: dict[str, Any]) -> None:
    """Every file but weights and the trainer's state, as it is; `run.json` also says how this checkpoint was merged."""
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            shutil.copyfile(file, folder / file.name)
    path = folder / "run.json"
    facts = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**facts, "merge": merging}, indent=2) + "\n")
