"""Robot side of vla-oft: descriptions of robots, and the messages that travel between a robot and its policy."""

from vla_oft_client.spec import Gripper, RobotSpec
from vla_oft_client.types import ActionChunk, Observation

__all__ = ["ActionChunk", "Gripper", "Observation", "RobotSpec"]
