"""Training on real (tiny) datasets: it learns, saves whole checkpoints, resumes exactly, and refuses what does not fit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_policy
from tests.training import config, rows, write_demos
from vla_oft.data.augment import AugmentConfig
from vla_oft.data.base import ReadOptions
from vla_oft.heads import diffusion, discrete, l1, pooled
from vla_oft.policy import Policy
from vla_oft.robots.tabletop import SPEC
from vla_oft.train import checkpoint, setup
from vla_oft.train.config import Dataset, Phase, Pretrained
from vla_oft.train.freeze import FILM
from vla_oft.train.loop import train
from vla_oft.train.optimizer import AdamW, Muon
from vla_oft_client import Observation


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    return write_demos(tmp_path_factory.mktemp("data") / "demos")


def test_training_learns_what_the_demonstrations_show(demos, tmp_path):
    longer = config(demos, phases=(Phase(steps=60, mixture=(1.0,)),), save_every=60, ema_decay=None)
    train(longer, tmp_path / "run")
    losses = [row["action_l1"] for row in rows(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


def test_a_run_leaves_a_loadable_checkpoint_and_says_how_it_was_made(demos, tmp_path):
    folder = train(config(demos), tmp_path / "run")
    assert folder.name == "step-000006"
    facts = json.loads((folder / "run.json").read_text())
    assert facts["step"] == 6 and facts["datasets"][0]["episodes"] == 2 and facts["versions"]["torch"] == torch.__version__
    assert Policy.load(tmp_path / "run").config.robot == SPEC
    assert "policy" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("ema_decay", "optimizer"), [(0.9, AdamW()), (None, Muon())])
def test_a_resumed_run_equals_an_uninterrupted_one(demos, tmp_path, ema_decay, optimizer):
    halves = (Phase(steps=2, mixture=(1.0,)), Phase(steps=4, mixture=(1.0,)))
    whole = config(demos, phases=halves, precision="bf16", augment=AugmentConfig(crop_area=0.9))
    whole = dataclasses.replace(whole, ema_decay=ema_decay, optimizer=optimizer)
    train(whole, tmp_path / "whole")
    train(whole, tmp_path / "resumed")
    last = tmp_path / "resumed" / "checkpoints"
    for file in sorted((last / "step-000006").rglob("*"), reverse=True):  # as if killed after step 3
        file.rmdir() if file.is_dir() else file.unlink()
    (last / "step-000006").rmdir()
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a row
    train(whole, tmp_path / "resumed", resume=True)
    first, second = (rows(tmp_path / name) for name in ("whole", "resumed"))
    assert [r["step"] for r in second] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in first] == [r["loss"] for r in second]
    weights = [Policy.load(tmp_path / name).state_dict() for name in ("whole", "resumed")]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_phases_mix_the_datasets_as_they_say(demos, tmp_path):
    scenes = write_demos(tmp_path / "scenes", kind="scenes")
    both = config(
        demos,
        datasets=(Dataset(name="a", path=str(demos)), Dataset(name="b", path=str(scenes))),
        phases=(Phase(steps=2, mixture=(0.0, 1.0)), Phase(steps=4, mixture=(1.0, 0.0))),
    )
    train(both, tmp_path / "run")
    assert ["action_l1" in r for r in rows(tmp_path / "run")] == [False, False, True, True, True, True], "scenes have no actions"
    state = checkpoint.load_state(tmp_path / "run/checkpoints/last")
    assert state["phase"] == 1 and state["loader"]["position"] == 16


def test_old_checkpoints_are_pruned_and_the_pointer_follows(demos, tmp_path):
    train(config(demos, save_every=2, keep_last=2), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [4, 6]
    assert (tmp_path / "run/checkpoints/last").resolve().name == "step-000006"


def test_fine_tuning_starts_from_the_pretrained_weights_and_its_statistics(demos, tmp_path):
    base = train(config(demos), tmp_path / "base")
    tuned = config(demos, model=Pretrained(path=str(base), statistics="base"), lr=1e-9, optimizer=AdamW(weight_decay=0.0), ema_decay=None)
    folder = train(tuned, tmp_path / "tuned")
    before, after = Policy.load(base), Policy.load(folder)
    assert after.config.dataset == before.config.dataset
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_a_blind_run_never_reads_the_instruction(demos, tmp_path):
    base = train(config(demos), tmp_path / "base")
    folder = train(config(demos, model=Pretrained(path=str(base), statistics="base", prompt_style="blind")), tmp_path / "blind")
    encode = Policy.load(folder).encode_prompts
    assert encode.ids("touch the red block") == encode.ids("anything else")


@pytest.mark.parametrize(
    ("demo_options", "message"),
    [({"cameras": ("front",)}, "no camera wrist"), ({"state_dim": 6}, "6 state dimensions, robot 'tabletop' has 8")],
)
def test_data_that_does_not_fit_the_robot_is_refused_before_work(tmp_path, demo_options, message):
    demos = write_demos(tmp_path / "demos", masks=False, **demo_options)
    with pytest.raises(ValueError, match=message):
        train(config(demos), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_empty_is_refused_and_kept(demos, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        train(config(demos), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_with_another_configuration_is_refused_by_field(demos, tmp_path):
    train(config(demos), tmp_path / "run")
    with pytest.raises(ValueError, match=r"changed in lr \(0.001 then, 0.002 now\)"):
        train(config(demos, lr=2e-3), tmp_path / "run", resume=True)


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        train(config(tmp_path / "nowhere"), tmp_path / "run")


def test_grounding_without_masks_is_refused_with_the_way_to_record_them(tmp_path):
    demos = write_demos(tmp_path / "demos", masks=False)
    with pytest.raises(ValueError, match="--grounding-patches 8"):
        train(config(demos), tmp_path / "run")


def test_a_dataset_that_changed_since_is_not_resumed(tmp_path):
    demos = write_demos(tmp_path / "demos")
    train(config(demos), tmp_path / "run")
    info = demos / "meta" / "info.json"
    info.write_text(info.read_text().replace('"robot_type": "', '"robot_type": "new '))
    with pytest.raises(ValueError, match="dataset 'demos' .* has changed"):
        train(config(demos, save_every=2), tmp_path / "run", resume=True)


def test_cameras_of_other_people_are_mapped(tmp_path):
    demos = write_demos(tmp_path / "demos", cameras=("top", "hand"))
    mapped = Dataset(name="demos", path=str(demos), read=ReadOptions(cameras=(("front", "top"), ("wrist", "hand"))))
    train(config(demos, datasets=(mapped,)), tmp_path / "run")
    assert Policy.load(tmp_path / "run").config.robot.cameras == ("front", "wrist")


def test_the_random_crop_of_training_is_the_central_crop_of_inference(demos, tmp_path):
    train(config(demos, augment=AugmentConfig(crop_area=0.8)), tmp_path / "run")
    assert Policy.load(tmp_path / "run").config.preprocess.crop_area == 0.8


TABLE_1 = {  # the paper's rows, each adding to the one before
    "openvla": {"head": discrete.Config(decoding="autoregressive"), "chunk_len": 1, "num_cameras": 1, "use_state": False},
    "parallel decoding": {"head": discrete.Config(), "chunk_len": 1, "num_cameras": 1, "use_state": False},
    "action chunks": {"head": discrete.Config(), "num_cameras": 1, "use_state": False},
    "l1": {"head": l1.Config(), "num_cameras": 1, "use_state": False},
    "diffusion": {"head": diffusion.Config(inference_steps=2), "num_cameras": 1, "use_state": False},
    "more inputs": {"head": l1.Config()},
    "pooled": {"head": pooled.Config()},
}


@pytest.mark.parametrize("row", TABLE_1)
def test_every_row_of_the_papers_table_trains_from_one_base(demos, tmp_path, row, base):
    settings = dict(TABLE_1[row])
    head = settings.pop("head")
    folder = train(config(demos, model=Pretrained(path=str(base), head=head), **settings), tmp_path / "run")
    policy = Policy.load(folder)
    spec = policy.config.robot
    assert policy.config.head == head
    assert (len(spec.cameras), spec.state_dim) == ((2, 8) if row in ("more inputs", "pooled") else (1, 0))
    seen = Observation(
        {camera: np.full((128, 128, 3), 99, np.uint8) for camera in spec.cameras},
        np.zeros(spec.state_dim, np.float32),
        "touch the red block",
    )
    (chunk,) = policy.act([seen])
    assert chunk.actions.shape == (settings.get("chunk_len", 8), 7)
    assert all(np.isfinite(r["loss"]) for r in rows(tmp_path / "run"))


@pytest.fixture(scope="module")
def base(demos, tmp_path_factory) -> Path:
    return train(config(demos), tmp_path_factory.mktemp("base") / "run")


def test_film_is_added_at_the_identity_and_taken_away(demos, tmp_path, base):
    before = Policy.load(base)
    without = train(
        config(demos, model=Pretrained(path=str(base), film=False), phases=(Phase(steps=1, mixture=(1.0,)),)), tmp_path / "without"
    )
    assert not [name for name in Policy.load(without).state_dict() if ".scale." in name]
    settings = config(demos, model=Pretrained(path=str(without), film=True))
    weights = setup.build_policy(settings, setup.open_datasets(settings)).weights
    added = {name: weight.read() for name, weight in weights.items() if FILM.search(name.rpartition(".")[0])}
    assert added.keys() == {name for name in before.state_dict() if FILM.search(name.rpartition(".")[0])}
    assert not any(p.any() for p in added.values())


def test_more_cameras_than_the_robot_has_are_refused(demos, tmp_path):
    with pytest.raises(ValueError, match="num_cameras=3: robot 'tabletop' has 2"):
        train(config(demos, num_cameras=3), tmp_path / "run")


def test_one_switch_makes_data_and_policy_behave_like_the_reference(demos, tmp_path, capsys):
    """With chunks of 8 and without the ends of episodes there are fewer samples; the switch is a fact of the checkpoint."""
    frames = []
    for parity in (False, True):
        folder = train(config(demos, parity=parity), tmp_path / f"{parity}")
        assert Policy.load(folder).config.parity is parity
        frames.append(int(capsys.readouterr().out.split("trained on ")[1].split(" frames")[0].replace(",", "")))
    episodes = json.loads((tmp_path / "True" / "checkpoints" / "last" / "run.json").read_text())["datasets"][0]["episodes"]
    assert frames[0] - frames[1] == episodes * 7


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(demos, tmp_path):
    wild = config(demos, lr=1e30, clip_norm=1e30, phases=(Phase(steps=30, mixture=(1.0,)),), save_every=1)
    with pytest.raises(FloatingPointError, match="the loss is not finite.*the last good checkpoint is .*step-"):
        train(wild, tmp_path / "run")
    assert all(torch.isfinite(p).all() for p in Policy.load(tmp_path / "run").parameters())


def test_muon_takes_the_matrices_and_adamw_the_rest():
    policy = tiny_policy()
    muon, adamw = Muon().build(policy, 1e-3).members
    sizes = [sum(p.numel() for p in member.parameters.values()) for member in (muon, adamw)]
    assert sum(sizes) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert all(p.ndim == 2 for p in muon.parameters.values()) and sizes[0] > sizes[1]


def test_weight_decay_spares_norms_biases_and_embeddings():
    policy = tiny_policy()
    members = AdamW().build(policy, 1e-3).members
    names = {name for m in members if m.optimizer.param_groups[0]["weight_decay"] for name in m.parameters}
    assert "vlm.language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert not [n for n in names if "norm" in n or "embed_tokens" in n or n.endswith(("bias", "token", "pos_embed"))]


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"batch_size": 0},
        {"phases": ()},
        {"phases": (Phase(steps=3, mixture=(-1.0,)),)},
        {"phases": (Phase(steps=3, mixture=(0.0,)),)},
        {"ema_decay": 1.0},
        {"datasets": ()},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused_by_field(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        config(Path("x"), **change)
