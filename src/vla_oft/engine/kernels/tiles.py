"""How a matrix product is cut into programs. No triton here: the tuner reads it on any machine."""

from dataclasses import asdict, dataclass

TILE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One way to run a kernel of `gemm` or `weight_only`.

    A program makes tiles of block_m rows and block_n + extra_n columns, block_k of the inner dimension at a time. `extra_n` is a second,
    smaller accumulator beside the first: tile widths that are no power of two (128 + 32 = 160) fill a last wave that powers of two do not.
    splits: parts of the inner dimension with a result of their own, float32. tma: operands come through the copy engine of sm_90 (rows
    of 16-byte multiples only). programs: how many run at once, each making tile after tile; 0 = one for each tile. specialized: of each
    such program, one group of warps loads and two multiply, half of the rows each.
    """

    block_m: int
    block_n: int
    block_k: int
    extra_n: int = 0
    splits: int = 1
    stages: int = 3
    warps: int = 4
    tma: bool = False
    programs: int = 0
    specialized: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            if getattr(self, name) not in TILE_SIZES:
                raise ValueError(f"{name}={getattr(self, name)} must be one of {TILE_SIZES}")
        if self.extra_n not in (0, *TILE_SIZES):
            raise ValueError(f"extra_n={self.extra_n} must be 0 or one of {TILE_SIZES}")
        if self.splits < 1 or self.stages < 1 or self.warps not in (1, 2, 4, 8, 16) or self.programs < 0:
            raise ValueError(f"splits={self.splits}, stages={self.stages}, warps={self.warps}, programs={self.programs}: see Tiles")

        if self.specialized and not (self.tma and self.programs and self.warps == 4 and self.block_m >= 128):
            raise ValueError(f"specialized={self.specialized} needs tma, programs > 0, warps=4 (of one group) and block_m >= 128")

    @property
    def width(self) -> int:
        """Columns of one tile."""
        return self.block_n + self.extra_n

    def as_dict(self) -> dict[str, int | bool]:
        """For JSON; Tiles(**t.as_dict()) == t."""
        return asdict(self)

    def __str__(self) -> str:
        extra = f"+{self.extra_n}" if self.extra_n else ""
        marks = [f"k{self.block_k}", f"{self.stages} stages", f"{self.warps} warps"]
        marks += (
            [f"{self.splits} splits"] * (self.splits > 1)
            + ["tma"] * self.tma
            + ["persistent"] * bool(self.programs)
            + ["specialized"] * self.specialized
        )
        return f"{self.block_m}x{self.block_n}{extra} {' '.join(marks)}"
