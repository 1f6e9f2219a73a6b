"""`vla-oft eval`: load a checkpoint, check that it fits the simulator, evaluate, print a table and write report.html."""

import dataclasses
import hashlib
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from vla_oft import engine, hub
from vla_oft.engine.accuracy import check_accuracy
from vla_oft.evaluate.plan import EvalConfig
from vla_oft.evaluate.reading import evaluation_report
from vla_oft.evaluate.report import write_report
from vla_oft.evaluate.results import Results
from vla_oft.evaluate.runner import evaluate
from vla_oft.evaluate.suite import resolve
from vla_oft.evaluate.table import print_results
from vla_oft.policy import Policy, checkpoint_folder
from vla_oft_client import Observation

GATE_SCENES = 8


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What the command line asks for; see `vla-oft eval --help`.

    checkpoint: its folder, its run's folder, or a hub id. dataset: whose statistics normalise, where the checkpoint has several.
    camera_size: side of the policy's camera images in pixels, as in the demonstrations that it was trained on.
    precision: of the compiled policy, see `engine.Precision`, or "eager" for the policy as it was trained; None compiles on a GPU.
    gate: refuse a compiled policy whose actions are too far from those in float32, see `engine.accuracy`.
    """

    checkpoint: str
    suite: str
    trials: int
    seed: int
    num_envs: int
    execute_steps: int | None
    controls: tuple[str, ...]
    record: int
    out: Path | None
    device: str | None
    camera_size: int = 128
    dataset: str | None = None
    precision: str | None = None
    gate: bool = False


def run(request: EvalRequest, *, quiet: bool = False) -> Results:
    """Evaluate and, unless `quiet`, print the results. Raises ValueError before any work for what does not fit."""
    resolve(request.suite)
    folder = checkpoint_folder(hub.resolve(request.checkpoint))
    started = time.strftime("%Y%m%d-%H%M%S")
    beside = folder.parent if Path(request.checkpoint).exists() else Path()  # not into the hub's cache
    out = request.out or beside / f"eval-{folder.name}-{request.suite.replace('/', '-').replace(',', '+')}-{started}"
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    precision = request.precision or (engine.default_precision(torch.device(device)) if on_gpu else "eager")
    config = EvalConfig(
        suite=request.suite,
        trials=request.trials,
        seed=request.seed,
        num_envs=request.num_envs,
        execute_steps=request.execute_steps,
        controls=request.controls,
        camera_size=request.camera_size,
        record=request.record,
        precision=precision,
        out=out,
    )
    policy = load_policy(folder, device, request.dataset, precision)
    check_robot(policy, request.suite)
    if request.gate and isinstance(policy, engine.CompiledPolicy):
        exact = Policy.load(folder, device=device, dtype=torch.float32, dataset=request.dataset)
        error = check_accuracy(policy, exact, first_views(request))
        del exact
        if not quiet:
            print(f"{precision}: actions are {error:.1e} from those in float32")
    results = evaluate(policy, config, checkpoint=fingerprint(folder))
    report = write_report(out / "report.html", evaluation_report(results, out, command_line(request, precision)))
    if not quiet:
        print_results(results)
        print(f"report: {report}\nrows, summary and videos: {out}")
    return results


def load_policy(folder: Path, device: str, dataset: str | None, precision: str) -> Policy | engine.CompiledPolicy:
    """The policy, compiled unless `precision` is "eager". Raises ValueError for an unknown precision."""
    if precision == "eager":
        return Policy.load(folder, device=device, dataset=dataset)
    return engine.load_compiled(folder, precision=cast(engine.Precision, precision), device=device, dataset=dataset)


def first_views(request: EvalRequest) -> list[Observation]:
    """What a policy sees at the beginning of a few scenes of each task; none of them is an evaluation scene."""
    found = []
    for task in resolve(request.suite):
        simulator = task.make(request.camera_size)
        try:
            for seed in range(GATE_SCENES):
                simulator.reset(seed)
                found.append(simulator.observe())
        finally:
            simulator.close()
    return found


def command_line(request: EvalRequest, precision: str) -> str:
    """What repeats an evaluation, in a new folder, on any machine."""
    flags = {
        "suite": request.suite,
        "trials": request.trials,
        "seed": request.seed,
        "num-envs": request.num_envs,
        "execute-steps": request.execute_steps,
        "camera-size": request.camera_size,
        "dataset": request.dataset,
        "record": request.record,
        "precision": precision,
    }
    words = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", str(value))]
    return shlex.join(["vla-oft", "eval", request.checkpoint, *words, "--controls", *request.controls])


def check_robot(policy: Policy | engine.CompiledPolicy, suite: str) -> None:
    """Raise ValueError with the differences unless the policy can drive the suite's robot.

    It may read fewer cameras, or no state, and predict other chunks; how it normalises is its own affair.
    """
    own = policy.config.robot
    for task in resolve(suite):
        simulator = task.make(16)
        try:
            spec = simulator.spec
        finally:
            simulator.close()
        cameras = own.cameras if set(own.cameras) <= set(spec.cameras) else spec.cameras
        alike = dataclasses.replace(
            spec,
            cameras=cameras,
            state_dim=own.state_dim and spec.state_dim,
            chunk_len=own.chunk_len,
            normalize_mask=own.normalize_mask if own.action_dim == spec.action_dim else spec.normalize_mask,
            normalization=own.normalization,
        )
        differences = own.differences(alike)
        if differences:
            raise ValueError(f"the policy was trained for robot '{own.name}', {task} is robot '{spec.name}': {'; '.join(differences)}")


def fingerprint(folder: Path) -> str:
    """Short hash of a checkpoint's weights and configuration."""
    digest = hashlib.sha256()
    for file in [
        folder / "policy.json",
        folder / "statistics.json",
        *sorted(folder.glob("model*.safetensors")),
        *sorted(folder.glob("adapter/*")),
    ]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
