"""MuJoCo without a display: choosing how it renders, and pictures of a scene at any size.

MuJoCo reads the environment variable MUJOCO_GL once, when it is imported, so every simulator imports it through `load_mujoco`.
On a machine without a screen the choices are `egl` (GPU driver, or Mesa on the CPU) and `osmesa` (always the CPU).
"""

import atexit
import ctypes
import os
import sys
import weakref
from types import ModuleType
from typing import Any

import numpy as np

from vla_oft.sims.base import SimulatorError

ADVICE = (
    "MuJoCo cannot render on this machine (MUJOCO_GL=%s: %s). Install a renderer, on Debian or Ubuntu:\n"
    "    apt-get install libegl1 libgl1 libgl1-mesa-dri libosmesa6\n"
    "and choose it with MUJOCO_GL=egl or MUJOCO_GL=osmesa (or unset MUJOCO_GL to let vla-oft choose)."
)


def load_mujoco() -> ModuleType:
    """The `mujoco` module, imported with a renderer that works headless. Raises SimulatorError with the packages to install."""
    if "mujoco" not in sys.modules and sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "egl" if _has_library("libEGL.so.1") else "osmesa"
    try:
        import mujoco
    except ModuleNotFoundError as error:
        raise SimulatorError("the simulators need MuJoCo: pip install 'vla-oft[sim]'") from error
    except Exception as error:  # mujoco raises RuntimeError, ImportError or AttributeError, depending on what is missing
        raise SimulatorError(ADVICE % (os.environ.get("MUJOCO_GL"), error)) from error
    # Defaults that let the destructor of a renderer whose constructor failed end quietly.
    mujoco.Renderer._gl_context = mujoco.Renderer._mjr_context = None
    return mujoco


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


class Renderer:
    """Pictures of one model. Geoms of group 2 are for people, of group 4 for policies, of groups 0 and 1 for both; others are hidden.

    One graphics context for each size and quality, made at first use. `draft` pictures leave out shadows, reflections, fog
    and multisampling: 5-10 times cheaper on a CPU.
    """

    def __init__(self, model: Any) -> None:
        self._mujoco = load_mujoco()
        self._model = model
        self._options = {pretty: self._mujoco.MjvOption() for pretty in (False, True)}
        for pretty, option in self._options.items():
            option.geomgroup[:] = 0
            option.geomgroup[[0, 1, 2 if pretty else 4]] = 1
        self._renderers: dict[tuple[int, int, bool], Any] = {}

    def draft(self, data: Any, camera: str, size: int) -> np.ndarray:
        """A cheap square picture for a policy, uint8 (size, size, 3)."""
        return self._draw(data, camera, size, size, pretty=False)

    def pretty(self, data: Any, camera: str, height: int, width: int) -> np.ndarray:
        """A picture for people, uint8 (height, width, 3)."""
        return self._draw(data, camera, height, width, pretty=True)

    def geom_ids(self, data: Any, camera: str, size: int) -> np.ndarray:
        """Which geom each pixel shows, int32 (size, size); -1 where there is none."""
        renderer = self._renderer(size, size, pretty=False)
        renderer.update_scene(data, camera, self._options[False])
        renderer.enable_segmentation_rendering()
        try:
            ids = renderer.render()
        finally:
            renderer.disable_segmentation_rendering()
        return np.where(ids[..., 1] == int(self._mujoco.mjtObj.mjOBJ_GEOM), ids[..., 0], -1)

    def close(self) -> None:
        """Free every graphics context."""
        while self._renderers:
            self._renderers.popitem()[1].close()

    def _draw(self, data: Any, camera: str, height: int, width: int, *, pretty: bool) -> np.ndarray:
        renderer = self._renderer(height, width, pretty=pretty)
        renderer.update_scene(data, camera, self._options[pretty])
        if not pretty:
            flags = self._mujoco.mjtRndFlag
            for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_FOG, flags.mjRND_HAZE, flags.mjRND_SKYBOX):
                renderer.scene.flags[flag] = 0
        return renderer.render()

    def _renderer(self, height: int, width: int, *, pretty: bool) -> Any:
        key = (height, width, pretty)
        if key not in self._renderers:
            visual = self._model.vis
            visual.quality.offsamples = 4 if pretty else 0  # segmentation ids would blend under multisampling
            visual.global_.offheight = max(visual.global_.offheight, height)
            visual.global_.offwidth = max(visual.global_.offwidth, width)
            try:
                self._renderers[key] = self._mujoco.Renderer(self._model, height, width)
                if len(self._renderers) == 1:
                    atexit.register(_close, weakref.ref(self))  # now, so that it runs before MuJoCo's own clean-up of the driver
            except Exception as error:  # EGL, OSMesa and GLFW each raise their own kinds
                raise SimulatorError(ADVICE % (os.environ.get("MUJOCO_GL"), error)) from error
        return self._renderers[key]


def _close(renderer: "weakref.ref[Renderer]") -> None:
    alive = renderer()
    if alive is not None:
        alive.close()
