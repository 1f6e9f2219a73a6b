"""The command line. Each command imports what it needs when it runs, so that `vla-oft --help` answers at once."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from vla_oft import cli_bench, cli_data, cli_doctor, cli_train


def quickstart(
    *,
    out: Path = Path("quickstart"),
    task: str = "pick_place",
    trials: int = 100,
    seed: int = 7,
    episodes: int | None = None,
    steps: int | None = None,
) -> None:
    """Demonstrations -> OFT fine-tuning -> closed-loop evaluation -> report.html, on a CPU in under ten minutes.

    Args:
        out: folder for everything; must be empty or absent.
        task: task family of the tabletop simulator; the pretrained policy has never seen pick_place.
        trials: evaluation episodes per condition.
        seed: which block of evaluation scenes.
        episodes: demonstrations to record and learn from.
        steps: optimizer steps of the fine-tuning.
    """
    from vla_oft.quickstart import QuickstartConfig, run

    chosen = {name: value for name, value in (("episodes", episodes), ("steps", steps)) if value is not None}
    run(QuickstartConfig(out=out, task=task, trials=trials, seed=seed, **chosen))


def evaluate(
    checkpoint: Positional[str],
    *,
    suite: str,
    trials: int = 50,
    seed: int = 7,
    num_envs: int = 8,
    execute_steps: int | None = None,
    controls: tuple[str, ...] = ("swapped",),
    record: int = 3,
    camera_size: int = 128,
    dataset: str | None = None,
    out: Path | None = None,
    json: bool = False,
    device: str | None = None,
    precision: str | None = None,
    gate: bool = False,
) -> None:
    """Closed-loop evaluation of a checkpoint in simulation.

    Args:
        checkpoint: a checkpoint or run folder, or a hub id.
        suite: tasks, for example tabletop/touch, tabletop, or tabletop/touch,tabletop/push.
        trials: episodes for each task and condition.
        seed: which block of scenes; the same seed gives the same scenes.
        num_envs: simulators side by side, and the largest batch.
        execute_steps: actions executed of each chunk before the next query; the whole chunk by default.
        controls: further conditions on the same scenes: swapped (another object is named), blind (none is), expert.
        record: film the first N trials of each task and condition.
        camera_size: pixels of the simulated cameras, as in the demonstrations.
        dataset: whose statistics normalise, where the checkpoint has several.
        out: folder for results.jsonl, summary.json and videos; a new one beside the checkpoint by default.
        json: print one JSON object on stdout and nothing else.
        device: "cpu" or "cuda"; the GPU if there is one.
        precision: compile the policy for fp32, bf16, fp8, fp8-llm, int8, int4 or int8-dynamic; "eager" runs it as it was trained. On a GPU
            bf16 by default, on a CPU eager.
        gate: refuse to begin when the compiled policy's actions are too far from those in float32.
    """
    from vla_oft.evaluate.command import EvalRequest, run

    request = EvalRequest(
        checkpoint=checkpoint,
        suite=suite,
        trials=trials,
        seed=seed,
        num_envs=num_envs,
        execute_steps=execute_steps,
        controls=controls,
        record=record,
        camera_size=camera_size,
        dataset=dataset,
        out=out,
        device=device,
        precision=precision,
        gate=gate,
    )
    results = run(request, quiet=json)
    if json:
        _print_json(results.to_json())


def ckpt_show(checkpoint: Positional[str], *, json: bool = False) -> None:
    """Print what a checkpoint is: model, robot, statistics, sizes.

    Args:
        checkpoint: a checkpoint or run folder.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.describe import describe, lines

    document = describe(Path(checkpoint))
    if json:
        _print_json(document)
    else:
        print("\n".join(lines(document)))


