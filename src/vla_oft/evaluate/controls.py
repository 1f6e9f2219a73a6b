"""Controls that tell a policy that listens from one that guesses: same seeds, same scenes, other words.

normal    "touch the red block"     scene of seed s   how often does it succeed?
swapped   "touch the green block"   the same scene    must follow the new words; `chose_original` says how often it did not
blind     "touch the block"         the same scene    how much of its success hangs on the words that were removed
expert    the scripted expert       the same scene    the ceiling: what the simulator and its physics allow
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vla_oft.evaluate.suite import Task
from vla_oft.sims.base import expert_class, load

CONTROLS = ("swapped", "blind", "expert")
InstructionFilter = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way to run the trials. swap: given to `Simulator.reset`. listen: what the policy hears of the instruction.

    expert: the class `Expert(env)` that acts instead of the policy.
    """

    name: str
    swap: int = 0
    listen: InstructionFilter | None = None
    expert: Callable[..., Callable] | None = None


def conditions(task: Task, controls: Sequence[str], listen: InstructionFilter | None) -> list[Condition]:
    """The normal condition and the controls asked for. `listen` applies wherever a policy hears an instruction."""
    plans = {
        "swapped": lambda: Condition(name="swapped", swap=1, listen=listen),
        "blind": lambda: Condition(name="blind", listen=_then(listen, blind(task))),
        "expert": lambda: Condition(name="expert", expert=expert_class(task.simulator)),
    }
    return [Condition(name="normal", listen=listen), *(plans[name]() for name in controls)]


def blind(task: Task) -> InstructionFilter:
    """Removes the words that tell one object of `task` from another. Raises ValueError when its simulator does not name them."""
    colours = getattr(load(task.simulator), "COLOURS", None)
    if not colours:
        raise ValueError(f"control 'blind': sims/{task.simulator}.py exports no COLOURS, the words that tell its objects apart")
    return lambda instruction: remove_words(instruction, colours)


def remove_words(instruction: str, words: Sequence[str]) -> str:
    """`instruction` without any of `words` (whole words, any case)."""
    pattern = r"\b(?:" + "|".join(re.escape(w) for w in words) + r")\b\s*"
    return re.sub(r"\s+", " ", re.sub(pattern, "", instruction, flags=re.IGNORECASE)).strip()


def chose_original(chosen: str, original: str, swapped: str) -> bool:
    """Whether `chosen` is the object of the instruction `original`: the first word that `swapped` replaced belongs to its name.

    "stack the RED block on the blue one" / "stack the green block on the red one": chosen "red" is the original object, "blue" is not.
    """
    words, others = original.lower().split(), swapped.lower().split()
    replaced = next((word for word, other in zip(words, others, strict=False) if word != other), None)
    return replaced is not None and replaced in re.findall(r"[a-z0-9]+", chosen.lower())


def _then(first: InstructionFilter | None, second: InstructionFilter) -> InstructionFilter:
    return second if first is None else lambda instruction: second(first(instruction))
