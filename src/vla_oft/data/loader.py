"""Endless batches from a `ChunkDataset`, prepared ahead of the training step.

Cached datasets are gathered by one background thread (a batch costs well under a millisecond: worker processes would cost more
than they bring); video is decoded by `num_workers` processes. Either way the batches are the same.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

import numpy as np

from vla_oft.data.chunks import ChunkDataset, Samples
from vla_oft.data.mixture import MixtureOrder
from vla_oft.data.random_numbers import seeds_of
from vla_oft.data.skipped import Draw, SkippedFrames
from vla_oft.data.workers import Allocate, WorkerPool

Batch = TypeVar("Batch")


class BatchLoader(Generic[Batch]):
    """Iterate it for batches of `batch_size`; it never ends. Iterating again continues at the position reached.

    collate: turns `Samples` into what the policy reads (prompts, augmentation with `samples.seeds`); runs in the background.
    rank, world_size: this process's share of the global order. num_workers: 0 for one thread, else processes.
    skipped: what lists and counts damaged frames; by default a list of this loader's own, on stderr.
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        order: MixtureOrder,
        batch_size: int,
        collate: Callable[[Samples], Batch],
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        prefetch: int = 3,
        skipped: SkippedFrames | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"num_workers={num_workers} must not be negative and prefetch={prefetch} must be positive")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if batch_size % order.neighbours:
            raise ValueError(f"batch_size={batch_size} would cut runs of neighbours={order.neighbours}: use a multiple of it")
        if order.sizes != dataset.sizes:
            raise ValueError(f"the order was made for datasets of {order.sizes} samples, the dataset has {dataset.sizes}")
        self.dataset, self.order, self.batch_size, self.collate = dataset, order, batch_size, collate
        self.rank, self.world_size, self.num_workers, self.prefetch = rank, world_size, num_workers, prefetch
        self.skipped = skipped or SkippedFrames(dataset)
        self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        batches = self._by_processes() if self.num_workers else self._by_thread()
        try:
            for batch, draw in batches:
                self.skipped.add(draw)
                self.position += self.batch_size * self.world_size  # delivered, not merely prefetched
                yield batch
        finally:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """The position in the global order: the number of samples delivered, over all ranks."""
        return {"position": self.position, **self.order.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError if the data has changed since."""
        for name, here in self.order.describe().items():
            if state.get(name) != here:
                change = f"the loader's {name} was {state.get(name)}, now it is {here}"
                raise ValueError(f"cannot resume: {change}; resume with the same data, seed and version of vla-oft")
        self.position = state["position"]

    def _requests(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(sample numbers, a seed for each) of this rank's batches from the current position on."""
        position = self.position
        while True:
            positions = self.order.positions(position, self.batch_size, self.rank, self.world_size)
            yield self.order.at(positions), seeds_of(self.order.seed, positions)
            position += self.batch_size * self.world_size

    def _by_processes(self) -> Generator[tuple[Batch, Draw], None, None]:
        pool = WorkerPool(_Fetch(self.dataset, self.collate), self.num_workers, self.prefetch)
        return pool.results(self._requests())

    def _by_thread(self) -> Generator[tuple[Batch, Draw], None, None]:
        ready: queue.Queue[Any] = queue.Queue(self.prefetch)
        stop = threading.Event()
        fetch = _Fetch(self.dataset, self.collate)

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for request in self._requests():
                    if not put(fetch(request, np.empty)):
                        return
            except BaseException as error:  # raised again in the consumer
                put(_Failure(error))

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        finally:
            stop.set()
            thread.join()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Fetch(Generic[Batch]):
    """One request becomes one batch, and what became of its samples."""

    def __init__(self, dataset: ChunkDataset, collate: Callable[[Samples], Batch]) -> None:
        self.dataset, self.collate = dataset, collate

    def __call__(self, request: tuple[np.ndarray, np.ndarray], allocate: Allocate) -> tuple[Batch, Draw]:
        indices, seeds = request
        samples = self.dataset.batch(indices, seeds, allocate)
        replaced = int((samples.indices != indices).sum())
        return self.collate(samples), Draw(drawn=self.dataset.count(indices), replaced=replaced, damaged=samples.damaged)
