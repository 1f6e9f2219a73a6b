"""Problems of pictures: none, black, of one colour, frozen, repeated, of several sizes, from the wrong camera."""

from collections.abc import Iterator

from vla_oft.inspection.facts import Camera, Inspection, Problem, Severity, Sighting
from vla_oft_client import RobotSpec

MOST = 0.5
"""Share from which on a camera is useless, not just unreliable."""

REPEATED = 0.2
"""Repeated pictures below this share are chance."""


def missing(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """No camera at all."""
    if not found.cameras:
        yield Problem(
            rule="no-camera",
            severity="error",
            title="The dataset has no camera",
            seen=Sighting(count=found.num_episodes, of=found.num_episodes),
            unit="episodes",
            effect="A policy needs at least one picture.",
            fix="Download or record the pictures too.",
        )


def blank(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Black pictures, and pictures of one colour."""
    for camera in found.cameras:
        for seen, what in ((camera.black, "black"), (camera.uniform, "of one colour")):
            if seen.count:
                yield Problem(
                    rule="blank-pictures",
                    severity=_severity(seen),
                    title=f"Camera '{camera.name}' shows pictures that are {what} all over",
                    seen=seen,
                    unit="frames looked at",
                    effect="They show nothing; a policy learns to do without this camera.",
                    fix="Check the camera's cable, exposure and first frames; leave these episodes or this camera out.",
                )


def frozen(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Pictures that stand still while the arm moves."""
    for camera in found.cameras:
        if camera.frozen.count:
            yield Problem(
                rule="frozen-camera",
                severity=_severity(camera.frozen),
                title=f"Camera '{camera.name}' stands still while the arm moves",
                seen=camera.frozen,
                unit="stretches of motion looked at",
                where=f"the longest over {camera.frozen_steps} steps",
                effect="Pictures and actions do not belong together, so a policy learns to ignore what it sees.",
                fix="Leave these episodes out. If the camera does not see the arm, leave the camera out.",
            )


def repeated(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """A camera that is slower than the recording."""
    for camera in found.cameras:
        if camera.repeated.count > 1 and camera.repeated.share >= REPEATED:
            yield Problem(
                rule="repeated-pictures",
                severity="warning",
                title=f"Camera '{camera.name}' repeats pictures: it is slower than the recording, or frames were dropped",
                seen=camera.repeated,
                unit="steps of motion looked at",
                effect="Pictures lag behind the state by a varying time.",
                fix="Record at the camera's rate, or keep only every second step (--every 2).",
            )


def sizes(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """One camera, several sizes."""
    for camera in found.cameras:
        if len(camera.sizes) > 1:
            usual = max(camera.sizes.values())
            yield Problem(
                rule="mixed-sizes",
                severity="warning",
                title=f"Camera '{camera.name}' has pictures of {len(camera.sizes)} sizes",
                seen=Sighting(count=sum(camera.sizes.values()) - usual, of=sum(camera.sizes.values())),
                unit="frames looked at",
                where=size_text(camera),
                effect="All are resized alike, so objects change their shape from one episode to another.",
                fix="Find out which recordings differ, and crop them to one aspect ratio.",
            )


def twins(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Two names for one camera."""
    frames = {camera.name: camera.frames for camera in found.cameras}
    for a, b in found.twins:
        yield Problem(
            rule="same-pictures",
            severity="warning",
            title=f"Cameras '{a}' and '{b}' show the same pictures",
            seen=Sighting(count=frames[a], of=frames[a]),
            unit="frames looked at",
            effect="The second costs time and tells nothing; a wrist camera may have been mixed up.",
            fix="Check the recorder's camera numbers; leave one out.",
        )


def size_text(camera: Camera) -> str:
    """Width x height, the most common first."""
    ordered = sorted(camera.sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{w} x {h}" + (f" ({count})" if len(ordered) > 1 else "") for (h, w), count in ordered)


def _severity(seen: Sighting) -> Severity:
    return "error" if seen.share >= MOST else "warning"


RULES = (missing, blank, frozen, repeated, sizes, twins)
