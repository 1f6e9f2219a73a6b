"""Every byte that a piece of PyTorch code holds, from birth to death, without having the memory: fake tensors run through the real code.

    with Recorder(cuda=True) as recorder:          any machine, no GPU needed
        weight = torch.empty(4096, 4096)           + 67 MB
        y = (x @ weight).relu()                    + product, + result, - product        x (ANY_BATCH, 4096)
    recorder.trace(ANY_BATCH).peak(batch=8)

    event    +1       +2       +3      -2     +4  ...       + n: storage n is allocated, - n: nothing refers to it any more
    bytes    67.1M    16k      16k                          fixed, or so many per sample of the batch
    live                       peak                         its maximum is what the device must have

Fake tensors have shapes, types and a lifetime, but no values. They say that they are on the CPU, because a PyTorch without CUDA cannot
differentiate anything else; what a GPU does otherwise, and what matters for memory, is done in its place: attention that never writes its
scores, RMSNorm in one kernel, and autocast's choice of operations that stay in float32.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vla_oft.vlm import attention

ANY_BATCH = 1009
"""A batch of so many samples tells for every storage whether it grows with the batch: only then can this prime divide its bytes."""
CUDA_BLOCK = 512
"""Bytes to which PyTorch's CUDA allocator rounds every request."""
FLOAT32_ON_CUDA = ("layer_norm", "group_norm")
LEADING_BF16 = 8  # flash attention wants heads that are a multiple of 8 numbers wide


