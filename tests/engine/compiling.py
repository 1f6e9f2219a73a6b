"""Compiles kernels for a GPU that is not there: calls of the real wrappers, with tensors that have shapes and types but no memory."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction


class AbsentGpu(DriverBase):
    """Knows its capability and nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # the key of triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self):
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self):
        raise NotImplementedError


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch. Registers per thread, spills and shared memory in bytes."""

    name: str
    grid: tuple[int, ...]
    ptx: str
    shared: int
    registers: int
    spills: int

    def has(self, instruction: str) -> bool:
        return instruction in self.ptx


@contextmanager
def compiled_for(capability: int) -> Iterator[list[Compiled]]:
    """Collect what is launched inside: compiled for sm_<capability>, not run."""
    launched: list[Compiled] = []
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        registers, spills = resources(kernel.asm["cubin"])
        launched.append(Compiled(kernel.metadata.name, grid, kernel.asm["ptx"], kernel.metadata.shared, registers, spills))
        return kernel

    with mock.patch.object(triton.runtime.driver, "_active", AbsentGpu(capability)), mock.patch.object(JITFunction, "run", compile_only):
        yield launched


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory (spills) of a compiled kernel."""
    import tempfile

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])
