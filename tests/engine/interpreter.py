"""Runs functions of the kernel modules where they can run: on a GPU if there is one, else under Triton's interpreter in a second process.

Triton decides when a kernel is decorated whether it is compiled or interpreted, so one process cannot have both.
The interpreter of Triton 3.6 cuts bfloat16 off, rounds float8 wrongly, and takes bfloat16 for integers in matrix products and in
conversions from integers. The GPU rounds to nearest even; `repair` makes the interpreter do so, through torch's conversions.
"""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

Call = Callable[..., Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def interpreter() -> Iterator[Call]:
    """Yield call("norms.add_rms_norm", *args, **kwargs): the result, and the positional arguments afterwards. Or call(function, ...).

    Tensors go in and come back on the CPU.
    """
    if DEVICE.type == "cuda":
        yield run_on_gpu
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=repair)
        pool.submit(os.getpid).result()  # starts the process, with the environment of now
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    with pool:
        yield lambda what, *args, **kwargs: pool.submit(run, what, args, kwargs).result()


def run(what: str | Call, args: tuple, kwargs: dict) -> tuple[Any, tuple]:
    if isinstance(what, str):
        module, name = what.rsplit(".", 1)
        what = getattr(importlib.import_module(f"vla_oft.engine.kernels.{module}"), name)
    return what(*args, **kwargs), args


def run_on_gpu(what: str | Call, *args, **kwargs) -> tuple[Any, tuple]:
    memory: dict[tuple, torch.Tensor] = {}

    def there(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)  # keeps the gaps between rows

    def back(x: torch.Tensor) -> torch.Tensor:
        return memory.setdefault((x.data_ptr(), x.shape, x.dtype), x.cpu())  # what is one tensor there is one tensor here

    result = run(what, moved(args, there), moved(kwargs, there))
    return moved(result, back)


def moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: moved(item, move) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [moved(item, move) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def repair() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    torch.set_num_threads(1)
    kinds = {tl.bfloat16: (torch.bfloat16, torch.int16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
    kinds |= {tl.float16: (torch.float16, torch.int16), tl.float32: (torch.float32, torch.int32)}
    bits = {torch.int16: np.int16, torch.int32: np.int32, torch.uint8: np.uint8}
    builder, handle = triton_interpreter.InterpreterBuilder, triton_interpreter.TensorHandle

    def convert(values, source, target, _rounding):
        (from_dtype, from_bits), (to_dtype, to_bits) = kinds[source], kinds[target]
        tensor = torch.from_numpy(np.ascontiguousarray(values).view(bits[from_bits]).copy()).view(from_dtype)
        return tensor.to(to_dtype).view(to_bits).numpy().view(f"u{to_dtype.itemsize}").reshape(values.shape)

    def widened(x):
        if x.dtype.scalar not in (tl.bfloat16, tl.float8e4nv):
            return x.data
        return convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32)

    def dot(self, a, b, d, _precision, _max_imprecise):
        exact = np.int32 if a.dtype == tl.int8 else np.float32
        return handle(widened(a).astype(exact) @ widened(b).astype(exact) + d.data, d.dtype.scalar)

    cast, patch_tensor = builder.cast_impl, triton_interpreter._patch_lang_tensor

    def cast_by_value(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = handle(source.data.astype(np.float32), tl.float32)
        return cast(self, source, target)

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda x: x.handle.data.item())  # numpy no longer turns arrays of one element into an int

    triton_interpreter._convert_float = convert
    triton_interpreter._patch_lang_tensor = patch_tensor_and_index
    builder.create_dot, builder.cast_impl = dot, cast_by_value
