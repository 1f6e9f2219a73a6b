"""Worker processes whose results come back through shared memory that is used again and again.

worker   slot 0 [images | actions | ...]   slot 1 [ ... ]        anonymous memory, mapped once by both sides
               |  "slot 0, arrays at these places" (a few hundred bytes through a pipe)
parent   arrays that lie in slot 0;  when the last of them is gone, "slot 0 is free" travels with the next request

Why not torch's DataLoader: it makes new shared memory for every tensor, and the page faults of both sides cost as much as decoding a JPEG
(measured: LOG.md). Here a batch is written once, and not copied at all where the fetching code allocates with the `Allocate`
that it is given.
"""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from io import BytesIO
from multiprocessing import connection, reduction
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

Request = TypeVar("Request")
Result = TypeVar("Result")
ALIGNMENT = 64
ROOM = 2**21
"""Slots are multiples of this many bytes."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
PATIENCE_S = 5.0
"""How long a dying worker may take to be gone."""

SPARE = 8
"""Free slots that a worker keeps; more only exist when many results were kept at once."""


class Allocate(Protocol):
    """Like `numpy.empty`; the array lies where the result will be handed over from, and must not be kept for the next result."""

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array whose contents are arbitrary."""
        ...


class WorkerPool(Generic[Request, Result]):
    """Computes `fetch(request, allocate)` in `num_workers` processes, `ahead` requests in each before they are asked for.

    Results come in the order of the requests, whatever the number of workers. A result may consist of anything that can be pickled;
    numpy arrays and CPU tensors in it travel through shared memory.
    """

    def __init__(self, fetch: Callable[[Request, Allocate], Result], num_workers: int, ahead: int) -> None:
        self._fetch, self._num_workers, self._ahead = fetch, num_workers, ahead

    def results(self, requests: Iterator[Request]) -> Generator[Result, None, None]:
        """Yield the results of `requests`, which may be endless.

        An exception in a worker is raised here as it is. Raises ChildProcessError when a worker has died.
        """
        workers = [_Worker(self._fetch) for _ in range(self._num_workers)]
        waiting: deque[_Worker] = deque()
        turn = 0
        try:
            more = True
            while True:
                while more and len(waiting) < self._num_workers * self._ahead:
                    try:
                        request = next(requests)
                    except StopIteration:
                        more = False
                        break
                    workers[turn % len(workers)].send(request)
                    waiting.append(workers[turn % len(workers)])
                    turn += 1
                if not waiting:
                    return
                yield waiting.popleft().receive()
        finally:
            for worker in workers:
                worker.close()


class _Failure(NamedTuple):
    error: Exception
    trace: str


class _Worker:
    """The parent's side of one process."""

    def __init__(self, fetch: Callable[[Any, Allocate], Any]) -> None:
        context = multiprocessing.get_context()
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, self._pipe, fetch), name="loader", daemon=True)
        self._process.start()
        other.close()
        self._slots: dict[int, np.ndarray] = {}
        self._free: deque[int] = deque()  # appended to by whichever thread lets go of a result

    def send(self, request: Any) -> None:
        free = [self._free.popleft() for _ in range(len(self._free))]
        try:
            self._pipe.send((request, free))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def receive(self) -> Any:
        try:
            connection.wait([self._pipe, self._process.sentinel])
            answer = self._pipe.recv()
            if isinstance(answer, _Failure):
                raise answer.error from (None if isinstance(answer.error, ValueError) else RuntimeError(f"in a worker:\n{answer.trace}"))
            slot, new_size, places = answer
            if new_size:
                self._slots[slot] = _map(reduction.recv_handle(self._pipe), new_size)
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        whole = self._slots[slot][:]  # an array of its own for each result: the slot is free again when nothing refers to it any more
        weakref.finalize(whole, self._free.append, slot).atexit = False
        view = whole.data  # a slice of `whole` would refer to the mapping instead
        data, *buffers = (view[start : start + size] for start, size in places)
        return pickle.loads(data, buffers=buffers)  # from our own child, not from a network

    def close(self) -> None:
        """End it: it holds nothing worth saving. Results that are still in use keep their memory."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _died(self) -> ChildProcessError:
        self._process.join(PATIENCE_S)
        code = self._process.exitcode or 0
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        advice = "; the machine ran out of memory? Use fewer workers, or smaller batches" if code == -signal.SIGKILL else ""
        return ChildProcessError(f"a loader process has died ({reason}){advice}")


def _work(pipe: connection.Connection, others: connection.Connection, fetch: Callable[[Any, Allocate], Any]) -> None:
    """What a process does until it is killed, or its parent is gone."""
    others.close()  # inherited by a fork: the end of file would never come
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler: nothing here needs saving
    torch.set_num_threads(1)
    _keep_memory()
    arena = _Arena()
    while True:
        try:
            request, free = pipe.recv()
        except (EOFError, OSError):
            return
        arena.give_back(free)
        try:
            answer = arena.pack(fetch(request, arena.begin()))
        except Exception as error:
            answer = _Failure(_portable(error), traceback.format_exc())
        try:
            pipe.send(answer)
            if not isinstance(answer, _Failure) and answer[1]:
                reduction.send_handle(pipe, arena.descriptor(answer[0]), None)  # type: ignore[arg-type]  (the process id is for Windows)
        except OSError:
            return


def _keep_memory() -> None:
    """Let freed memory be used again instead of going back to the system: each frame would otherwise come as fresh pages.

    Of 270 microseconds for a JPEG of 224 pixels, 90 went into page faults (glibc only; elsewhere nothing changes).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


