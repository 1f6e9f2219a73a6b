"""How far predicted memory is from what a GPU really hands out, for benchmarks/gpu/memory.md. Needs a CUDA GPU.

python scripts/measure_memory.py [--out DIR] [--workload B] [SETTING ...]

Each setting is one training step of configuration B (7.5 B parameters, random weights) in a process of its own; those that are predicted
not to fit are skipped. Exit code 1 when a prediction is off by more than 15 %, or a process failed.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from vla_oft.atomic import replace_file
from vla_oft.bench import workloads
from vla_oft.bench.environment import environment
from vla_oft.bench.random_policy import random_weights
from vla_oft.policy import PolicyConfig
from vla_oft.train import anatomy, assemble, memory
from vla_oft.train.batches import to_device
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.config import Dataset, Phase, Pretrained, TrainConfig
from vla_oft.train.lora import Lora
from vla_oft.train.parallel import Ranks
from vla_oft.train.schedule import Cosine
from vla_oft.train.step import backward
from vla_oft.vlm import sizes
from vla_oft.weights import LazyTensor

TOLERANCE = 0.15
SETTINGS = ("lora-none-1", "lora-none-8", "lora-selective-8", "lora-full-1", "lora-full-8", "nf4-none-1", "nf4-full-8", "frozen-none-8")
PROCESS_S = 100
STEPS = 3
"""Memory is counted from the second one on: loading the weights is not training."""


def settings(name: str, workload: str) -> tuple[TrainConfig, PolicyConfig]:
    """lora-none-8: what trains, recomputation, samples in a pass."""
    kind, recompute, batch = name.split("-")
    lora = {"lora": Lora(base_dtype="bfloat16"), "nf4": Lora(base_dtype="nf4"), "full": None, "frozen": None}[kind]
    config = TrainConfig(
        name=name,
        robot="libero",
        model=Pretrained(path="random weights"),
        datasets=(Dataset(name="random", path="random data"),),
        phases=(Phase(steps=STEPS, mixture=(1.0,)),),
        batch_size=int(batch),
        lr=1e-5,
        schedule=Cosine(warmup_steps=1),
        lora=lora,
        freeze=("vision", "projector", "language") if kind == "frozen" else (),
        weights="bfloat16" if kind == "frozen" else "float32",
        recompute=recompute,  # type: ignore[arg-type]
        precision="bf16",
    )
    policy = workloads.load(workload).config
    return config, dataclasses.replace(policy, vlm=sizes.openvla_7b(film=policy.vlm.film)) if workload in "ABC" else policy


def measure(name: str, workload: str) -> dict[str, float]:
    """Train a few steps on the GPU; bytes that torch handed out, and held, at most."""
    config, policy = settings(name, workload)
    device, skeleton = torch.device("cuda"), anatomy.without_memory(policy)

    def weight(path: str, shape: torch.Size) -> LazyTensor:
        return LazyTensor(tuple(shape), torch.float32, lambda: random_weights(path, shape, device, 0))

    blueprint = Blueprint(skeleton, {path: weight(path, p.shape) for path, p in skeleton.named_parameters()})
    trainee = assemble.assemble(assemble.prepare(blueprint, config), config, Ranks(device=device))
    trained = [p for p in trainee.policy.parameters() if p.requires_grad]
    optimizer = config.optimizer.build(trainee.policy, config.lr, masters=config.weights == "bfloat16+master")
    for step in range(STEPS):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        batch = to_device(memory.sample_batch(policy, config.batch_size, memory.PROMPT_LEN), device)
        backward(trainee.module, batch, bf16=trainee.autocast)
        torch.nn.utils.clip_grad_norm_(trained, config.clip_norm or 1.0)
        optimizer.step(config.lr)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {"measured": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved(), "used": total - free}


def row(name: str, workload: str, out: Path) -> dict[str, object]:
    """Prediction and measurement of one setting."""
    start = time.monotonic()
    predicted = memory.simulate(*settings(name, workload)).predict()
    found: dict[str, object] = {"setting": name, "predicted": predicted.peak, "needed": predicted.needed, "parts": predicted.parts}
    found["simulated_s"] = round(time.monotonic() - start, 1)
    free = torch.cuda.mem_get_info()[0]
    if predicted.needed > free:
        return {**found, "skipped": f"{free / 1e9:.0f} GB are free"}
    answer = out / f"memory-{name}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--workload", workload, "--out", str(out), "--process", name]
    try:
        done = subprocess.run(command, timeout=PROCESS_S, env=os.environ)
    except subprocess.TimeoutExpired:
        return {**found, "failed": f"took longer than {PROCESS_S} s"}
    if done.returncode or not answer.is_file():
        return {**found, "failed": f"the process ended with code {done.returncode}"}
    measured = json.loads(answer.read_text())
    answer.unlink()
    return {**found, **measured, "ratio": predicted.peak / measured["measured"]}


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| setting | predicted, GB | measured, GB | predicted / measured | held, GB | on the device, GB | simulated in, s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for entry in rows:
        cells = [f"{entry[key] / 1e9:.2f}" if key in entry else "-" for key in ("predicted", "measured")]  # type: ignore[operator]
        cells.append(f"{entry['ratio']:.3f}" if "ratio" in entry else str(entry.get("skipped") or entry.get("failed")))
        cells += [f"{entry[key] / 1e9:.2f}" if key in entry else "-" for key in ("held", "used")]  # type: ignore[operator]
        lines.append(f"| {entry['setting']} | {' | '.join(cells)} | {entry['simulated_s']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=SETTINGS)
    parser.add_argument("--workload", default="B")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu"))
    parser.add_argument("--process", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        (given.out / f"memory-{given.process}.json").write_text(json.dumps(measure(given.process, given.workload)))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in given.settings:
        rows.append(row(name, given.workload, given.out))
        print({k: v for k, v in rows[-1].items() if k != "parts"}, flush=True)
        document = {"workload": given.workload, "environment": environment(torch.device("cuda")), "rows": rows}
        replace_file(given.out / "memory.json", json.dumps(document, indent=1) + "\n")
        replace_file(given.out / "memory.md", f"# Predicted and measured memory, configuration {given.workload}\n\n{table(rows)}\n")
    print(table(rows))
    off = [r["setting"] for r in rows if "failed" in r or abs(float(r.get("ratio", 1)) - 1) > TOLERANCE]  # type: ignore[arg-type]
    if off:
        sys.exit(f"off by more than {TOLERANCE:.0%}, or failed: {', '.join(map(str, off))}")


if __name__ == "__main__":
    main()
