"""The embedded simulator: one ViperX arm, three coloured blocks and a plate; the instruction says what to do with which.

Shaped like LIBERO (7-D increments, 8-D state, a front and a wrist camera, 20 Hz) but with nothing to download and about 3 ms a
step with both cameras on one CPU core (benchmarks/tabletop.md). Needs `pip install 'vla-oft[sim]'` and, for the meshes,
`pip install --no-deps gym-aloha`.

    env = tabletop.make("pick_place")
    env.reset(seed=7)
    expert = experts.tabletop.Expert(env)
    while not env.outcome().success:
        env.step(expert())
"""

from typing import Any

import numpy as np

from vla_oft.robots.tabletop import SPEC
from vla_oft.sims import tabletop_tasks, viperx
from vla_oft.sims.base import Outcome, Simulator, SimulatorError
from vla_oft.sims.rendering import Renderer, load_mujoco
from vla_oft.sims.tabletop_scene import BLOCK_HALF_M, NUM_BLOCKS, PALETTE, PLATE_TOP_M, TIMESTEP_S, Layout, build_model, draw_layout
from vla_oft_client import Observation

FAMILIES: tuple[str, ...] = tuple(tabletop_tasks.FAMILIES)
COLOURS: tuple[str, ...] = tuple(PALETTE)  # the words that tell one block from another

POSITION_STEP_M = 0.05  # an action of 1.0
WORKSPACE_M = np.array([[0.17, -0.20, 0.028], [0.56, 0.20, 0.28]])  # the TCP stays between these corners
HOME_M = np.array([0.26, 0.0, 0.17])
SHOWN_FRACTION = 0.15  # a patch shows an object if this part of its pixels does

_SUBSTEPS = round(SPEC.period_s / TIMESTEP_S)
_FINGER_STEP_M = 0.0016  # finger travel in one physics step
_LEAD_M = 0.06  # the commanded position runs at most this far ahead of the hand, however hard it is blocked


def make(family: str, *, camera_size: int = 128) -> Simulator:
    """A simulator of one of `FAMILIES`."""
    return TabletopEnv(family, camera_size=camera_size)


