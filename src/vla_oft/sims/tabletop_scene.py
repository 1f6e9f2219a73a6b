"""What stands on the embedded simulator's table: one arm, a plate and three coloured blocks, and how a scene is drawn at random.

x (m)   y +0.115 ......... -0.115          the front camera looks back at the robot from x = 0.9
0.53         ( plate )
0.37     .................
         .  [A]      [C] .                 every block has its own lane along x: the gripper fits beside it,
0.25     .      [B]      .                 and it can be pushed forward without meeting another
0.00         robot base
"""

from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from vla_oft.sims import viperx
from vla_oft.sims.rendering import load_mujoco

PALETTE = {
    "red": (0.86, 0.10, 0.08),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.08, 0.26, 0.88),
    "yellow": (0.98, 0.80, 0.05),
    "purple": (0.55, 0.14, 0.70),
}
NUM_BLOCKS = 3
BLOCK_HALF_M = 0.020
PLATE_RADIUS_M = 0.060
PLATE_TOP_M = 0.006
PLATE_XY_M = (0.505, 0.0)
REGION_M = ((0.25, 0.37), (-0.115, 0.115))  # block centres: x, y
LANE_M = 0.072  # two blocks are at least this far apart in y ...
BESIDE_M = 0.088  # ... and this far where a gripper around the one would reach the other in x
MAX_YAW_RAD = 0.2
TIMESTEP_S = 0.005

_XML = """
<mujoco model="tabletop">
  <compiler angle="radian" meshdir="{meshdir}" inertiafromgeom="auto" inertiagrouprange="0 5"/>
  <option timestep="{timestep}" cone="elliptic" impratio="5" integrator="implicitfast" noslip_iterations="2"/>
  <visual>
    <map znear="0.02" zfar="6" shadowclip="0.9" shadowscale="0.7"/>
    <quality shadowsize="4096" offsamples="0"/>
    <headlight ambient="0.42 0.42 0.42" diffuse="0.22 0.22 0.22" specular="0 0 0"/>
  </visual>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.86 0.90 0.94" rgb2="0.62 0.68 0.75" width="128" height="128"/>
    <texture name="wood" type="2d" builtin="flat" rgb1="0.8 0.7 0.5" width="512" height="512"/>
    <material name="wood" texture="wood" specular="0.1" shininess="0.1"/>
    <material name="arm" rgba="0.21 0.22 0.25 1" specular="0.5" shininess="0.6"/>
    <material name="finger" rgba="0.32 0.33 0.36 1" specular="0.3" shininess="0.4"/>
    <material name="block" specular="0.25" shininess="0.3"/>
    <material name="china" rgba="0.80 0.80 0.79 1" specular="0.3" shininess="0.6"/>
    <material name="glaze" rgba="0.58 0.68 0.74 1" specular="0.3" shininess="0.6"/>
  </asset>
  <worldbody>
    <light directional="true" castshadow="true" pos="0.3 0.8 1.6" dir="-0.1 -0.45 -1" diffuse="0.55 0.54 0.50" specular="0.25 0.25 0.25"/>
    <light directional="true" castshadow="false" pos="1 -1 1" dir="-0.7 0.6 -0.6" diffuse="0.16 0.17 0.20" specular="0 0 0"/>
    <geom name="table" type="box" size="0.62 0.80 0.02" pos="0.34 0 -0.02" material="wood" friction="0.7 0.005 0.0001"/>
    <body name="plate" pos="{plate_x} {plate_y} 0">
      <geom name="plate" type="cylinder" size="{plate_radius} {plate_half}" pos="0 0 {plate_half}" material="china"/>
      <geom name="glaze" type="cylinder" size="{glaze_radius} {plate_half}" pos="0 0 {glaze_z}" material="glaze" contype="0"
        conaffinity="0"/>
    </body>
    {blocks}
    <camera name="front" pos="0.90 0 0.54" xyaxes="0 1 0 -0.672 0 0.741" fovy="33"/>
    <camera name="people" pos="0.96 0.48 0.58" xyaxes="-0.586 0.81 0 -0.375 -0.271 0.886" fovy="38"/>
  </worldbody>
  <actuator/>
</mujoco>
"""
_BLOCK = """
    <body name="block_{i}" pos="0.3 {y} {half}">
      <freejoint name="block_{i}"/>
      <geom name="block_{i}" type="box" size="{half} {half} {half}" material="block" mass="0.04" conaffinity="3"
        condim="4" friction="1 0.02 0.001"/>
    </body>"""
