"""Optimizers: AdamW for everything (fine-tuning, the paper's choice), or Muon for the matrices of a model that is trained from nothing.

Muon (Jordan et al. 2024) orthogonalises the update of every weight matrix. Training the nano model from scratch it needed half the samples
of AdamW for the same action error (LOG.md); each step costs a few matrix products per weight more.

What an optimizer works on is not always the parameter itself:

    parameter     what the policy computes with        float32, or bfloat16; all of it, or with FSDP this process's part
    leaf          what the optimizer reads and writes  the parameter, or its part; with `masters` a float32 copy of it

Weights in bfloat16 without masters have 8 bits: an update below 1/512 of a weight is lost, and so is what a second moment with beta 0.999
should gain per step. That is good enough for short fine-tuning with a high learning rate; masters cost 4 bytes per weight and lose nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Named = list[tuple[str, nn.Parameter]]
CAST_BYTES = 512 << 20
"""With masters, at most about so many bytes of gradients are float32 at a time."""


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """weight_decay: on the matrices of linear and convolution layers only, not on norms, biases and embeddings; with `decay` `all` on
    every trained weight. The reference uses `all` and betas (0.9, 0.999).
    """

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    decay: Literal["matrices", "all"] = "matrices"

    def build(self, model: nn.Module, lr: float, *, masters: bool = False) -> "Optimizers":
        """Optimizers for the trained parameters of `model`. masters: keep float32 copies of them."""
        decayed, spared = split(model, nn.Linear | nn.Conv2d)
        spared_decay = self.weight_decay if self.decay == "all" else 0.0
        return Optimizers(
            [*_adamw(decayed, lr, self.betas, self.weight_decay, masters), *_adamw(spared, lr, self.betas, spared_decay, masters)]
        )


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon on the matrices of linear layers, scaled to AdamW's learning rates; AdamW without weight decay on everything else."""

    weight_decay: float = 0.01
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)

    def build(self, model: nn.Module, lr: float, *, masters: bool = False) -> "Optimizers":
        """As `AdamW.build`. Raises ValueError where torch has no Muon (before 2.9)."""
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}; upgrade, or use adamw")
        matrices, others = split(model, nn.Linear)
        settings = {"lr": lr, "weight_decay": self.weight_decay, "momentum": self.momentum, "adjust_lr_fn": "match_rms_adamw"}
        make = lambda leaves: torch.optim.Muon(leaves, **settings)  # noqa: E731
        muon = [Member(chunk, make, {"momentum_buffer": torch.zeros_like}, masters, parts=False) for chunk in _chunks(matrices, masters)]
        return Optimizers([*muon, *_adamw(others, lr, self.betas, 0.0, masters)])


