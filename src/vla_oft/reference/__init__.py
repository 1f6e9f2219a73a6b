"""The published checkpoints' layout, read and written: `import_checkpoint`, `export_checkpoint`.

config.json, preprocessor_config.json, tokenizer.*      shapes, pixel constants, tokenizer
model[-0000i-of-0000n].safetensors                      towers, projector, decoder
dataset_statistics.json                                 or `norm_stats` in config.json
action_head--N_checkpoint.pt                            L1 or diffusion; absent with discrete actions
proprio_projector--N, noisy_action_projector--N         state, and the diffusion head's input
vision_backbone--N                                      with FiLM: both towers again, with FiLM and their LoRA
lora_adapter/                                           PEFT
"""

from vla_oft.reference.exporter import export_checkpoint
from vla_oft.reference.importer import ImportRequest, import_checkpoint

__all__ = ["ImportRequest", "export_checkpoint", "import_checkpoint"]
