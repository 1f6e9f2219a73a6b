"""Turn a finished `nano_base` run into the base policy that the package ships: python scripts/ship_base.py runs/nano_base

Weights are stored in bfloat16 (half the size) without the trainer's state; `run.json` says how they were made.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from vla_oft.policy import Policy, checkpoint_folder
from vla_oft.recipes.nano_finetune import BASE

LIMIT_BYTES = 25_000_000


def main() -> None:
    source = checkpoint_folder(Path(sys.argv[1]))
    shutil.rmtree(BASE, ignore_errors=True)
    Policy.load(source, dtype=torch.bfloat16).save(BASE)
    facts = json.loads((source / "run.json").read_text())
    command, facts["command"] = facts["command"], "vla-oft train nano_base"  # without this machine's folders
    (BASE / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
    (BASE / "README.md").write_text((source / "README.md").read_text().replace(command, facts["command"]))
    size = sum(file.stat().st_size for file in BASE.iterdir())
    assert size < LIMIT_BYTES, f"the base policy has {size} bytes, more than {LIMIT_BYTES}"
    print(f"{BASE}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
