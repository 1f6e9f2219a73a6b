"""Checkpoints on disk: which of them stay, what a kill leaves behind, what a failing process tells the others."""

import json
from pathlib import Path

import pytest
import torch

from vla_oft import checksums
from vla_oft.train import checkpoint
from vla_oft.train.checkpoint import Checkpoints, Keep, Snapshot
from vla_oft.train.shards import Part

WEIGHT = {"weight": Part(torch.arange(4.0), (0,))}


def snapshot(step: int, error: float | None = None, parts=WEIGHT) -> Snapshot:
    def write(folder: Path, previous: Path | None) -> None:
        (folder / "policy.json").write_text(json.dumps({"after": previous and previous.name}))

    return Snapshot(step=step, write_policy=write, parts=parts, state={"step": step}, facts={"step": step}, card="", error=error)


def saved(run: Path, keep: Keep, errors: dict[int, float | None]) -> Checkpoints:
    checkpoints = Checkpoints(run, keep)
    for step, error in errors.items():
        checkpoints.save(snapshot(step, error))
    checkpoints.wait()
    return checkpoints


def pointed(run: Path, link: str) -> str:
    return (run / "checkpoints" / link).readlink().name


def test_a_kill_before_the_links_are_moved_is_made_good_on_resume(tmp_path):
    saved(tmp_path, Keep(last=2, best=True), {1: 0.5, 2: 0.4, 3: 0.3})
    for link, target in (("best", "step-000002"), ("last", "step-000002")):
        checkpoint.point(tmp_path / "checkpoints" / link, target)
    half_removed = tmp_path / "checkpoints/.step-000001.writing"
    half_removed.mkdir()
    Checkpoints(tmp_path, Keep(last=2, best=True)).settle(3)
    assert pointed(tmp_path, "best") == pointed(tmp_path, "last") == "step-000003"
    assert not half_removed.exists()


def test_the_best_one_is_the_first_of_equals_and_stays(tmp_path):
    saved(tmp_path, Keep(last=1, best=True), {1: 0.5, 2: 0.2, 3: None, 4: 0.2, 5: 0.3})
    assert pointed(tmp_path, "best") == "step-000002" and checkpoint.steps(tmp_path) == [2, 5]


def test_a_newer_checkpoint_that_was_passed_over_takes_no_place_and_passes_nothing_on(tmp_path):
    saved(tmp_path, Keep(last=2), {2: None, 4: None, 6: None})  # 6 turns out to be damaged: the run goes on from 4
    resumed = saved(tmp_path, Keep(last=1), {5: None})
    assert checkpoint.steps(tmp_path) == [5, 6]
    assert pointed(tmp_path, "last") == "step-000005" and resumed.last == tmp_path / "checkpoints/step-000005"
    assert json.loads((tmp_path / "checkpoints/step-000005/policy.json").read_text()) == {"after": "step-000004"}


def test_copies_by_other_names_are_left_alone(tmp_path):
    saved(tmp_path, Keep(last=1), {1: None})
    copy = tmp_path / "checkpoints/step-000001-backup"
    copy.mkdir()
    (copy / "policy.json").write_text("{}")
    saved(tmp_path, Keep(last=1), {2: None})
    assert checkpoint.steps(tmp_path) == [2] and copy.is_dir()


def test_a_process_that_cannot_write_its_part_is_not_waited_for(tmp_path):
    ranks = [Checkpoints(tmp_path, Keep(last=1), rank=rank, world_size=2) for rank in range(2)]
    ranks[0].save(snapshot(1))
    ranks[1].save(snapshot(1, parts={"weight": Part(torch.empty(4, device="meta"), (0,))}))
    with pytest.raises(OSError, match="process 1 could not write its part"):
        ranks[0].wait()
    assert checkpoint.steps(tmp_path) == []


def test_a_disk_that_cannot_read_a_checkpoint_is_as_good_as_damage(tmp_path, monkeypatch, capsys):
    saved(tmp_path, Keep(last=2), {1: None, 2: None})
    verify = checksums.verify

    def failing(folder: Path) -> None:
        if folder.name == "step-000002":
            raise OSError(5, "Input/output error", str(folder))
        verify(folder)

    monkeypatch.setattr(checksums, "verify", failing)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-000001"
    assert "Input/output error" in capsys.readouterr().out
