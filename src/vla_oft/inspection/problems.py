"""From facts to problems: every rule says what it saw, what that does to training and how to mend it.

A rule is a function `(Inspection, RobotSpec or None) -> problems`. Add one by adding it to its module's `RULES`.
"""

from vla_oft.inspection import camera_rules, episode_rules, motion_rules, number_rules
from vla_oft.inspection.facts import Inspection, Problem
from vla_oft_client import RobotSpec

SEVERITIES = ("error", "warning", "note")
"""error: do not train on this. warning: training works, but worse than it could. note: good to know."""

RULES = (*episode_rules.RULES, *number_rules.RULES, *motion_rules.RULES, *camera_rules.RULES)


def find(inspection: Inspection, spec: RobotSpec | None) -> tuple[Problem, ...]:
    """All problems, the most severe first."""
    found = [problem for rule in RULES for problem in rule(inspection, spec)]
    return tuple(sorted(found, key=lambda problem: SEVERITIES.index(problem.severity)))
