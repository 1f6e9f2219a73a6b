"""`vla-oft doctor`: part of the command line, see `cli.py`."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg


def doctor(
    target: Positional[str | None] = None,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    set: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE"), UseAppendAction] = (),
    out: Path | None = None,
    device: str | None = None,
    dataset: str | None = None,
    json: bool = False,
) -> None:
    """Will it work? Of this machine, of a run before it starts, or of a trained policy.

    Without a target: GPUs, processor, disk, renderer, clock, optional packages. A recipe (or train.json): memory that training needs, by
    size of passes and recomputation, and what it lacks. A checkpoint: does it see, listen, and decide on a whole chunk at once?

    Exit code 1 when a run cannot begin (memory, settings, folder) or a policy fails a test.

    Args:
        target: a recipe, a train.json, or a checkpoint, run folder or hub id.
        gpu: what the run is planned for: h200, h100, a100-80, a100-40, l40s, 5090, 4090, 3090, l4, t4, ..., or its memory in GB; by
            default what is here.
        gpus: how many share the work.
        set: change fields of the recipe, as in `vla-oft train`; may be given several times.
        out: run folder, whose disk is measured; runs/RECIPE by default.
        device: where to try a checkpoint: "cpu" or "cuda"; the GPU if there is one.
        dataset: whose statistics normalise, where a checkpoint has several.
        json: print one JSON object on stdout and nothing else.
    """
    from vla_oft.doctor.command import DoctorRequest, run

    request = DoctorRequest(target=target, gpu=gpu, gpus=gpus, changes=set, out=out, device=device, dataset=dataset)
    document, lines, healthy = run(request)
    sys.stdout.write(json_module.dumps({**document, "healthy": healthy}) + "\n" if json else "\n".join(lines) + "\n")
    sys.exit(0 if healthy else 1)