_WRIST_CAMERA = {"name": "wrist", "pos": "0.0 0 0.115", "xyaxes": "0 -1 0 0.56 0 0.83", "fovy": "68"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One random scene.

    colours: names of the three blocks' colours.
    positions_m: (3, 2) block centres on the table.
    yaws_rad: (3,) small turns of the blocks.
    plate_m: (2,) centre of the plate.
    """

    colours: tuple[str, ...]
    positions_m: np.ndarray
    yaws_rad: np.ndarray
    plate_m: np.ndarray


def draw_layout(rng: np.random.Generator) -> Layout:
    """A scene in which an open gripper fits around every block and every block can be pushed forward freely."""
    names = list(PALETTE)
    colours = tuple(names[i] for i in rng.permutation(len(names))[:NUM_BLOCKS])
    (x_low, x_high), (y_low, y_high) = REGION_M
    while True:
        positions = rng.uniform((x_low, y_low), (x_high, y_high), (NUM_BLOCKS, 2))
        gaps = np.abs(positions[:, None] - positions[None])[np.triu_indices(NUM_BLOCKS, 1)]  # (3 pairs, 2)
        if np.all(gaps[:, 1] >= np.where(gaps[:, 0] < 0.055, BESIDE_M, LANE_M)):
            break
    plate = np.array(PLATE_XY_M) + rng.uniform((-0.01, -0.03), (0.01, 0.03))
    return Layout(colours=colours, positions_m=positions, yaws_rad=rng.uniform(-MAX_YAW_RAD, MAX_YAW_RAD, NUM_BLOCKS), plate_m=plate)


def build_model() -> Any:
    """The compiled `mujoco.MjModel`: bodies `block_0` .. `block_2`, `plate`; cameras `front`, `wrist`, `people`."""
    mujoco = load_mujoco()
    plate_half = PLATE_TOP_M / 2
    root = ElementTree.fromstring(
        _XML.format(
            meshdir=viperx.assets_folder(), timestep=TIMESTEP_S, plate_x=PLATE_XY_M[0], plate_y=PLATE_XY_M[1],
            plate_radius=PLATE_RADIUS_M, plate_half=plate_half, glaze_radius=0.68 * PLATE_RADIUS_M, glaze_z=plate_half + 0.001,
            blocks="".join(_BLOCK.format(i=i, y=0.09 * (i - 1), half=BLOCK_HALF_M) for i in range(NUM_BLOCKS)),
        )
    )  # fmt: skip
    arm = viperx.arm_element()
    next(body for body in arm.iter("body") if body.get("name") == viperx.joint_name("gripper_link")).append(
        ElementTree.Element("camera", _WRIST_CAMERA)
    )
    _child(root, "worldbody").append(arm)
    _child(root, "asset").extend(viperx.mesh_elements())
    _child(root, "actuator").extend(viperx.actuator_elements())
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
    start = model.tex_adr[model.texture("wood").id]
    pixels = _wood(512)
    model.tex_data[start : start + pixels.size] = pixels.ravel()
    return model


def _child(root: ElementTree.Element, tag: str) -> ElementTree.Element:
    found = root.find(tag)
    assert found is not None
    return found


def _wood(size: int) -> np.ndarray:
    """Pale planks with a soft grain, uint8 (size, size, 3)."""
    rng = np.random.default_rng(0)
    across, along = np.meshgrid(np.arange(size) / size, np.arange(size) / size)
    plank = np.floor(across * 5).astype(int)
    wave = across * 5 + 0.05 * np.sin(2 * np.pi * (along + rng.uniform(size=5)[plank]))
    grain = 0.5 * np.sin(2 * np.pi * wave * 9) + 0.3 * np.sin(2 * np.pi * wave * 23 + 1) + 0.2 * rng.standard_normal((size, size))
    tone = rng.uniform(-0.035, 0.035, 5)[plank] + 0.012 * grain
    seam = np.where((across * 5) % 1 < 0.012, 0.85, 1.0)
    colour = (np.array([0.80, 0.70, 0.56]) + tone[..., None]) * seam[..., None]
    return np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8)
