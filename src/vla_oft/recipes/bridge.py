"""OFT on BridgeData V2, or on your own WidowX demonstrations.

The paper has no such run, so there is nothing published to compare with. LIBERO's settings (`libero_spatial.py`), with what BridgeData
asks for: one camera, the state, chunks of 5 actions (one second at 5 Hz, the reference's constant). OpenVLA saw BridgeData while it was
pretrained; what is new here is the head.
"""

import dataclasses

from vla_oft.recipes import libero_spatial
from vla_oft.recipes._openvla import BASE, IMPORT
from vla_oft.recipes.base import Recipe
from vla_oft.train.config import Dataset

FOLDER = "bridge_orig"
DOWNLOAD = (
    'its makers have it, 124 GB: wget -r -nH --cut-dirs=4 --reject="index.html*" -P datasets '
    "https://rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds/bridge_dataset/ && mv datasets/bridge_dataset datasets/bridge_orig"
)
"""The release of BridgeData's authors, under the name that the reference gives it; copies elsewhere are older."""


def recipe() -> Recipe:
    """LIBERO's settings on `datasets/bridge_orig`."""
    path = f"datasets/{FOLDER}"
    like = libero_spatial.recipe().train
    train = dataclasses.replace(like, name="bridge", robot="bridge", datasets=(Dataset(name=FOLDER, path=path),), num_workers=4)
    return Recipe(train=train, get={BASE: IMPORT, path: DOWNLOAD})
