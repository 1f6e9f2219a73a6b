"""Parameter names: the published files' and this package's.

model.safetensors                         X                                              vlm.X
vision_backbone--N   ...blocks.3.block.attn.qkv.base_layer.weight    vlm....blocks.3.attn.qkv.weight
                     ...blocks.3.scale.weight                        vlm....blocks.3.scale.weight
action_head--N       module.model.X                                  action_head.model.X
                     module.noise_predictor.mlp_resnet.X             action_head.noise_predictor.X
proprio_projector--N, noisy_action_projector--N    module.X          state_projector.X, action_head.noisy_action_projector.X
lora_adapter         MODULE of the VLM, with FiLM under vision_backbone.vision_backbone and .block.
"""

import re
from dataclasses import dataclass

VLM = "vlm."
VISION = "vision_backbone."
FILM = re.compile(r"blocks\.\d+\.(scale|shift)\.")
_BLOCK = re.compile(r"(blocks\.\d+\.)(?!scale\.|shift\.)")


@dataclass(frozen=True)
class Component:
    """A `.pt` file of its own: its stem in the published folder, and how the start of its names changes."""

    stem: str
    theirs: str
    ours: str

    def to_ours(self, name: str) -> str:
        """A published parameter name (with or without the wrapper's `module.`) -> ours; unknown ones stay recognisable."""
        bare = name.removeprefix("module.")
        return self.ours + bare.removeprefix(self.theirs) if bare.startswith(self.theirs) else f"{self.stem}:{name}"

    def to_theirs(self, name: str) -> str:
        """Our parameter name -> the published one."""
        return f"module.{self.theirs}{name.removeprefix(self.ours)}"


L1_HEAD = Component("action_head", "model.", "action_head.model.")
DIFFUSION_HEAD = Component("action_head", "noise_predictor.mlp_resnet.", "action_head.noise_predictor.")
NOISY_PROJECTOR = Component("noisy_action_projector", "", "action_head.noisy_action_projector.")
STATE_PROJECTOR = Component("proprio_projector", "", "state_projector.")


def film_to_ours(name: str) -> str:
    """A name of the wrapped vision backbone (with or without the wrapper's `module.`) -> ours (LoRA suffixes stay)."""
    return VLM + name.removeprefix("module.").replace(".block.", ".").replace(".base_layer.", ".")


def film_to_theirs(name: str) -> str:
    """Our name of a vision weight -> the wrapped backbone's, without LoRA's `base_layer`."""
    return _BLOCK.sub(r"\1block.", name.removeprefix(VLM))


def adapter_module_to_ours(module: str) -> str:
    """An adapted module of the published adapter -> ours."""
    return VLM + module.replace("vision_backbone.vision_backbone.", "vision_backbone.").replace(".block.", ".")
