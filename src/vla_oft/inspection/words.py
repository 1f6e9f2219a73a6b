"""The facts of an inspection in words, for the table and the page alike."""

import json

from vla_oft.inspection.camera_rules import size_text
from vla_oft.inspection.facts import Camera, Following, Inspection, Problem
from vla_oft.inspection.motion_rules import convention
from vla_oft.inspection.number_rules import label

__all__ = ["counted", "facts", "following", "label", "number", "printable"]

LONGEST = 300
"""Characters of a text from a dataset that are shown."""


def facts(found: Inspection) -> dict[str, str]:
    """Name -> value, in the order in which they are read; what the dataset does not have is left out."""
    rows = {
        "path": found.path,
        "format": found.format + ("" if found.kind == "demonstrations" else f", {found.kind}"),
        "fingerprint": found.fingerprint,
        "episodes": f"{found.num_episodes:,}",
        "frames": f"{found.num_frames:,}" + (f", {duration(found.duration_s)}" if found.duration_s else ""),
        "length": f"{found.lengths.min} to {found.lengths.max} steps, median {found.lengths.median:g}",
        "frame rate": f"{found.fps:g} Hz" if found.fps else "not recorded",
        **{f"camera {camera.name}": camera_text(camera) for camera in found.cameras},
        "state": f"{len(found.state)} dimensions" if found.state else "none",
        "action": f"{len(found.action)} dimensions; {following(found.following)}",
        **{f"gripper {label(found.action[g.index])}": convention(g) for g in found.grippers},
        "pauses": _pauses(found),
        "extras": ", ".join(f"{name} {list(shape) or 'scalar'}" for name, shape in found.extras.items()),
        "recorded by us": json.dumps(dict(found.provenance), default=str) if found.provenance else "",
        "checked for": f"robot {found.robot}, chunks of {found.chunk_len}" if found.robot else f"chunks of {found.chunk_len} actions",
    }
    return {printable(name): printable(value) for name, value in rows.items() if value}


def camera_text(camera: Camera) -> str:
    """Size and brightness."""
    if not camera.frames:
        return "not looked at"
    return f"{size_text(camera)}, mean brightness {camera.brightness or 0:.0f} of 255"


def following(seen: Following) -> str:
    """What the actions look like."""
    if seen.kind == "absolute":
        lag = f", which follows after {seen.lag} step{'' if seen.lag == 1 else 's'}" if seen.lag else ""
        return f"they look like absolute targets of the state{lag} ({100 * (seen.strength or 0):.0f} % of its variance)"
    if seen.kind == "increments":
        return f"they look like increments of the state (correlation {seen.strength or 0:.2f})"
    return "the state does not show whether they are absolute or increments"


def counted(problem: Problem) -> str:
    """How often, and where first."""
    seen = problem.seen
    share = f", {percent(seen.share)}" if seen.of and seen.count < seen.of else ""
    where = f"; for example {printable(str(seen.first))}" if seen.first else ""
    return f"{seen.count:,} of {seen.of:,} {problem.unit}{share}{where}"


def percent(share: float) -> str:
    """A share as a percentage that is not 0 when the share is not."""
    return "less than 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """Four digits."""
    return "-" if value is None else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def printable(text: str) -> str:
    """Text from a dataset without control characters, which could rewrite a terminal, and not endless."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= LONGEST else clean[: LONGEST - 3] + "..."


def _pauses(found: Inspection) -> str:
    if found.kind != "demonstrations":
        return ""
    absolute = found.following.kind == "absolute"
    seen = found.pauses.repeated_targets if absolute else found.pauses.noops
    return f"{percent(seen.share)} of the steps" + (", target unchanged" if absolute else "")
