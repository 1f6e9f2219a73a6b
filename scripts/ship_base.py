"""Turn a `nano_base` run into the base policy that the package ships: python scripts/ship_base.py runs/nano_base

Weights are stored in bfloat16 (half the size) without the trainer's state; `run.json` says how they were made.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from vla_oft.policy import Policy, checkpoint_folder
from vla_oft.recipes.nano_finetune import BASE

LIMIT_BYTES = 25_000_000


def main() -> None:
    source = checkpoint_folder(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as temporary:
        ready = Path(temporary) / "base"
        Policy.load(source, dtype=torch.bfloat16).save(ready)
        for name in ("run.json", "README.md"):  # without this machine's folders
            (ready / name).write_text(re.sub(r" --out [^\s\"`]+| --resume", "", (source / name).read_text()))
        size = sum(file.stat().st_size for file in ready.iterdir())
        assert size < LIMIT_BYTES, f"the base policy has {size} bytes, more than {LIMIT_BYTES}"
        facts = json.loads((ready / "run.json").read_text())
        shutil.rmtree(BASE, ignore_errors=True)
        shutil.copytree(ready, BASE)
    print(f"{BASE}: step {facts['step']}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
