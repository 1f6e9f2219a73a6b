"""The task families of the embedded simulator: what is asked for, and when it counts as done.

Every family is played in the same random scenes, so a picture never gives the task away: only the instruction does.
A new family is one entry in `FAMILIES`; its expert is one method in `experts/tabletop.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla_oft.sims.tabletop_scene import BLOCK_HALF_M, PLATE_RADIUS_M, PLATE_TOP_M


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What the judge sees after every control step. Three blocks; metres.

    blocks: (3, 3) centres now.  start: (3, 3) centres at the start of the episode.
    touched: (3,) a finger touches the block now.  gripped: (3,) both do.  still: (3,) the block hardly moves.
    brushed: (3,) a finger touched it in any physics step since the last control step.  ever_brushed: (3,) since the start.
    highest: (3,) the greatest height of the centre since the start.
    plate: (2,) centre of the plate.
    target, other: index of the object to act on, and of the block to stack it on.
    """

    blocks: np.ndarray
    start: np.ndarray
    touched: np.ndarray
    gripped: np.ndarray
    still: np.ndarray
    brushed: np.ndarray
    ever_brushed: np.ndarray
    highest: np.ndarray
    plate: np.ndarray
    target: int
    other: int

    def moved(self) -> np.ndarray:
        """(3,) horizontal distance from the start."""
        return np.linalg.norm((self.blocks - self.start)[:, :2], axis=1)

    def raised(self) -> np.ndarray:
        """(3,) the block has been off the table at some time."""
        return self.highest > BLOCK_HALF_M + 0.03

    def put_down(self) -> np.ndarray:
        """(3,) the block was picked up and now rests somewhere, let go."""
        return self.raised() & ~self.touched & self.still


@dataclass(frozen=True, kw_only=True)
class Family:
    """instruction: a template with {target} and {other}.

    destination: what the object is brought to: "plate", "other" (block) or None.
    max_steps: about twice the length of the expert's mean episode (benchmarks/tabletop.md).
    acted_on: (3,) which objects have been chosen by this moment; the first ever is the policy's choice; several at once are a wrong one.
    success: whether the instruction has been carried out.
    """

    instruction: str
    destination: str | None
    max_steps: int
    acted_on: Callable[[Moment], np.ndarray]
    success: Callable[[Moment], bool]


def is_on_plate(blocks: np.ndarray, plate: np.ndarray) -> np.ndarray:
    """(N,) whether blocks (N, 3) rest on the plate (2,)."""
    near = np.linalg.norm(blocks[:, :2] - plate, axis=1) < PLATE_RADIUS_M - 0.005
    return near & (np.abs(blocks[:, 2] - PLATE_TOP_M - BLOCK_HALF_M) < 0.010)


def is_stacked(upper: np.ndarray, lower: np.ndarray) -> bool:
    """Whether the block at `upper` (3,) rests on the one at `lower` (3,)."""
    offset = upper - lower
    return bool(np.hypot(offset[0], offset[1]) < 1.2 * BLOCK_HALF_M and abs(offset[2] - 2 * BLOCK_HALF_M) < 0.006)


def _touched(moment: Moment) -> bool:
    return bool(moment.touched[moment.target] and not np.delete(moment.ever_brushed, moment.target).any())


def _pushed(moment: Moment) -> bool:
    """Along the table: a block that is carried forward was not pushed."""
    forward, others = (moment.blocks - moment.start)[moment.target, 0], np.delete(moment.moved(), moment.target)
    return bool(forward >= 0.05 and moment.highest[moment.target] < BLOCK_HALF_M + 0.02 and np.all(others < 0.015))


def _lifted(moment: Moment) -> bool:
    return bool(moment.touched[moment.target] and moment.blocks[moment.target, 2] > BLOCK_HALF_M + 0.05)


def _stacked(moment: Moment) -> bool:
    upper, lower = moment.target, moment.other
    rests = moment.put_down()[upper] and moment.still[lower] and not moment.gripped[lower]
    return bool(rests and is_stacked(moment.blocks[upper], moment.blocks[lower]))


def _placed(moment: Moment) -> np.ndarray:
    """Shoving a block onto the plate, which is only 6 mm high, is not placing it."""
    return moment.put_down() & is_on_plate(moment.blocks, moment.plate)


FAMILIES = {
    "touch": Family(
        instruction="touch the {target} block",
        destination=None,
        max_steps=30,
        acted_on=lambda m: m.brushed,
        success=_touched,
    ),
    "push": Family(
        instruction="push the {target} block forward",
        destination=None,
        max_steps=40,
        acted_on=lambda m: m.moved() > 0.02,
        success=_pushed,
    ),
    "lift": Family(
        instruction="lift the {target} block",
        destination=None,
        max_steps=40,
        acted_on=lambda m: m.blocks[:, 2] > BLOCK_HALF_M + 0.03,
        success=_lifted,
    ),
    "pick_place": Family(
        instruction="pick up the {target} block and place it on the plate",
        destination="plate",
        max_steps=80,
        acted_on=_placed,
        success=lambda m: bool(_placed(m)[m.target]),
    ),
    "stack": Family(
        instruction="stack the {target} block on the {other} block",
        destination="other",
        max_steps=80,
        acted_on=Moment.put_down,
        success=_stacked,
    ),
}
