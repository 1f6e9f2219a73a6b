"""`vla-oft bench profile`: which kernels a call spends its time in, as text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vla_oft.atomic import replace_file
from vla_oft.bench import latency, rows, timing

NAME_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """What the command line asks for. precision: the engine's, or "eager". top: kernels to list."""

    workload: str | None = None
    precision: str = "bf16"
    calls: int = 5
    top: int = 40
    device: str | None = None
    seed: int = 0
    out: Path | None = None


def run(request: ProfileRequest, *, quiet: bool = False) -> str:
    """Profile some calls on the device alone; returns the text. Raises ValueError before any work."""
    device = rows.choose_device(request.device)
    precisions = latency.check_precisions((request.precision,), device) if request.precision != "eager" else []
    plan = timing.Plan(calls=request.calls, warmup=3)
    setting = latency.prepare(latency.LatencyRequest(workload=request.workload, seed=request.seed), plan, device)
    subject = rows.compile_subject(setting, precisions[0]) if precisions else timing.Eager(setting.policy)
    call = subject.prepare(setting.batches[0], noise=setting.noise)
    text = kernel_times(call, device, calls=request.calls, warmup=plan.warmup, top=request.top)
    text = f"workload {setting.name}, {request.precision}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}\n{text}"
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        replace_file(request.out / f"profile-{setting.name}-{request.precision}-{device.type}.txt", text)
    if not quiet:
        print(text)
    return text


@torch.inference_mode()
def kernel_times(call: Callable[[], Any], device: torch.device, *, calls: int, warmup: int, top: int) -> str:
    """Time on the device by kernel, mean over `calls`, longest first; on a CPU by operator."""
    for _ in range(max(warmup, 1)):
        call()
    timing.synchronize(device)
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        for _ in range(calls):
            call()
        timing.synchronize(device)
    found = [
        ((event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000 / calls, event.count / calls, event.key)
        for event in profiler.key_averages()
        if not gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    found.sort(reverse=True)
    total = sum(ms for ms, _, _ in found)
    number, what = sum(count for _, count, _ in found), "kernels" if gpu else "operators"
    lines = [f"{total:.3f} ms in {number:.0f} {what} per call, mean of {calls}", "", f"{'ms':>9}  {'share':>6}  {'calls':>6}  name"]
    lines += [f"{ms:9.4f}  {100 * ms / total:5.1f}%  {count:6.1f}  {name[:NAME_WIDTH]}" for ms, count, name in found[:top] if ms > 0]
    return "\n".join(lines) + "\n"
