"""A run's folder says how to make it again: code, command, machine, data; and never a secret."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from vla_oft.heads import l1
from vla_oft.train import provenance
from vla_oft.train.config import Dataset, Fresh, Phase, TrainConfig
from vla_oft.train.schedule import Cosine

DATASETS = [{"name": "demos", "path": "data/demos", "fingerprint": "abc", "episodes": 2, "frames": 24}]


def config() -> TrainConfig:
    return TrainConfig(
        name="a run",
        robot="tabletop",
        model=Fresh(size="nano", head=l1.Config(), grounding=None),
        datasets=(Dataset(name="demos", path="data/demos"),),
        phases=(Phase(steps=6, mixture=(1.0,)),),
        batch_size=4,
        lr=1e-3,
        schedule=Cosine(),
        seed=11,
    )


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A user's repository, where the command is given."""
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "recipe.py").write_text("steps = 1\nname = 'grüße'\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    return folder


def started(run: Path, **changes) -> dict:
    run.mkdir(exist_ok=True)
    provenance.write(run, {**provenance.facts(config(), DATASETS, device="cpu"), **changes})
    return json.loads((run / "run.json").read_text())


def test_run_json_says_what_ran_on_what(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/vla-oft", "train", "debug", "--out", "runs/a b"])
    facts = started(tmp_path / "run")
    assert facts["command"] == "vla-oft train debug --out 'runs/a b'" and facts["argv"][1:] == ["train", "debug", "--out", "runs/a b"]
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["numpy"] and facts["versions"]["python"]
    assert facts["machine"]["cpu"] and facts["machine"]["device"] == "cpu" and facts["world_size"] == 1
    assert facts["datasets"] == DATASETS and facts["seed"] == 11 and facts["train"]["lr"] == 1e-3 and facts["name"] == "a run"
    assert facts["earlier"] == []


def test_a_clean_repository_is_named_by_its_commit(project, tmp_path):
    (project / "notes.txt").write_text("not part of the code")
    found = started(tmp_path / "run")["code"]["working_folder"]
    assert found == {"commit": git(project, "rev-parse", "HEAD"), "dirty": False, "untracked": 1}


def test_changes_can_be_applied_to_the_commit_again(project, tmp_path):
    (project / "recipe.py").write_text("steps = 2\nname = 'grüße'\n")
    (project / "new.py").write_text("x = 1\n")
    git(project, "add", "new.py")
    git(project, "config", "diff.noprefix", "true")
    found = started(tmp_path / "run")["code"]["working_folder"]
    assert found["dirty"] and len(found["diff_sha256"]) == 64
    git(tmp_path, "clone", "-q", str(project), "again")
    git(tmp_path / "again", "apply", str(tmp_path / "run" / found["diff"]))
    assert (tmp_path / "again" / "recipe.py").read_text() == (project / "recipe.py").read_text()
    assert (tmp_path / "again" / "new.py").read_text() == "x = 1\n"


def test_a_change_that_is_too_large_is_named_and_not_kept(project, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "DIFF_LIMIT_BYTES", 10)
    (project / "recipe.py").write_text("steps = 2\n")
    found = started(tmp_path / "run")["code"]["working_folder"]
    assert found["dirty"] and found["diff_sha256"] and "diff" not in found and not list((tmp_path / "run").glob("*.diff"))
    assert "and further changes" in (tmp_path / "run" / "reproduce.sh").read_text()


def test_outside_of_a_repository_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "working_folder" not in started(tmp_path / "run")["code"]


def test_secrets_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["mine.py", "--hf-token", "hf_geheim", "api_key=geheim", "--password=geheim", "--lr", "1e-3", "--token", "--x"]
    )
    for name in ("VLA_OFT_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "TORCH_SECRET", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "geheim" if name != "NCCL_DEBUG" else "INFO")
    facts = started(tmp_path / "run")
    for file in (tmp_path / "run").iterdir():
        assert "geheim" not in file.read_text(), file
    assert facts["command"] == "python mine.py --hf-token '***' 'api_key=***' '--password=***' --lr 1e-3 --token --x"
    assert facts["environment"]["NCCL_DEBUG"] == "INFO"


def test_a_resume_adds_to_what_was_there(tmp_path):
    started(tmp_path / "run", started="first", versions={"torch": "1"})
    started(tmp_path / "run", started="second", versions={"torch": "1"})
    facts = started(tmp_path / "run", started="third", versions={"torch": "2"})
    assert facts["started"] == "third" and [e["started"] for e in facts["earlier"]] == ["first", "second"]
    assert "versions" in facts["earlier"][1] and "versions" not in facts["earlier"][0], "only what changed"
    assert all("train" not in e and "datasets" not in e for e in facts["earlier"])


def reproduced(run: Path, folder: Path, **environment: str) -> tuple[int, str]:
    """Run reproduce.sh where the commands only say how they were called."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("vla-oft", "torchrun"):
        (programs / name).write_text('#!/bin/sh\necho "$(basename "$0") $* | in $PWD | $OMP_NUM_THREADS"\n')
        (programs / name).chmod(0o755)
    start = [str(run / "reproduce.sh"), *([environment.pop("out")] if "out" in environment else [])]
    done = subprocess.run(
        start, cwd=folder, env={**os.environ, **environment, "PATH": f"{programs}:{os.environ['PATH']}"}, capture_output=True, text=True
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def test_the_script_trains_again_from_where_paths_begin(project, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    started(tmp_path / "my run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code, shown = reproduced(tmp_path / "my run", elsewhere, out="new", OMP_NUM_THREADS="1")
    expected = f"vla-oft train --config {tmp_path}/my run/train.json --out {elsewhere}/new --device cpu"
    assert (code, shown) == (0, f"{expected} | in {project} | 3")
    code, shown = reproduced(tmp_path / "my run", elsewhere)
    assert code != 0 and "give a new folder" in shown


def test_the_script_of_several_processes_starts_as_many(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    run = tmp_path / "run"
    run.mkdir()
    provenance.write(run, provenance.facts(config(), DATASETS, device="cpu", world_size=8))
    _, shown = reproduced(run, tmp_path, out="/new")
    assert shown.startswith(f"torchrun --nnodes 2 --nproc-per-node 4 -m vla_oft train --config {run}/train.json --out /new --device cpu")
