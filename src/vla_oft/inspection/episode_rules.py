"""Problems of whole episodes: unreadable, empty, too short, repeated, failed, badly labelled, at the wrong rate."""

from collections import defaultdict
from collections.abc import Iterator

from vla_oft.inspection.facts import Inspection, Instruction, Place, Problem, Sighting
from vla_oft_client import RobotSpec


def damaged(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """What cannot be read, and what was left out for that reason."""
    if found.records.damaged:
        first, reason = found.records.unreadable[0]
        yield Problem(
            rule="damaged",
            severity="error",
            title="Episodes cannot be read whole",
            seen=Sighting(count=found.records.damaged, of=found.num_episodes, first=Place(episode=first)),
            unit="episodes",
            where=reason,
            effect="Training stops when it meets them.",
            fix="Copy or record them again, or leave them out (--skip-bad, --episodes).",
        )
    if found.skipped:
        yield Problem(
            rule="skipped",
            severity="warning",
            title="Parts of the dataset were left out because they cannot be read",
            seen=Sighting(count=len(found.skipped), of=len(found.skipped)),
            unit="files or episodes",
            where=found.skipped[0],
            effect="Everything on this page is about the rest.",
            fix="Copy or record them again.",
        )


def lengths(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Episodes shorter than a chunk."""
    if found.kind == "demonstrations" and found.short.count:
        yield Problem(
            rule="short-episodes",
            severity="warning",
            title=f"Episodes shorter than one chunk of {found.chunk_len} actions",
            seen=found.short,
            unit="episodes",
            where=f"the shortest has {found.lengths.min} steps",
            effect="Their last action is repeated and masked; trained as the reference does, they are dropped altogether.",
            fix="Leave out broken recordings; for short tasks choose a shorter chunk.",
        )


def duplicates(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Episodes with the same numbers."""
    seen = found.records.duplicates
    if found.kind == "demonstrations" and seen.count:
        yield Problem(
            rule="duplicates",
            severity="warning",
            title="Episodes repeat earlier ones number by number",
            seen=seen,
            unit="episodes",
            where=f"the first repeats episode {found.records.duplicate_of}",
            effect="They count twice in training, and a split into training and validation leaks.",
            fix="Leave the copies out.",
        )


def failures(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Episodes that did not reach their goal."""
    seen = found.records.failed
    if not seen.count:
        return
    everything = seen.count == seen.of
    yield Problem(
        rule="failed-episodes",
        severity="note" if everything else "warning",
        title="No episode is marked as successful" if everything else "Episodes that failed, by their own success or reward",
        seen=seen,
        unit="episodes",
        effect="Either success was never recorded, or every demonstration failed." if everything else "A policy imitates failures too.",
        fix="Look at the last frames." if everything else "The filter --drop-failed leaves them out, as the reference does.",
    )


def instructions(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """Instructions that are empty, or the same but for their spelling."""
    empty = [i for i in found.instructions if not i.text.strip() and i.episodes]
    if empty or not found.instructions:
        seen = _episodes(empty, found) if empty else Sighting(count=found.num_episodes, of=found.num_episodes)
        yield Problem(
            rule="empty-instruction",
            severity="error",
            title="Episodes without an instruction",
            seen=seen,
            unit="episodes",
            effect="The policy is told nothing there, and at run time it will be told something.",
            fix="Label these episodes, or give one instruction for all (--instruction).",
        )
    spellings: dict[str, list[Instruction]] = defaultdict(list)
    for instruction in found.instructions:
        if instruction.episodes and instruction.text.strip():
            spellings[" ".join(instruction.text.casefold().split()).rstrip(".!?")].append(instruction)
    varied = [group for group in spellings.values() if len(group) > 1]
    if varied:
        texts = "; ".join(" = ".join(f"'{i.text}'" for i in group[:3]) for group in varied[:3])
        yield Problem(
            rule="instruction-spelling",
            severity="warning",
            title="Instructions that differ only in case, spaces or a full stop",
            seen=_episodes([i for group in varied for i in group], found),
            unit="episodes",
            where=texts,
            effect="They are other tokens for the same task; counts and weights per task are wrong.",
            fix="Spell them alike.",
        )


def rate(found: Inspection, spec: RobotSpec | None) -> Iterator[Problem]:
    """An unknown rate, or not the robot's."""
    everything = Sighting(count=found.num_episodes, of=found.num_episodes)
    if found.kind != "demonstrations":
        return
    if found.fps is None:
        yield Problem(
            rule="rate",
            severity="note",
            title="The frame rate is not recorded",
            seen=everything,
            unit="episodes",
            effect="Nothing checks that the policy will act as fast as the demonstrator did.",
            fix="Say it when opening the dataset (--fps).",
        )
    elif spec is not None and abs(found.fps - spec.control_hz) > 1e-3:
        yield Problem(
            rule="rate",
            severity="warning",
            title=f"Recorded at {found.fps:g} frames a second, robot '{spec.name}' runs at {spec.control_hz:g} Hz",
            seen=everything,
            unit="episodes",
            effect=f"Executed at the robot's rate, motions are {spec.control_hz / found.fps:.2g} times as fast as demonstrated.",
            fix=_other_rate(found.fps / spec.control_hz),
        )


def _other_rate(ratio: float) -> str:
    """What helps when a recording has `ratio` times the robot's rate."""
    if ratio > 1.5 and abs(ratio - round(ratio)) < 1e-3:
        return f"Keep one step of {ratio:.0f} (--every {ratio:.0f}; only for absolute actions), or change the robot's rate."
    return "Run the robot at the recording's rate (control_hz in robots/NAME.py), or record at the robot's."


def _episodes(instructions: list[Instruction], found: Inspection) -> Sighting:
    firsts = [i.first for i in instructions if i.first is not None]
    first = Place(episode=min(firsts)) if firsts else None
    return Sighting(count=sum(i.episodes for i in instructions), of=found.num_episodes, first=first)


RULES = (damaged, lengths, duplicates, failures, instructions, rate)
