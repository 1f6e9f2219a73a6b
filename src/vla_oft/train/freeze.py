"""What trains: parts of the backbone can be left as they are; action head, state projector, FiLM and grounding head always train.

freeze=("vision",)                             both towers' own weights; FiLM inside them still trains
freeze=("vision", "projector", "language")     heads only: a probe of what the backbone knows already
"""

import re
from collections.abc import Sequence
from typing import Literal

from vla_oft.policy import Policy

Part = Literal["vision", "projector", "language"]
PREFIXES: dict[Part, str] = {"vision": "vlm.vision_backbone.", "projector": "vlm.projector.", "language": "vlm.language_model."}
FILM = re.compile(r"\.blocks\.\d+\.(scale|shift)$")


def freeze_parts(policy: Policy, parts: Sequence[Part]) -> None:
    """Set `requires_grad` of every parameter: off in `parts` and where no output depends on it, on everywhere else.

    Raises ValueError when nothing is left to train.
    """
    unread = {id(parameter) for parameter in policy.unread_parameters()}
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(id(parameter) not in unread and not (is_in(name, parts) and not is_new(name)))
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(f"freeze={tuple(parts)} leaves nothing to train: this policy has neither FiLM nor an action head with weights")


def is_in(name: str, parts: Sequence[Part]) -> bool:
    """Whether a parameter or module belongs to one of `parts`."""
    return name.startswith(tuple(PREFIXES[part] for part in parts))


def is_new(name: str) -> bool:
    """Whether a parameter is OFT's own, which always trains in full: everything outside the backbone, and FiLM inside."""
    return not name.startswith("vlm.") or FILM.search(name.rpartition(".")[0]) is not None
