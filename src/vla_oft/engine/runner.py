"""One set of static shapes: inputs in memory that stays, and on a GPU one captured graph from raw images to normalised actions.

load    host -> pinned memory -> device, into the inputs; prompts only when they change
run     replay: resize, crop, towers, decoder, head
read    device -> pinned memory -> host
"""

from collections.abc import Callable, Sequence
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
        self.model, self.shapes, self.pixels, self.graph = model, shapes, pixels, graph
        c, device, B = model.config, model.device, shapes.batch
        size, V = c.preprocess.image_size, len(c.robot.cameras)
        if shapes.images is None:
            self.images = [Pinned((B, V, size, size, 3), torch.uint8, device)]
        else:
            self.images = [Pinned((B, *shape, 3), torch.uint8, device) for shape in shapes.images]
        self.state = Pinned((B, c.robot.state_dim), torch.float32, device) if c.use_state else None
        self.noise = Pinned((B, c.chunk_len, c.robot.action_dim), torch.float32, device) if model.head.draws_noise else None
        self.prompts = prompts.clone()
        self._loaded: Prompts | None = prompts
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

    def forget_prompts(self) -> None:
        """Load them anew at the next call, though they are the same: the weights are not."""
        self._loaded = None

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Normalised actions of what was loaded, float32 (B, K, D) on the device; overwritten by the next call."""
        if not self.graph:
            return self._forward()
        if self._captured is None:
            self._capture()
        assert self._captured is not None and self._actions is not None
        self._captured.replay()
        return self._actions

    def _forward(self) -> Tensor:
        images = self.images[0].device if self.pixels is None else self.pixels([i.device for i in self.images])
        state, noise = (None if pinned is None else pinned.device for pinned in (self.state, self.noise))
        return self.model(images, state, self.prompts, noise)

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                self._forward()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.model.graph_pool, stream=stream):
            self._actions = self._forward()
        self._captured = graph
