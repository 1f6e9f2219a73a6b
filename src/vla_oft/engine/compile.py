"""From a policy, or from a checkpoint without loading it first, to a `CompiledPolicy`."""

from collections.abc import Mapping
from pathlib import Path

import torch

from vla_oft import hub
from vla_oft.engine.checkpoint import checkpoint_weights, load_interface
from vla_oft.engine.compiled import CompiledPolicy, check_prompts
from vla_oft.engine.factory import check_precision
from vla_oft.engine.options import Options, Precision
from vla_oft.heads import diffusion
from vla_oft.interface import Interface
from vla_oft.policy import Policy
from vla_oft.policy_config import checkpoint_folder

CameraSizes = Mapping[str, tuple[int, int]]


def compile_policy(
    policy: Policy,
    *,
    precision: Precision | None = None,
    device: str | torch.device | None = None,
    cameras: CameraSizes | None = None,
    instruction: str | None = None,
    max_prompt_len: int | None = None,
    options: Options = Options(),
) -> CompiledPolicy:
    """Specialise a policy, which is not changed, and not needed afterwards.

    precision: see `options.Precision`; bf16 on a GPU and fp32 on a CPU by default. device: where to run, the policy's own by default; a
    policy on the CPU can be compiled for a GPU, which then holds only the compiled weights. cameras: (height, width) of each camera's raw
    images, and instruction: make the graph for them now instead of at the first call. max_prompt_len: one graph for all instructions of up
    to so many tokens, which are padded and masked; without it each length of prompt has its own graph, faster and without a mask.
    Raises ValueError for what does not fit, before any work.
    """
    where = _check(policy.interface, device or policy.device, precision, cameras, instruction, max_prompt_len)
    weights = policy.state_dict()
    compiled = CompiledPolicy(policy.interface, weights.__getitem__, precision or default_precision(where), where, max_prompt_len, options)
    if isinstance(policy.action_head, diffusion.Head) and isinstance(compiled.action_head, diffusion.Head):
        compiled.action_head.inference_steps = policy.action_head.inference_steps
    return _warm(compiled, cameras, instruction)


def load_compiled(
    checkpoint: str | Path,
    *,
    precision: Precision | None = None,
    device: str | torch.device = "cpu",
    dataset: str | None = None,
    cameras: CameraSizes | None = None,
    instruction: str | None = None,
    max_prompt_len: int | None = None,
    options: Options = Options(),
) -> CompiledPolicy:
    """Specialise a checkpoint: its folder, its run's folder, or a hub id. Weights are read and stored one at a time: a GPU that could not
    hold the checkpoint holds it in int8 or int4. dataset: whose statistics normalise, where there are several. Otherwise `compile_policy`.
    """
    folder = checkpoint_folder(hub.resolve(checkpoint))
    interface = load_interface(folder, dataset)
    where = _check(interface, device, precision, cameras, instruction, max_prompt_len)
    read = checkpoint_weights(folder, interface.config, where)
    compiled = CompiledPolicy(interface, read, precision or default_precision(where), where, max_prompt_len, options)
    return _warm(compiled, cameras, instruction)


def default_precision(device: torch.device) -> Precision:
    """bf16 on a GPU, fp32 on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"


def _check(
    interface: Interface,
    device: str | torch.device,
    precision: Precision | None,
    cameras: CameraSizes | None,
    instruction: str | None,
    max_prompt_len: int | None,
) -> torch.device:
    """The device, with its index, once everything that was asked for is known to be possible. Raises ValueError otherwise."""
    where = _device(device)
    check_precision(precision or default_precision(where), where)
    robot = interface.config.robot
    unknown = sorted((cameras or {}).keys() - set(robot.cameras))
    if unknown:
        raise ValueError(f"cameras={unknown} are not cameras of robot '{robot.name}': {list(robot.cameras)}")
    for camera, shape in (cameras or {}).items():
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"cameras: {camera!r} has size {tuple(shape)}; give (height, width) in pixels")
    if max_prompt_len is not None and (not isinstance(max_prompt_len, int) or max_prompt_len < 1):
        raise ValueError(f"max_prompt_len={max_prompt_len!r} must be a positive number of tokens, or None")
    if instruction is not None and not instruction.strip():
        raise ValueError(f"instruction={instruction!r} is empty")
    if instruction is not None and max_prompt_len is not None:
        check_prompts(interface, [instruction], max_prompt_len)
    if cameras is not None and instruction is None and max_prompt_len is None:
        raise ValueError("cameras without instruction: give one too, or max_prompt_len, for the length of prompts decides about the graph")
    return where


def _device(device: str | torch.device) -> torch.device:
    """With its index, which streams and graphs need. Raises ValueError without such a device."""
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: policies are compiled for cpu and cuda")
    if where.type == "cpu":
        return where
    if not torch.cuda.is_available():
        raise ValueError(f'device={str(device)!r}: torch sees no CUDA device here; use device="cpu"')
    count = torch.cuda.device_count()
    if where.index is not None and where.index >= count:
        raise ValueError(f"device={str(device)!r}: there are {count} CUDA devices, 0 to {count - 1}")
    return torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)


def _warm(compiled: CompiledPolicy, cameras: CameraSizes | None, instruction: str | None) -> CompiledPolicy:
    if cameras is not None or instruction is not None:
        compiled.warm_up(cameras, instruction or "go")
    return compiled
