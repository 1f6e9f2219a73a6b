"""The small pretrained policy that ships with this package: what OpenVLA-7B is to a robot lab, in a size that a laptop can train.

Two phases, one command, about two hours on two cores (benchmarks/quickstart.md): first language grounding on random scenes (which patches
show the named object?), then actions of every task family but `HELD_OUT`, which stays new for fine-tuning.
"""

import os
from pathlib import Path

from vla_oft.collect import CollectConfig, Noise, SceneConfig
from vla_oft.data.augment import AugmentConfig
from vla_oft.heads import grounding, l1
from vla_oft.recipes.base import Recipe
from vla_oft.train.config import Dataset, Fresh, Phase, TrainConfig
from vla_oft.train.optimizer import Muon
from vla_oft.train.schedule import Cosine

HELD_OUT = "pick_place"
FAMILIES = ("touch", "push", "lift", "stack")
CORPUS = (
    "touch push lift pick up grasp put place stack move open close",
    "the red green blue yellow purple block and it on onto into plate forward",
    "pick up the red block and place it on the plate",
)
"""Words that the tokenizer knows as a whole. A tokenizer reads more than a policy was trained on."""
SUITES = tuple(f"tabletop/{family}" for family in FAMILIES)
DEMOS, SCENES = Path("datasets/nano_base/demos"), Path("datasets/nano_base/scenes")
DART = Noise(hold_probability=0.05, hold_std=0.5, hold_steps=4)
"""Pushes and no white noise: about 10 % of the steps are disturbed, and most chunks lie between two pushes (see `data/chunks.py`)."""
LIGHT = AugmentConfig(crop_area=1.0, brightness=0.06, contrast=0.1, saturation=0.1, hue=0.01)
"""No crops: at 64 px the place of a pixel IS the position of a block."""


def recipe() -> Recipe:
    """4 x 900 demonstrations and 8,000 scenes; about 360,000 samples."""
    workers = os.cpu_count() or 1
    return Recipe(
        train=TrainConfig(
            name="nano_base",
            robot="tabletop",
            model=Fresh(size="nano", head=l1.Config(), grounding=grounding.Config(), corpus=CORPUS),
            datasets=(Dataset(name="scenes", path=str(SCENES)), Dataset(name="demos", path=str(DEMOS))),
            phases=(Phase(steps=560, mixture=(1.0, 0.0)), Phase(steps=5040, mixture=(0.1, 0.9))),
            batch_size=64,
            lr=2e-3,
            optimizer=Muon(),
            schedule=Cosine(warmup_steps=200, floor=0.01),
            augment=LIGHT,
            ema_decay=0.999,
            frame_cache="disk",
            log_every=50,
            save_every=1000,
        ),
        collect=(
            SceneConfig(suite=SUITES, scenes=8000, seed=500_000, out=SCENES, grounding_patches=8, workers=workers),
            CollectConfig(suite=SUITES, episodes=900, seed=0, out=DEMOS, noise=DART, grounding_patches=8, workers=workers),
        ),
    )
