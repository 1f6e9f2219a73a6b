"""Exponential moving average of the weights: what is saved and evaluated, while the optimizer works on the raw ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Ema:
    """A second copy of the trained weights, in float32. The decay ramps up as (1 + n) / (10 + n): early averages forget the start.

    parameters: the module's own, by name. weights: the same as precise as they are kept (float32 masters, or the parameters themselves).
    """

    def __init__(self, parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay, self.weights = decay, dict(weights)
        self.parameters = {name: parameters[name] for name in weights}
        self.average = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}
        device = next(iter(weights.values())).device
        self.updates = torch.zeros(1, device=device)  # a tensor: whether a step counts is known to the device alone

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Fold in the current weights. skip: bool scalar on their device; nothing changes where it is True."""
        counts = torch.ones_like(self.updates) if skip is None else 1 - skip.float().view(1)
        self.updates += counts
        share = counts * (1 - torch.clamp((1 + self.updates) / (10 + self.updates), max=self.decay))
        for name, weight in self.weights.items():
            average = _part(self.average[name])
            average.add_((_part(weight) - average).mul_(share))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights."""
        raw = {name: _part(parameter).clone() for name, parameter in self.parameters.items()}
        self._hold(self.average)
        try:
            yield
        finally:
            self._hold(raw)

    @torch.no_grad()
    def _hold(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            _part(parameter).copy_(_part(values[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """For exact resume, beside `average`: the number of updates."""
        return {"updates": self.updates.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.updates.copy_(state["updates"])


def _part(tensor: Tensor) -> Tensor:
    """What this process holds of it, sharing memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
