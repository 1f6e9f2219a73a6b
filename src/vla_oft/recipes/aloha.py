"""OpenVLA-OFT+ (OFT with FiLM) on your own ALOHA's demonstrations.

The `aloha_*` recipes are this one on the paper's four tasks.

| what | value | source |
| --- | --- | --- |
| cameras, state | the high one and both wrists, 14-D state | paper, section V-B; reference's `--num_images_in_input 3 --use_proprio True` |
| actions | absolute joint angles, minimum and maximum normalised, none clipped | reference's constants (robots/aloha.py) |
| chunk | 25 actions, one second at 25 Hz | paper, section V-B |
| head | L1 regression with FiLM | paper, section IV; reference's `--use_l1_regression True --use_film True` |
| batch | 32 = 8 GPUs x 4 | reference's `--batch_size 4` on 8 GPUs |
| learning rate | 5e-4, x 0.1 at step 50,000 | reference's `--num_steps_before_decay 50000` |
| steps | 100,000 | reference's `--max_steps 100005` |
| validation | 5 % of the episodes | reference's `--use_val_set True`, `--percent_val 0.05` |
| stop | below an L1 loss of 0.01, once it no longer falls | the reference's advice |
| LoRA, optimizer, augmentation | `_openvla.py` | |

Recordings at 50 Hz: `--set datasets.0.filters.every=2`, as the paper did. With a single instruction FiLM has nothing to tell apart:
`--set model.film=false`. Much more than 300 demonstrations want a later decay: `--steps 200000`.
"""

from vla_oft.data.augment import AugmentConfig
from vla_oft.heads import l1
from vla_oft.recipes._openvla import BASE, IMPORT, LEARNING_RATE, SAVE_EVERY, adamw, lora
from vla_oft.recipes.base import Recipe
from vla_oft.train.config import Dataset, Phase, Pretrained, TrainConfig
from vla_oft.train.schedule import MultiStep
from vla_oft.train.stopping import EarlyStop
from vla_oft.train.validation import Validation

STEPS, DECAY_AT = 100_000, 50_000
YOURS = "put your recordings there (HDF5 of the recorder, LeRobot or RLDS), or name their folder with --set datasets.0.path=FOLDER"


def recipe(name: str = "aloha", folder: str = "aloha") -> Recipe:
    """Fine-tuning on the demonstrations in `datasets/folder`."""
    path = f"datasets/{folder}"
    return Recipe(
        train=TrainConfig(
            name=name,
            robot="aloha",
            model=Pretrained(path=BASE, head=l1.Config(), film=True),
            datasets=(Dataset(name=folder, path=path),),
            phases=(Phase(steps=STEPS, mixture=(1.0,)),),
            batch_size=32,
            micro_batch=4,
            lr=LEARNING_RATE,
            schedule=MultiStep(milestones=(DECAY_AT,)),
            optimizer=adamw(),
            lora=lora(),
            clip_norm=None,
            augment=AugmentConfig(),
            precision="bf16",
            num_workers=4,
            log_every=50,
            save_every=SAVE_EVERY,
            keep_last=2,
            keep_every=50_000,
            keep_best=True,
            validation=Validation(every=SAVE_EVERY, share=0.05),
            stop=EarlyStop(metric="action_l1", below=0.01, patience_steps=10_000, after=DECAY_AT),
        ),
        get={BASE: IMPORT, path: YOURS},
    )
