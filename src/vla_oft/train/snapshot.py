"""A run at one step, copied to the host so that it can be written while the training goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vla_oft.policy import Policy
from vla_oft.train import lora, shards
from vla_oft.train.checkpoint import Snapshot
from vla_oft.train.ema import Ema
from vla_oft.train.optimizer import Optimizers
from vla_oft.train.parallel import Ranks, whole
from vla_oft.weights import LazyTensor, write_shards


class Exact:
    """Everything that a resumed run must find again, beside the position in the data: one dictionary of tensors, each with a name.

    Random numbers are not among it: each step draws from a seed of its own (`loop.seed_step`).
    """

    def __init__(self, trained: Mapping[str, Tensor], optimizer: Optimizers, ema: Ema | None) -> None:
        self.trained, self.optimizer, self.ema = trained, optimizer, ema

    def tensors(self) -> dict[str, Tensor]:
        """All of it, sharing memory with the run: reading a checkpoint into them restores it."""
        return {
            **{f"weight/{name}": parameter.detach() for name, parameter in self.trained.items()},
            **{f"ema/{name}": average for name, average in (self.ema.average if self.ema else {}).items()},
            **{f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()},
        }

    def shown(self) -> Mapping[str, Tensor]:
        """The trained weights as a checkpoint shows them: averaged, or as precise as they are kept."""
        return self.ema.average if self.ema else self.optimizer.weights()


class Stateful(Protocol):
    """What remembers a few numbers."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Scalars."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse."""
        ...


class Scalars:
    """The numbers that several parts of a run remember, as plain JSON; a part that is None has none."""

    def __init__(self, parts: Mapping[str, Stateful | None]) -> None:
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def state(self) -> dict[str, dict[str, list[Any]]]:
        """Type and value of each number, by part and name. Waits for the device."""
        found = {name: part.state_dict() for name, part in self.parts.items()}
        return {name: {key: [str(v.dtype).removeprefix("torch."), v.item()] for key, v in values.items()} for name, values in found.items()}

    def load(self, state: Mapping[str, Mapping[str, list[Any]]]) -> None:
        """The inverse of `state`. A part that the saved run did not have stays as it is."""
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict({key: torch.tensor(v, dtype=getattr(torch, dtype)) for key, (dtype, v) in state[name].items()})


class Photographer:
    """Takes the snapshots of a run. origin: where its frozen weights came from, by name. save_dtype: of the trained weights in the policy
    that a checkpoint holds. facts: of `run.json`.
    """

    def __init__(
        self,
        policy: Policy,
        exact: Exact,
        origin: Mapping[str, LazyTensor],
        ranks: Ranks,
        save_dtype: torch.dtype,
        facts: dict[str, Any],
    ) -> None:
        self.policy, self.exact, self.origin = policy, exact, origin
        self.ranks, self.save_dtype, self.facts = ranks, save_dtype, facts

    def take(self, step: int, state: dict[str, Any], error: float | None) -> Snapshot:
        """A copy of everything as it is now. Every process must call this at the same step."""
        adapted = lora.is_adapted(self.policy)
        weights: dict[str, Tensor] = self._on_main(self.exact.shown())
        frozen = self._divided_origin() if adapted else self._on_main(self._frozen())
        facts = {**self.facts, "step": step}
        return Snapshot(
            step=step,
            write_policy=lambda folder, previous: self._write(folder, previous, weights, frozen),
            parts=shards.own_parts(self.exact.tensors(), is_main=self.ranks.is_main),
            state={"step": step, **state},
            facts=facts,
            card=_model_card(self.policy, facts),
            error=error,
        )

    def _divided_origin(self) -> dict[str, LazyTensor]:
        """Frozen weights of which every process has only a part, read once more from where they came."""
        return {name: self.origin[name] for name, p in self.policy.named_parameters() if not p.requires_grad and isinstance(p, DTensor)}

    def _frozen(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.policy.named_parameters() if name not in self.exact.trained}

    def _on_main(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies on the host, of the first process alone; one tensor at a time."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach())
            if self.ranks.is_main:
                found[name] = full.to("cpu", copy=True)
        return found

    def _write(self, folder: Path, previous: Path | None, weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor | LazyTensor]) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.set_device(self.ranks.device)  # of this thread, which unpacks 4-bit weights
        if lora.is_adapted(self.policy):
            lora.write(self.policy, {**frozen, **weights}, folder, previous)
            return
        self.policy.write_facts(folder)
        saved = {name: LazyTensor.of(tensor).to(self.save_dtype) for name, tensor in weights.items()}
        saved |= {name: LazyTensor.of(tensor) for name, tensor in frozen.items() if isinstance(tensor, Tensor)}
        write_shards({name: saved[name] for name, _ in self.policy.named_parameters()}, folder)


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
