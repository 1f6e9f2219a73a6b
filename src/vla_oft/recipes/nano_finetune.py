"""OFT fine-tuning of the shipped base policy on a few dozen demonstrations of a task family that it has never seen."""

import os
from pathlib import Path

from vla_oft.collect import CollectConfig
from vla_oft.recipes.base import Recipe
from vla_oft.recipes.nano_base import DART, HELD_OUT, LIGHT
from vla_oft.train.config import Dataset, Phase, Pretrained, TrainConfig
from vla_oft.train.schedule import Cosine

BASE = Path(__file__).parents[1] / "assets" / "nano_base"
EPISODES = 50
STEPS = 600


def recipe(family: str = HELD_OUT, demos: Path | None = None, *, episodes: int = EPISODES, steps: int = STEPS) -> Recipe:
    """`episodes` demonstrations of `family`, recorded into folder `demos`; `steps` batches of 32."""
    demos = demos or Path("datasets") / f"nano_{family}"
    return Recipe(
        train=TrainConfig(
            name=f"nano_{family}",
            robot="tabletop",
            model=Pretrained(path=str(BASE), statistics="base"),
            datasets=(Dataset(name=family, path=str(demos)),),
            phases=(Phase(steps=steps, mixture=(1.0,)),),
            batch_size=32,
            lr=3e-4,
            schedule=Cosine(warmup_steps=30, floor=0.01),
            augment=LIGHT,
            ema_decay=0.99,
            frame_cache="ram",
            log_every=20,
            save_every=steps,
        ),
        collect=(
            CollectConfig(
                suite=(f"tabletop/{family}",), episodes=episodes, seed=900_000, out=demos, noise=DART, workers=os.cpu_count() or 1
            ),
        ),
    )
