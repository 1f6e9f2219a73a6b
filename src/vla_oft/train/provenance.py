"""Everything that says how to make a run again: versions, machine, code, data, command. Never a secret.

    RUN/run.json          the latest start, in full; `earlier` has what was different before each resume
    RUN/reproduce.sh      ./reproduce.sh NEW_FOLDER trains the same again
    RUN/code-1a2b3c4d.diff    what differs from the commit, where something does; run.json names the file

Code is looked at in two places: the folder that the command was given in, and this package, if it is a checkout.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import vla_oft
from vla_oft import __version__, machine
from vla_oft.atomic import replace_file
from vla_oft.config import to_dict
from vla_oft.train.config import TrainConfig

DIFF_LIMIT_BYTES = 5_000_000
ALSO = ("triton", "torchao", "bitsandbytes", "transformers", "nvidia-nccl-cu12", "nvidia-cudnn-cu12")
"""Packages that matter where they are installed, beside those that this one asks for."""

NUMERIC = r"OMP_NUM_THREADS|MKL_\w+|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|TORCH_\w+|PYTORCH_\w+|ATEN_\w+|DNNL_\w+|ONEDNN_\w+"
RECORDED = re.compile(rf"({NUMERIC}|CUDA_\w+|NCCL_\w+|TRITON_\w+|VLA_OFT_\w+|LOCAL_WORLD_SIZE)$")
SECRET = re.compile(r"token|secret|passw|credential|api.?key|private.?key", re.IGNORECASE)


def facts(config: TrainConfig, datasets: Sequence[dict[str, Any]], *, device: torch.device | str, world_size: int = 1) -> dict[str, Any]:
    """What `run.json` says, plain JSON. datasets: name, path, fingerprint and sizes of each."""
    argv = without_secrets(sys.argv)
    return {
        "name": config.name,
        "command": _command(argv, world_size),
        "argv": argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": _machine(torch.device(device)),
        "world_size": world_size,
        "environment": environment(),
        "code": {name: found for name, (found, _) in _code().items()},
        "seed": config.seed,
        "datasets": list(datasets),
        "train": to_dict(config),
    }


def write(run: Path, facts: dict[str, Any]) -> None:
    """Write `run.json`, `reproduce.sh` and the differences of the code into the run's folder; see the top of this file."""
    for found, diff in _code().values():
        if "diff" in found:
            replace_file(run / found["diff"], diff)
    path = run / "run.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    earlier = before.pop("earlier", [])
    if before:
        earlier.append({name: value for name, value in before.items() if facts.get(name) != value})
    replace_file(path, json.dumps({**facts, "earlier": earlier}, indent=2) + "\n")
    replace_file(run / "reproduce.sh", _script(facts))
    (run / "reproduce.sh").chmod(0o755)


