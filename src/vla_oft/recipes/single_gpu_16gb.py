"""OpenVLA-OFT on one GPU with 16 GB: QLoRA (Dettmers et al. 2023).

As `single_gpu_24gb.py`, with the frozen weights in 4 bits: 7.5 B of them take 4 GB instead of 15. Targets: 10 to 11 GB at one sample a
pass, under 14 GB at eight. Checkpoints hold what the 4-bit weights stand for, so the saved policy acts like the trained one.
"""

import dataclasses

from vla_oft.recipes import single_gpu_24gb
from vla_oft.recipes._openvla import lora
from vla_oft.recipes.base import Recipe


def recipe() -> Recipe:
    """4-bit NormalFloat base, everything else as with 24 GB."""
    like = single_gpu_24gb.recipe()
    train = dataclasses.replace(like.train, name="single_gpu_16gb", lora=dataclasses.replace(lora(), base_dtype="nf4"))
    return dataclasses.replace(like, train=train)
