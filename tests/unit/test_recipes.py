"""Recipes: the published numbers, changes by name, and what a new user reads before there is any data."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from vla_oft import cli, cli_train
from vla_oft.config import from_dict, to_dict
from vla_oft.heads import l1
from vla_oft.recipes import base
from vla_oft.train import anatomy, plan, preflight
from vla_oft.train.config import Pretrained, TrainConfig
from vla_oft.train.schedule import Cosine, MultiStep, Reference

LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_all")
ALOHA = ("aloha", "aloha_fold_shorts", "aloha_fold_shirt", "aloha_scoop", "aloha_pot")
ON_OPENVLA = (*LIBERO, *ALOHA, "article", "bridge", "single_gpu_24gb", "single_gpu_16gb")


def run(*arguments: str, monkeypatch) -> int | str | None:
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["vla-oft", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def trained(name: str) -> list[anatomy.Part]:
    config = base.load(name).train
    return anatomy.parts(config, anatomy.trained_policy(config, anatomy.published_base(config)))


def test_every_recipe_of_the_documentation_is_there_and_shared_files_are_none():
    assert {*ON_OPENVLA, "debug", "nano_base", "nano_finetune"} <= set(base.names())
    assert not any(name == "base" or name.startswith("_") for name in base.names())
    assert all(base.summary(name) and len(base.summary(name)) < 140 for name in base.names())


@pytest.mark.parametrize("name", base.names())
def test_a_recipe_survives_its_own_train_json_and_every_common_number_of_gpus(name):
    config = base.load(name).train
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    known = anatomy.published_base(config) if isinstance(config.model, Pretrained) else None
    policy = anatomy.trained_policy(config, known)
    for gpus in (1, 2, 4, 8):
        assert preflight.refusals(config, policy, gpus) == []
    assert preflight.warnings(config, "cuda") == []


@pytest.mark.parametrize("name", LIBERO)
def test_libero_has_the_papers_numbers(name):
    config = base.load(name).train
    assert (config.batch_size, config.micro_batch, config.total_steps, config.lr) == (64, 8, 150_000, 5e-4)
    assert plan.rates(config) == [(0, 5e-4), (100_000, pytest.approx(5e-5)), (149_999, pytest.approx(5e-5))]
    assert config.lora is not None and (config.lora.rank, config.lora.scale, config.lora.dropout) == (32, 16, 0)
    spec = config.robot_spec()
    assert (spec.chunk_len, spec.cameras, spec.state_dim, spec.normalization) == (8, ("front", "wrist"), 8, "bounds_q99")
    assert isinstance(config.model, Pretrained) and config.model.head == l1.Config() and not config.model.film
    assert config.augment is not None and config.augment.crop_area == 0.9
    assert plan.batches(config, 8).passes == 1 and plan.batches(config, 1).passes == 8


@pytest.mark.parametrize("name", ALOHA)
def test_aloha_has_the_papers_numbers(name):
    config = base.load(name).train
    assert (config.batch_size, config.micro_batch, config.total_steps, config.lr) == (32, 4, 100_000, 5e-4)
    assert config.schedule == MultiStep(milestones=(50_000,)) and config.validation is not None and config.validation.share == 0.05
    spec = config.robot_spec()
    assert (spec.chunk_len, len(spec.cameras), spec.action_kind, spec.normalization) == (25, 3, "absolute_joint", "bounds")
    assert isinstance(config.model, Pretrained) and config.model.head == l1.Config() and config.model.film


def test_all_libero_frames_are_drawn_equally_often():
    config = base.load("libero_all").train
    (phase,) = config.phases
    shares = dict(zip((d.name for d in config.datasets), phase.mixture, strict=True))
    assert shares["libero_10_no_noops"] / shares["libero_goal_no_noops"] == pytest.approx(101_469 / 52_042)


def test_openvla_7b_has_the_published_size_and_lora_its_share():
    parts = {part.name: part for part in trained("libero_spatial")}
    backbone = [parts[name] for name in ("vision", "projector", "language")]
    assert round(sum(p.total for p in backbone) / 1e9, 3) == 7.541
    assert 105e6 < sum(p.adapter for p in backbone) < 111e6 and not any(p.trained for p in backbone)
    assert parts["action head"].trained == parts["action head"].total


def test_the_article_freezes_vision_and_ends_at_a_millionth():
    config = base.load("article").train
    assert isinstance(config.model, Pretrained) and config.model.head == l1.Config(loss="huber", delta=0.1)
    assert plan.rates(config)[-1][1] == pytest.approx(1e-6, rel=1e-3) and plan.rates(config)[0][1] == 5e-4
    assert {p.name: p.adapter + p.trained for p in trained("article")}["vision"] == 0


def test_the_recipes_for_one_gpu_keep_few_activations():
    small, smaller = (base.load(name).train for name in ("single_gpu_24gb", "single_gpu_16gb"))
    assert small.recompute == smaller.recompute == "full" and small.micro_batch == 2
    assert small.lora is not None and smaller.lora is not None
    assert (small.lora.base_dtype, smaller.lora.base_dtype) == ("bfloat16", "nf4")


def test_another_number_of_steps_keeps_the_shape_of_the_schedule():
    config = base.load("libero_spatial").train
    assert base.with_total_steps(config, 300_000).schedule == MultiStep(milestones=(200_000,))
    reference = dataclasses.replace(config, schedule=Reference(decay_at=100_000))
    assert base.with_total_steps(reference, 1500).schedule == Reference(decay_at=1000)
    assert base.with_total_steps(base.load("debug").train, 40).schedule == Cosine(warmup_steps=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lorra.rank=4", "there is no 'lorra', did you mean 'lora'?"),
        ("lora.rnak=4", "did you mean 'rank'?"),
        ("lr.peak=4", "lr is 0.0005, it has no 'peak'"),
        ("ema_decay.x=4", """ema_decay is null here, it has no 'x'; set it as a whole: --set 'ema_decay={"x": ...}'"""),
        ("datasets.4.path=x", "there is no '4'; there is 0..0"),
        ("freeze=vision", "expected a list"),
        ("lora.base_dtype=int3", "'int3' is not one of"),
    ],
)
def test_a_misspelt_setting_is_refused_with_what_was_meant(change, message):
    with pytest.raises(ValueError) as caught:
        base.override(base.load("libero_spatial").train, base.parse_changes([change]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_misspelt_recipe_is_refused_with_what_was_meant():
    with pytest.raises(ValueError, match="unknown recipe 'libero_spacial', did you mean 'libero_spatial'"):
        base.load("libero_spacial")


@pytest.mark.parametrize("name", ON_OPENVLA)
def test_without_model_and_data_one_line_says_how_to_get_both(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", name, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err.strip()
    assert "import it first: vla-oft ckpt import openvla/openvla-7b checkpoints/openvla-7b" in said and "\n" not in said
    assert all(f"{dataset.path} is not here" in said for dataset in base.load(name).train.datasets)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_only_what_is_missing_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = base.load("libero_spatial")
    (tmp_path / "datasets" / "libero_spatial_no_noops").mkdir(parents=True)
    assert list(base.missing(recipe, recipe.train)) == ["checkpoints/openvla-7b"]
    own = base.override(recipe.train, {"model.path": "someone/a-policy", "datasets.0.path": "someone/demos"})
    assert base.missing(recipe, own) == {}, "hub ids are downloaded when they are needed"
    debug = base.load("debug")
    for made in (debug, base.load("nano_base")):
        assert base.missing(made, made.train) == {}, "recorded first"
    assert "nowhere" in base.missing(debug, base.override(debug.train, {"datasets.0.path": "nowhere"}))


def test_show_says_what_will_happen_before_anything_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("show", "libero_spatial", "--gpus", "8", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    for words in (
        "OpenVLA-7B is assumed",
        "of 7,709.2 M parameters: LoRA of rank 32",
        "datasets/libero_spatial_no_noops: not here",
        "hf download openvla/modified_libero_rlds",
        "64 samples = 8 GPUs x 8, in 1 pass of 8",
        "64 samples = 1 GPU x 64, in 8 passes of 8",
        "step   100,000  5e-05",
        "torchrun --nproc-per-node 8 -m vla_oft train libero_spatial",
    ):
        assert words in said, words


def test_show_repeats_changes_and_says_what_would_be_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changed = ("--gpus", "6", "--set", "schedule.milestones=[200000]", "--set", "stop.metric=validation_action_l1")
    assert run("show", "libero_spatial", *changed, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "refused: batch_size=64 cannot be divided among 6 processes" in said
    assert "refused: stop.metric='validation_action_l1' is never measured" in said
    assert "warning: the learning rate falls at step 200,000, but the run ends at step 150,000" in said
    assert "'--set=schedule.milestones=[200000]'" in said


def test_show_json_is_the_whole_configuration_and_nothing_else(monkeypatch, capsys):
    assert run("show", "aloha", "--json", "--set", "seed=3", monkeypatch=monkeypatch) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["train"]["seed"] == 3 and from_dict(TrainConfig, document["train"]).robot == "aloha"
    assert document["get"]["datasets/aloha"].startswith("put your recordings there")


def test_show_alone_lists_all_recipes(monkeypatch, capsys):
    assert run("show", monkeypatch=monkeypatch) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == base.names()


def test_an_earlier_run_can_take_a_recipes_place(tmp_path, monkeypatch, capsys):
    config = base.override(base.load("debug").train, {"lr": 0.125})
    (tmp_path / "train.json").write_text(json.dumps(to_dict(config)))
    for given in (tmp_path, tmp_path / "train.json"):
        chosen, settings = cli_train._choose(None, given, None, {"seed": 5}, ("batch_size=4",))
        assert (settings.lr, settings.seed, settings.batch_size) == (0.125, 5, 4)
        assert chosen.collect == base.load("debug").collect, "its demonstrations can be recorded again"
    (tmp_path / "train.json").write_text("{")
    assert run("train", "--config", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert "train.json is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a recipe, or give --config FILE (not both); recipes: aloha,"),
        (["train", "debug", "--config", "x"], "name a recipe, or give --config FILE (not both)"),
        (["train", "--config", "nowhere"], "nowhere does not exist"),
        (["train", "debug", "--lr", "1e-4", "--set", "lr=1e-3"], "lr is given twice"),
        (["train", "debug", "--steps", "3", "--set", "phases=[]"], "give one of both"),
        (["train", "debug", "--lr", "0"], "TrainConfig.lr=0.0 must be positive"),
        (["show", "debug", "--gpus", "0"], "gpus=0 must be positive"),
    ],
)
def test_contradictions_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_the_plot_of_the_learning_rate_falls_where_it_does(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run("show", "libero_spatial", monkeypatch=monkeypatch)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rate")]
    plot = line.split("|")[1]
    assert plot.rstrip(".").count("#") == len(plot.rstrip(".")) == math.ceil(len(plot) * 2 / 3)


def test_paths_of_recipes_are_relative_to_where_one_works():
    for name in base.names():
        assert all(not Path(dataset.path).is_absolute() for dataset in base.load(name).train.datasets)