class TabletopEnv:
    """One task family. `camera_size` is the side of both square camera images in pixels."""

    spec = SPEC

    def __init__(self, family: str, camera_size: int = 128) -> None:
        self._home_family = _known(family)
        self._mujoco = load_mujoco()
        self._camera_size = camera_size
        self._model = build_model()
        self._data = self._mujoco.MjData(self._model)
        self._renderer = Renderer(self._model)
        self._index_model()
        self.reset(0)

    # ---- the Simulator protocol ----

    def reset(self, seed: int, *, swap: int = 0) -> None:
        """Build the scene of `seed`; `swap` names another block (1 or 2 further) in the same scene."""
        rng = np.random.default_rng(seed)
        layout = draw_layout(rng)
        target, shift = int(rng.integers(NUM_BLOCKS)), int(rng.integers(1, NUM_BLOCKS))
        self.layout = layout
        self._mujoco.mj_resetData(self._model, self._data)
        self._paint(layout)
        self._put_arm(HOME_M + rng.uniform(-0.015, 0.015, 3), viperx.FINGER_OPEN_M)
        for block in range(NUM_BLOCKS):
            self._put_block(block, (*layout.positions_m[block], BLOCK_HALF_M), layout.yaws_rad[block])
        self._mujoco.mj_step(self._model, self._data, nstep=_SUBSTEPS)
        self.set_instruction(self._home_family, (target + swap) % NUM_BLOCKS, (target + shift + swap) % NUM_BLOCKS)
        self._begin()

    def observe(self) -> Observation:
        """Render both cameras and read the state."""
        images = {camera: self._renderer.draft(self._data, camera, self._camera_size) for camera in SPEC.cameras}
        return Observation(images=images, state=self.state(), instruction=self.instruction, time_s=self.num_steps * SPEC.period_s)

    def step(self, action: np.ndarray) -> None:
        """Execute one action (7,) for 50 ms. Values are clipped to [-1, 1]; rotations are ignored: the hand always points down."""
        action = np.asarray(action, np.float64)
        if action.shape != (SPEC.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"action must be {SPEC.action_dim} finite numbers, got {action}")
        lead = np.clip(self._goal + POSITION_STEP_M * np.clip(action[:3], -1, 1) - self.tcp(), -_LEAD_M, _LEAD_M)
        start, self._goal = self._goal, np.clip(self.tcp() + lead, *WORKSPACE_M)
        finger_goal = viperx.FINGER_CLOSED_M if action[6] > 0 else viperx.FINGER_OPEN_M
        if action[6] <= 0:
            self._finger = max(self._finger, self.finger())  # open from where the block stopped the fingers
        control = self._data.ctrl
        begin, end = viperx.inverse_kinematics(start), viperx.inverse_kinematics(self._goal)
        lead = (end - begin) / SPEC.period_s * viperx.VELOCITY_LEAD_S
        self._brushed = np.zeros(NUM_BLOCKS, bool)
        for substep in range(_SUBSTEPS):
            control[:6] = begin + (end - begin) * ((substep + 1) / _SUBSTEPS) + lead
            self._finger += np.clip(finger_goal - self._finger, -_FINGER_STEP_M, _FINGER_STEP_M)
            control[6:8] = self._finger, -self._finger
            self._mujoco.mj_step(self._model, self._data)
            self._watch()
        self.num_steps += 1
        self._check_physics()
        self._judge()

    def outcome(self) -> Outcome:
        """The verdict so far. Acting on the wrong object first, or on several at once, is never a success."""
        if self._chosen is None:
            return Outcome(success=False, chosen=None, correct=None)
        correct = self._chosen == self.target
        return Outcome(success=self._success and correct, chosen=self.layout.colours[self._chosen], correct=correct)

    def frame(self, height: int, width: int) -> np.ndarray:
        """A picture for people, uint8 (height, width, 3), with shadows and smooth edges."""
        return self._renderer.pretty(self._data, "people", height, width)

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()

    # ---- what experts and the grounding supervision read ----

    def state(self) -> np.ndarray:
        """(8,) float32: TCP position, axis-angle of the gripper, the two finger joints."""
        quaternion, rotation = np.zeros(4), np.zeros(3)
        self._mujoco.mju_mat2Quat(quaternion, self._data.xmat[self._hand])
        self._mujoco.mju_quat2Vel(rotation, quaternion, 1.0)
        return np.concatenate([self.tcp(), rotation, self._data.qpos[self._joint_addresses[6:]]]).astype(np.float32)

    def tcp(self) -> np.ndarray:
        """(3,) the point between the finger tips, metres."""
        return self._data.xpos[self._hand] + self._data.xmat[self._hand].reshape(3, 3)[:, 0] * viperx.TCP_M

    def finger(self) -> float:
        """Mean finger joint, from `viperx.FINGER_CLOSED_M` to `viperx.FINGER_OPEN_M`."""
        left, right = self._data.qpos[self._joint_addresses[6:]]
        return float(left - right) / 2

    def moment(self) -> tabletop_tasks.Moment:
        """The blocks and what happens to them, as the judge sees them."""
        contacts = self._pad_contacts()
        return tabletop_tasks.Moment(
            blocks=self._data.xpos[self._blocks].copy(),
            start=self._start,
            touched=contacts[:, 0] | contacts[:, 1],
            gripped=contacts[:, 0] & contacts[:, 1],
            still=np.abs(self._data.qvel[self._block_velocities]).max(axis=1) < 0.10,
            brushed=self._brushed,
            ever_brushed=self._ever_brushed,
            highest=self._highest,
            plate=self.layout.plate_m,
            target=self.target,
            other=self.other,
        )

    def set_instruction(self, family: str, target: int, other: int | None = None) -> None:
        """Name other objects (indices into `layout.colours`) or another family in the scene as it stands; starts a new verdict."""
        self.family = _known(family)
        self.target = target
        self.other = (target + 1) % NUM_BLOCKS if other is None else other
        if not (0 <= self.target < NUM_BLOCKS and 0 <= self.other < NUM_BLOCKS and self.other != self.target):
            raise ValueError(f"target and other must be two different blocks of 0..{NUM_BLOCKS - 1}, got {target} and {other}")
        chosen = tabletop_tasks.FAMILIES[family]
        colours = self.layout.colours
        self.instruction = chosen.instruction.format(target=colours[self.target], other=colours[self.other])
        self.max_steps = chosen.max_steps
        self._begin()

    @property
    def objects(self) -> tuple[str, ...]:
        """The blocks of the scene, in the order of the indices of `set_instruction`."""
        return self.layout.colours

    def patch_masks(self, patches_per_side: int) -> dict[str, np.ndarray]:
        """Which patches show what the instruction names: camera -> uint8 (2, P, P); channel 0 the object, channel 1 its destination."""
        size = self._camera_size
        if patches_per_side < 1 or size % patches_per_side:
            raise ValueError(f"patches_per_side={patches_per_side} must divide camera_size={size}")
        destination = tabletop_tasks.FAMILIES[self.family].destination
        wanted = (
            self._block_geoms[self.target : self.target + 1],
            {"plate": self._plate_geoms, "other": self._block_geoms[self.other : self.other + 1], None: []}[destination],
        )
        side, masks = size // patches_per_side, {}
        for camera in SPEC.cameras:
            ids = self._renderer.geom_ids(self._data, camera, size)
            shown = np.stack([np.isin(ids, geoms) for geoms in wanted])
            fraction = shown.reshape(2, patches_per_side, side, patches_per_side, side).mean(axis=(2, 4))
            masks[camera] = (fraction >= SHOWN_FRACTION).astype(np.uint8)
        return masks

    def landmarks(self) -> np.ndarray:
        """(2, 3) float32: where the named object and its destination are, metres in the arm's frame; NaN where there is none."""
        destination = tabletop_tasks.FAMILIES[self.family].destination
        there = {"plate": self._plate, "other": self._blocks[self.other], None: None}[destination]
        goal = np.full(3, np.nan) if there is None else self._data.xpos[there]
        return np.stack([self._data.xpos[self._blocks[self.target]], goal]).astype(np.float32)

    def randomize_pose(self, rng: np.random.Generator) -> None:
        """Put arm and blocks anywhere plausible, for pretraining images: blocks lying, held, stacked or on the plate. Not an episode."""
        layout = draw_layout(rng)
        self.layout = Layout(colours=self.layout.colours, positions_m=layout.positions_m, yaws_rad=layout.yaws_rad, plate_m=layout.plate_m)
        self._mujoco.mj_resetData(self._model, self._data)
        self._paint(self.layout)
        places = np.column_stack([layout.positions_m, np.full(NUM_BLOCKS, BLOCK_HALF_M)])
        special, below = rng.permutation(NUM_BLOCKS)[:2]
        hand = rng.uniform(WORKSPACE_M[0] + (0.03, 0.07, 0.02), WORKSPACE_M[1] - (0.03, 0.07, 0.06))
        finger = rng.uniform(viperx.FINGER_CLOSED_M, viperx.FINGER_OPEN_M)
        kind = rng.choice(["lying", "near", "held", "plate", "stacked"], p=[0.25, 0.25, 0.25, 0.125, 0.125])
        if kind == "near":
            hand = places[special] + rng.normal(0, (0.02, 0.02, 0.0)) + (0, 0, 0.01 + rng.uniform(0, 0.12))
        elif kind == "plate":
            places[special] = (*(layout.plate_m + rng.normal(0, 0.012, 2)), PLATE_TOP_M + BLOCK_HALF_M)
        elif kind == "stacked":
            places[special] = places[below] + (*rng.normal(0, 0.006, 2), 2 * BLOCK_HALF_M)
        elif kind == "held":
            finger = viperx.PAD_INNER_M + BLOCK_HALF_M
            places[special] = hand - (*rng.normal(0, 0.004, 2), 0.008)
            self.layout.yaws_rad[special] = 0.0
        self._put_arm(hand, finger)
        for block in range(NUM_BLOCKS):
            self._put_block(block, places[block], self.layout.yaws_rad[block])
        self._mujoco.mj_forward(self._model, self._data)
        self._begin()

    # ---- internals ----

    def _index_model(self) -> None:
        model = self._model
        names = [viperx.joint_name(joint) for joint in viperx.ARM_JOINTS + viperx.FINGER_JOINTS]
        self._joint_addresses = np.array([model.joint(name).qposadr[0] for name in names])
        self._hand = model.body(viperx.joint_name("gripper_link")).id
        self._plate = model.body("plate").id
        self._pads = {model.geom("pad_left").id, model.geom("pad_right").id}
        self._plate_geoms = [model.geom("plate").id, model.geom("glaze").id]
        self._block_geoms = [model.geom(f"block_{i}").id for i in range(NUM_BLOCKS)]
        self._block_of = {geom: block for block, geom in enumerate(self._block_geoms)}
        self._blocks = [model.body(f"block_{i}").id for i in range(NUM_BLOCKS)]
        self._block_addresses = [model.joint(f"block_{i}").qposadr[0] for i in range(NUM_BLOCKS)]
        first = [model.joint(f"block_{i}").dofadr[0] for i in range(NUM_BLOCKS)]
        self._block_velocities = np.array(first)[:, None] + np.arange(3)

    def _paint(self, layout: Layout) -> None:
        for geom, colour in zip(self._block_geoms, layout.colours, strict=True):
            self._model.geom_rgba[geom] = (*PALETTE[colour], 1)
        self._model.body_pos[self._plate, :2] = layout.plate_m

    def _put_arm(self, tcp: np.ndarray, finger: float) -> None:
        self._goal = np.clip(tcp, *WORKSPACE_M)
        self._finger = finger
        self._data.qpos[self._joint_addresses] = (*viperx.inverse_kinematics(self._goal), finger, -finger)
        self._data.ctrl[:] = self._data.qpos[self._joint_addresses]

    def _put_block(self, block: int, position: Any, yaw: float) -> None:
        address = self._block_addresses[block]
        self._data.qpos[address : address + 7] = (*position, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))

    def _begin(self) -> None:
        self.num_steps = 0
        self._start = self._data.xpos[self._blocks].copy()
        self._highest = self._start[:, 2].copy()
        self._brushed = np.zeros(NUM_BLOCKS, bool)
        self._ever_brushed = np.zeros(NUM_BLOCKS, bool)
        self._chosen: int | None = None
        self._success = False

    def _pad_contacts(self) -> np.ndarray:
        """(3 blocks, 2 pads) bool."""
        contact = self._data.contact
        touching = contact.geom[contact.dist < 0.0005]  # (contacts, 2)
        found = np.zeros((NUM_BLOCKS, 2), bool)
        for side, pad in enumerate(sorted(self._pads)):
            partners = touching[(touching == pad).any(axis=1)]
            found[:, side] = np.isin(self._block_geoms, partners)
        return found

    def _watch(self) -> None:
        """Once a physics step: what is over within a control step counts all the same. Plain Python: NumPy's cost twice as much."""
        np.maximum(self._highest, self._data.xpos[self._blocks, 2], out=self._highest)
        for pair in self._data.contact.geom.tolist():
            if not self._pads.isdisjoint(pair):
                for block in self._block_of.keys() & pair:
                    self._brushed[self._block_of[block]] = True

    def _judge(self) -> None:
        self._ever_brushed |= self._brushed
        family, moment = tabletop_tasks.FAMILIES[self.family], self.moment()
        if self._chosen is None:
            acted_on = np.flatnonzero(family.acted_on(moment))
            if acted_on.size:
                wrong = acted_on[acted_on != self.target]
                self._chosen = int(wrong[0] if wrong.size else self.target)
        self._success = family.success(moment)

    def _check_physics(self) -> None:
        data, names = self._data, self._mujoco.mjtWarning
        fired = [names(i).name for i in range(int(names.mjNWARNING)) if data.warning[i].number]
        if fired or not np.isfinite(data.qpos).all():
            raise SimulatorError(f"physics became unstable at step {self.num_steps}: {fired or 'joint positions are not finite'}")


def _known(family: str) -> str:
    if family not in FAMILIES:
        raise ValueError(f"tabletop has no task family '{family}'; it has {', '.join(FAMILIES)}")
    return family
