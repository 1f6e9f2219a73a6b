"""OpenVLA-OFT+ on the paper's task "fold shorts" (20 demonstrations).

Settings and their sources: `aloha.py`. The steps are those published for "put X into pot"; with fewer demonstrations the run reaches its
plateau, and ends, earlier.
"""

from vla_oft.recipes import aloha
from vla_oft.recipes.base import Recipe


def recipe() -> Recipe:
    """The paper's settings on this task."""
    return aloha.recipe("aloha_fold_shorts", "aloha1_fold_shorts_20_demos")
