"""One OpenVLA-OFT policy for all four LIBERO suites.

Settings and their sources: `libero_spatial.py`. Every frame is drawn equally often, as in the reference: the shares are the suites' numbers
of frames. The published policy of this kind is that of step 300,000: `--steps 300000`, with which the learning rate falls at step 200,000
(when it fell there is not published).
"""

from vla_oft.recipes import libero_spatial
from vla_oft.recipes.base import Recipe

FRAMES = {"libero_spatial": 52_970, "libero_object": 66_984, "libero_goal": 52_042, "libero_10": 101_469}
"""Steps of the demonstrations without pauses, as their `dataset_statistics.json` counts them."""


def recipe() -> Recipe:
    """The paper's settings on 40 tasks."""
    return libero_spatial.recipe("libero_all", tuple(FRAMES), tuple(float(count) for count in FRAMES.values()))
