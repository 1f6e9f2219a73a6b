"""One set of static shapes: inputs in memory that stays, and on a GPU one captured graph from raw images to normalised actions.

load    host -> pinned memory -> device, into the inputs; prompts only when they change
run     replay: resize, crop, towers, decoder, head
read    device -> host
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vla_oft.engine.model import Model
from vla_oft.engine.prompts import Prompts

WARMUP_CALLS = 3
"""Before a capture: kernels compile, cuBLAS takes its workspace, products are tuned."""
Pixels = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Shapes:
    """What a graph is made for.

    batch: observations. prompt_len: tokens; masked: whether some are padding. images: (H, W) of each camera, prepared on the device; None
    when images come prepared. variant: of the action head's sampling.
    """

    batch: int
    prompt_len: int
    masked: bool
    images: tuple[tuple[int, int], ...] | None
    variant: object = None


class Pinned:
    """A tensor on the device and its twin in page-locked host memory, between which copies need no waiting."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        host = torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")
        self.device = host if device.type == "cpu" else torch.empty(tuple(shape), dtype=dtype, device=device)
        self._pinned, self.host = host, host.numpy()

    def send(self) -> None:
        """What is in `host` now, to the device."""
        if self.device is not self._pinned:
            self.device.copy_(self._pinned, non_blocking=True)


class Runner:
    """The network for fixed shapes. One call at a time."""

    def __init__(self, model: Model, shapes: Shapes, prompts: Prompts, pixels: Pixels | None, *, graph: bool) -> None:
        self.model, self.pixels, self.graph = model, pixels, graph
        c, device, B = model.config, model.device, shapes.batch
        size, V = c.preprocess.image_size, len(c.robot.cameras)
        if shapes.images is None:
            self.images = [Pinned((B, V, size, size, 3), torch.uint8, device)]
        else:
            self.images = [Pinned((B, *shape, 3), torch.uint8, device) for shape in shapes.images]
        self.state = Pinned((B, c.robot.state_dim), torch.float32, device) if c.use_state else None
        self.noise = Pinned((B, c.chunk_len, c.robot.action_dim), torch.float32, device) if model.head.draws_noise else None
        self.prompts = prompts.clone()
        self._loaded = prompts
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self._captured: torch.cuda.CUDAGraph | None = None
        self._actions: Tensor | None = None

    def load(self, images: Sequence[Sequence[np.ndarray]], state: np.ndarray | None, noise: np.ndarray | None, prompts: Prompts) -> None:
        """Set the inputs. images: for each camera those of all observations, uint8; or the prepared ones, as if of one camera."""
        if self._sent is not None:
            self._sent.synchronize()  # the last inputs have left the host's memory
        filled = [*zip(self.images, images, strict=True), *((p, v) for p, v in ((self.state, state), (self.noise, noise)) if p is not None)]
        for pinned, values in filled:
            assert values is not None
            for row, value in zip(pinned.host, values, strict=True):
                np.copyto(row, value)  # any strides: cameras are often mounted upside down
            pinned.send()
        if self._sent is not None:
            self._sent.record()
        if prompts is not self._loaded:
            self.prompts.load(prompts)
            self._loaded = prompts

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Normalised actions of what was loaded, float32 (B, K, D) on the device; overwritten by the next call of any runner."""
        with on_device(self.model.device):
            if not self.graph:
                return self._forward()
            if self._captured is None:
                self._captured = self._capture()
            assert self._actions is not None
            self._captured.replay()
            return self._actions

    def _forward(self) -> Tensor:
        images = self.images[0].device if self.pixels is None else self.pixels([i.device for i in self.images])
        state, noise = (None if pinned is None else pinned.device for pinned in (self.state, self.noise))
        return self.model(images, state, self.prompts, noise)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Run until everything is compiled and chosen, then record. All graphs of a policy share one stream and one pool of memory.

        cuBLAS keeps a workspace for each stream. Cleared before and after, it lies in the graph's own memory: torch 2.12 and later free a
        stream's workspace together with a graph that was captured there, under the feet of other graphs (pytorch issue 193402).
        """
        stream = self.model.capture_stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                self._forward()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, pool=self.model.graph_pool, stream=stream, capture_error_mode="thread_local"):
            self._actions = self._forward()
        torch._C._cuda_clearCublasWorkspaces()
        return graph


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one: streams, events and kernels are made for that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
