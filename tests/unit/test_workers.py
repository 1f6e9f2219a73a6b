"""Worker processes and their shared memory: order, memory that is used again, errors, deaths."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_oft.data.workers import WorkerPool


@dataclass(frozen=True)
class Answer:
    number: int
    image: torch.Tensor
    array: np.ndarray
    text: str


def fetch(number: int, allocate) -> Answer:
    """An array in the given memory, one elsewhere, and an empty one."""
    inside = allocate((100, 1000), np.uint8)
    inside[:] = number % 256
    return Answer(number, torch.from_numpy(inside), np.full(number % 7, number, np.float64), f"answer {number}")


def check(answer: Answer, number: int) -> None:
    assert answer.number == number and answer.text == f"answer {number}"
    assert answer.image.shape == (100, 1000) and (answer.image == number % 256).all()
    assert answer.array.tolist() == [number] * (number % 7)


@pytest.mark.parametrize("workers", [1, 3])
def test_answers_come_in_order_and_stay_as_they_are(workers):
    answers = list(WorkerPool(fetch, workers, 2).results(iter(range(40))))
    assert len(answers) == 40
    for number, answer in enumerate(answers):
        check(answer, number)


def test_memory_is_used_again_once_nothing_refers_to_it():
    places, kept = set(), []
    for number, answer in enumerate(WorkerPool(fetch, 1, 2).results(iter(range(60)))):
        check(answer, number)
        places.add(answer.image.data_ptr())
        if number == 5:
            kept.append(answer.image[3:5, ::2])  # a part keeps the whole
        del answer
        gc.collect()
    assert len(places) < 8, "a handful of slots, not sixty"
    assert (kept[0] == 5).all()


def mixed(number: int, allocate) -> list:
    """Growing sizes, several dtypes, a scalar tensor, shared and unshared memory."""
    inside = allocate((number * 1000, 3), np.float32)
    inside[:] = number
    half = torch.full((2, number), 1.5, dtype=torch.bfloat16)
    return [inside, torch.tensor(number), half, torch.ones(3, 4).t(), {"a": np.arange(number)}, None]


def test_any_arrays_travel():
    for number, (inside, scalar, half, turned, table, nothing) in enumerate(WorkerPool(mixed, 2, 2).results(iter(range(1, 30))), 1):
        assert inside.shape == (number * 1000, 3) and (inside == number).all() and inside.dtype == np.float32
        assert scalar.item() == number and scalar.dtype == torch.int64 and scalar.shape == ()
        assert half.dtype == torch.bfloat16 and (half == 1.5).all() and half.shape == (2, number)
        assert turned.shape == (4, 3) and table["a"].tolist() == list(range(number)) and nothing is None
        inside += 1  # an answer may be changed


def failing(number: int, allocate) -> int:
    if number == 3:
        raise ValueError("file x: damaged")
    return number


def test_an_error_is_raised_as_it_is_in_its_turn():
    results = WorkerPool(failing, 2, 3).results(itertools.count())
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="^file x: damaged$"):
        next(results)


def dying(number: int, allocate) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_noticed():
    results = WorkerPool(dying, 2, 1).results(itertools.count())
    with pytest.raises(ChildProcessError, match="killed by SIGKILL.*ran out of memory"):
        list(itertools.islice(results, 10))


def who(number: int, allocate) -> int:
    return os.getpid()


def test_no_process_is_left_behind():
    results = WorkerPool(who, 2, 2).results(itertools.count())
    found = {next(results) for _ in range(6)}
    assert len(found) == 2 and os.getpid() not in found
    results.close()
    for process in found:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().split()[2] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import itertools, os, sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_workers import who\n"
        "from vla_oft.data.workers import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    results = WorkerPool(who, 2, 2).results(itertools.count())\n"
        "    print(next(results), next(results), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 20
    for process in map(int, done.stdout.split()):
        while is_running(process):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)


def growing(number: int, allocate) -> np.ndarray:
    out = allocate((number * 2_000_000,), np.uint8)
    out[:] = number
    return out


def shared_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssShmem")).split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' memory accounts")
def test_slots_that_became_too_small_are_given_back():
    before = shared_mb()
    for number, answer in enumerate(WorkerPool(growing, 1, 2).results(iter(range(1, 30))), 1):
        assert answer[0] == number == answer[-1] and len(answer) == number * 2_000_000
        del answer
        gc.collect()
        assert shared_mb() - before < 8 * 2 * (number + 2), "a handful of the largest size, not all sizes that ever were"


def backwards(request: str, allocate) -> str:
    return request[::-1]


def test_large_answers_without_arrays_do_not_block():
    requests = ("x" * 300_000 + str(i) for i in range(6))
    found = list(WorkerPool(backwards, 1, 3).results(requests))
    assert [len(answer) for answer in found] == [300_001] * 6


def broken(number: int, allocate) -> int:
    return {}["absent"]


def test_an_unexpected_error_names_its_place():
    with pytest.raises(KeyError, match="absent") as error:
        next(WorkerPool(broken, 1, 1).results(itertools.count()))
    assert "test_workers.py" in str(error.value.__cause__)


def test_a_program_that_handles_sigterm_still_ends(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import itertools, signal, sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_workers import who\n"
        "from vla_oft.data.workers import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGTERM, lambda *_: print('requeue'))\n"
        "    results = WorkerPool(who, 2, 2).results(itertools.count())\n"
        "    next(results)\n"
        "    sys.modules['kept'] = results\n"
    )
    assert subprocess.run([sys.executable, str(script)], timeout=60).returncode == 0
