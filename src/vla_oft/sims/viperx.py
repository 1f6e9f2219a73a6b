"""The ViperX-300s arm: its meshes, its MuJoCo description with retuned servos, and its inverse kinematics.

Meshes and kinematic tree come from gym-aloha (Apache-2.0), used as a folder of files; its code is never imported.
Retuned, because the stock description cannot follow small increments: joint friction of 30-60 N m against weak position gains.
Flat pads replace the stock finger hulls, which are wedges that squeeze objects out.

Frames: the base stands at the origin, x forward, y left, z up; metres and radians. The tool centre point (TCP) lies between the
finger tips, `TCP_M` in front of the gripper link.
"""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from vla_oft.sims.base import SimulatorError
from vla_oft.sims.meshes import decimate, read_stl

ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
FINGER_JOINTS = ("left_finger", "right_finger")  # the right one runs from -FINGER_CLOSED_M to -FINGER_OPEN_M
FINGER_CLOSED_M = 0.021
FINGER_OPEN_M = 0.062
PAD_INNER_M = 0.021  # from a finger's joint axis to the inner face of its pad: the gap is 2 * (joint - PAD_INNER_M)
TIP_BELOW_TCP_M = 0.0237
TCP_M = 0.130

FINE_GROUP, COARSE_GROUP = 2, 4  # geom groups of the arm's meshes: as published for people, decimated for policy cameras
COARSE = "_coarse"

_PREFIX = "vx300s_right/"
_CELL_M = 0.004  # of the decimation; a pixel of a 128-px front camera is 4 mm wide
_SHOULDER_HEIGHT_M = 0.12705
_UPPER_ARM_M = float(np.hypot(0.05955, 0.3))
_FOREARM_M = 0.3
_ELBOW_OFFSET_RAD = float(np.arctan2(0.05955, 0.3))
_WRIST_TO_TCP_M = 0.069744 + TCP_M
# joint: (armature, dry friction). The reflected inertia of the gears outweighs the links, so one servo frequency suits every pose.
# Without it the contact solver, which knows nothing of implicit damping, lets held objects slip.
_SERVO_RAD_S = 50.0
_ARMATURE = {
    "waist": (1.0, 0.5),
    "shoulder": (1.0, 0.5),
    "elbow": (0.6, 0.5),
    "forearm_roll": (0.1, 0.1),
    "wrist_angle": (0.1, 0.1),
    "wrist_rotate": (0.1, 0.1),
}
VELOCITY_LEAD_S = 2 / _SERVO_RAD_S  # add this times the wanted velocity to a position command: the servo then follows without lag
# armature, dry friction, position gain, damping: 6 N on a closed grip
_FINGER = (0.1, 0.1, 150.0, 8.0)


def assets_folder() -> Path:
    """The folder of gym-aloha's meshes and MJCF files. Raises SimulatorError when it is not installed."""
    found = importlib.util.find_spec("gym_aloha")
    if found is None or found.origin is None:
        raise SimulatorError("the embedded simulator uses the robot meshes of gym-aloha: pip install --no-deps gym-aloha")
    return Path(found.origin).parent / "assets"


def joint_name(joint: str) -> str:
    """The name in the MuJoCo model of one of `ARM_JOINTS` or `FINGER_JOINTS`; of a body likewise ("gripper_link")."""
    return _PREFIX + joint


def mesh_elements() -> list[ElementTree.Element]:
    """`<mesh>` elements that the arm's geoms refer to, each with a coarse twin; file names are relative to `assets_folder()`."""
    fine = list(ElementTree.parse(assets_folder() / "vx300s_dependencies.xml").getroot().iter("mesh"))
    return fine + [_coarse_mesh(mesh) for mesh in fine]


