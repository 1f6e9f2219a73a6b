"""A small arm's recordings in memory, healthy unless a test breaks them: a `Source` whose every number can be changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla_oft_client import Gripper, RobotSpec

STEPS, EPISODES = 60, 6

ARM = RobotSpec(
    name="arm",
    cameras=("front", "wrist"),
    state_dim=8,
    action_dim=7,
    control_hz=20.0,
    chunk_len=10,
    action_kind="delta_ee",
    absolute_mask=(False,) * 6 + (True,),
    normalize_mask=(True,) * 6 + (False,),
    normalization="bounds_q99",
    action_limits=((-1.0, 1.0),) * 7,
    gripper=(Gripper(index=6, open=-1.0, closed=1.0),),
)


class Recordings:
    """A `Source` over arrays: one (T, S), one (T, D) and one (T, H, W, 3) for each camera, of every episode.

    unreadable: episode -> reason, raised whenever its numbers are asked for.
    """

    def __init__(self, states: list[np.ndarray], actions: list[np.ndarray], pictures: dict[str, list[np.ndarray]]) -> None:
        self.state_arrays, self.action_arrays, self.pictures = states, actions, pictures
        self.path, self.name, self.format, self.kind = Path("/data/arm"), "arm", "memory", "demonstrations"
        self.fps: float | None = 20.0
        self.tasks: tuple[str, ...] = ("pick up the bowl", "open the drawer")
        self.state_names: tuple[str, ...] = ()
        self.action_names: tuple[str, ...] = ()
        self.extra_arrays: dict[str, list[np.ndarray]] = {}
        self.recording: dict[str, Any] = {}
        self.skipped: tuple[str, ...] = ()
        self.unreadable: dict[int, str] = {}
        self.damage: dict[int, str] = {}
        self.infos: dict[int, dict[str, Any]] = {}

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(a) for a in self.action_arrays], np.int64)

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(self.pictures)

    @property
    def state_dim(self) -> int:
        return self.state_arrays[0].shape[1] if self.state_arrays else 0

    @property
    def action_dim(self) -> int:
        return self.action_arrays[0].shape[1]

    @property
    def extras(self) -> dict[str, tuple[int, ...]]:
        return {name: values[0].shape[1:] for name, values in self.extra_arrays.items()}

    def __len__(self) -> int:
        return len(self.action_arrays)

    def fingerprint(self) -> str:
        return "0123456789abcdef"

    def frames(self, episode: int, indices: Any, camera: str) -> np.ndarray:
        if not self.pictures[camera]:
            raise ValueError(f"no frames of {camera}")
        return self.pictures[camera][episode][np.asarray(indices)]

    def states(self, episode: int) -> np.ndarray:
        self._refuse(episode)
        return self.state_arrays[episode]

    def actions(self, episode: int) -> np.ndarray:
        self._refuse(episode)
        return self.action_arrays[episode]

    def task_indices(self, episode: int) -> np.ndarray:
        return np.full(len(self.action_arrays[episode]), episode % len(self.tasks))

    def extra(self, name: str, episode: int) -> np.ndarray:
        return self.extra_arrays[name][episode]

    def episode_info(self, episode: int) -> dict[str, Any]:
        return self.infos.get(episode, {})

    def damaged(self) -> Iterator[tuple[int, str]]:
        return iter(self.damage.items())

    def _refuse(self, episode: int) -> None:
        if episode in self.unreadable:
            raise ValueError(self.unreadable[episode])


def arm(episodes: int = EPISODES, steps: int = STEPS) -> Recordings:
    """Healthy recordings: smooth increments of seven dimensions, the gripper last (-1 opens, +1 closes), eight of state, two cameras.

    state[t + 1] = state[t] + 0.05 * action[t] for the arm; the two fingers, mirrored, follow the gripper within two steps.
    """
    states, actions = [], []
    for number in range(episodes):
        rng = np.random.default_rng(number)
        t = np.arange(steps)[:, None]
        waves = sum(rng.normal(size=6) * np.sin(2 * np.pi * t / rng.uniform(20, 50, 6) + rng.uniform(0, 6, 6)) for _ in range(3))
        gripper = np.where(np.abs(t - steps // 2) < steps // 5, 1.0, -1.0)
        action = np.concatenate([np.clip(0.4 * waves, -1, 1), gripper], 1)
        position = 0.2 * rng.normal(size=6) + 0.05 * np.concatenate([np.zeros((1, 6)), np.cumsum(action[:-1, :6], 0)])
        opening = 0.04 * np.convolve((gripper[:, 0] < 0), [0, 0.5, 0.5], mode="full")[:steps]
        opening[:2] = 0.04
        fingers = np.stack([opening, -opening], 1)
        states.append(np.concatenate([position, fingers], 1).astype(np.float32))
        actions.append(action.astype(np.float32))
    return Recordings(states, actions, {"front": pictures(states, 0.0), "wrist": pictures(states, 1.0)})


def pictures(states: list[np.ndarray], hue: float, size: int = 32) -> list[np.ndarray]:
    """Pictures of four bars, one below the other, over a ramp; each bar's place is one dimension of the state."""
    everything = np.concatenate(states)[:, :4]
    low, span = everything.min(axis=0), np.ptp(everything, axis=0) + 1e-9
    across = np.arange(size)
    found = []
    for values in states:
        places = (values[:, :4] - low) / span * (size - 8) + 4
        bars = np.exp(-(((across - places[..., None]) / 2) ** 2))
        rows = np.repeat(bars, size // 4, axis=1)
        grey = 30 + 2 * across + 120 * rows
        found.append(np.stack([grey, (0.5 + 0.3 * hue) * grey, 60 + 40 * hue + 0 * grey], axis=-1).astype(np.uint8))
    return found
