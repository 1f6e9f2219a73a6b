"""Choosing how MuJoCo renders, and what is said when it cannot. Each case is a process of its own: MuJoCo decides once."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    not (find_spec("mujoco") and find_spec("gym_aloha")), reason="pip install 'vla-oft[sim]'; pip install --no-deps gym-aloha"
)
CHECK = "from vla_oft.sims.rendering import check_renderer\ncheck_renderer()\n"
NO_EGL = "import ctypes.util\nfrom vla_oft.sims import rendering\nrendering._egl_works = lambda: False\n"
NO_OSMESA = "ctypes.util.find_library = lambda name: None\n"


def run(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")}
    return subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)


def last_lines(result):
    """What the exception said."""
    return result.stderr[result.stderr.index("SimulatorError: ") :]


def test_without_a_wish_a_renderer_that_works_is_chosen():
    result = run(CHECK + "import os; print(os.environ['MUJOCO_GL'])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("egl", "osmesa")


def test_egl_is_chosen_only_where_it_has_a_device():
    assert run(
        NO_EGL + "ctypes.util.find_library = str\nrendering.choose_renderer()\nimport os; print(os.environ['MUJOCO_GL'])"
    ).stdout == ("osmesa\n")
    said = last_lines(run(NO_EGL + NO_OSMESA + "rendering.choose_renderer()"))
    assert "neither an EGL device nor OSMesa was found" in said


@pytest.mark.skipif(not os.path.exists("/usr/share/glvnd/egl_vendor.d"), reason="needs glvnd, to hide EGL's drivers from it")
def test_libegl_without_a_driver_does_not_count(tmp_path):
    hidden = {"__EGL_VENDOR_LIBRARY_DIRS": str(tmp_path)}
    assert run("from vla_oft.sims import rendering\nassert not rendering._egl_works()", **hidden).returncode == 0


@pytest.mark.parametrize("backend", ["nonsense", "osmesa"])
def test_a_missing_renderer_is_explained_with_the_packages_to_install(backend):
    hidden = "import sys; sys.modules['OpenGL'] = None\n" if backend == "osmesa" else ""
    for code in (CHECK, "from vla_oft.sims import tabletop\nenv = tabletop.make('touch')\nenv.observe()"):
        said = last_lines(run(hidden + code, MUJOCO_GL=backend))
        assert f"MuJoCo cannot render on this machine (MUJOCO_GL={backend}" in said
        assert "apt-get install libegl1 libgl1 libgl1-mesa-dri\n" in said
        assert "apt-get install libosmesa6\n" in said and "unset" not in said


def test_a_context_that_fails_although_we_chose_it_names_both_options():
    said = last_lines(
        run("from vla_oft.sims import rendering\nrendering._egl_works = lambda: True\n" + CHECK, EGL_PLATFORM="", **no_drivers())
    )
    assert "MUJOCO_GL=egl" in said and "libegl1" in said and "libosmesa6" in said


def no_drivers():
    return {"__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"}


def test_mujoco_imported_too_early_is_its_own_case():
    said = last_lines(run("import mujoco\n" + CHECK))
    assert "mujoco was imported before vla_oft without a headless renderer" in said and "apt-get" not in said
    assert run("import mujoco\n" + CHECK, MUJOCO_GL=os.environ.get("MUJOCO_GL", "egl")).returncode == 0


def test_missing_meshes_are_one_clear_line():
    said = last_lines(run("import sys; sys.modules['gym_aloha'] = None\nfrom vla_oft.sims import tabletop\ntabletop.make('touch')"))
    assert said.count("\n") == 1 and "pip install --no-deps gym-aloha" in said
