"""Shared fixtures: a tiny real policy, and the recorded data beside the checkout (absent on a user's machine)."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from vla_oft.sims.base import SimulatorError
from vla_oft.sims.rendering import choose_renderer

with contextlib.suppress(SimulatorError):  # no renderer: the tests that need one say so
    choose_renderer()  # before any test, or a library that one imports, brings mujoco in

SHARED = Path(os.environ.get("VLA_OFT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "parity").is_dir():
        pytest.skip(f"needs the recorded reference data in {SHARED} (set VLA_OFT_SHARED)")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    import torch

    torch.set_num_threads(2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
