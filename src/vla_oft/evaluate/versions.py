"""What a result depends on besides the policy: program versions, renderer and machine."""

import importlib.metadata
import os
import platform
import sys

from vla_oft.machine import cpu_name

DISTRIBUTIONS = ("vla-oft", "vla-oft-client", "numpy", "torch", "mujoco", "robosuite", "hf-libero", "gym-aloha")


def versions() -> dict[str, str]:
    """Name -> version or description; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        **found,
        "platform": platform.platform(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} logical cores",
        "MUJOCO_GL": os.environ.get("MUJOCO_GL", ""),
        "renderer": _renderer(),
    }


def _renderer() -> str:
    """OpenGL's own words. Only asked when a simulator has already brought MuJoCo up: results differ between drivers."""
    mujoco = sys.modules.get("mujoco")
    if mujoco is None:
        return ""
    try:
        from OpenGL import GL

        context = mujoco.GLContext(16, 16)
        context.make_current()
        try:
            words = [GL.glGetString(name) for name in (GL.GL_RENDERER, GL.GL_VERSION)]
        finally:
            context.free()
    except Exception as error:  # any driver failure: a missing line in the report must not lose an evaluation
        return f"unknown ({type(error).__name__}: {error})"
    return ", ".join(w.decode() for w in words if w)
