"""Does a checkpoint do what a policy must? A policy that is blind, deaf or causal by mistake still answers, and nobody is told.

images        black pictures and white ones lead to other actions
instruction   two instructions lead to other actions; to the same ones if the policy was trained blind
state         two states lead to other actions, where it is read
attention     the first action sees the last token of the sequence, unless it is decoded one token after the other
finite        every action is a number
statistics    of the data: which dimensions hardly change
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_oft import hub, weights
from vla_oft.bench import cost
from vla_oft.heads import discrete
from vla_oft.policy import Policy, PolicyInputs, checkpoint_folder, some_dataset
from vla_oft.sequence import Sequence
from vla_oft.train import memory
from vla_oft_client import Observation

SIDE = 128
"""Pixels of the test pictures."""
SAME = 1e-5
"""Normalised actions that differ by less than this are the same: about what rounding does in float32."""
INSTRUCTIONS = ("pick up the red block and place it on the plate", "open the top drawer")
MARGIN = 1.2


def examine(checkpoint: str | Path, *, device: str = "cpu", dataset: str | None = None) -> dict[str, Any]:
    """Load and try a policy; everything as JSON types. Raises ValueError for a folder that is no whole checkpoint, or is too large."""
    folder = checkpoint_folder(hub.resolve(checkpoint))
    _require_memory(folder, torch.device(device))
    policy = Policy.load(folder, device=device, dataset=dataset or some_dataset(folder))
    return {"kind": "checkpoint", "path": str(folder), "dataset": policy.config.dataset, "checks": _checks(policy)}


def is_healthy(document: dict[str, Any]) -> bool:
    """Whether no check failed."""
    return all(check["ok"] is not False for check in document["checks"])


def lines(document: dict[str, Any]) -> list[str]:
    """`examine` for people."""
    words = {True: "ok  ", False: "FAIL", None: "-   "}
    checks = [f"{words[check['ok']]}  {check['name']:<12} {check['says']}" for check in document["checks"]]
    return [f"{document['path']}, statistics of '{document['dataset']}'", *checks]


@torch.inference_mode()
def _checks(policy: Policy) -> list[dict[str, Any]]:
    config = policy.config
    black, white = _picture(policy, 0), _picture(policy, 255)
    first, other = (_picture(policy, 128, instruction=text) for text in INSTRUCTIONS)
    low, high = (_picture(policy, 128, state=value) for value in (-0.5, 0.5))
    answers = [_act(policy, policy.prepare([seen])) for seen in (black, white, first, other, low, high)]
    finite = all(bool(torch.isfinite(answer).all()) for answer in answers)
    told, blind = _distance(answers[2], answers[3]), config.prompt_style == "blind"
    found = [
        _check("finite", finite, "every action is a number" if finite else "actions are not finite: the weights are damaged, or too large"),
        _differ("images", answers[0], answers[1], "black and white pictures", "it does not see: check the vision weights"),
    ]
    if blind:
        says = f"trained blind: instructions change actions by {told:.1e}"
        found.append(_check("instruction", told <= SAME, says))
    else:
        found.append(_differ("instruction", answers[2], answers[3], "two instructions", "it does not listen: trained on one task alone?"))
    if config.use_state:
        found.append(_differ("state", answers[4], answers[5], "two states", "it ignores its state: check the state projector"))
    else:
        found.append(_check("state", None, "is not read"))
    return [*found, _attention(policy, first), _statistics(policy)]


def _attention(policy: Policy, seen: Observation) -> dict[str, Any]:
    """Whether the first action changes when the last token of the sequence does."""
    head = policy.config.head
    if isinstance(head, discrete.Config) and head.decoding == "autoregressive":
        return _check("attention", None, "one token after the other: causal, as it should be")
    inputs = policy.prepare([seen])
    plain, changed = (Sequence(policy.vlm, policy.state_projector, inputs) for _ in range(2))
    changed.stop_embed = changed.stop_embed + 3 * changed.stop_embed.std() * torch.ones_like(changed.stop_embed).cumsum(-1).sin()
    states = []
    for sequence in (plain, changed):
        hidden = sequence(sequence.zeros(cost.num_slots(policy.config)))
        states.append(hidden[:, 0].float())
    distance = _distance(*states) / max(float(states[0].abs().max()), 1e-12)
    says = f"the first action sees the last token (its hidden state moves by {distance:.1e})"
    broken = f"the first action does not see the last token ({distance:.1e}): attention is causal, and a chunk is not one decision"
    return _check("attention", distance > SAME, says if distance > SAME else broken)


def _statistics(policy: Policy) -> dict[str, Any]:
    normalizers = {"action": policy.action_normalizer, "state": policy.state_normalizer}
    constant = {what: n.constant_dims() for what, n in normalizers.items() if n}
    told = [f"{what} dimensions {dims} hardly change in the data and are held constant" for what, dims in constant.items() if dims]
    return _check("statistics", True, "; ".join(told) or "every dimension changes in the data")


def _picture(policy: Policy, value: int, *, instruction: str = INSTRUCTIONS[0], state: float = 0.0) -> Observation:
    """Every camera shows one grey; the state lies at `state` between the middle and the ends of its usual range."""
    robot = policy.config.robot
    images = {camera: np.full((SIDE, SIDE, 3), value, np.uint8) for camera in robot.cameras}
    return Observation(images, _state(policy, state) if robot.state_dim else None, instruction)


def _state(policy: Policy, where: float) -> np.ndarray:
    moments = policy.statistics.state
    if moments is None:
        return np.zeros(policy.config.robot.state_dim, np.float32)
    low, high = np.asarray(moments.q01, np.float64), np.asarray(moments.q99, np.float64)
    return ((low + high) / 2 + where * (high - low) / 2).astype(np.float32)


def _act(policy: Policy, inputs: PolicyInputs) -> Tensor:
    """Normalised actions (1, K, D), from the same noise every time."""
    shape = (1, policy.config.chunk_len, policy.config.robot.action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(policy.device)
    return policy.predict(inputs, noise=noise).float()


def _differ(name: str, a: Tensor, b: Tensor, what: str, fix: str) -> dict[str, Any]:
    distance = _distance(a, b)
    if distance > SAME:
        return _check(name, True, f"{what} change normalised actions by up to {distance:.2g}")
    return _check(name, False, f"{what} lead to the same actions ({distance:.1e}): {fix}")


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _check(name: str, ok: bool | None, says: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "says": says}


def _require_memory(folder: Path, device: torch.device) -> None:
    stored = sum(weight.num_bytes for weight in weights.open_weights(folder).values())
    widest = 2 if device.type == "cpu" else 1  # bfloat16 on disk becomes float32 on a CPU
    needed, free = int(MARGIN * widest * stored), memory.free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(f"{folder} needs up to {needed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free; use a larger machine")
