"""The cluster examples are code: their shell and YAML parse, and every command in them is one that our command line understands."""

import functools
import inspect
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

from vla_oft import cli_train
from vla_oft.recipes import base
from vla_oft.train import plan
from vla_oft.train.preflight import check_processes

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
SHELL = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".sh", ".sbatch"))
TRAIN = re.compile(r"(?:vla-oft|-m vla_oft) train ([^`|)]*)")


def script(name: str) -> str:
    """The file, with continued lines joined; of the YAML, what is run."""
    text = (FOLDER / name).read_text()
    if name.endswith(".yaml"):
        yaml = pytest.importorskip("yaml")
        document = yaml.safe_load(text)
        text = document["setup"] + document["run"]
    return text.replace("\\\n", " ")


def commands(name: str) -> list[list[str]]:
    """The words after `train` of every command that trains, with the file's own default values for its variables."""
    text = script(name)
    values = dict(re.findall(r"^(\w+)=\$\{\1-:?(.*)\}$", text, re.MULTILINE)) | dict(
        re.findall(r"^(\w+)=\$\{\1:-(.*)\}$", text, re.MULTILINE)
    )
    values |= {"RECIPE": values.get("RECIPE", "libero_spatial")}
    found = []
    for line in text.splitlines():
        for arguments in TRAIN.findall(line) if not line.lstrip().startswith("#") else []:
            for _ in range(2):  # OUT has RECIPE in it
                arguments = re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], match[0]), arguments)
            words = shlex.split(arguments.replace('"$@"', "").partition("||")[0])
            found.append([word for word in words if word not in ("RECIPE", "...")])
    return [words for words in found if words]


def parsed(words: list[str], function: Callable[..., None] = cli_train.train) -> dict:
    """What our command line makes of them. Fails for an unknown flag."""
    calls: list[dict] = []

    @functools.wraps(function)
    def note(*args, **options):
        calls.append(inspect.signature(function).bind(*args, **options).arguments)

    tyro.cli(note, args=words)
    return calls[0]


def test_there_is_an_example_for_every_row_of_the_readme():
    readme = (FOLDER / "README.md").read_text()
    assert {path.name for path in FOLDER.iterdir()} - {"README.md"} == set(re.findall(r"^\|[^|]*\| `([\w.]+)` \|", readme, re.MULTILINE))


@pytest.mark.parametrize("name", SHELL)
def test_the_shell_scripts_parse(name):
    done = subprocess.run(["bash", "-n", str(FOLDER / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "set -euo pipefail" in script(name)


@pytest.mark.parametrize("name", [*SHELL, "skypilot.yaml", "README.md"])
def test_every_training_command_is_understood_and_names_real_fields(name):
    found = commands(name)
    assert found, "no command"
    for words in found:
        options = parsed(words)
        _, settings = cli_train._choose(options["recipe"], None, None, {}, options.get("set", ()))
        assert settings.total_steps > 0


@pytest.mark.parametrize(("name", "nodes"), [("slurm_single_node.sbatch", 1), ("slurm_multi_node.sbatch", 4)])
def test_the_batch_files_ask_for_processes_that_can_share_the_batch(name, nodes):
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script(name), re.MULTILINE))
    assert int(directives["nodes"]) == nodes and directives["ntasks-per-node"] == directives["gpus-per-node"] == "8"
    assert directives["signal"].startswith("USR1@"), "to the tasks, not to the shell"
    (words,) = commands(name)
    options = parsed(words)
    direct = {name: options[name] for name in ("lr",) if name in options}
    _, settings = cli_train._choose(options["recipe"], None, None, direct, options.get("set", ()))
    check_processes(settings, 8 * nodes)
    assert plan.batches(settings, 8 * nodes).share == 64 // (8 * nodes)
    assert options["resume"], "the same command begins and goes on"


def test_full_fine_tuning_on_several_nodes_is_hsdp_at_a_fitting_rate():
    (words,) = commands("slurm_multi_node.sbatch")
    options = parsed(words)
    _, settings = cli_train._choose(options["recipe"], None, None, {"lr": options["lr"]}, options["set"])
    assert settings.lora is None and settings.lr == 2e-5 and settings.parallel.shard_size == 8 and settings.recompute == "selective"


@pytest.mark.parametrize("name", ["torchrun.sh", "skypilot.yaml", "README.md"])
def test_torchrun_understands_its_part(name):
    lines = [line.strip() for line in script(name).splitlines() if re.match(r"\s*(exec )?torchrun -", line)]
    assert lines
    for line in lines:
        words = shlex.split(re.sub(r'"?\$\w+"?', "8", line.partition("torchrun ")[2].replace("--node-rank N", "--node-rank 0")))
        options = get_args_parser().parse_args(words)
        assert options.module and options.training_script == "vla_oft" and options.nproc_per_node == "8"


@pytest.mark.parametrize("name", ["slurm_single_node.sbatch", "slurm_multi_node.sbatch"])
def test_a_slurm_task_becomes_a_rank(name):
    """What `srun` starts for each GPU: its environment is turned into torchrun's, and the process takes the shell's place for signals."""
    (wrapper,) = re.findall(r"bash -c '([^']*)' --", script(name))
    assert wrapper.endswith('exec "$@"'), "a shell in between would not hand signals on"
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "PATH": "/usr/bin:/bin"}
    command = ["bash", "-c", wrapper, "--", "sh", "-c", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE"; kill -USR1 $$']
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=60)
    assert done.stdout == "5 1 8\n" and done.returncode == -10, "the signal came through"


def test_the_readme_names_recipes_that_exist():
    names = set(re.findall(r"(?:train|show|RECIPE=)\s?(\w+_\w+)", (FOLDER / "README.md").read_text()))
    assert names and names <= set(base.names())
