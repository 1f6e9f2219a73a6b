"""Less memory or less time per block of the backbone: recompute activations in the backward pass, or compile the block.

    recompute    kept for the backward pass, per ViT block or decoder layer                                recomputed
    none         everything that a gradient needs                                                         nothing
    selective    what enters the block, results of large matrix products and of attention                 norms, activations, RoPE, casts,
                                                                                                          LoRA's products (rank is small)
    full         what enters the block                                                                    the block

Losses and gradients are the same bits in all three, dropout included. Parameter names do not change: calls are wrapped, not modules.
Order: recompute, compile, shard; so the compiler sees what to recompute, and FSDP gathers a block once for all of it.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vla_oft.policy import Policy
from vla_oft.train.parallel import blocks

GRAPHS = 64
"""How many variants of blocks may be compiled. Beyond torch's own limit, 8 for all blocks together, they would run uncompiled."""
LARGE = 8
"""A matrix product (m, k) x (k, n) is cheap to repeat, compared with the memory of its result, when k is less than n / 8: LoRA's B."""
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "torch_attn::_varlen_attn",
)


def apply_recompute(policy: Policy, mode: Literal["none", "selective", "full"]) -> None:
    """Make every ViT block and decoder layer of `policy` recompute in its backward pass what `mode` does not keep."""
    if mode != "none":
        for block in blocks(policy):
            block.forward = _recomputed(block, selective=mode == "selective")


def compile_blocks(policy: Policy, *, backend: str = "inductor") -> None:
    """Compile every ViT block and decoder layer, in place. Blocks of a kind share one compiled function.

    The first prompt length is compiled for itself; at the second one the length becomes a variable, and later ones cost nothing. The same
    again for the first batches whose prompts differ in length, and for validation.
    Raises ValueError for a policy with DoRA, which peft computes in a way that cannot be compiled.
    """
    if any("lora_magnitude_vector" in name for name, _ in policy.named_parameters()):
        raise ValueError("compile=True does not work with lora.dora=True: every layer would become many graphs; use one or the other")
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    for block in blocks(policy):
        block.compile(backend=backend)


def _recomputed(block: nn.Module, *, selective: bool) -> Callable[..., Tensor]:
    compute = block.forward
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
    contexts: dict[str, Any] = {"context_fn": _contexts} if selective else {}

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return compute(*args, **kwargs)
        return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=draws, **contexts, **kwargs)

    return forward


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_decide)


def _decide(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = operation.name() in _ATTENTION or _is_large_product(operation, args)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _is_large_product(operation: Any, args: tuple[Any, ...]) -> bool:
    """Of linear layers; and, where attention is written out, of weights and values."""
    if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        inner, width = args[-1].shape
        return inner * LARGE >= width
    if operation == torch.ops.aten.bmm.default:
        inner, width = args[1].shape[1:]
        return inner >= width
    return False
