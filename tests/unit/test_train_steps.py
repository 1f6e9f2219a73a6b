"""One optimizer step of several passes, no clipping, and runs that an earlier version started."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from spoiling import spoil

from tests.tiny import tiny_batch, tiny_policy
from tests.training import config, rows, write_demos
from vla_oft.data.augment import AugmentConfig
from vla_oft.data.base import ReadOptions, open_source
from vla_oft.heads import discrete, pooled
from vla_oft.train import checkpoint
from vla_oft.train.config import Dataset, Fresh, Phase
from vla_oft.train.loop import train
from vla_oft.train.step import backward, mean_metrics


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_demos(tmp_path_factory.mktemp("data") / "demos")


def steps(count: int) -> tuple[Phase, ...]:
    return (Phase(steps=count, mixture=(1.0,)),)


def test_accumulated_gradients_are_those_of_the_mean_loss():
    policy = tiny_policy().train()
    batches = [tiny_batch(policy, seed=seed) for seed in (0, 5)]
    passes = [backward(policy, batch, share=0.5) for batch in batches]
    accumulated = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    together = (policy(batches[0])[0] + policy(batches[1])[0]) / 2
    together.backward()
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(accumulated[name], parameter.grad, atol=1e-5, rtol=1e-4)
    assert mean_metrics([(metrics, 1.0) for metrics in passes])["loss"].item() == pytest.approx(together.item(), rel=1e-6)


def test_a_metric_that_a_pass_does_not_know_is_left_out_of_the_mean():
    nothing, one, three = torch.tensor(float("nan")), torch.tensor(1.0), torch.tensor(3.0)
    means = mean_metrics([({"a": nothing, "b": one}, 3.0), ({"a": three, "b": three, "c": one}, 1.0)])
    assert {name: value.item() for name, value in means.items()} == {"a": 3.0, "b": 1.5, "c": 1.0}


def test_a_loss_that_is_not_finite_in_one_pass_is_not_finite_in_the_step():
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    assert mean_metrics([({"loss": nan}, 1.0), ({"loss": one}, 1.0)])["loss"].isnan()


def test_steps_rows_and_checkpoints_count_optimizer_steps(demos, tmp_path):
    """Although they hold unequal numbers of valid actions; and each sample is augmented as in the whole batch."""
    some = {"phases": steps(3), "save_every": 2, "batch_size": 8, "ema_decay": None, "augment": AugmentConfig(crop_area=0.9)}
    train(config(demos, **some), tmp_path / "single")
    train(config(demos, micro_batch=4, **some), tmp_path / "double")
    single, double = ([(row["loss"], row["action_l1"]) for row in rows(tmp_path / name)] for name in ("single", "double"))
    assert np.ravel(double) == pytest.approx(np.ravel(single), rel=1e-5)
    assert checkpoint.steps(tmp_path / "double") == [2, 3]
    state = checkpoint.load_state(tmp_path / "double/checkpoints/last")
    assert state["loader"]["position"] == 3 * 2 * 4


def test_an_accumulating_run_resumes_exactly(demos, tmp_path):
    whole = config(demos, phases=(*steps(2), *steps(2)), batch_size=6, micro_batch=2, save_every=1, keep_last=9)
    train(whole, tmp_path / "whole")
    for last in (1, 2):  # inside the first phase, and at its end
        out = tmp_path / f"resumed{last}"
        shutil.copytree(tmp_path / "whole", out, symlinks=True)
        for step in range(last + 1, 5):
            shutil.rmtree(out / f"checkpoints/step-{step:06d}")
        train(whole, out, resume=True)
        assert [(r["loss"], r["grad_norm"]) for r in rows(out)] == [(r["loss"], r["grad_norm"]) for r in rows(tmp_path / "whole")]


def test_without_clipping_the_norm_is_still_logged(demos, tmp_path):
    train(config(demos, phases=steps(1), clip_norm=None), tmp_path / "free")
    train(config(demos, phases=steps(1), clip_norm=1e-3), tmp_path / "clipped")
    free, clipped = (rows(tmp_path / name)[0]["grad_norm"] for name in ("free", "clipped"))
    assert free == clipped > 1e-3


def test_a_resumed_run_keeps_the_precision_that_it_began_with(demos, tmp_path, monkeypatch):
    for measured in ("bf16", "fp32"):  # as on a busy machine
        monkeypatch.setattr("vla_oft.train.companions.faster_precision", lambda device, measured=measured: measured)
        train(config(demos, precision="auto", phases=steps(2), save_every=2), tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run/train.json").read_text())["precision"] == "bf16"


def test_a_run_of_an_earlier_version_resumes_with_defaults_for_new_settings(demos, tmp_path):
    train(config(demos), tmp_path / "run")
    path = tmp_path / "run" / "train.json"
    document = json.loads(path.read_text())
    for name in ("lora", "micro_batch", "guard"):
        del document[name]
    del document["optimizer"]["decay"]
    path.write_text(json.dumps(document))
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    train(config(demos), tmp_path / "run", resume=True)
    assert checkpoint.steps(tmp_path / "run") == [3, 6]
    with pytest.raises(ValueError, match="changed in freeze"):
        train(config(demos, freeze=("vision",)), tmp_path / "run", resume=True)


@pytest.mark.parametrize("head", [discrete.Config(), pooled.Config(dropout=0.0)], ids=["discrete", "pooled"])
def test_passes_of_every_head_add_up_to_the_batch(demos, tmp_path, head):
    """The discrete head's loss also counts a stop token for every sample."""
    some = {"model": Fresh(size="nano", head=head, grounding=None), "phases": steps(2), "batch_size": 8, "ema_decay": None, "save_every": 2}
    for name, micro in (("whole", None), ("passes", 2)):
        train(config(demos, micro_batch=micro, **some), tmp_path / name)
    whole, passes = ([row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "passes"))
    assert passes == pytest.approx(whole, rel=1e-5)


def test_a_damaged_picture_ends_a_run_in_one_line_and_with_skip_bad_none(tmp_path):
    """The run that it has ended goes on with skip_bad: the rest of the configuration is the same."""
    demos = write_demos(tmp_path / "demos")
    file = spoil(open_source(demos), 1, 3, "front")
    settings = config(demos, phases=steps(8), frame_cache="none", save_every=1)
    with pytest.raises(ValueError, match=r"episode 1, step 3, camera 'front'.*--skip-bad"):
        train(settings, tmp_path / "run")
    skipping = Dataset(name="demos", path=str(demos), read=ReadOptions(skip_bad=True))
    train(dataclasses.replace(settings, datasets=(skipping,)), tmp_path / "run", resume=True)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))
    (line,) = (tmp_path / "run/skipped.txt").read_text().splitlines()
    assert file.name in line and "episode 1" in line and "step 3" in line