def arm_element() -> ElementTree.Element:
    """The arm as a `<body>` standing at the origin and facing +x. Only the finger pads collide, and only with geoms of conaffinity 2."""
    arm = next(ElementTree.parse(assets_folder() / "vx300s_right.xml").getroot().iter("body"))
    arm.set("pos", "0 0 0")
    arm.set("euler", "0 0 0")
    for body in arm.iter("body"):
        body.set("gravcomp", "1")
        for camera in body.findall("camera"):
            body.remove(camera)
        for geom in body.findall("geom"):
            geom.set("contype", "0")
            geom.set("conaffinity", "0")
            geom.set("material", "finger" if "finger" in geom.get("name", "") else "arm")
            if geom.get("mesh"):
                geom.set("group", str(FINE_GROUP))
                coarse = {attribute: geom.get(attribute, "") + COARSE for attribute in ("name", "mesh")}
                body.append(ElementTree.Element("geom", {**geom.attrib, **coarse, "group": str(COARSE_GROUP), "mass": "0"}))
        if body.get("name", "").endswith("_finger_link"):
            body.append(_pad(side=-1 if "left" in body.get("name", "") else 1))
    for joint in arm.iter("joint"):
        name = joint.get("name", "").removeprefix(_PREFIX)
        armature, friction, _, damping = _servo(name)
        joint.set("armature", str(armature))
        joint.set("damping", str(damping))
        joint.set("frictionloss", str(friction))
        if name in FINGER_JOINTS:
            low, high = (FINGER_CLOSED_M, FINGER_OPEN_M) if name == "left_finger" else (-FINGER_OPEN_M, -FINGER_CLOSED_M)
            joint.set("range", f"{low} {high}")
    return arm


def actuator_elements() -> list[ElementTree.Element]:
    """Position servos in the order `ARM_JOINTS + FINGER_JOINTS`; a control value is a joint position."""
    return [
        ElementTree.Element(
            "position", name=name, joint=_PREFIX + name, kp=str(_servo(name)[2]), forcelimited="true", forcerange="-300 300"
        )
        for name in ARM_JOINTS + FINGER_JOINTS
    ]


def inverse_kinematics(tcp: np.ndarray) -> np.ndarray:
    """Joint angles (6,) that put the TCP at `tcp` (3,) with the gripper pointing straight down, its fingers left and right (along y).

    The wrist undoes the waist's turn, so the hand keeps its orientation everywhere. Points out of reach are pulled towards the base.
    """
    waist = np.arctan2(tcp[1], tcp[0])
    reach = np.hypot(tcp[0], tcp[1])
    height = tcp[2] + _WRIST_TO_TCP_M - _SHOULDER_HEIGHT_M
    distance = min(float(np.hypot(reach, height)), _UPPER_ARM_M + _FOREARM_M - 1e-4)
    direction = np.arctan2(reach, height)  # from the vertical
    cosine = (_UPPER_ARM_M**2 + distance**2 - _FOREARM_M**2) / (2 * _UPPER_ARM_M * distance)
    upper = direction - np.arccos(np.clip(cosine, -1, 1))
    shoulder = upper - _ELBOW_OFFSET_RAD
    lower = np.arctan2(
        distance * np.sin(direction) - _UPPER_ARM_M * np.sin(upper), distance * np.cos(direction) - _UPPER_ARM_M * np.cos(upper)
    )
    elbow = lower - np.pi / 2 - shoulder
    return np.array([waist, shoulder, elbow, 0.0, np.pi / 2 - shoulder - elbow, waist])


def _coarse_mesh(mesh: ElementTree.Element) -> ElementTree.Element:
    scale = np.array([float(s) for s in mesh.get("scale", "1 1 1").split()])
    file = Path(mesh.get("file", ""))
    vertices, faces = decimate(read_stl(assets_folder() / file.name) * scale, _CELL_M)
    text = [" ".join(map(str, array.ravel().tolist())) for array in (vertices, faces)]
    return ElementTree.Element("mesh", name=mesh.get("name", file.stem) + COARSE, vertex=text[0], face=text[1])


def _servo(joint: str) -> tuple[float, float, float, float]:
    """Armature, dry friction, position gain and damping: critically damped."""
    if joint in FINGER_JOINTS:
        return _FINGER
    armature, friction = _ARMATURE[joint]
    return armature, friction, armature * _SERVO_RAD_S**2, 2 * armature * _SERVO_RAD_S


def _pad(side: int) -> ElementTree.Element:
    half_x, half_y, half_z = 0.022, 0.004, 0.010
    finger_link_m = 0.0687
    return ElementTree.Element(
        "geom",
        name=f"pad_{'left' if side < 0 else 'right'}",
        type="box",
        size=f"{half_x} {half_y} {half_z}",
        pos=f"{TCP_M - finger_link_m} {side * (PAD_INNER_M - half_y)} 0",
        group="3",
        contype="2",
        conaffinity="0",
        condim="4",
        friction="1.5 0.02 0.001",
        solref="0.01 1",
        priority="1",
    )
