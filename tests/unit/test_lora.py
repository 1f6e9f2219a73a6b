"""LoRA, rsLoRA and DoRA: what is adapted and what is left alone, checkpoints that resume exactly and load merged, peft, `ckpt merge`."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.adapting import adapted, everything, shake, write
from tests.tiny import observation, tiny_batch, tiny_config, tiny_policy
from tests.training import config, rows, write_demos
from vla_oft.config import from_dict, to_dict
from vla_oft.heads import discrete
from vla_oft.merge import load_unmerged, merge_checkpoint, unmerged
from vla_oft.policy import Policy
from vla_oft.train import checkpoint, lora
from vla_oft.train.blueprint import Blueprint
from vla_oft.train.config import Phase, Pretrained, TrainConfig
from vla_oft.train.freeze import FILM, freeze_parts
from vla_oft.train.loop import train
from vla_oft.train.lora import Lora
from vla_oft.train.optimizer import AdamW, Muon
from vla_oft.vlm import sizes

pytest.importorskip("peft", reason="needs the extra 'train'")
SMALL = Lora(rank=4)
VARIANTS = [SMALL, Lora(rank=4, rslora=True), Lora(rank=4, dora=True), Lora(rank=4, dora=True, rslora=True, alpha=2.0)]


def whole_policy(**changes) -> Policy:
    """With the weights that nothing reads, as in a published checkpoint."""
    vlm = tiny_config().vlm
    vlm = dataclasses.replace(
        vlm,
        dino=dataclasses.replace(vlm.dino, unread_weights=True),
        siglip=dataclasses.replace(vlm.siglip, unread_weights=True, attention_pool=True),
    )
    return tiny_policy(vlm=vlm, **changes)


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    return write_demos(tmp_path_factory.mktemp("data") / "demos")


@pytest.fixture(scope="module")
def run(demos, tmp_path_factory) -> Path:
    """A LoRA run on a pretrained policy: run/base, run/tuned."""
    folder = tmp_path_factory.mktemp("runs")
    base = train(config(demos, phases=(Phase(steps=2, mixture=(1.0,)),), save_every=2), folder / "base")
    tuned = config(demos, model=Pretrained(path=str(base), statistics="base"), lora=SMALL, lr=3e-3, ema_decay=None, save_every=2)
    train(tuned, folder / "tuned")
    return folder


@pytest.mark.parametrize("head", [None, discrete.Config()])
def test_by_default_exactly_the_linear_layers_that_are_read_are_adapted(head):
    policy = whole_policy(**({} if head is None else {"head": head})).train()
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    policy(tiny_batch(policy))[0].backward()
    read = {
        name
        for name, module in policy.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith("vlm.") and module.weight.grad is not None
    }
    film = {name for name in read if name.endswith((".scale", ".shift"))}
    assert film and set(lora.target_modules(policy, Lora())) == read - film
    assert ("vlm.language_model.lm_head" in read) == (head is not None)


def test_the_references_targets_are_those_and_the_layers_that_nothing_reads():
    policy = whole_policy()
    ours, theirs = (set(lora.target_modules(policy, Lora(targets=targets))) for targets in ("default", "reference"))
    extra = theirs - ours
    assert ours < theirs and all("blocks.2." in n or "attn_pool." in n or n.endswith("lm_head") for n in extra)
    assert len(extra) == 2 * 4 + 5 + 1
    assert not any("action_head" in n or "state_projector" in n or n.endswith((".scale", ".shift")) for n in theirs)


def test_layers_can_be_chosen_by_name_and_a_misspelt_name_is_refused():
    policy = whole_policy()
    chosen = lora.target_modules(policy, Lora(targets=("self_attn.q_proj", "qkv")))
    assert len(chosen) == 2 + 2 * 2 and all(n.endswith(("self_attn.q_proj", "qkv")) for n in chosen)
    with pytest.raises(ValueError, match=r"no layer that the policy reads is called qproj, lm_head; there are .*q_proj"):
        lora.target_modules(policy, Lora(targets=("qproj", "v_proj", "lm_head")))


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [(Lora(rank=4), 1.0), (Lora(rank=32), 0.5), (Lora(rank=4, alpha=2.0), 0.5), (Lora(rank=16, alpha=8.0, rslora=True), 2.0)],
)
def test_the_updates_are_scaled_by_alpha_over_rank_or_its_root(tmp_path, settings, scaling):
    policy = shake(adapted(tiny_policy(), settings))
    assert {factors.scaling for factors in lora.adapter(policy).factors.values()} == {scaling}
    write(policy, tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(Policy.load(tmp_path).predict(tiny_like(policy)), policy.predict(tiny_like(policy)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("freeze", [("vision",), ("projector", "language"), ("vision", "projector", "language")])
def test_frozen_parts_do_not_train_but_film_and_heads_do(freeze):
    names = {"vision": "vlm.vision_backbone.", "projector": "vlm.projector.", "language": "vlm.language_model."}
    policy = whole_policy().train()
    freeze_parts(policy, freeze)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    policy(tiny_batch(policy))[0].backward()
    assert trained == {name for name, p in policy.named_parameters() if p.grad is not None}
    film = {name for name in trained if FILM.search(name.rpartition(".")[0])}
    assert len(film) == 2 * 2 * 2 * 2 and {"action_head", "state_projector", "grounding_head"} <= {n.split(".")[0] for n in trained}
    for part, prefix in names.items():
        assert any(name.startswith(prefix) for name in trained - film) == (part not in freeze)


def test_freezing_everything_is_refused():
    policy = tiny_policy(film=False, head=discrete.Config(), use_state=False, grounding=None)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze_parts(policy, ("vision", "projector", "language"))


def test_no_layer_of_a_frozen_part_is_adapted():
    policy = whole_policy()
    for targets in ("default", "reference"):
        names = lora.target_modules(policy, Lora(targets=targets), ("vision", "projector"))
        assert names and all(name.startswith("vlm.language_model.") for name in names)
    with pytest.raises(ValueError, match=r"outside the frozen parts is called q_proj; there are .*qkv"):
        lora.target_modules(policy, Lora(targets=("q_proj",)), ("language",))
    with pytest.raises(ValueError, match=r"leaves no layer to adapt; set lora=null"):
        lora.target_modules(policy, SMALL, ("vision", "projector", "language"))


@pytest.mark.parametrize("settings", VARIANTS)
def test_an_adapted_blueprint_has_no_memory_and_knows_every_weight(settings):
    plain = whole_policy()
    blueprint = lora.inject(Blueprint.of(whole_policy()), settings, (), seed=0)
    parameters = dict(blueprint.policy.named_parameters())
    assert all(p.is_meta for p in parameters.values()) and parameters.keys() == blueprint.weights.keys()
    for name, parameter in parameters.items():
        assert blueprint.weights[name].read().shape == parameter.shape, name
    for name, weight in plain.state_dict().items():
        now = name if name in parameters else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(blueprint.weights[now].read(), weight)


@pytest.mark.parametrize("init", ["gaussian", "default"])
def test_a_layers_update_starts_from_the_seed_and_its_name_alone(init):
    few, all_ = (
        lora.inject(Blueprint.of(tiny_policy()), Lora(rank=8, init=init, targets=targets), (), seed=3).weights
        for targets in (("q_proj",), "default")
    )
    shared = [name for name in few if ".lora_A" in name]
    assert len(shared) == 2 and all(torch.equal(few[name].read(), all_[name].read()) for name in shared)
    drawn = torch.cat([all_[name].read().flatten() for name in all_ if ".lora_A" in name and "self_attn" in name])
    assert len({all_[name].read().flatten()[0].item() for name in all_ if ".lora_A" in name}) > 30
    expected = 1 / 8 if init == "gaussian" else (48 * 3) ** -0.5  # of a uniform number below 1 / sqrt(48)
    assert drawn.std().item() == pytest.approx(expected, rel=0.1)
    other = lora.inject(Blueprint.of(tiny_policy()), Lora(rank=8, init=init), (), seed=4).weights
    assert not torch.equal(other[shared[0]].read(), all_[shared[0]].read())


@pytest.mark.parametrize("settings", VARIANTS)
def test_adapting_changes_no_action_and_freezes_the_backbone(settings):
    policy = whole_policy()
    observations = [observation(seed=1), observation(seed=2)]
    before = policy.act(observations)
    policy = adapted(policy, settings)
    for old, new in zip(before, policy.act(observations), strict=True):
        np.testing.assert_allclose(old.actions, new.actions, atol=1e-6 if settings.dora else 0)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    in_full = {name for name in trained if ".lora_" not in name}
    assert {name.split(".")[0] for name in in_full} == {"action_head", "state_projector", "grounding_head", "vlm"}
    assert all(".scale." in name or ".shift." in name for name in in_full if name.startswith("vlm."))
    assert not any("blocks.2." in name for name in trained), "the last blocks are not read"


def test_the_reference_shape_of_a_7b_model_has_its_published_number_of_parameters():
    tiny = tiny_policy()
    image = dataclasses.replace(tiny.config.preprocess, image_size=224)
    config_7b = dataclasses.replace(tiny.config, vlm=sizes.openvla_7b(film=False), preprocess=image)
    with torch.device("meta"):
        policy = Policy(config_7b, tiny.statistics, tiny.tokenizer)
    layers = dict(policy.named_modules())
    size = lambda names: sum(32 * (layers[n].weight.shape[0] + layers[n].weight[0].numel()) for n in names)  # noqa: E731
    reference, default = (size(lora.target_modules(policy, Lora(targets=t))) for t in ("reference", "default"))
    assert reference == 110_828_288, "what OpenVLA's fine-tuning script prints for rank 32"
    assert default < 0.98 * reference


@pytest.mark.parametrize("optimizer", [AdamW(), AdamW(decay="all"), Muon()])
def test_training_moves_the_adapter_and_no_frozen_bit(optimizer):
    policy = adapted(whole_policy(), SMALL).train()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    steps = optimizer.build(policy, 1e-2)
    for _ in range(2):
        policy(tiny_batch(policy))[0].backward()
        steps.step(1e-2)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name


def test_a_bfloat16_base_trains_what_is_new_in_float32():
    policy = adapted(whole_policy(), Lora(rank=4, base_dtype="bfloat16")).train()
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in policy.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = policy(tiny_batch(policy))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.requires_grad)


def test_under_autocast_no_float32_copy_of_a_layers_input_is_made():
    policy = adapted(tiny_policy(), Lora(rank=4, base_dtype="bfloat16")).train()
    seen: set[torch.dtype] = set()
    for name, module in policy.named_modules():
        if name.endswith(".lora_A.default") and "language_model" in name and "norm" not in name:
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        policy(tiny_batch(policy))
    assert seen == {torch.bfloat16}


def test_a_run_keeps_every_frozen_weight_and_loads_merged(run):
    base, tuned = Policy.load(run / "base"), run / "tuned/checkpoints/last"
    unmerged_policy, merged_policy = load_unmerged(tuned, torch.float32), Policy.load(tuned)
    trained = load_file(tuned / lora.TRAINED)
    weights = unmerged_policy.state_dict()
    assert {n.split(".")[0] for n in trained if not n.startswith("vlm.")} == {"action_head", "state_projector", "grounding_head"}
    for name, weight in base.state_dict().items():
        assert torch.equal(weights[name], weight) == (name not in trained), name
    changed = {n for n, w in merged_policy.state_dict().items() if not torch.equal(w, weights[n])}
    assert changed == {f"{name}.weight" for name in lora.target_modules(base, SMALL)}


def test_a_loaded_checkpoint_acts_like_the_unmerged_model(run):
    tuned = run / "tuned/checkpoints/last"
    plain = adapted(load_unmerged(tuned, torch.float32), SMALL, seed=99).eval()
    trained = {f"weight/{name}": p.detach() for name, p in plain.named_parameters() if p.requires_grad}
    checkpoint.load_tensors(tuned, trained)
    observations = [observation(seed=s) for s in range(3)]
    merged = Policy.load(run / "tuned").act(observations)
    base = Policy.load(run / "base").act(observations)
    for one, other, untrained in zip(plain.act(observations), merged, base, strict=True):
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)
        assert np.abs(one.actions - untrained.actions).max() > 1e-3


def test_checkpoints_share_what_does_not_change(run):
    folders = sorted((run / "tuned/checkpoints").glob("step-*"))
    assert len(folders) == 2
    frozen = [folder / f"{lora.FROZEN}.safetensors" for folder in folders]
    assert frozen[0].stat().st_ino == frozen[1].stat().st_ino
    assert (folders[0] / lora.TRAINED).stat().st_ino != (folders[1] / lora.TRAINED).stat().st_ino
    index = json.loads((folders[1] / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == Policy.load(folders[1]).state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "changes", "fresh"),
    [
        (Lora(rank=4, dropout=0.2), {"ema_decay": 0.9, "micro_batch": 2}, True),
        (Lora(rank=4, targets="reference", dora=True), {"ema_decay": None, "optimizer": Muon(), "freeze": ("projector",)}, False),
        (Lora(rank=4, base_dtype="bfloat16"), {"ema_decay": None, "precision": "bf16", "weights": "bfloat16+master"}, True),
        (Lora(rank=4, base_dtype="nf4"), {"ema_decay": 0.9, "precision": "bf16", "recompute": "full"}, False),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(demos, run, tmp_path, settings, changes, fresh):
    whole = config(demos, lora=settings, phases=(Phase(steps=4, mixture=(1.0,)),), save_every=2, **changes)
    if not fresh:
        whole = dataclasses.replace(whole, model=Pretrained(path=str(run / "base"), statistics="base"))
    train(whole, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-000004")  # as if killed after step 2
    train(whole, tmp_path / "resumed", resume=True)
    first, second = (rows(tmp_path / name) for name in ("whole", "resumed"))
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in first] == [(r["step"], r["loss"], r["grad_norm"]) for r in second]
    for file in ("adapter/adapter_model.safetensors", lora.TRAINED, f"{lora.FROZEN}.safetensors"):
        one, other = (load_file(tmp_path / name / "checkpoints/step-000004" / file) for name in ("whole", "resumed"))
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("settings", VARIANTS)
def test_stock_peft_reads_the_adapter_as_we_do(tmp_path, settings):
    from peft import PeftModel

    write(shake(adapted(whole_policy(), settings)), tmp_path)
    ours = Policy.load(tmp_path)
    theirs, batch = load_unmerged(tmp_path, torch.float32).eval(), tiny_like(ours)
    with torch.inference_mode():
        base = theirs.predict(batch)
        wrapped = PeftModel.from_pretrained(nn.ModuleDict({"vlm": theirs.vlm}), str(tmp_path / "adapter")).eval()  # in place
        torch.testing.assert_close(theirs.predict(batch), ours.predict(batch), atol=1e-5, rtol=0)
        assert (theirs.predict(batch) - base).abs().max() > 1e-2
    read = {name for name, _ in wrapped.named_parameters() if ".lora_" in name}
    assert any("lora_magnitude_vector" in name for name in read) == settings.dora


def test_an_adapter_that_contradicts_its_configuration_is_refused(tmp_path):
    write(shake(adapted(tiny_policy(), Lora(rank=4, dora=True))), tmp_path)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": False}))
    with pytest.raises(ValueError, match="use_dora=False contradicts the tensors of vlm"):
        Policy.load(tmp_path)


def tiny_like(policy: Policy):
    return policy.prepare([observation(seed=3), observation(seed=4)])


@pytest.mark.parametrize("targets", ["default", "reference", ("q_proj", "v_proj")])
def test_the_settings_survive_json(demos, targets):
    settings = config(demos, lora=Lora(targets=targets))
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(settings)))) == settings


def test_a_wrong_target_in_json_is_named(demos):
    document = json.loads(json.dumps(to_dict(config(demos, lora=Lora()))))
    document["lora"]["targets"] = "everything"
    with pytest.raises(ValueError, match=r"lora.targets: 'everything' is not one of \['default', 'reference'\]; or .*expected a list"):
        from_dict(TrainConfig, document)


def test_impossible_settings_are_refused_by_field(demos, tmp_path):
    for change in ({"rank": 0}, {"alpha": -1.0}, {"dropout": 1.0}, {"targets": ()}):
        with pytest.raises(ValueError, match=f"Lora.{next(iter(change))}"):
            Lora(**change)
    with pytest.raises(ValueError, match="base_dtype='bfloat16' needs precision='bf16'"):
        train(config(demos, lora=Lora(base_dtype="bfloat16"), precision="fp32"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_peft_is_named_before_any_work(demos, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vla-oft\[train\]'"):
        train(config(demos, lora=SMALL), tmp_path / "run")


def adapted_checkpoint(out: Path, settings: Lora = SMALL) -> Path:
    out.mkdir()
    write(shake(adapted(whole_policy(), settings)), out)
    return out


@pytest.mark.parametrize("settings", VARIANTS)
def test_merging_keeps_the_actions_and_drops_the_adapter(tmp_path, settings):
    source = adapted_checkpoint(tmp_path / "source", settings)
    (source / "trainer").mkdir()
    done = merge_checkpoint(source, tmp_path / "merged")
    assert 0 < done.difference < 1e-5
    assert not (tmp_path / "merged/adapter").exists() and not (tmp_path / "merged/trainer").exists()
    one, other = Policy.load(source), Policy.load(tmp_path / "merged")
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert json.loads((tmp_path / "merged/run.json").read_text())["merge"]["largest_difference"] == done.difference


def test_merging_is_refused_when_the_policy_would_act_otherwise(tmp_path):
    source = adapted_checkpoint(tmp_path / "source")
    with pytest.raises(ValueError, match=r"merged in bfloat16, .* more than the tolerance 1.0e-07; nothing was written.*--dtype float32"):
        merge_checkpoint(source, tmp_path / "merged", dtype="bfloat16", tolerance=1e-7)
    assert not (tmp_path / "merged").exists()
    done = merge_checkpoint(source, tmp_path / "merged", dtype="bfloat16", tolerance=1.0)
    assert 1e-4 < done.difference < 0.5
    assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}


def test_the_check_sees_a_wrong_sum(tmp_path, monkeypatch):
    source = adapted_checkpoint(tmp_path / "source")
    monkeypatch.setattr("vla_oft.merge.merge", lambda policy, adapter, dtype: None)
    with pytest.raises(ValueError, match="the policy acts otherwise"):
        merge_checkpoint(source, tmp_path / "merged")


def test_merging_without_an_adapter_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_checkpoint(run / "base", tmp_path / "merged")


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_update_beside_the_weights_is_pefts(tmp_path, settings):
    policy = shake(adapted(whole_policy(), settings))
    write(policy, tmp_path)
    plain, batch = load_unmerged(tmp_path, torch.float32).eval(), tiny_like(policy)
    with torch.inference_mode():
        alone = plain.predict(batch)
        with unmerged(plain, lora.adapter(policy)):
            together = plain.predict(batch)
        torch.testing.assert_close(together, policy.predict(batch), atol=1e-5, rtol=0)
        assert (together - alone).abs().max() > 1e-2
        torch.testing.assert_close(plain.predict(batch), alone, atol=0, rtol=0)


def test_a_checkpoint_is_written_from_the_given_tensors_alone(tmp_path):
    policy = shake(adapted(whole_policy(), Lora(rank=4, dora=True)))
    snapshot = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    wanted = policy.eval().predict(tiny_like(policy)).detach()
    for parameter in policy.parameters():  # training goes on
        if parameter.requires_grad:
            parameter.data += 1
    lora.write(policy, snapshot, tmp_path, previous=None)
    torch.testing.assert_close(Policy.load(tmp_path).predict(tiny_like(policy)).detach(), wanted, atol=1e-5, rtol=0)
    everywhere = everything(adapted(whole_policy(), Lora(rank=4, dora=True)))
    meta = lora.inject(Blueprint.of(whole_policy()), Lora(rank=4, dora=True), (), seed=0).policy
    (tmp_path / "second").mkdir()
    lora.write(meta, {**everywhere, **snapshot}, tmp_path / "second", previous=None)  # a policy that holds nothing itself
    first, second = (load_file(folder / f"{lora.FROZEN}.safetensors") for folder in (tmp_path, tmp_path / "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("settings", [SMALL, Lora(rank=32, dropout=0.3), Lora(rank=3, alpha=2.0)])
def test_our_layers_compute_what_pefts_do(settings):
    from peft.tuners.lora.layer import Linear

    results = []
    for ours in (True, False):
        policy = shake(adapted(whole_policy(), settings)).train()
        layers = [m for m in policy.modules() if isinstance(m, Linear)]
        assert len(layers) > 20 and all(type(m) is not Linear for m in layers)
        for layer in layers:
            if not ours:
                layer.__class__ = Linear
        torch.manual_seed(0)
        loss, _ = policy(tiny_batch(policy))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    exact = settings.scale / settings.rank in (1.0, 0.5)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0 if exact else 1e-4, rtol=0 if exact else 1e-3)
