"""Any dataset that can be read, written anew as LeRobot v3.0."""

from vla_oft.convert.report import Converted
from vla_oft.convert.run import ConvertConfig, convert

__all__ = ["ConvertConfig", "Converted", "convert"]
