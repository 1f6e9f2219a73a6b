"""Seconds on a CPU, generated data: does everything run?"""

from pathlib import Path

from vla_oft.collect import CollectConfig
from vla_oft.heads import grounding, l1
from vla_oft.recipes.base import Recipe
from vla_oft.train.config import Dataset, Fresh, Phase, TrainConfig
from vla_oft.train.schedule import Cosine

DEMOS = Path("datasets/debug")


def recipe() -> Recipe:
    """Four demonstrations of `touch`, twenty steps."""
    return Recipe(
        train=TrainConfig(
            name="debug",
            robot="tabletop",
            model=Fresh(size="nano", head=l1.Config(), grounding=grounding.Config()),
            datasets=(Dataset(name="touch", path=str(DEMOS)),),
            phases=(Phase(steps=20, mixture=(1.0,)),),
            batch_size=8,
            lr=1e-3,
            schedule=Cosine(warmup_steps=5),
            frame_cache="ram",
            log_every=5,
            save_every=10,
        ),
        collect=(CollectConfig(suite=("tabletop/touch",), episodes=4, seed=0, out=DEMOS, grounding_patches=8),),
    )
