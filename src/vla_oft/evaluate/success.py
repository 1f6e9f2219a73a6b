"""Success rates with honest intervals.

Wilson's score interval stays inside [0, 1] and does not collapse at 0 or n successes, where small evaluations often end:
10 of 10 is "72-100 %", not "100 % +- 0".
"""

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054


def wilson(successes: int, episodes: int, z: float = Z_95) -> tuple[float, float]:
    """Lower and upper bound of a success probability; (0, 1) when nothing was observed."""
    if episodes < 0 or not 0 <= successes <= episodes:
        raise ValueError(f"successes={successes} must lie between 0 and episodes={episodes}")
    if episodes == 0:
        return 0.0, 1.0
    share, spread = successes / episodes, z * z / episodes
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / episodes + spread / (4 * episodes))
    # Exact at both ends in real arithmetic; rounding must not push the bound past them.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == episodes else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class Rate:
    """`successes` out of `episodes`, with its Wilson 95 % interval."""

    successes: int
    episodes: int

    def __post_init__(self) -> None:
        wilson(self.successes, self.episodes)

    @property
    def value(self) -> float | None:
        """The observed share, or None without episodes."""
        return self.successes / self.episodes if self.episodes else None

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return wilson(self.successes, self.episodes)[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return wilson(self.successes, self.episodes)[1]

    def with_failures(self, failures: int) -> "Rate":
        """The rate with so many more episodes, all of them failed."""
        return Rate(self.successes, self.episodes + failures)

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain JSON types."""
        return {"successes": self.successes, "episodes": self.episodes, "rate": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        if self.value is None:
            return "no episodes"
        return f"{100 * self.value:.1f} % ({self.successes}/{self.episodes}, 95 % interval {100 * self.low:.1f}-{100 * self.high:.1f} %)"


def count(verdicts: list[bool]) -> Rate:
    """The rate of True among `verdicts`."""
    return Rate(sum(verdicts), len(verdicts))


def interval(rate: Rate) -> str:
    """The 95 % interval in whole percent."""
    return f"{100 * rate.low:.0f}-{100 * rate.high:.0f} %"


def separated(a: Rate, b: Rate) -> bool:
    """Whether the two intervals do not overlap: a difference that is unlikely to be luck. The converse does not hold."""
    return a.low > b.high or b.low > a.high
