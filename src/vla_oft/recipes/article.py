"""The variant of OFT that engineering articles describe for ALOHA.

To be compared with `aloha.py`, from which it differs in four points:

| what | value | instead of |
| --- | --- | --- |
| loss | Huber, quadratic below 0.1 of the normalised range | L1 |
| vision towers | frozen, and so without FiLM | LoRA and FiLM |
| learning rate | half a cosine from 5e-4 down to 1e-6 | x 0.1 at half time |
| state | z-score, so that joints outside the demonstrated range are told apart | minimum and maximum, clipped |

The head that goes with it in one variant, one slot for the whole chunk: `--set 'model.head={"kind": "pooled", "loss": "huber"}'`.
"""

import dataclasses

from vla_oft.heads import l1
from vla_oft.recipes import aloha
from vla_oft.recipes._openvla import BASE, LEARNING_RATE
from vla_oft.recipes.base import Recipe
from vla_oft.train.config import Pretrained
from vla_oft.train.schedule import Cosine

LAST_LEARNING_RATE = 1e-6


def recipe() -> Recipe:
    """On the demonstrations in `datasets/aloha`."""
    like = aloha.recipe("article")
    train = dataclasses.replace(
        like.train,
        model=Pretrained(path=BASE, head=l1.Config(loss="huber", delta=0.1), film=False),
        freeze=("vision",),
        state_normalization="zscore",
        schedule=Cosine(floor=LAST_LEARNING_RATE / LEARNING_RATE),
    )
    return dataclasses.replace(like, train=train)
