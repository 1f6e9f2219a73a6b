"""OpenVLA-OFT+ on the paper's task "scoop X into bowl" (45 demonstrations).

Settings and their sources: `aloha.py`. The steps are those published for "put X into pot"; with fewer demonstrations the run reaches its
plateau, and ends, earlier.
"""

from vla_oft.recipes import aloha
from vla_oft.recipes.base import Recipe


def recipe() -> Recipe:
    """The paper's settings on this task."""
    return aloha.recipe("aloha_scoop", "aloha1_scoop_X_into_bowl_45_demos")