def ckpt_import(
    source: Positional[str],
    out: Positional[Path],
    *,
    base: str | None = None,
    dataset: str | None = None,
    robot: str | None = None,
    cameras: int | None = None,
    chunk_len: int | None = None,
    decoding: Literal["parallel", "autoregressive"] | None = None,
    center_crop: bool | None = None,
    step: str | None = None,
    vision_overrides: Path | None = None,
    diffusion_steps: int = 50,
    parity: bool = True,
) -> None:
    """Import a published OpenVLA or OpenVLA-OFT checkpoint; weights keep their bits.

    Args:
        source: its folder or hub id, for example moojink/openvla-7b-oft-finetuned-libero-spatial.
        out: checkpoint folder to write; must be empty or absent.
        base: folder or hub id of the model that source/lora_adapter adapts; replaces weights that were merged in bfloat16.
        dataset: whose statistics normalise, where the checkpoint has several; may be chosen later, when loading.
        robot: name of a robot: rates, cameras, kind of normalisation; guessed from the dataset's name.
        cameras: how many of the robot's cameras the policy reads.
        chunk_len: actions per chunk; the robot's by default, 1 for autoregressive decoding.
        decoding: of a checkpoint without action head.
        center_crop: whether the policy was trained on random crops and sees the central 90 %; all fine-tuned ones were, the base was not.
        step: N of the files *--N_checkpoint.pt, where there are several; a number or "latest".
        vision_overrides: JSON with num_heads of each vision tower, for towers of other than the published sizes.
        diffusion_steps: noise levels that a diffusion head was trained with.
        parity: reproduce the reference in every detail, see docs/parity.md.
    """
    from vla_oft.reference import ImportRequest, import_checkpoint

    request = ImportRequest(
        source=source,
        base=base,
        dataset=dataset,
        robot=robot,
        cameras=cameras,
        chunk_len=chunk_len,
        decoding=decoding,
        center_crop=center_crop,
        step=step,
        vision_overrides=vision_overrides,
        diffusion_steps=diffusion_steps,
        parity=parity,
    )
    print(f"checkpoint: {import_checkpoint(request, out)}")


def ckpt_export(checkpoint: Positional[Path], out: Positional[Path], *, step: str | None = None, unmerged: bool = False) -> None:
    """Write a checkpoint in the published layout, for the reference's own code.

    Args:
        checkpoint: a checkpoint or run folder.
        out: folder to write; must be empty or absent.
        step: N of the files *--N_checkpoint.pt.
        unmerged: leave the LoRA adapter out of model.safetensors; it lies beside it either way.
    """
    from vla_oft.reference import export_checkpoint

    print(f"exported: {export_checkpoint(checkpoint, out, step=step, unmerged=unmerged)}")


def ckpt_merge(
    source: Positional[str],
    out: Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tolerance: float | None = None,
) -> None:
    """Add a checkpoint's LoRA adapter to its weights; refused when the policy would act otherwise.

    Args:
        source: checkpoint folder, run folder or hub id with an adapter.
        out: checkpoint folder to write; must be empty or absent.
        dtype: what the merged weights are stored in; the sums are float32.
        tolerance: largest change of a normalised action; 1e-4 in float32, 2e-2 in bfloat16 by default.
    """
    from vla_oft.merge import merge_checkpoint

    done = merge_checkpoint(source, out, dtype=dtype, tolerance=tolerance)
    print(
        f"checkpoint: {done.folder}; in {dtype} normalised actions move by at most {done.difference:.1e} (tolerance {done.tolerance:.1e})"
    )


def ckpt() -> None:
    """Checkpoints: show, import, export, merge."""


COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "train": cli_train.train,
    "show": cli_train.show,
    "eval": evaluate,
    "data": cli_data.data,
    "ckpt": ckpt,
    "bench": cli_bench.bench,
    "doctor": cli_doctor.doctor,
}
GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "data": cli_data.COMMANDS,
    "ckpt": {"show": ckpt_show, "import": ckpt_import, "export": ckpt_export, "merge": ckpt_merge},
    "bench": cli_bench.COMMANDS,
}


def main() -> None:
    """Entry point. Exit code 0 on success, 2 for bad usage or bad input, 1 for anything else."""
    arguments = sys.argv[1:]
    group = arguments[0] if arguments and arguments[0] in GROUPS else None
    commands = GROUPS[group] if group else COMMANDS
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog=f"vla-oft {group}" if group else "vla-oft",
            description=commands_help(group),
            args=arguments[1:] if group else arguments,
        )
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:  # OSError: the disk is full, or a process died
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        print(f"error: {error}; install what this command needs with: pip install 'vla-oft[data,sim,train]'", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        from vla_oft.sims.base import SimulatorError

        if not isinstance(error, SimulatorError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def commands_help(group: str | None) -> str:
    """The line above a help page."""
    return (COMMANDS[group].__doc__ or "") if group else "Optimized Fine-Tuning of vision-language-action models."


def in_words(error: Exception) -> str:
    """An error in one line, with what to do where the system only gives a number."""
    fixes = {errno.EACCES: "change its owner or mode, or choose another place", errno.ENOSPC: "free some space, or choose another place"}
    if not isinstance(error, OSError) or error.errno not in fixes:
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{os.strerror(error.errno).lower()}; {fixes[error.errno]}"


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, default=str) + "\n")
