"""Problems of motion: jumps, angles that turn over, lost frames, pauses, how actions relate to the state, grippers."""

from collections.abc import Iterator

from vla_oft.inspection.facts import Dimension, Gripper, Inspection, Problem, Sighting
from vla_oft.inspection.number_rules import OTHER_RANGE, excess, label, named
from vla_oft_client import Gripper as GripperSpec
from vla_oft_client import RobotSpec

FEW_PAUSES, MANY_PAUSES = 0.01, 0.10
"""Shares of pauses that are worth a note, and a warning."""

FEW_LEAPS = 0.002

LITTLE = 0.1
"""Dimensions that cover less than this share of what the largest one covers hardly move; contact shakes them."""


def jumps(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Changes that no arm can make."""
    for what, dims in (("state", found.state), ("action", found.action)):
        jumping = [d for d in dims if d.jumps.count and not d.gripper]
        if not jumping:
            continue
        worst = max(jumping, key=lambda d: (d.jump_size or 0) / (d.span or 1))
        telling = (what == "state" or targets(found, spec)) and any(_reach(d) > LITTLE * max(map(_reach, dims)) for d in jumping)
        yield Problem(
            rule="jumps",
            severity="warning" if telling else "note",
            title=f"Jumps of the {what}",
            seen=worst.jumps,
            unit="steps",
            where=f"{named(jumping)}; the largest: {label(worst)} changes by {worst.jump_size or 0:g} at once, its range is {worst.span:g}",
            effect="Lost frames, a joined pair of episodes or a broken reading: chunks across it teach motions that nobody made.",
            fix="Look at the plot of that episode; cut it there, or leave it out.",
        )


def wraps(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Angles that pass from pi to -pi."""
    for what, dims in (("state", found.state), ("action", found.action)):
        turning = [d for d in dims if d.wraps.count]
        if turning:
            worst = max(turning, key=lambda d: d.wraps.count)
            yield Problem(
                rule="wraps",
                severity="warning",
                title=f"Angles of the {what} turn over by 2 pi",
                seen=worst.wraps,
                unit="steps",
                where=named(turning),
                effect="Two equal poses look opposite; the mean of both, which a policy may predict, is half a turn away.",
                fix="Shift the angle's origin so that the turn lies outside the range in use, or record sines and cosines.",
            )


def lost_frames(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Missing time, by recorded times or by the state."""
    gaps, leaps = found.timing.gaps, found.timing.leaps
    advice = "Check the recorder's load; leave the episodes out, or cut them at the gap."
    effect = "Between these steps more time passed than the policy will be given at run time, so it learns motions that are too fast."
    if gaps is not None and gaps.count:
        yield Problem(
            rule="lost-frames",
            severity="warning",
            title="Frames are missing, by the recorded times",
            seen=gaps,
            unit="steps",
            effect=effect,
            fix=advice,
        )
    elif leaps.count > 1:
        yield Problem(
            rule="lost-frames",
            severity="warning" if leaps.share > FEW_LEAPS else "note",
            title="Frames seem to be missing: a steady motion covers twice the way in one step",
            seen=leaps,
            unit="steps",
            effect=effect,
            fix=advice,
        )


def pauses(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Steps in which nothing is done."""
    absolute = targets(found, spec)
    seen = found.pauses.repeated_targets if absolute else found.pauses.noops
    if seen.share < FEW_PAUSES:
        return
    leave_out = "The filter --drop-noops leaves them out, as the reference does."
    cut = "Cut idle beginnings and ends; keep pauses that belong to the task."
    yield Problem(
        rule="pauses",
        severity="warning" if seen.share >= MANY_PAUSES else "note",
        title="Steps in which the target does not move" if absolute else "Steps in which nothing is done (no-ops)",
        seen=seen,
        unit="steps",
        effect="A policy that has seen pauses pauses too, and may never start again.",
        fix=cut if absolute else leave_out,
    )


def following(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Whether actions are what the robot takes them for."""
    seen = found.following
    if seen.copies:
        yield Problem(
            rule="copied-state",
            severity="error",
            title="Every action equals the state of its own step",
            seen=Sighting(count=found.num_frames, of=found.num_frames),
            unit="steps",
            effect="A policy that reads the state copies it, and the robot never moves.",
            fix="Use the commands that the robot was sent, or the state of the next step.",
        )
    if spec is None or seen.kind is None:
        return
    if (seen.kind == "absolute") != spec.action_kind.startswith("absolute"):
        looks = "absolute targets of the state" if seen.kind == "absolute" else "increments"
        yield Problem(
            rule="action-kind",
            severity="warning",
            title=f"The actions look like {looks}, robot '{spec.name}' takes {spec.action_kind}",
            seen=Sighting(count=found.num_frames, of=found.num_frames),
            unit="steps",
            effect="Executed as the robot takes them, these actions mean other motions.",
            fix="Choose another robot or layout, or convert the actions.",
        )


def grippers(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Conventions of grippers: as found, and against the robot's."""
    known = {g.index: g for g in spec.gripper} if spec else {}
    for gripper in found.grippers:
        if found.action[gripper.index].min is None:
            continue  # nothing could be read, which is another problem
        everywhere = Sighting(count=found.num_frames, of=found.num_frames)
        name = f"dimension {label(found.action[gripper.index])}"
        if gripper.convention == "constant":
            effect = "Nor will the policy move it: right for pushing and touching, wrong for grasping."
            yield _gripper("note", f"The gripper never moves: {gripper.values}", everywhere, name, effect)
            continue
        values = found.action[gripper.index].values
        if values is not None and len(values) == 3:
            middle, count = values[1]
            title = f"A gripper with two commands has a third: {middle:g}"
            seen = Sighting(count=count, of=sum(c for _, c in values))
            yield _gripper("warning", title, seen, name, "The mean of both commands does neither; a policy learns to predict it.")
        if gripper.index in known and spec is not None:
            yield from _against(gripper, known[gripper.index], found, spec, name)
        elif spec is None:
            yield _gripper("note", f"Gripper convention: {convention(gripper)}", everywhere, name, "Robots differ in it.")


def convention(gripper: Gripper) -> str:
    """How a gripper is driven, in words."""
    if gripper.opens:
        return f"{gripper.values}; {'high' if gripper.opens == 'high' else 'low'} values open it"
    if gripper.correlation is not None and abs(gripper.correlation) >= 0.4:
        way = "up" if gripper.correlation > 0 else "down"
        return f"{gripper.values}; after high values dimension {gripper.states[0]} of the state goes {way}"
    return f"{gripper.values}; the state does not show which way opens it"


def targets(found: Inspection, spec: RobotSpec | None) -> bool:
    """Whether actions are absolute: as the robot says, otherwise as the state shows."""
    return spec.action_kind.startswith("absolute") if spec else found.following.kind == "absolute"


def _reach(d: Dimension) -> float:
    return 0.0 if d.gripper or d.q01 is None or d.q99 is None else d.q99 - d.q01


def _against(gripper: Gripper, known: GripperSpec, found: Inspection, spec: RobotSpec, name: str) -> Iterator[Problem]:
    dimension = found.action[gripper.index]
    wanted = f"robot '{spec.name}' opens at {known.open:g} and closes at {known.closed:g}"
    if dimension.outside and excess(dimension, spec) > OTHER_RANGE:
        title = f"Gripper commands lie outside the robot's limits: {gripper.values}; {wanted}"
        effect = "Commands pass through normalisation unchanged, so the policy learns what the robot refuses."
        yield _gripper("error", title, dimension.outside, name, effect)
    elif known.binary and gripper.convention == "continuous":
        everywhere = Sighting(count=found.num_frames, of=found.num_frames)
        title = f"The gripper's commands are continuous ({gripper.values}), {wanted} and knows nothing between"
        yield _gripper("warning", title, everywhere, name, "Half-open commands are rounded to one of both at run time.")
    if gripper.opens and (gripper.opens == "high") != (known.open > known.closed):
        everywhere = Sighting(count=found.num_frames, of=found.num_frames)
        title = f"The gripper is turned around: {gripper.opens} commands open the fingers, {wanted}"
        yield _gripper("error", title, everywhere, name, "The policy opens where it should close.")


def _gripper(severity: str, title: str, seen: Sighting, where: str, effect: str) -> Problem:
    fix = "Compare with the robot's convention (robots/NAME.py); vla_oft.grippers and the robot's layouts convert."
    assert severity in ("error", "warning", "note")
    return Problem(rule="gripper", severity=severity, title=title, seen=seen, unit="steps", where=where, effect=effect, fix=fix)


RULES = (jumps, wraps, lost_frames, pauses, following, grippers)
