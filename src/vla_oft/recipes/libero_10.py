"""OpenVLA-OFT on LIBERO-10, the long tasks ("LIBERO-Long").

Settings and their sources: `libero_spatial.py`.
"""

from vla_oft.recipes import libero_spatial
from vla_oft.recipes.base import Recipe


def recipe() -> Recipe:
    """The paper's settings on this suite."""
    return libero_spatial.recipe("libero_10", ("libero_10",))
