"""The command line as a user meets it: real processes, exit codes, one clear line for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_policy
from vla_oft import cli


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vla_oft", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_needs_no_heavy_library(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    for name in ("mujoco", "pyarrow", "h5py", "av"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    for arguments in ("", "train", "show", "eval", "data", "data collect", "data convert", "ckpt show", "quickstart"):
        done = run(*arguments.split(), "--help", cwd=tmp_path)
        assert done.returncode == 0 and "usage: vla-oft" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no_such_recipe"], "unknown recipe 'no_such_recipe'; known: aloha,"),
        (["train", "debug", "--set", "lrr=1"], "there is no 'lrr'"),
        (["train", "debug", "--set", "lrr=1", "--set", "seed=3"], "there is no 'lrr'"),
        (["ckpt", "import", "nowhere/at/all", "out"], "no such folder, and not a hub id"),
        (["ckpt", "export", "nowhere", "out"], "nowhere is not a checkpoint"),
        (["ckpt", "merge", "nowhere", "out"], "nowhere: no such folder"),
        (["train", "debug", "--set", "lr=fast"], "TrainConfig.lr: expected float, got 'fast'"),
        (["train", "debug", "--set", "datasets.0.path=nowhere"], "nowhere does not exist"),
        (["eval", "nowhere", "--suite", "tabletop/touch"], "nowhere: no such folder"),
        (["eval", "nowhere", "--suite", "tabletop/juggle"], "has no family 'juggle'; it has touch"),
        (["data", "collect", "tabletop/juggle", "--out", "demos"], "has no family 'juggle'; it has touch"),
        (["ckpt", "show", "nowhere"], "nowhere is not a checkpoint"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(13, "Permission denied", "out/x.json"),
            "out/x.json: permission denied; change its owner or mode, or choose another place",
        ),
        (OSError(28, "No space left on device"), "no space left on device; free some space, or choose another place"),
        (ChildProcessError("a worker process has died"), "a worker process has died"),
        (ValueError("steps=0 must be positive"), "steps=0 must be positive"),
    ],
)
def test_what_the_system_refuses_is_said_with_what_to_do(error, line):
    assert cli.in_words(error) == line


def test_an_output_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "demos").mkdir()
    (tmp_path / "demos" / "notes.txt").write_text("mine")
    done = run("data", "collect", "tabletop/touch", "--out", "demos", "--episodes", "1", cwd=tmp_path)
    assert done.returncode == 2 and "exists and is not empty" in done.stderr
    assert (tmp_path / "demos" / "notes.txt").read_text() == "mine"


def test_without_a_renderer_the_packages_to_install_are_named(tmp_path):
    command = ["data", "collect", "tabletop/touch", "--out", "demos", "--episodes", "1", "--workers", "0"]
    done = run(*command, cwd=tmp_path, MUJOCO_GL="glfw", DISPLAY="")
    assert done.returncode == 1 and "apt-get install libegl1" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "demos").exists()


def test_show_prints_a_recipe_as_json(tmp_path):
    done = run("show", "nano_base", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["train"]["robot"] == "tabletop"


def test_ckpt_show_prints_one_json_object(tmp_path):
    tiny_policy().save(tmp_path / "checkpoint")
    document = json.loads(run("ckpt", "show", "checkpoint", "--json", cwd=tmp_path).stdout)
    assert document["policy"]["robot"]["name"] == "tabletop"
    assert sum(document["parameters"].values()) == sum(p.numel() for p in tiny_policy().parameters())
    assert "robot      tabletop" in run("ckpt", "show", "checkpoint", cwd=tmp_path).stdout


def test_demonstrations_training_and_evaluation_run_from_the_shell(tmp_path):
    recorded = run("data", "collect", "tabletop/touch", "--out", "demos", "--episodes", "2", "--grounding-patches", "8", cwd=tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    training = ["train", "debug", "--set", "datasets.0.path=demos", "--out", "run", "--steps", "4", "--save-every", "2"]
    trained = run(*training, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [4]
    resumed = run(*training, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    evaluated = run("eval", "run", "--suite", "tabletop/touch", "--trials", "2", "--record", "1", "--out", "eval", "--json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    document = json.loads(evaluated.stdout)
    assert document["versions"]["mujoco"] and document["config"]["trials"] == 2
    assert len((tmp_path / "eval" / "results.jsonl").read_text().splitlines()) == 4, "normal and swapped, two trials each"
    assert len(list((tmp_path / "eval" / "videos").glob("*.mp4"))) == 2
