"""What recipes that fine-tune OpenVLA-7B share. Sources: the OFT paper (arXiv 2502.19645) and the reference's training command.

LoRA r 32, alpha 16, Gaussian A, on every linear layer      reference's --lora_rank 32; alpha = min(r, 16); lora_dropout 0
learning rate 5e-4, constant, then x 0.1                    --learning_rate 5e-4, --num_steps_before_decay
AdamW, betas (0.9, 0.999), decay 0.01 on everything         PyTorch's defaults, which the reference leaves alone
no clipping of gradients, no warm-up, no averaged weights   the reference has none of them
crop to 90 % of the area, colour jitter                     --image_aug True
frozen weights and arithmetic in bfloat16                   the reference loads the base in bfloat16 and autocasts
"""

from vla_oft.train.lora import Lora
from vla_oft.train.optimizer import AdamW

BASE = "checkpoints/openvla-7b"
IMPORT = f"import it first: vla-oft ckpt import openvla/openvla-7b {BASE}"
LEARNING_RATE = 5e-4
SAVE_EVERY = 2_500
"""Steps. The reference saves every 10,000; a LoRA checkpoint is small here, and this is what a preempted machine loses at most."""


def lora() -> Lora:
    """The paper's, on a base in bfloat16."""
    return Lora(rank=32, alpha=16.0, init="gaussian", base_dtype="bfloat16")


def adamw() -> AdamW:
    """The reference's."""
    return AdamW(weight_decay=0.01, betas=(0.9, 0.999), decay="all")
