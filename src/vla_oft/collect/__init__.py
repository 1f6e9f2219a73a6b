"""Demonstrations and scenes from the simulators and their scripted experts, written as LeRobot datasets."""

from vla_oft.collect.episodes import CollectConfig, Noise, collect
from vla_oft.collect.scenes import SceneConfig, collect_scenes
from vla_oft.collect.workers import Collected, provenance

__all__ = ["CollectConfig", "Collected", "Noise", "SceneConfig", "collect", "collect_scenes", "provenance"]
