"""Looking at a dataset before training on it: what is in it, what is wrong with it, how to mend that."""

from vla_oft.inspection.command import run
from vla_oft.inspection.facts import Inspection, Problem
from vla_oft.inspection.measure import Options, inspect_source

__all__ = ["Inspection", "Options", "Problem", "inspect_source", "run"]
