"""A policy specialised for speed: it answers as the policy does, and makes its graphs as shapes come up.

observations -> check -> raw images, state -> Runner of these shapes -> actions -> robot units
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_oft import hub
from vla_oft.engine.checkpoint import checkpoint_weights, load_interface
from vla_oft.engine.factory import Factory, check_precision, require_memory
from vla_oft.engine.linear import Read
from vla_oft.engine.model import Model
from vla_oft.engine.options import Options, Precision
from vla_oft.engine.pixels import Pixels
from vla_oft.engine.prompts import Prompts
from vla_oft.engine.runner import Runner, Shapes, on_device
from vla_oft.heads.base import ActionHead
from vla_oft.interface import Interface
from vla_oft.policy_config import PolicyConfig, checkpoint_folder
from vla_oft_client import ActionChunk, Observation

PROMPT_STEP = 8
"""On a GPU, prompts of a batch are padded to a multiple of so many tokens: few graphs then serve all batches."""
KEPT_RUNNERS = 16
KEPT_PROMPTS = 64
"""Most graphs, and most batches of instructions, that are kept; the least recently used one goes first."""
_SHAPE_FIELDS = ("vlm", "head", "chunk_len", "use_state", "preprocess", "prompt_style", "parity", "robot")


class CompiledPolicy:
    """Made by `compile_policy` and `load_compiled`. One call at a time: inputs and outputs live in fixed memory."""

    def __init__(
        self, interface: Interface, read: Read, precision: Precision, device: torch.device, max_prompt_len: int | None, options: Options
    ) -> None:
        check_precision(precision, device)
        self.interface, self.device = interface, device
        self.precision: Precision = precision
        self.max_prompt_len, self.options = max_prompt_len, options
        cuda = device.type == "cuda"
        self._graph, self._device_images = options.graph and cuda, options.device_images and cuda
        factory = Factory(precision, device, options)
        require_memory(interface.config, precision, device)
        self._model = Model(interface.config, factory, streams=options.streams and cuda, zero_row=options.zero_row)
        with torch.inference_mode(), on_device(device):
            self._model.fill(read)
        self._whole = True
        self._runners: OrderedDict[Shapes, Runner] = OrderedDict()
        self._prompts: OrderedDict[tuple[str, ...], Prompts] = OrderedDict()

    @property
    def config(self) -> PolicyConfig:
        """Of the policy."""
        return self.interface.config

    @property
    def action_head(self) -> ActionHead:
        """As in the policy: the settings that may be changed at any time, such as `inference_steps`, may be changed here."""
        return self._model.head

    def act(
        self, observations: Sequence[Observation], noise: np.ndarray | Tensor | None = None, generator: torch.Generator | None = None
    ) -> list[ActionChunk]:
        """One chunk of actions in robot units for each observation; see `Policy.act`."""
        return self.interface.chunks(self.predict(observations, noise, generator).numpy(), observations)

    @torch.inference_mode()
    def predict(
        self, observations: Sequence[Observation], noise: np.ndarray | Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Normalised actions, float32 (B, K, D), on the CPU."""
        return self.prepare(observations, noise, generator)().to("cpu", copy=True)[: len(observations)]

    @torch.inference_mode()
    def prepare(
        self, observations: Sequence[Observation], noise: np.ndarray | Tensor | None = None, generator: torch.Generator | None = None
    ) -> Runner:
        """Check observations and copy them to the device. Calling the result runs the device's part: normalised actions (B', K, D).

        B' may exceed the batch: on a GPU it is the next power of two, so that few graphs serve all batches.
        """
        if not observations:
            raise ValueError("no observations: pass at least one")
        self.interface.check(observations)
        with on_device(self.device):
            return self._prepare(observations, noise, generator)

    def _prepare(self, observations: Sequence[Observation], noise: np.ndarray | Tensor | None, generator: torch.Generator | None) -> Runner:
        rows = _padded(observations) if self._graph else list(observations)
        start = self._noise(noise, generator, len(observations))
        if start is not None:
            start = start[[min(i, len(observations) - 1) for i in range(len(rows))]]
        prompts = self._encode(tuple(o.instruction for o in rows))
        shapes, images = self._images(rows)
        runner = self._runner(
            Shapes(len(rows), prompts.embeds.shape[1], prompts.mask is not None, shapes, self._model.head.variant), prompts
        )
        runner.load(images, self.interface.state(rows), None if start is None else start.numpy(), prompts)
        return runner

    @torch.inference_mode()
    def warm_up(self, cameras: Mapping[str, tuple[int, int]] | None, instruction: str) -> None:
        """Make the graph for these shapes now. cameras: (height, width) of raw images; those of the network by default."""
        size, robot = self.config.preprocess.image_size, self.config.robot
        shapes = {camera: (cameras or {}).get(camera, (size, size)) for camera in robot.cameras}
        images = {camera: np.zeros((*shape, 3), np.uint8) for camera, shape in shapes.items()}
        state = np.zeros(robot.state_dim, np.float32) if robot.state_dim else None
        self.prepare([Observation(images, state, instruction)])()

    def swap(self, checkpoint: str | Path, dataset: str | None = None) -> None:
        """Take the weights and statistics of another checkpoint of the same shape: its folder, its run's folder, or a hub id.

        A LoRA adapter is added in float32. Graphs stay; what was prepared before must be prepared again. dataset: whose statistics
        normalise, where the checkpoint has several and chooses none.
        Raises ValueError, with nothing changed, for a checkpoint of another shape.
        """
        folder = checkpoint_folder(hub.resolve(checkpoint))
        interface = load_interface(folder, dataset)
        different = [name for name in _SHAPE_FIELDS if getattr(interface.config, name) != getattr(self.config, name)]
        if different:
            raise ValueError(f"{folder} differs from the compiled policy in {', '.join(different)}: compile it instead of swapping")
        read = checkpoint_weights(folder, interface.config, self.device)
        self._whole = False
        with torch.inference_mode(), on_device(self.device):
            self._model.fill(read)
        self._whole, self.interface = True, interface
        self._prompts.clear()

    @property
    def num_bytes(self) -> int:
        """Of the big layers' weights."""
        return sum(tensor.numel() * tensor.element_size() for layer in self._model.linears() for tensor in layer.tensors())

    def _noise(self, noise: np.ndarray | Tensor | None, generator: torch.Generator | None, count: int) -> Tensor | None:
        """What a stochastic head starts from, drawn as `Policy.act` draws it; None for other heads."""
        given = self.interface.noise(noise, count, torch.device("cpu"))
        if not self._model.head.draws_noise:
            return None
        if given is not None:
            return given
        return torch.randn(count, self.config.chunk_len, self.config.robot.action_dim, generator=generator, dtype=torch.float32)

    def _encode(self, instructions: tuple[str, ...]) -> Prompts:
        if instructions not in self._prompts:
            ids, mask = self.interface.encode_prompts(list(instructions))
            length = self._padded_len(instructions, ids.shape[1])
            widths = ((0, 0), (length - ids.shape[1], 0))
            ids, mask = np.pad(ids, widths, constant_values=self.config.vlm.tokens.pad), np.pad(mask, widths)
            masked = self.max_prompt_len is not None or not mask.all()
            on_device = torch.from_numpy(mask).to(self.device) if masked else None
            self._prompts[instructions] = self._model.prompts(torch.from_numpy(ids).to(self.device), on_device)
        return _recent(self._prompts, instructions, KEPT_PROMPTS)

    def _padded_len(self, instructions: tuple[str, ...], length: int) -> int:
        """Tokens that these prompts are padded to. Batches are padded a little further than they must, so that few graphs serve all."""
        if self.max_prompt_len is not None:
            check_prompts(self.interface, instructions, self.max_prompt_len)
            return self.max_prompt_len
        return -(-length // PROMPT_STEP) * PROMPT_STEP if self._graph and len(instructions) > 1 else length

    def _images(self, observations: Sequence[Observation]) -> tuple[tuple[tuple[int, int], ...] | None, list[Sequence[np.ndarray]]]:
        """Raw images by camera and their sizes, or prepared ones and None: on a CPU, and where one camera has several sizes."""
        stacks = [[o.images[camera] for o in observations] for camera in self.config.robot.cameras]
        if not self._device_images or any(image.shape != stack[0].shape for stack in stacks for image in stack):
            return None, [list(self.interface.images(observations))]
        return tuple(stack[0].shape[:2] for stack in stacks), [*stacks]

    def _runner(self, shapes: Shapes, prompts: Prompts) -> Runner:
        if not self._whole:
            raise RuntimeError("swapping in other weights broke off half-way: swap again, or compile anew")
        if shapes not in self._runners:
            pixels = None if shapes.images is None else Pixels(self.config.preprocess, shapes.images, self.device)
            self._runners[shapes] = Runner(self._model, shapes, prompts, pixels, graph=self._graph)
        return _recent(self._runners, shapes, KEPT_RUNNERS)


def check_prompts(interface: Interface, instructions: Sequence[str], max_prompt_len: int) -> None:
    """Raise ValueError for an instruction of more tokens."""
    for text in instructions:
        length = len(interface.encode_prompts.ids(text))
        if length > max_prompt_len:
            raise ValueError(f"instruction {text!r} has {length} tokens, but max_prompt_len={max_prompt_len}")


def _padded(observations: Sequence[Observation]) -> list[Observation]:
    """Up to the next power of two, by repeating the last one."""
    count = 1 << (len(observations) - 1).bit_length()
    return [*observations, *[observations[-1]] * (count - len(observations))]


def _recent(entries: OrderedDict, key: object, limit: int) -> Any:
    """The entry of `key`, now the most recently used; those used longest ago are dropped beyond `limit`."""
    entries.move_to_end(key)
    while len(entries) > limit:
        entries.popitem(last=False)
    return entries[key]
