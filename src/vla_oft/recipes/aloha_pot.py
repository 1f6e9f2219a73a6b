"""OpenVLA-OFT+ on the paper's task "put X into pot" (300 demonstrations).

Settings and their sources: `aloha.py`. The reference gives its training command for this very task.
"""

from vla_oft.recipes import aloha
from vla_oft.recipes.base import Recipe


def recipe() -> Recipe:
    """The paper's settings on this task."""
    return aloha.recipe("aloha_pot", "aloha1_put_X_into_pot_300_demos")
