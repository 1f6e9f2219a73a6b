"""OpenVLA-OFT on LIBERO-Spatial.

The other `libero_*` recipes are this one on other demonstrations.

| what | value | source |
| --- | --- | --- |
| cameras, state | front and wrist, 8-D state | paper, section V-A; reference's `--num_images_in_input 2 --use_proprio True` |
| chunk | 8 actions | paper, section V-A (robots/libero.py) |
| head | L1 regression, no FiLM | paper, section IV; reference's `--use_l1_regression True --use_film False` |
| batch | 64 = 8 GPUs x 8 | paper, appendix; reference's `--batch_size 8` on 8 GPUs |
| learning rate | 5e-4, x 0.1 at step 100,000 | paper, appendix; reference's `--num_steps_before_decay 100000` |
| steps | 150,000 | reference's `--max_steps 150005` |
| stop | below an L1 loss of 0.01, once it no longer falls | the reference's advice; about 0.006 is reached at step 150,000 |
| LoRA, optimizer, augmentation | `_openvla.py` | |

The reference needs 62 GB a GPU with 8 samples a pass, 25 GB with one (its own figures): `--micro-batch 1` is the same run, slower. Less
memory still: `single_gpu_24gb.py`.
"""

from vla_oft.data.augment import AugmentConfig
from vla_oft.heads import l1
from vla_oft.recipes._openvla import BASE, IMPORT, LEARNING_RATE, SAVE_EVERY, adamw, lora
from vla_oft.recipes.base import Recipe
from vla_oft.train.config import Dataset, Phase, Pretrained, TrainConfig
from vla_oft.train.schedule import MultiStep
from vla_oft.train.stopping import EarlyStop

STEPS, DECAY_AT = 150_000, 100_000


def recipe(name: str = "libero_spatial", suites: tuple[str, ...] = ("libero_spatial",), shares: tuple[float, ...] = (1.0,)) -> Recipe:
    """Fine-tuning on `suites`, of which batches hold `shares`. Each is a folder of the reference's demonstrations without pauses."""
    folders = {f"{suite}_no_noops": f"datasets/{suite}_no_noops" for suite in suites}
    return Recipe(
        train=TrainConfig(
            name=name,
            robot="libero",
            model=Pretrained(path=BASE, head=l1.Config()),
            datasets=tuple(Dataset(name=folder, path=path) for folder, path in folders.items()),
            phases=(Phase(steps=STEPS, mixture=shares),),
            batch_size=64,
            micro_batch=8,
            lr=LEARNING_RATE,
            schedule=MultiStep(milestones=(DECAY_AT,)),
            optimizer=adamw(),
            lora=lora(),
            clip_norm=None,
            augment=AugmentConfig(),
            precision="bf16",
            num_workers=2,
            log_every=50,
            save_every=SAVE_EVERY,
            keep_last=2,
            keep_every=50_000,
            stop=EarlyStop(metric="action_l1", below=0.01, patience_steps=10_000, after=DECAY_AT),
        ),
        get={BASE: IMPORT, **{path: download(folder) for folder, path in folders.items()}},
    )


def download(folder: str) -> str:
    """How to get one suite of the converted demonstrations."""
    command = f'hf download openvla/modified_libero_rlds --repo-type dataset --include "{folder}/*" --local-dir datasets'
    return f"the hub's dataset openvla/modified_libero_rlds is known to hold it: {command}"
