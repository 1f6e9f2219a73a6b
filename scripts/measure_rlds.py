"""How many episodes a second the RLDS reader parses whole, CRC checked, without decoding pictures; and how fast it builds its index.

    python scripts/measure_rlds.py FOLDER

Made-up episodes like LIBERO's: 130 steps, two JPEGs of 224 pixels, state, action, language and flags for each step. Prints one line.
"""

import sys
import tempfile
import time
from pathlib import Path

from vla_oft.bench import demonstrations
from vla_oft.data.base import ReadOptions, open_source
from vla_oft.data.example import parse_example
from vla_oft.data.tfrecord import read_records


def main() -> None:
    shape = demonstrations.Shape(episodes=100, length=130)
    folder = demonstrations.write(Path(sys.argv[1]), "rlds", shape)
    (shard,) = folder.glob("*.tfrecord-*")
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        count = sum(1 for record in read_records(shard) if parse_example(record.data))
        rates.append(count / (time.perf_counter() - start))
    built = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            source = open_source(folder, ReadOptions(cache_dir=Path(cache)))
            built.append(len(source) / (time.perf_counter() - start))
            start = time.perf_counter()
            open_source(folder, ReadOptions(cache_dir=Path(cache)))
            again_ms = 1000 * (time.perf_counter() - start)
    size = shard.stat().st_size / shape.episodes / 1e6
    print(
        f"parse {sorted(rates)[2]:.0f} episodes/s (median of 5, {min(rates):.0f}..{max(rates):.0f}), "
        f"index {sorted(built)[1]:.0f} episodes/s, opened again in {again_ms:.1f} ms; {size:.1f} MB an episode, one process"
    )


if __name__ == "__main__":
    main()
