"""peft's LoRA layer with half the memory traffic: the strength scales the rank's few columns, not a copy of the whole output.

    peft    result + (B (A x)) * s        two passes over the output forward, one more backward
    here    result + B ((A x) * s)        one forward, none backward; the same bits where s is a power of two, as by default

Without autocast's detour, too: peft would first cast the input to the type of A, which autocast undoes.
"""

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class LoraLinear(Linear):
    """One adapter, never merged, never switched off."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(..., in) -> (..., out)."""
        (name,) = self.lora_A
        result = self.base_layer(x)
        low = self.lora_A[name](self.lora_dropout[name](x))
        return result + self.lora_B[name](low * self.scaling[name])


def lighten(layer: nn.Module) -> None:
    """Make a layer of peft's a `LoraLinear`, in place; DoRA and convolutions stay peft's."""
    if type(layer) is Linear and not layer.lora_variant:
        layer.__class__ = LoraLinear