def versions() -> dict[str, str]:
    """Of everything that is installed and that training may use."""
    wanted = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in importlib.metadata.requires("vla-oft") or []]
    found = {"vla-oft": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in (*wanted, *ALSO):
        try:
            found.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """The variables that may change what a run computes, or on what; none whose name sounds like a secret."""
    return {name: value for name, value in sorted(os.environ.items()) if RECORDED.match(name) and not SECRET.search(name)}


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Arguments, with *** in place of what follows a name that sounds like a secret: `--api-key x`, `hub_token=x`."""
    shown, hide = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if hide and not argument.startswith("-"):
            shown.append("***")
        elif equals and SECRET.search(name):
            shown.append(f"{name}=***")
        else:
            shown.append(argument)
        hide = not equals and argument.startswith("-") and SECRET.search(argument) is not None
    return shown


def _command(argv: Sequence[str], world_size: int) -> str:
    program = Path(argv[0]).name if argv else ""
    if program not in ("vla-oft", "__main__.py"):
        return shlex.join(["python", *argv])
    start = ["vla-oft"] if world_size == 1 else [*_torchrun(world_size, os.environ.get("LOCAL_WORLD_SIZE")), "-m", "vla_oft"]
    return shlex.join([*start, *argv[1:]])


def _torchrun(world_size: int, local: str | None) -> list[str]:
    per_node = int(local) if local and local.isdigit() and int(local) else world_size
    nodes = world_size // per_node
    return ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc-per-node", str(per_node)]


def _machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found |= {
            "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in gpus],
            "driver": machine.gpu_driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _code() -> dict[str, tuple[dict[str, Any], str]]:
    """Where code lies -> (commit, whether and how files differ from it; the difference)."""
    package = Path(vla_oft.__file__).parent
    here, ours = _repository(Path.cwd()), _repository(package) if _is_tracked(package) else None
    found = {} if here is None else {"working_folder": _state(here)}
    if ours is not None and ours != here:
        found["vla_oft"] = _state(ours)
    elif ours is None and (commit := _installed_commit()):
        found["vla_oft"] = ({"commit": commit, "dirty": False}, "")
    return found


def _repository(folder: Path) -> Path | None:
    """The top of the repository that a folder lies in, if that has a commit."""
    top = _git(folder, "rev-parse", "--show-toplevel").strip()
    return Path(top) if top and _git(folder, "rev-parse", "--verify", "HEAD") else None


def _is_tracked(package: Path) -> bool:
    """Not so where the package is installed into an environment that happens to lie within a repository."""
    return bool(_git(package, "ls-files", "__init__.py"))


def _state(top: Path) -> tuple[dict[str, Any], str]:
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")  # whatever the user's settings are
    diff = _git(top, "diff", "HEAD", "--binary", *plain)
    changes = _git(top, "status", "--porcelain").splitlines()
    untracked = sum(line.startswith("??") for line in changes)
    found: dict[str, Any] = {"commit": _git(top, "rev-parse", "HEAD").strip(), "dirty": len(changes) > untracked, "untracked": untracked}
    if diff:
        digest = hashlib.sha256(diff.encode()).hexdigest()
        found["diff_sha256"] = digest
        if len(diff.encode()) <= DIFF_LIMIT_BYTES:
            found["diff"] = f"code-{digest[:8]}.diff"
    return found, diff


def _installed_commit() -> str:
    """Of a package that pip has installed from a repository."""
    try:
        document = importlib.metadata.distribution("vla-oft").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return str(json.loads(document).get("vcs_info", {}).get("commit_id", "")) if document else ""


def _git(folder: Path, *arguments: str) -> str:
    return machine.output("git", "-C", str(folder), *arguments)


def _script(facts: dict[str, Any]) -> str:
    world_size, device = facts["world_size"], facts["machine"]["device"]
    start = ["vla-oft"] if world_size == 1 else [*_torchrun(world_size, facts["environment"].get("LOCAL_WORLD_SIZE")), "-m", "vla_oft"]
    numeric = {name: value for name, value in facts["environment"].items() if re.fullmatch(NUMERIC, name)}
    words = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if name in ("vla-oft", "python", "torch"))
    where = f"{_comment(facts['machine']['cpu'])}, {world_size} process{'es' if world_size > 1 else ''} on {device}"
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Trains {_comment(facts['name'])} again: ./reproduce.sh NEW_FOLDER",
            f"# First on {facts['started']} with {words}; {where}",
            *(f"# {line}" for line in _code_lines(facts["code"])),
            "set -euo pipefail",
            'here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
            'out="${1:?give a new folder}"',
            'case "$out" in /*) ;; *) out="$PWD/$out" ;; esac',
            f"folder={shlex.quote(str(Path.cwd()))}  # where relative paths in train.json begin",
            'if [ -d "$folder" ]; then cd "$folder"; fi',
            *(f"export {name}={shlex.quote(value)}" for name, value in numeric.items()),
            f'exec {shlex.join([*start, "train"])} --config "$here/train.json" --out "$out" --device {device}',
            "",
        ]
    )


def _code_lines(code: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, found in code.items():
        diff = f", then git apply {found['diff']}" if "diff" in found else " and further changes" if found["dirty"] else ""
        lines.append(f"code ({name}): git checkout {found['commit']}{diff}")
    return lines


def _comment(text: str) -> str:
    return " ".join(text.split())
