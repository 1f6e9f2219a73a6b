"""The scripted teacher of the embedded simulator.

It is a pure function of the simulator's state: no phases, no counters. Whatever noise is injected while demonstrations are
recorded (DART), the recorded label is what a good robot would do from where it really is, and a policy that sees only images
and the arm's state can imitate it.

Motions are funnels: the hand travels at a safe height and sinks as it comes over the place where it is going.

    height
      hover  ______
                   \\            height = low + clip(SLOPE * (distance - radius), 0, hover)
                    \\
      low            |___| place
"""

import numpy as np

from vla_oft.sims.tabletop import POSITION_STEP_M, TabletopEnv
from vla_oft.sims.tabletop_scene import BLOCK_HALF_M, PLATE_TOP_M
from vla_oft.sims.tabletop_tasks import FAMILIES, Moment

GAIN = 0.8  # of the remaining way, in one step
SPEED = 0.3  # largest horizontal action
VERTICAL_SPEED = 0.35
SLOPE = 3.0
GRASP_HEIGHT_M = 0.030  # of the TCP over the table: 8-10 mm above the middle of a block
HOVER_M = 0.075  # above a block that is about to be grasped
CARRY_M = 0.065  # clearance under a block that is carried
CLOSING_M = 0.060  # finger joints below this have begun to close
OPENED_M = 0.052  # finger joints above this have let go


class Expert:
    """`expert()` is the action (7,) float32 in [-1, 1] for the environment's current state and instruction."""

    def __init__(self, env: TabletopEnv) -> None:
        self._env = env
        self._act = {"touch": _touch, "push": _push, "lift": _lift, "pick_place": _place, "stack": _place}

    def __call__(self) -> np.ndarray:
        env = self._env
        velocity, closed = self._act[env.family](env.tcp(), env.finger(), env.moment(), env.family)
        action = np.zeros(7, np.float32)
        action[:3] = velocity
        action[6] = 1.0 if closed else -1.0
        return action


def _towards(tcp: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(3,) action that moves the TCP to `place`, proportional near it."""
    way = GAIN * (place - tcp) / POSITION_STEP_M
    way[:2] *= min(1.0, SPEED / max(float(np.hypot(way[0], way[1])), 1e-9))
    way[2] = np.clip(way[2], -VERTICAL_SPEED, VERTICAL_SPEED)
    return way


def _funnel(tcp: np.ndarray, place: np.ndarray, *, hover: float, radius: float) -> np.ndarray:
    """(3,) action towards `place` from above. Slower sideways while too low for the distance, so that nothing is swept away."""
    distance = float(np.hypot(*(place - tcp)[:2]))
    height = place[2] + np.clip(SLOPE * (distance - radius), 0, hover)
    action = _towards(tcp, np.array([place[0], place[1], height]))
    action[:2] *= np.clip(1 - (height - tcp[2] - 0.015) / 0.03, 0, 1)
    return action


def _touch(tcp: np.ndarray, finger: float, moment: Moment, family: str) -> tuple[np.ndarray, bool]:
    block = moment.blocks[moment.target]
    if moment.touched[moment.target]:
        return np.zeros(3), True
    return _funnel(tcp, block + np.array([0, 0, BLOCK_HALF_M + 0.015]), hover=0.06, radius=0.008), True


def _push(tcp: np.ndarray, finger: float, moment: Moment, family: str) -> tuple[np.ndarray, bool]:
    block = moment.blocks[moment.target]
    if block[0] - moment.start[moment.target, 0] > 0.06:
        return np.array([0, 0, 0.3 if tcp[2] < 0.12 else 0.0]), True
    behind, aside = block[0] - tcp[0], abs(block[1] - tcp[1])
    if tcp[2] < 0.055 and behind > 0.022 and aside < 0.016:
        return _towards(tcp, np.array([block[0] + 0.03, block[1], GRASP_HEIGHT_M])) * (0.75, 1, 1), True
    return _funnel(tcp, np.array([block[0] - 0.055, block[1], GRASP_HEIGHT_M]), hover=HOVER_M, radius=0.010), True


def _lift(tcp: np.ndarray, finger: float, moment: Moment, family: str) -> tuple[np.ndarray, bool]:
    grasp = _grasp(tcp, finger, moment)
    if grasp is not None:
        return grasp
    return _towards(tcp, np.array([tcp[0], tcp[1], 0.13])), True


def _place(tcp: np.ndarray, finger: float, moment: Moment, family: str) -> tuple[np.ndarray, bool]:
    """Bring the block to the plate or onto the other block, let go, rise."""
    block = moment.blocks[moment.target]
    if FAMILIES[family].destination == "plate":
        place, tolerance = np.array([*moment.plate, PLATE_TOP_M + BLOCK_HALF_M]), 0.022
    else:
        place, tolerance = moment.blocks[moment.other] + (0, 0, 2 * BLOCK_HALF_M), 0.010
    distance = float(np.hypot(*(place - block)[:2]))
    above = block[2] - place[2]
    settled = above < 0.004 or not moment.touched[moment.target]  # it lies there already: a little off is good enough
    if distance < (1.8 * tolerance if settled else tolerance) and abs(above) < 0.008:
        if finger < OPENED_M:
            return np.zeros(3), False
        return _towards(tcp, np.array([block[0], block[1], min(tcp[2] + 0.03, block[2] + 0.08)])), False
    grasp = _grasp(tcp, finger, moment)
    if grasp is not None:
        return grasp
    return _funnel(block, place, hover=CARRY_M, radius=0.7 * tolerance), True


def _grasp(tcp: np.ndarray, finger: float, moment: Moment) -> tuple[np.ndarray, bool] | None:
    """Come down over the block with an open hand and close it; None once the block is held."""
    block = moment.blocks[moment.target]
    if moment.gripped[moment.target]:
        return None
    place = np.array([block[0], block[1], block[2] - BLOCK_HALF_M + GRASP_HEIGHT_M])
    offset = np.abs(tcp - place)
    sideways = 0.022 if finger < CLOSING_M else 0.012  # a hand that is closing is not called off by a small push
    if offset[0] < sideways and offset[1] < 0.016 and offset[2] < 0.016:
        return _towards(tcp, place), True
    return _funnel(tcp, place, hover=HOVER_M, radius=0.008), False
