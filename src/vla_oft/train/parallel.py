"""Several processes as one trainer: `torchrun` starts them, PyTorch's DDP or FSDP2 averages their gradients.

    ddp              every process holds all weights
    fsdp             [w0 | w1 | w2 | w3]            each holds a part; a block is whole only while it computes
    fsdp, shard 2    [w0 | w1]  [w0 | w1]           HSDP: a whole copy on every machine, parts within

The backbone, FiLM, projectors and the action head are one module, `Policy`, so nothing can train behind the wrapper's back.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vla_oft.policy import Policy
from vla_oft.train import nf4

T = TypeVar("T")
TIMEOUT = timedelta(hours=3)
"""How long processes wait for each other: the first one may record demonstrations, build caches or write a large checkpoint meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """strategy: `ddp` keeps a whole copy of the weights in every process; `fsdp` divides weights, gradients and optimizer state among them,
    block by block (FSDP2). shard_size: of `fsdp`, how many processes share one copy; None for all. A divisor of their number, usually the
    processes of one machine, keeps copies on every machine (HSDP) so that only gradients travel between machines.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    shard_size: int | None = None

    def __post_init__(self) -> None:
        if self.shard_size is not None and (self.strategy != "fsdp" or self.shard_size < 1):
            raise ValueError(f"parallel.shard_size={self.shard_size} needs strategy='fsdp' and a positive number, or None")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. rank: 0 prints and writes. device: where this process computes."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        """Whether this process computes on the CPU."""
        return self.device.type == "cpu"

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over all processes; in place, on any device, without waiting for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(()))  # on the host: a GPU's barrier would wait for its queue

    def agree(self, count: int, wish: bool, failure: bool) -> tuple[int, bool, bool]:
        """The sum of `count` over all processes, and whether any of them has a wish or a failure. Over the host: no GPU is waited for."""
        values = self.sum(torch.tensor([count, int(wish), int(failure)]))
        return int(values[0]), bool(values[1]), bool(values[2])

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by the first process alone while the others wait; its error is raised in all of them."""
        if self.world_size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = work()
            except Exception as error:
                answer[1] = _portable(error)
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """The result of `work` in every process; the first does it before the others, who find its caches. Errors are as in `on_main`."""
        result: list[T] = []
        self.on_main(lambda: result.append(work()))
        return result[0] if result else work()

    @contextmanager
    def held_by_main(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Inside, the first process is in `context`; its error on entering is raised in all."""
        with ExitStack() as stack:
            self.on_main(lambda: (stack.enter_context(context), None)[1])
            yield

    @contextmanager
    def silent_others(self) -> Iterator[None]:
        """Inside, only the first process prints. What the others raise is seen outside."""
        with ExitStack() as stack:
            if not self.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield


@contextmanager
def start(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be alone. device: "cpu", "cuda" (this process's GPU) or "cuda:N".

    Raises ValueError for a GPU that is not there. May be nested: the innermost call joins nothing anew.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = _place(device, int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else None)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # Triton starts kernels on the current GPU, wherever their tensors are
    if world_size == 1 or dist.is_initialized():
        yield Ranks(rank, world_size, place)
        return
    if place.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=place)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    yield Ranks(rank, world_size, place)
    dist.destroy_process_group()  # after an error it could wait for work that the others never finish


def _portable(error: Exception) -> Exception:
    """The same, or one with the same words that can be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _place(device: str, local_rank: int | None) -> torch.device:
    place = torch.device(device)
    if place.type != "cuda":
        return place
    if not torch.cuda.is_available():
        raise ValueError(f"device={device}, but this torch ({torch.__version__}) finds no CUDA GPU; use --device cpu")
    index = place.index if place.index is not None else local_rank or 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"device={device}: this process is number {index} on a machine with {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def shard(policy: Policy, parallel: Parallel, ranks: Ranks, compute_dtype: torch.dtype | None) -> None:
    """Divide the parameters of `policy`, which may be on the meta device, among the processes (FSDP2), in place.

    compute_dtype: what blocks are gathered and computed in; None for what they are kept in. Gradients are averaged in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    size = parallel.shard_size or ranks.world_size
    if ranks.world_size % size:
        raise ValueError(f"parallel.shard_size={size} does not divide the {ranks.world_size} processes")
    kind = ranks.device.type
    if size == ranks.world_size:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (ranks.world_size // size, size), mesh_dim_names=("copy", "shard"))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    packed = nf4.packed_parameters(policy)  # 4 bits each: every process keeps all of them
    for block in blocks(policy):
        fully_shard(block, mesh=mesh, mp_policy=precision, ignored_params=packed)
    fully_shard(policy, mesh=mesh, mp_policy=precision, ignored_params=packed)
    register_fsdp_forward_method(policy, "predict")


def blocks(policy: Policy) -> list[nn.Module]:
    """The repeated parts of the backbone: what is sharded, recomputed and compiled one by one."""
    backbone, body = policy.vlm.vision_backbone, policy.vlm.language_model.model
    return [*backbone.featurizer.blocks, *backbone.fused_featurizer.blocks, *body.layers]


def replicate(policy: Policy, ranks: Ranks) -> nn.Module:
    """DDP around a policy whose weights are equal in all processes."""
    from torch.nn.parallel import DistributedDataParallel

    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(policy, device_ids=devices, gradient_as_bucket_view=True)


def averaged(module: nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """Around forward and backward of one pass: gradients are averaged over the processes only `now`, in the last pass of a step."""
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(module, DistributedDataParallel):
        return nullcontext() if now else module.no_sync()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(now)  # type: ignore[operator]
    return nullcontext()


def forget_gathered(policy: nn.Module) -> None:
    """Let FSDP gather anew what it may still hold whole from the latest forward pass: the weights have been, or will be, exchanged.

    It keeps those outside the blocks for a backward pass, and validation has none: the next step would compute with averaged weights.
    """
    for module in policy.modules():
        if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def whole(value: Tensor) -> Tensor:
    """A tensor that may be divided among the processes, all of it. Every process must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value
