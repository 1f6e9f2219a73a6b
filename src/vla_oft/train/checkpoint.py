"""Checkpoints of a run: `checkpoints/step-000500/` with the policy and `trainer/state.pt`; `checkpoints/last` points at the newest.

A checkpoint appears whole or not at all, and the pointer is replaced in one step: a kill at any instant leaves the last good one.
"""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_oft.atomic import atomic_directory
from vla_oft.policy import Policy
from vla_oft.train import lora
from vla_oft.train.ema import Ema
from vla_oft.train.optimizer import Optimizers


def save(run: Path, policy: Policy, ema: Ema | None, trainer: dict[str, Any], facts: dict[str, Any], keep_last: int) -> Path:
    """Write the checkpoint of step `trainer["step"]` (averaged weights when there is an EMA), move `last`, prune. Returns its folder."""
    folder = run / "checkpoints" / f"step-{trainer['step']:06d}"
    if folder.exists():  # left behind by a run that was resumed from an earlier step
        shutil.rmtree(folder)
    before = steps(run)
    with atomic_directory(folder) as temporary:
        (temporary / "trainer").mkdir()
        torch.save(trainer, temporary / "trainer" / "state.pt")
        with ema.applied() if ema else nullcontext():
            if lora.is_adapted(policy):
                lora.write(policy, temporary, previous=run / "checkpoints" / f"step-{before[-1]:06d}" if before else None)
            else:
                policy.write(temporary)
        (temporary / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
        (temporary / "README.md").write_text(_model_card(policy, facts))
    _point(run / "checkpoints" / "last", folder.name)
    for old in steps(run)[:-keep_last]:
        shutil.rmtree(run / "checkpoints" / f"step-{old:06d}")
    return folder


def trainer_state(step: int, phase: int, loader: dict[str, Any], optimizer: Optimizers, policy: Policy, ema: Ema | None) -> dict[str, Any]:
    """Everything that a resumed run needs beside the policy; tensors and plain types only, so that it loads with `weights_only`."""
    return {
        "step": step,
        "phase": phase,
        "loader": loader,
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "ema": ema.state_dict() if ema else None,
        "weights": _weights(policy, ema),
    }


def _weights(policy: Policy, ema: Ema | None) -> dict[str, Tensor] | None:
    """What the checkpoint itself does not hold: with LoRA all trained weights in full precision, with an EMA those not averaged."""
    if lora.is_adapted(policy):
        return lora.trained_state(policy)
    return policy.state_dict() if ema else None


def same_data(run: Path, datasets: list[dict[str, Any]]) -> None:
    """Raise ValueError unless the datasets are those that the newest checkpoint was trained on."""
    before = json.loads((run / "checkpoints" / "last" / "run.json").read_text())["datasets"]
    for old, new in zip(before, datasets, strict=True):
        if old["fingerprint"] != new["fingerprint"]:
            raise ValueError(
                f"cannot resume {run}: dataset '{new['name']}' at {new['path']} has changed since; restore it, or start a new run"
            )


def restore(state: dict[str, Any], policy: Policy, ema: Ema | None, optimizer: Optimizers) -> None:
    """Put everything back as it was when `state` was saved; `policy` was loaded from the same checkpoint."""
    if state["weights"] is not None:
        missing, unexpected = policy.load_state_dict(state["weights"], strict=False)
        assert not unexpected and not (set(missing) & {name for name, p in policy.named_parameters() if p.requires_grad})
    if ema:
        ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if state.get("rng_cuda") and len(state["rng_cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["rng_cuda"])


def steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*") if (p / "policy.json").is_file())


def load_trainer(run: Path) -> dict[str, Any] | None:
    """The trainer state of the newest checkpoint, or None when the run has none yet."""
    found = steps(run)
    if not found:
        return None
    folder = run / "checkpoints" / f"step-{found[-1]:06d}"
    _point(run / "checkpoints" / "last", folder.name)  # a kill may have come between a checkpoint and its pointer
    return torch.load(folder / "trainer" / "state.pt", weights_only=True, map_location="cpu")


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _model_card(policy: Policy, facts: dict[str, Any]) -> str:
    robot = policy.config.robot
    return (
        f"# {facts['name']}, step {facts['step']} of {_total_steps(facts)}\n\n"
        f"A vision-language-action policy for robot `{robot.name}` (cameras {', '.join(robot.cameras)}; state {robot.state_dim}-D; "
        f"actions {robot.action_dim}-D, {robot.action_kind}, {robot.control_hz:g} Hz, chunks of {policy.config.chunk_len}).\n\n"
        f"Trained by `{facts['command']}` with vla-oft {facts['versions']['vla-oft']}; data: "
        + ", ".join(f"{d['name']} ({d['episodes']} episodes, {d['frames']} frames)" for d in facts["datasets"])
        + '.\n\n```python\nfrom vla_oft.policy import Policy\npolicy = Policy.load(".")\nchunk, = policy.act([observation])\n```\n'
    )


def _total_steps(facts: dict[str, Any]) -> int:
    return sum(phase["steps"] for phase in facts["train"]["phases"])