@dataclass(frozen=True)
class Trace:
    """Storages in the order of their events. events: + n where storage n (from 1) is born, - n where it dies.

    fixed + batch * per_sample: bytes of each storage. kinds: what each one is, an index into `names`.
    """

    events: np.ndarray
    fixed: np.ndarray
    per_sample: np.ndarray
    kinds: np.ndarray
    names: tuple[str, ...]
    block: int = 1

    def sizes(self, batch: int) -> np.ndarray:
        """Bytes of each storage, rounded as the allocator does."""
        exact = self.fixed + batch * self.per_sample
        return -(-exact // self.block) * self.block

    def peak(self, batch: int, shares: Mapping[str, float] | None = None) -> dict[str, int]:
        """Bytes alive at the worst moment, by kind. shares: of a kind, what part of it this device holds; 1 where nothing is said."""
        factors = np.array([(shares or {}).get(name, 1.0) for name in self.names])
        sizes = self.sizes(batch) * factors[self.kinds]
        changes = np.sign(self.events) * sizes[np.abs(self.events) - 1]
        worst = int(np.argmax(np.cumsum(changes))) + 1
        events = self.events[:worst]
        alive = np.zeros(len(sizes))
        np.add.at(alive, np.abs(events) - 1, np.sign(events))
        by_kind = np.bincount(self.kinds, weights=alive * sizes, minlength=len(self.names))
        return {name: int(count) for name, count in zip(self.names, by_kind, strict=True)}


class Recorder:
    """Context in which every tensor operation is followed. cuda: behave as on a GPU. fake: False records real tensors, on the CPU.

    `kind` names what is allocated from now on. Python's cycle collector rests: with it, deaths would come at random.
    """

    def __init__(self, *, cuda: bool = False, fake: bool = True) -> None:
        self._ledger = _Ledger(cuda)
        self._cuda, self._fake = cuda, fake
        self._stack = ExitStack()

    def __enter__(self) -> "Recorder":
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        if collecting:
            self._stack.callback(gc.enable)
        if self._fake:
            self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(self._ledger)
        if self._cuda:
            self._stack.enter_context(_cuda_kernels())
        return self

    def __exit__(self, *error: object) -> None:
        self._ledger.closed = True
        self._stack.close()

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """What is allocated inside is of this kind."""
        before, self._ledger.kind = self._ledger.kind, kind
        try:
            yield
        finally:
            self._ledger.kind = before

    def follow_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """From now on, the gradients of these are of the kind "gradients", and what else the backward pass allocates is "temporaries"."""

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None and not self._ledger.closed:
                self._ledger.rename(parameter.grad, "gradients")

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(arrived)

    def live_bytes(self) -> int:
        """Of all storages that are alive now, unrounded."""
        return self._ledger.live

    def trace(self, batch: int | None = None) -> Trace:
        """What was recorded. batch: the size that was used, if it is `ANY_BATCH`: then the trace is valid for every batch size."""
        ledger = self._ledger
        names = tuple(sorted(set(ledger.kinds)))
        sizes, kinds = np.array(ledger.sizes), np.array([names.index(kind) for kind in ledger.kinds])
        grows = sizes % batch == 0 if batch else np.zeros(len(sizes), bool)
        fixed, per_sample = np.where(grows, 0, sizes), np.where(grows, sizes // (batch or 1), 0)
        return Trace(ledger.events_in_order(), fixed, per_sample, kinds, names, CUDA_BLOCK if self._cuda else 1)


class _Ledger(TorchDispatchMode):
    """Below autograd and autocast: sees what really runs, in the backward pass too."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.kind, self.live, self.closed, self._cuda = "other", 0, False, cuda
        self.events: list[int] = []
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self._alive: dict[int, tuple[int, Any]] = {}  # C++ address of a storage -> its number, and the reference that reports its death

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around every single call, for the sake of torch.compile, which is not used here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two thirds of all calls
        result = func(*args, **(kwargs or {}))
        kind = None
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                kind = kind or self._kind(func, args)
                self._see(leaf, kind)
        if self._cuda and func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
            self._scratch(_flash_scratch(args[1]))
        return result

    def rename(self, tensor: Tensor, kind: str) -> None:
        self.kinds[self._alive[tensor.untyped_storage()._cdata][0] - 1] = kind

    def events_in_order(self) -> np.ndarray:
        """With deaths that follow each other sorted: autocast forgets its copies in no particular order."""
        events = np.array(self.events)
        return events[np.lexsort((-events, np.cumsum(events > 0)))]

    def _kind(self, func: Any, args: Any) -> str:
        """A weight in another type, autocast's doing, is a kind of its own."""
        if func is torch.ops.aten._to_copy.default:
            source = self._alive.get(args[0].untyped_storage()._cdata)
            if source is not None and self.kinds[source[0] - 1] == "weights":
                return "casts"
        if self.kind == "activations" and torch._C._current_graph_task_id() != -1:
            self.kind = "temporaries"  # the backward pass has begun
        return self.kind

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        number = self._born(storage.nbytes(), kind)
        self._alive[address] = number, weakref.ref(storage, lambda _: self._die(address))

    def _die(self, address: int) -> None:
        number, _ = self._alive.pop(address)
        if not self.closed:
            self._died(number)

    def _scratch(self, num_bytes: int) -> None:
        """Memory that a kernel takes and gives back within."""
        self._died(self._born(num_bytes, self.kind))

    def _born(self, num_bytes: int, kind: str) -> int:
        self.sizes.append(num_bytes)
        self.kinds.append(kind)
        self.events.append(len(self.sizes))
        self.live += num_bytes
        return len(self.sizes)

    def _died(self, number: int) -> None:
        self.events.append(-number)
        self.live -= self.sizes[number - 1]


@contextmanager
def _cuda_kernels() -> Iterator[None]:
    """Inside, PyTorch's functions that work otherwise on a GPU do what they would do there. (A TorchFunctionMode would be switched off
    during the backward pass, in which `recompute` runs them again.)
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention, "EXPLICIT_ROWS", 0))  # tensors claim to be on the CPU, and attention believes it
        for name, function in (("scaled_dot_product_attention", _attention), ("rms_norm", _rms_norm), *_float32_functions()):
            stack.enter_context(mock.patch.object(F, name, function))
        yield


def _float32_functions() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Autocast casts their inputs up on a GPU and leaves them alone on a CPU; those that a policy calls on large tensors."""

    def lifted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    for name in FLOAT32_ON_CUDA:
        yield name, lifted(getattr(F, name))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False) -> Tensor:
    """Flash attention keeps q, k, v, the result and one number per row; with a mask, the memory-efficient kernel does the same."""
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        q, k, v = q.to(lower), k.to(lower), v.to(lower)
    width = q.shape[-1]
    if width % LEADING_BF16:
        q, k, v = (F.pad(t, (0, -width % LEADING_BF16)) for t in (q, k, v))
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    else:
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        bias = None
        if attn_mask is not None:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
            bias = bias.expand(*q.shape[:3], k.shape[2])
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]
    return out[..., :width]


def _flash_scratch(q: Tensor) -> int:
    """Its backward pass adds up the gradient of q in float32, over rows rounded up to 128 and heads to 32."""
    batch, heads, rows, width = q.shape
    rounded = -(-rows // 128) * 128
    return 4 * batch * heads * rounded * (-(-width // 32) * 32 + 1)


def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One kernel on CUDA, several operations on a CPU."""
    assert weight is None, "not followed: pass no weight"
    return _RmsNorm.apply(x.float() if torch.is_autocast_enabled("cpu") else x, len(normalized_shape))


class _RmsNorm(torch.autograd.Function):
    """The memory of one fused kernel: it keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: int) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-dims]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0]), None
