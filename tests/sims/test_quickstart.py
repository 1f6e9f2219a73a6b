"""The main job from end to end, with few demonstrations, steps and trials: every part runs and says what it did."""

import json

import pytest

from vla_oft.policy import Policy
from vla_oft.quickstart import QuickstartConfig, run
from vla_oft.recipes import nano_base, nano_finetune


def test_the_shipped_base_fits_its_robot_and_never_saw_the_held_out_family():
    base = Policy.load(nano_finetune.BASE)
    assert base.config.robot.name == "tabletop"
    assert sum(p.numel() for p in base.parameters()) <= 12_000_000
    assert sum(file.stat().st_size for file in nano_finetune.BASE.iterdir()) <= 25_000_000
    facts = json.loads((nano_finetune.BASE / "run.json").read_text())
    assert [d["name"] for d in facts["datasets"]] == ["scenes", "demos"] and nano_base.HELD_OUT not in nano_base.FAMILIES


def test_quickstart_ends_with_a_report(tmp_path):
    report = run(QuickstartConfig(out=tmp_path / "out", trials=2, episodes=2, steps=3))
    page = report.read_text()
    assert page.count("<video") == 6, "normal, swapped and blind, two scenes each"
    assert "pretrained on other task families" in page and "2 demonstrations of pick_place" in page
    assert len((tmp_path / "out" / "eval" / "results.jsonl").read_text().splitlines()) == 2 * 4
    assert (tmp_path / "out" / "run" / "checkpoints" / "last" / "policy.json").is_file()


@pytest.mark.parametrize(("changes", "message"), [({"task": "juggle"}, "choose one of touch"), ({}, "not empty")])
def test_quickstart_refuses_before_any_work(tmp_path, changes, message):
    (tmp_path / "out").mkdir()
    if not changes:
        (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=message):
        run(QuickstartConfig(out=tmp_path / "out", **changes))


def test_a_missing_base_says_how_to_train_it(tmp_path, monkeypatch):
    monkeypatch.setattr(nano_finetune, "BASE", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="vla-oft train nano_base"):
        run(QuickstartConfig(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
