"""Problems of single numbers: not finite, never changing, far away from all others, outside the robot's limits."""

from collections.abc import Iterator, Sequence

from vla_oft.data.check import MANY
from vla_oft.inspection.facts import Dimension, Inspection, Problem, Sighting
from vla_oft_client import RobotSpec

FAR = 10.0
"""An outlier lies so many times the distance from q01 to q99 beyond either."""


OTHER_RANGE = 0.25
"""A gripper that reaches so far beyond the robot's limits follows another convention; below that, it is just not calibrated well."""


def not_finite(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """NaN and infinite values."""
    for what, seen, dims in (("states", found.broken_state, found.state), ("actions", found.broken_action, found.action)):
        if seen.count:
            yield Problem(
                rule="not-finite",
                severity="error",
                title=f"NaN or infinite values in the {what}",
                seen=seen,
                unit="steps",
                where=named([d for d in dims if d.non_finite]),
                effect="One such value makes the loss NaN; statistics and training refuse the dataset.",
                fix="Repair these steps, or leave the episodes out.",
            )


def constant(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Dimensions with one value, and those that leave it in less than a hundredth of the steps."""
    if found.kind != "demonstrations":
        return
    for what, dims in (("state", found.state), ("action", found.action)):
        still = [d for d in dims if d.constant and not d.gripper]
        if still and found.num_frames > 1:
            whole = what == "action" and len(still) == sum(not d.gripper for d in dims)
            yield Problem(
                rule="constant",
                severity="error" if whole else "note",
                title="The actions never change" if whole else f"Constant dimensions of the {what}",
                seen=Sighting(count=len(still), of=len(dims)),
                unit="dimensions",
                where=", ".join(f"{label(d)} = {d.min:g}" for d in still[:12]) + (", ..." if len(still) > 12 else ""),
                effect="A policy learns to keep the constant." if what == "action" else "It tells the policy nothing, and does no harm.",
                fix="Fine if this part of the robot is not used; otherwise the recorder did not fill it in.",
            )
        passed = spec.normalize_mask if spec and what == "action" else (True,) * len(dims)
        rare = [d for d in dims if d.q01 == d.q99 and d.q01 is not None and not d.constant and passed[d.index] and not d.gripper]
        if rare:
            yield Problem(
                rule="nearly-constant",
                severity="warning",
                title=f"Dimensions of the {what} that almost never change",
                seen=Sighting(count=len(rare), of=len(dims)),
                unit="dimensions",
                where=named(rare),
                effect="q01 and q99 are equal: normalised by quantiles (bounds_q99), these dimensions become constant.",
                fix="Normalise by 'bounds', or record more episodes in which they move.",
            )


def outliers(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Extremes far away from everything else."""
    for what, dims in (("state", found.state), ("action", found.action)):
        far = [d for d in dims if _beyond(d) > FAR]
        if far:
            worst = max(far, key=_beyond)
            yield Problem(
                rule="outliers",
                severity="warning" if spec and spec.normalization != "bounds_q99" else "note",
                title=f"Extremes of the {what} lie far from all other values",
                seen=Sighting(count=len(far), of=len(dims)),
                unit="dimensions",
                where=f"{named(far)}; {label(worst)}: {worst.min:g} to {worst.max:g}, but 98 % within {worst.q01:g} to {worst.q99:g}",
                effect="Normalised by 'bounds' or 'zscore', ordinary values shrink to a narrow band; 'bounds_q99' clips the extremes.",
                fix="Look at the plots: repair broken readings, or normalise by 'bounds_q99'.",
            )


def limits(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Actions that the robot would not accept."""
    if spec is None:
        return
    outside = [d for d in found.action if d.outside and d.outside.count and not (d.gripper and excess(d, spec) > OTHER_RANGE)]
    if not outside:
        return
    worst = max(outside, key=lambda d: d.outside.count if d.outside else 0)
    assert worst.outside is not None
    low, high = spec.action_limits[worst.index]
    yield Problem(
        rule="limits",
        severity="warning" if worst.outside.share > MANY else "note",
        title=f"Actions beyond the limits of robot '{spec.name}'",
        seen=worst.outside,
        unit="steps",
        where=f"{named(outside)}; {label(worst)} reaches {worst.min:g} to {worst.max:g}, allowed are {low:g} to {high:g}",
        effect="The policy learns commands that are cut off before they reach the robot.",
        fix="Check units and layout (metres or millimetres, radians or degrees, absolute or increments) before widening any limit.",
    )


def excess(dimension: Dimension, spec: RobotSpec) -> float:
    """How far an action dimension reaches beyond the robot's limits, in shares of their range."""
    low, high = spec.action_limits[dimension.index]
    if dimension.min is None or dimension.max is None:
        return 0.0
    return max(low - dimension.min, dimension.max - high, 0.0) / (high - low)


def label(dimension: Dimension) -> str:
    """The name of a dimension, with its number."""
    return dimension.name if dimension.name == str(dimension.index) else f"{dimension.index} ({dimension.name})"


def named(dimensions: Sequence[Dimension]) -> str:
    """The names of a few dimensions."""
    rest = f" and {len(dimensions) - 12} more" if len(dimensions) > 12 else ""
    return f"dimension{'s' if len(dimensions) > 1 else ''} {', '.join(map(label, dimensions[:12]))}{rest}"


def _beyond(d: Dimension) -> float:
    """How far the extremes lie beyond q01 and q99, in distances between these."""
    if d.q01 is None or d.q99 is None or d.min is None or d.max is None or d.q99 <= d.q01:
        return 0.0
    return max(d.max - d.q99, d.q01 - d.min) / (d.q99 - d.q01)


RULES = (not_finite, constant, outliers, limits)
