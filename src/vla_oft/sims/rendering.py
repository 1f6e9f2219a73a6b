"""MuJoCo without a display: choosing how it renders, and pictures of a scene at any size.

MuJoCo reads the environment variable MUJOCO_GL once, when it is imported, so every simulator imports it through `load_mujoco`.
On a machine without a screen the choices are `egl` (GPU driver, or Mesa on the CPU) and `osmesa` (always the CPU).
"""

import atexit
import ctypes
import ctypes.util
import os
import sys
import weakref
from types import ModuleType
from typing import Any

import numpy as np

from vla_oft.sims.base import SimulatorError

ADVICE = """MuJoCo cannot render on this machine (%s). Install one of these, here for Debian and Ubuntu:
    EGL, on the GPU or else on the CPU:                           apt-get install libegl1 libgl1 libgl1-mesa-dri
    OSMesa, always on the CPU, where the distribution has it:     apt-get install libosmesa6
vla-oft takes the first of them that works, unless the environment variable MUJOCO_GL names one (egl, osmesa)."""
IMPORTED_EARLY = (
    "mujoco was imported before vla_oft without a headless renderer: it would need a display. "
    "Import vla_oft's simulator first, or set MUJOCO_GL=egl (or osmesa) before Python starts"
)

_EGL_PLATFORM_DEVICE_EXT = 0x313F
_MAX_EGL_DEVICES = 32


def choose_renderer() -> None:
    """Set MUJOCO_GL to a renderer that works without a display, unless it is set. Raises SimulatorError when there is none.

    Tried out before MuJoCo is imported, which reads the variable only once: libEGL alone, without a driver, draws nothing.
    """
    if sys.platform != "linux" or os.environ.get("MUJOCO_GL") or "mujoco" in sys.modules:
        return
    if _egl_works():
        os.environ["MUJOCO_GL"] = "egl"
    elif ctypes.util.find_library("OSMesa"):
        os.environ["MUJOCO_GL"] = "osmesa"
    else:
        raise SimulatorError(ADVICE % "neither an EGL device nor OSMesa was found")


def load_mujoco() -> ModuleType:
    """The `mujoco` module, imported with a renderer that works headless. Raises SimulatorError with the packages to install."""
    choose_renderer()
    try:
        import mujoco
    except Exception as error:  # mujoco raises RuntimeError, ImportError or AttributeError, depending on what is missing
        if isinstance(error, ModuleNotFoundError) and error.name == "mujoco":
            raise SimulatorError("the simulators need MuJoCo: pip install 'vla-oft[sim]'") from error
        raise _cannot_render(error) from error
    if _needs_a_display(mujoco):
        raise SimulatorError(IMPORTED_EARLY)
    # Defaults that let the destructor of a renderer whose constructor failed end quietly.
    renderer: Any = mujoco.Renderer
    renderer._gl_context = renderer._mjr_context = None
    return mujoco


def check_renderer() -> None:
    """Draw one tiny picture, to fail early. Raises SimulatorError with the packages to install."""
    mujoco = load_mujoco()
    model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><camera name="eye"/></worldbody></mujoco>')
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = Renderer(model)
    try:
        renderer.draft(data, "eye", 8)
    finally:
        renderer.close()


def _cannot_render(error: Exception) -> SimulatorError:
    return SimulatorError(ADVICE % f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}")


def _needs_a_display(mujoco: ModuleType) -> bool:
    """Whether a MuJoCo that somebody else imported settled on windows, on a Linux machine that shows none."""
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return False
    backend = getattr(getattr(mujoco, "GLContext", None), "__module__", "")
    return backend == "mujoco.glfw" and os.environ.get("MUJOCO_GL") != "glfw"


def _egl_works() -> bool:
    """Whether EGL can open a device without a display, the way MuJoCo will."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype, egl.eglGetProcAddress.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    query, open_display = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not query or not open_display:
        return False
    devices, num_devices = (ctypes.c_void_p * _MAX_EGL_DEVICES)(), ctypes.c_int()
    devices_of = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(open_display)
    if not devices_of(_MAX_EGL_DEVICES, devices, ctypes.byref(num_devices)):
        return False
    displays = (display_of(_EGL_PLATFORM_DEVICE_EXT, device, None) for device in devices[: num_devices.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)


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
                raise _cannot_render(error) from error
        return self._renderers[key]


def _close(renderer: "weakref.ref[Renderer]") -> None:
    alive = renderer()
    if alive is not None:
        alive.close()