class Optimizers:
    """Several optimizers that step as one."""

    def __init__(self, members: Iterable["Member"]) -> None:
        self.members = list(members)

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """One update at learning rate `lr`; gradients are dropped afterwards.

        skip: bool scalar on the parameters' device; where True nothing changes, neither weights nor state. AdamW leaves the decision on
        the device; Muon waits for it.
        """
        for member in self.members:
            member.step(lr, skip)

    def tensors(self) -> dict[str, Tensor]:
        """All state, sharing memory with it, as KIND/PARAMETER: `exp_avg/action_head.model.fc1.weight`. Filling it resumes a run exactly.

        Complete from the start. Steps are tensors of one element; with FSDP moments and masters are DTensors, laid out as their parameter.
        """
        return {name: tensor for member in self.members for name, tensor in member.tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, for tensors of the same layout. Raises ValueError naming what does not fit."""
        mine = self.tensors()
        if wrong := sorted(mine.keys() ^ tensors.keys()):
            raise ValueError(f"optimizer state of another configuration: {wrong[0]} {'is missing' if wrong[0] in mine else 'is unknown'}")
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, as precise as they are kept: masters, or the parameters themselves."""
        return {name: weight for member in self.members for name, weight in member.weights().items()}


class Member:
    """One torch optimizer over some parameters.

    make: the optimizer for a list of leaves. state: what it remembers of each, and how that starts. parts: whether it may work on the
    part of a divided parameter alone; if not, its leaves are DTensors.
    """

    def __init__(
        self,
        parameters: Named,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        state: Mapping[str, Callable[[Tensor], Tensor]],
        masters: bool,
        *,
        parts: bool,
    ) -> None:
        self.parameters, self.masters, self.parts = dict(parameters), masters, parts
        self.leaves = {name: nn.Parameter(self._copy(p) if masters else self._view(p)) for name, p in parameters}
        self.optimizer = make(list(self.leaves.values()))
        for leaf in self.leaves.values():
            self.optimizer.state[leaf].update({kind: start(leaf.detach()) for kind, start in state.items()})

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None) -> None:
        """See `Optimizers.step`."""
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        if skip is None or fused or not bool(skip):
            self._hand_over_gradients()
            self.optimizer.found_inf = skip.float() if skip is not None and fused else None  # type: ignore[attr-defined]
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
            if self.masters:
                torch._foreach_copy_([_part(p) for p in self.parameters.values()], [_part(leaf) for leaf in self.leaves.values()])
        for parameter, leaf in zip(self.parameters.values(), self.leaves.values(), strict=True):
            parameter.grad = leaf.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """See `Optimizers.tensors`."""
        found: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            like = self.parameters[name]
            if self.masters:
                found[f"master/{name}"] = _whole(leaf.detach(), like)
            for kind, value in self.optimizer.state[leaf].items():
                found[f"{kind}/{name}"] = value.view(1) if kind == "step" else _whole(value, like)
        return found

    def weights(self) -> dict[str, Tensor]:
        """See `Optimizers.weights`."""
        if not self.masters:
            return dict(self.parameters)
        return {name: _whole(leaf.detach(), self.parameters[name]) for name, leaf in self.leaves.items()}

    def _hand_over_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            leaf = self.leaves[name]
            if not self.masters:
                leaf.data = self._view(parameter)  # FSDP may have moved its part
            leaf.grad = None if parameter.grad is None else self._view(parameter.grad).to(leaf.dtype)
            parameter.grad = None

    def _view(self, tensor: Tensor) -> Tensor:
        """What the optimizer may work on of a tensor, sharing memory."""
        return _part(tensor) if self.parts else tensor.detach()

    def _copy(self, tensor: Tensor) -> Tensor:
        return self._view(tensor).to(torch.float32, copy=True)


def split(model: nn.Module, kinds: Any) -> tuple[Named, Named]:
    """The trained parameters by name: weights of modules of `kinds`, and all others."""
    chosen = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [n for n in trained if id(n[1]) in chosen], [n for n in trained if id(n[1]) not in chosen]


def _adamw(parameters: Named, lr: float, betas: tuple[float, float], weight_decay: float, masters: bool) -> list[Member]:
    make = lambda leaves: torch.optim.AdamW(leaves, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)  # noqa: E731
    start = {"step": lambda leaf: torch.zeros((), device=leaf.device), "exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like}
    return [Member(chunk, make, start, masters, parts=True) for chunk in _chunks(parameters, masters)]


def _chunks(parameters: Named, masters: bool) -> list[Named]:
    """All in one, or, with masters, such that few gradients are float32 at the same time."""
    chunks: list[Named] = [[]]
    filled = 0
    for name, parameter in parameters:
        num_bytes = 4 * parameter.numel()
        if masters and chunks[-1] and filled + num_bytes > CAST_BYTES:
            chunks.append([])
            filled = 0
        chunks[-1].append((name, parameter))
        filled += num_bytes
    return [chunk for chunk in chunks if chunk]


def _part(tensor: Tensor) -> Tensor:
    """What this process holds of it, sharing memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _whole(part: Tensor, like: Tensor) -> Tensor:
    """`part` as a tensor laid out like `like`, sharing memory."""
    if not isinstance(like, DTensor) or isinstance(part, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