class _Arena:
    """A worker's slots. One is written at a time; those that the parent still uses are left alone."""

    def __init__(self) -> None:
        self._files: list[int] = []
        self._slots: list[np.ndarray] = []
        self._free: set[int] = set()
        self._announced: set[int] = set()
        self._current: int | None = None
        self._used = self._wanted = 0

    def begin(self) -> Allocate:
        """Start a result in a free slot that is as large as the largest result was."""
        for slot in [s for s in sorted(self._free) if len(self._slots[s]) < self._wanted] + sorted(self._free)[SPARE:]:
            self._forget(slot)
        self._current = next((slot for slot in sorted(self._free) if len(self._slots[slot]) >= self._wanted), None)
        if self._current is None and self._wanted:
            self._current = self._add(self._wanted)
        self._used = 0
        return self.allocate

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Part of the current slot; ordinary memory where it is full."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        start = self._reserve(size)
        if start is None or self._current is None:
            return np.empty(shape, dtype)
        return self._slots[self._current][start : start + size].view(dtype).reshape(shape)

    def give_back(self, slots: list[int]) -> None:
        """The parent has let go of these."""
        self._free.update(slots)

    def pack(self, result: Any) -> tuple[int, int, list[tuple[int, int]]]:
        """(slot, size of the slot if it is new to the parent, where in it the pickle and each array lie)."""
        buffers: list[pickle.PickleBuffer] = []
        data = BytesIO()
        _Pickler(data, protocol=5, buffer_callback=buffers.append).dump(result)
        arrays = [np.frombuffer(data.getbuffer(), np.uint8), *(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers)]
        inside = [self._offset(array) for array in arrays]
        outside = sum(_aligned(len(a)) for a, offset in zip(arrays, inside, strict=True) if offset is None)
        needed = self._used + outside
        self._wanted = max(self._wanted, needed)
        if self._current is None or needed > len(self._slots[self._current]):
            self._current, self._used = self._add(max(sum(_aligned(len(a)) for a in arrays), 1)), 0
            inside = [None] * len(arrays)
        slot, places = self._current, []
        for array, offset in zip(arrays, inside, strict=True):
            if offset is None:
                offset = self._reserve(len(array))
                assert offset is not None
                self._slots[slot][offset : offset + len(array)] = array
            places.append((offset, len(array)))
        self._free.discard(slot)
        new = len(self._slots[slot]) if slot not in self._announced else 0
        self._announced.add(slot)
        return slot, new, places

    def descriptor(self, slot: int) -> int:
        """The file behind a slot."""
        return self._files[slot]

    def _forget(self, slot: int) -> None:
        """Give the memory of a slot that is too small, or one too many, back to the system; the parent will not hear of it again."""
        if slot in self._free:
            self._free.discard(slot)
            os.ftruncate(self._files[slot], 0)
            os.close(self._files[slot])
            self._slots[slot] = np.empty(0, np.uint8)

    def _reserve(self, size: int) -> int | None:
        start = self._used
        if self._current is None or start + size > len(self._slots[self._current]):
            return None
        self._used = start + _aligned(size)
        return start

    def _offset(self, array: np.ndarray) -> int | None:
        """Where in the current slot `array` lies; None elsewhere."""
        if self._current is None or not len(array):
            return None
        offset = array.ctypes.data - self._slots[self._current].ctypes.data
        return offset if 0 <= offset <= len(self._slots[self._current]) - len(array) else None

    def _add(self, size: int) -> int:
        size = (size + ROOM - 1) // ROOM * ROOM
        file = _anonymous_file()
        os.ftruncate(file, size)
        self._files.append(file)
        self._slots.append(_map(file, size, keep=True))
        self._free.add(len(self._slots) - 1)
        return len(self._slots) - 1


class _Pickler(pickle.Pickler):
    """Tensors travel as the arrays that they are."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided and not value.requires_grad:
            return _tensor, (value.contiguous().reshape(-1).view(torch.uint8).numpy(), value.dtype, tuple(value.shape))
        return NotImplemented


def _tensor(raw: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def _portable(error: Exception) -> Exception:
    """The exception itself if it survives a trip through a pipe, otherwise what it says."""
    try:
        pickle.loads(pickle.dumps(error))  # our own, just made
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _anonymous_file() -> int:
    """A file without a name: nothing is left behind whoever is killed, and /dev/shm, which containers keep small, is not used."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("loader")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _map(file: int, size: int, keep: bool = False) -> np.ndarray:
    """uint8 (size,): the file in memory."""
    array = np.frombuffer(mmap.mmap(file, size), np.uint8)
    if not keep:
        os.close(file)
    return array


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
