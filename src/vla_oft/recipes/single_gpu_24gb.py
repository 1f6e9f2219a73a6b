"""OpenVLA-OFT on one GPU with 24 GB: LIBERO-Spatial, or your own data by `--set robot=... --set datasets.0.path=...`.

As `libero_spatial.py`, but for one card:

| what | value | why |
| --- | --- | --- |
| recompute | full | 7.5 B weights in bfloat16 are 15 GB, what trains and its optimizer 4 GB: activations must be small |
| micro_batch | 2 | changes memory and speed, and nothing that is learned: try 4 or 8 where the card has room |
| batch | 16 | 64 would take weeks; a smaller batch reaches the same loss in more steps (the reference's authors) |
| learning rate | 2.5e-4, x 0.1 at step 35,000 | 5e-4 for 64 samples, by the square root of the batch, as is usual for Adam |
| steps | 50,000 | 0.8 M samples; LIBERO-Goal's published policy saw 3.2 M |
"""

import dataclasses

from vla_oft.recipes import libero_spatial
from vla_oft.recipes.base import Recipe
from vla_oft.train.config import Phase
from vla_oft.train.schedule import MultiStep


def recipe() -> Recipe:
    """LoRA with recomputed activations."""
    like = libero_spatial.recipe()
    train = dataclasses.replace(
        like.train,
        name="single_gpu_24gb",
        phases=(Phase(steps=50_000, mixture=(1.0,)),),
        batch_size=16,
        micro_batch=2,
        lr=2.5e-4,
        schedule=MultiStep(milestones=(35_000,)),
        recompute="full",
        keep_every=None,
    )
    return dataclasses.replace(like, train=train)
