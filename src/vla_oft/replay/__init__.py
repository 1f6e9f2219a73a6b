"""Recorded actions, executed again in the simulator that they were recorded in."""

from vla_oft.replay.episode import Deviation, Replayed, Scene
from vla_oft.replay.report import Replay
from vla_oft.replay.run import ReplayConfig, replay, which_episodes

__all__ = ["Deviation", "Replay", "ReplayConfig", "Replayed", "Scene", "replay", "which_episodes"]
