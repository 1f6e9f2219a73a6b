"""Published layouts of a tiny policy: there and back, and one clear error for everything that can be wrong with a download."""

import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.tiny import INSTRUCTIONS, tiny_config, tiny_statistics
from vla_oft import preprocess
from vla_oft.adapter import Adapter, Factors
from vla_oft.describe import describe
from vla_oft.heads import diffusion, discrete, l1, pooled
from vla_oft.interface import Interface
from vla_oft.policy import Policy
from vla_oft.reference import ImportRequest, export_checkpoint, import_checkpoint
from vla_oft.robots.libero import SPEC
from vla_oft.statistics import load_statistics, save_statistics
from vla_oft.vlm import tokens
from vla_oft_client import Observation

TIMM = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")


def publishable(head=None, *, film=False, seed=0, use_state=True) -> Policy:
    """A policy of the published kind in a tiny size; every weight is representable in bfloat16."""
    config = tiny_config(film=film)
    unread = {"unread_weights": True}
    vlm = dataclasses.replace(
        config.vlm,
        dino=dataclasses.replace(config.vlm.dino, **unread),
        siglip=dataclasses.replace(config.vlm.siglip, **unread, attention_pool=True, depth=4, num_heads=4),
        llm=dataclasses.replace(config.vlm.llm, vocab_size=config.vlm.tokens.num_tokens + 64),
    )
    config = dataclasses.replace(
        config,
        robot=SPEC,
        vlm=vlm,
        head=head or l1.Config(num_blocks=3),
        preprocess=preprocess.reference_config(image_size=16),
        dataset="libero_tiny",
        prompt_style="openvla",
        grounding=None,
        use_state=use_state,
        parity=True,
    )
    tokenizer, _ = tokens.train_tokenizer(INSTRUCTIONS, 640)
    policy = Policy.create(config, tiny_statistics(), tokenizer, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_((parameter + 0.02 * torch.randn(parameter.shape, generator=generator)).bfloat16())
    return policy


def published(policy: Policy, folder):
    policy.save(folder / "ours")
    return export_checkpoint(folder / "ours", folder / "published", step="7", report=lambda line: None)


def heads_file(folder, policy):
    sizes = [policy.config.vlm.dino, policy.config.vlm.siglip]
    path = folder / "overrides.json"
    path.write_text(json.dumps({name: {"embed_dim": s.width, "num_heads": s.num_heads} for name, s in zip(TIMM, sizes, strict=True)}))
    return path


def bring_in(folder, policy, **changes):
    request = ImportRequest(source=str(folder / "published"), vision_overrides=heads_file(folder, policy))
    return import_checkpoint(dataclasses.replace(request, **changes), folder / "again", report=lambda line: None)


def observation(seed=0, text="Öffne die 抽屉 {now}") -> Observation:
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, size, dtype=np.uint8) for camera, size in (("front", (40, 61, 3)), ("wrist", (224, 224, 3)))}
    return Observation(images, rng.normal(size=8).astype(np.float32), text)


@pytest.fixture
def folder(tmp_path):
    policy = publishable()
    published(policy, tmp_path)
    return tmp_path


HEADS = {
    "l1": l1.Config(num_blocks=3),
    "diffusion": diffusion.Config(num_blocks=2),
    "parallel": discrete.Config(any_token=True),
    "autoregressive": discrete.Config(any_token=True, decoding="autoregressive"),
}


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_there_and_back(tmp_path, kind, film):
    """Other towers, depths, vocabulary, blocks and heads than any published checkpoint has; odd images, other alphabets."""
    policy = publishable(HEADS[kind], film=film, use_state=kind != "parallel")
    published(policy, tmp_path)
    options = {"decoding": kind} if kind in ("parallel", "autoregressive") else {}
    again = Policy.load(bring_in(tmp_path, policy, cameras=2, chunk_len=8, **options))
    if kind == "autoregressive":  # which leaves the resizing of images to the crop
        config = dataclasses.replace(policy.config, preprocess=again.config.preprocess)
        policy.interface = Interface(config, policy.statistics, policy.tokenizer)
    elif kind == "parallel":
        assert not again.config.use_state
    changed = ("robot", "preprocess") if kind == "parallel" else ()
    assert {f.name for f in dataclasses.fields(again.config) if getattr(again.config, f.name) != getattr(policy.config, f.name)} <= set(
        changed
    )
    noise = np.random.default_rng(0).normal(size=(8, 7))
    expected, actual = (p.act([observation(), observation(1)], noise=noise) for p in (policy, again))
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)


def test_black_and_white_images_differ_after_import(folder):
    policy = Policy.load(bring_in(folder, publishable()))
    images = [{c: np.full((50, 50, 3), value, np.uint8) for c in ("front", "wrist")} for value in (0, 255)]
    black, white = policy.act([Observation(i, np.zeros(8, np.float32), "go") for i in images])
    assert np.abs(black.actions - white.actions).max() > 1e-4


@pytest.mark.parametrize("rank", [3, 17])
@pytest.mark.parametrize("stabilised", [False, True])
def test_adapter_of_any_rank(folder, rank, stabilised):
    """Base and adapter, merged by hand in float64."""
    policy = publishable()
    generator = torch.Generator().manual_seed(0)
    modules = ["language_model.model.layers.0.self_attn.q_proj", "vision_backbone.featurizer.patch_embed.proj", "projector.fc2"]
    factors = {}
    for module in modules:
        weight = policy.get_submodule("vlm." + module).weight
        kernel = weight.shape[2:]
        factors[module] = Factors(
            torch.randn(rank, weight.shape[1], *kernel, generator=generator) * 0.1,
            torch.randn(weight.shape[0], rank, *(1 for _ in kernel), generator=generator) * 0.1,
            5 / rank,
        )
    source = folder / "published"
    Adapter(factors).save(source / "lora_adapter")
    path = source / "lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": stabilised}))
    (folder / "base").mkdir()
    for path in [*source.glob("*.json"), source / "model.safetensors"]:
        (folder / "base" / path.name).write_bytes(path.read_bytes())
    again = Policy.load(bring_in(folder, policy, base=str(folder / "base")))
    scaling = 5 / (rank**0.5 if stabilised else rank)
    for module, (a, b, *_) in factors.items():
        before = policy.get_submodule("vlm." + module).weight
        wanted = before.double() + scaling * (b.double().flatten(1) @ a.double().flatten(1)).view(before.shape)
        after = again.get_submodule("vlm." + module).weight
        np.testing.assert_allclose(after.detach().numpy(), wanted.detach().numpy(), atol=1e-6)
        assert (after - before).abs().max() > 1e-3


def test_several_statistics(folder):
    path = folder / "published" / "dataset_statistics.json"
    entry = load_statistics(path)["libero_tiny"]
    other = dataclasses.replace(entry, action=dataclasses.replace(entry.action, q99=entry.action.q99 + 1))
    save_statistics(path, {"libero_a": entry, "libero_b": other})
    with pytest.raises(ValueError, match=r"\['libero_a', 'libero_b'\], not 'libero_c'.*--dataset"):
        bring_in(folder, publishable(), dataset="libero_c")
    out = bring_in(folder, publishable(), dataset="libero_b")
    assert set(load_statistics(out / "statistics.json")) == {"libero_a", "libero_b"}
    chosen, switched = Policy.load(out), Policy.load(out, dataset="libero_a")
    assert chosen.config.dataset == "libero_b"
    assert np.abs(chosen.act([observation()])[0].actions - switched.act([observation()])[0].actions).max() > 0.1
    with pytest.raises(ValueError, match="not 'libero_c'"):
        Policy.load(out, dataset="libero_c")


def test_the_choice_of_statistics_can_wait(folder):
    """The published checkpoint of four suites, or the base model's 27 datasets."""
    path = folder / "published" / "dataset_statistics.json"
    entry = load_statistics(path)["libero_tiny"]
    save_statistics(path, {"libero_a": entry, "libero_b": entry})
    out = bring_in(folder, publishable())
    with pytest.raises(ValueError, match=r"was trained on \['libero_a', 'libero_b'\]: choose.*dataset="):
        Policy.load(out)
    assert Policy.load(out, dataset="libero_b").config.dataset == "libero_b"
    again = export_checkpoint(out, folder / "exported", report=lambda line: None)
    assert set(load_statistics(again / "dataset_statistics.json")) == {"libero_a", "libero_b"}
    assert describe(out)["policy"]["dataset"] is None


def test_statistics_inside_config_json(folder):
    """openvla/openvla-7b has no dataset_statistics.json, and was not trained on crops."""
    source = folder / "published"
    document = json.loads((source / "config.json").read_text())
    document["norm_stats"] = json.loads((source / "dataset_statistics.json").read_text())
    (source / "config.json").write_text(json.dumps(document))
    (source / "dataset_statistics.json").unlink()
    config = Policy.load(bring_in(folder, publishable())).config
    assert config.dataset == "libero_tiny"
    assert config.preprocess.crop_area == 1.0


@pytest.mark.parametrize(("proprio", "decoding"), [("kept", "parallel"), ("zeros", "autoregressive"), ("none", "autoregressive")])
def test_tokens_are_decoded_as_the_statistics_tell(tmp_path, proprio, decoding):
    """The original OpenVLA, which decodes one token after another, never loads the state and writes zeros for it."""
    policy = publishable(HEADS["parallel"], use_state=False)
    path = published(policy, tmp_path) / "dataset_statistics.json"
    document = json.loads(path.read_text())
    if proprio == "zeros":
        document["libero_tiny"]["proprio"] = {name: [0.0] * 7 for name in document["libero_tiny"]["proprio"]}
    elif proprio == "none":
        del document["libero_tiny"]["proprio"]
    path.write_text(json.dumps(document))
    config = Policy.load(bring_in(tmp_path, policy)).config
    assert config.head.decoding == decoding
    assert config.chunk_len == (8 if decoding == "parallel" else 1)
    assert len(config.robot.cameras) == 1


def test_a_state_projector_without_a_head_is_an_incomplete_download(folder):
    (folder / "published" / "action_head--7_checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="proprio_projector but no action_head"):
        bring_in(folder, publishable())


def test_all_wrong_weights_are_listed(folder):
    path = folder / "published" / "model.safetensors"
    tensors = load_file(path)
    del tensors["language_model.model.norm.weight"]
    tensors["projector.fc9.weight"] = torch.zeros(2)
    tensors["projector.fc1.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"(?s)missing.*model\.norm\.weight.*unexpected.*fc9\.weight.*wrong shape.*fc1\.bias: \(3,\)"):
        bring_in(folder, publishable())
    assert not (folder / "again").exists()


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_code_in_a_pt_file_never_runs(folder, capsys):
    path = folder / "published" / "action_head--7_checkpoint.pt"
    torch.save({"module.model.fc1.weight": Evil()}, path)
    with pytest.raises(ValueError, match=r"action_head--7_checkpoint\.pt is not a file of plain tensors"):
        bring_in(folder, publishable())
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        bring_in(folder, publishable())
    assert "code ran" not in capsys.readouterr().out


def test_python_files_stay_behind(folder):
    (folder / "published" / "modeling_prismatic.py").write_text("raise SystemExit('ran')")
    out = bring_in(folder, publishable())
    assert not list(out.rglob("*.py"))


def edit_config(folder, **changes):
    path = folder / "published" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type='llava' is not supported"),
        ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone=False"),
        ({"arch_specifier": "no-align+gelu-mlp"}, "arch_specifier='no-align"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type='mistral'"),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "text_config.rope_scaling"),
        ({"text_config": {"partial_rotary_factor": 0.5}}, "text_config.partial_rotary_factor"),
        ({"text_config": {"hidden_size": "48"}}, "text_config.hidden_size='48'"),
        ({"text_config": {"vocab_size": 5}}, r"text_config.vocab_size=5, but the weights have"),
        ({"text_config": {"num_hidden_layers": 10**9}}, r"num_hidden_layers=1000000000, but the weights have 2"),
        ({"text_config": {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 24}}, "head_dim=24"),
        ({"timm_override_act_layers": [None, "quick_gelu"]}, "timm_override_act_layers"),
        ({"image_sizes": [384, 384]}, "image_sizes=.384, 384."),
        ({"pad_to_multiple_of": None}, "pad_to_multiple_of=None"),
    ],
)
def test_other_models_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        bring_in(folder, publishable())


def test_unknown_number_of_vision_heads(folder):
    with pytest.raises(ValueError, match=r"32 wide.*--vision-overrides"):
        bring_in(folder, publishable(), vision_overrides=None)
    (folder / "bad.json").write_text(json.dumps({TIMM[0]: {"num_heads": 2}}))
    with pytest.raises(ValueError, match=f"no num_heads for '{TIMM[1]}'"):
        bring_in(folder, publishable(), vision_overrides=folder / "bad.json")


def test_several_steps(folder):
    source = folder / "published"
    (source / "action_head--9_checkpoint.pt").write_bytes((source / "action_head--7_checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match=r"steps \['7', '9'\]: choose one with --step"):
        bring_in(folder, publishable())
    with pytest.raises(ValueError, match="no proprio_projector of step 9"):
        bring_in(folder, publishable(), step="9")
    assert json.loads((bring_in(folder, publishable(), step="7") / "run.json").read_text())["step"] == "7"


def test_the_latest_step_by_name(folder):
    """The reference's option save_latest_checkpoint_only."""
    policy = Policy.load(bring_in(folder, publishable()))
    (folder / "again").rename(folder / "numbered")
    for path in (folder / "published").glob("*.pt"):
        path.rename(path.with_name(path.name.replace("--7_", "--latest_")))
    latest = bring_in(folder, publishable())
    np.testing.assert_array_equal(Policy.load(latest).act([observation()])[0].actions, policy.act([observation()])[0].actions)
    assert (export_checkpoint(latest, folder / "out", report=lambda line: None) / "action_head--latest_checkpoint.pt").is_file()
    (folder / "published" / "action_head--latest_checkpoint.pt").rename(folder / "published" / "action_head_checkpoint.pt")
    with pytest.raises(ValueError, match="whose name is not understood"):
        import_checkpoint(ImportRequest(source=str(folder / "published")), folder / "more")


def test_names_with_and_without_the_wrapper(tmp_path):
    """Saved from a single process, no name starts with `module.`; the vision backbone may have it."""
    policy = publishable(film=True)
    source = published(policy, tmp_path)
    for path in source.glob("*.pt"):
        tensors = torch.load(path, weights_only=True)
        wrapped = next(iter(tensors)).startswith("module.")
        torch.save({n.removeprefix("module.") if wrapped else f"module.{n}": t for n, t in tensors.items()}, path)
    again = Policy.load(bring_in(tmp_path, policy))
    np.testing.assert_allclose(again.act([observation()])[0].actions, policy.act([observation()])[0].actions, atol=1e-5)


def adapted(policy, source, *, rank=3, scaling=1.5):
    """Give a published folder a base, `base/`, and an adapter of every layer of the backbone; `policy` gets the sum."""
    generator = torch.Generator().manual_seed(2)
    (source.parent / "base").mkdir()
    for path in [*source.glob("*.json"), source / "model.safetensors"]:
        (source.parent / "base" / path.name).write_bytes(path.read_bytes())
    film = policy.config.vlm.film
    factors = {}
    for name, module in policy.vlm.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not name.endswith((".scale", ".shift")):
            out, inner, *kernel = module.weight.shape
            a = 0.1 * torch.randn(rank, inner, *kernel, generator=generator)
            b = 0.1 * torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
            theirs = name
            if film and name.startswith("vision_backbone."):
                theirs = re.sub(r"(blocks\.\d+\.)", r"\1block.", "vision_backbone." + name)
            factors[theirs] = Factors(a, b, scaling)
            with torch.no_grad():
                module.weight.add_((b.flatten(1) @ a.flatten(1)).view(module.weight.shape), alpha=scaling)
    Adapter(factors).save(source / "lora_adapter")
    return str(source.parent / "base")


def test_export_of_base_and_adapter_acts_like_both(tmp_path):
    """The published layout holds the sum; a folder that acted like the base alone would be a trap."""
    policy = publishable()
    base = adapted(policy, published(policy, tmp_path))
    ours = bring_in(tmp_path, policy, base=base)
    wanted = policy.act([observation()])[0].actions
    np.testing.assert_allclose(Policy.load(ours).act([observation()])[0].actions, wanted, atol=1e-4)
    for unmerged, atol in ((False, 0.05), (True, 1e-4)):
        out = export_checkpoint(ours, tmp_path / f"out{unmerged}", unmerged=unmerged, report=lambda line: None)
        request = ImportRequest(source=str(out), vision_overrides=heads_file(tmp_path, policy), base=str(out) if unmerged else None)
        again = Policy.load(import_checkpoint(request, tmp_path / f"again{unmerged}", report=lambda line: None))
        np.testing.assert_allclose(again.act([observation()])[0].actions, wanted, atol=atol)


def test_film_with_base_and_adapter(tmp_path):
    """The vision backbone's own file wins over the adapter's copy of it, whatever rank either has."""
    policy = publishable(film=True)
    source = published(policy, tmp_path)
    vision = {n: p.detach().clone() for n, p in policy.vlm.vision_backbone.named_parameters()}
    base = adapted(policy, source)
    policy.vlm.vision_backbone.load_state_dict(vision, strict=False)
    path = source / "vision_backbone--7_checkpoint.pt"
    tensors, generator = torch.load(path, weights_only=True), torch.Generator().manual_seed(3)
    rank = 20
    for name in [n for n in tensors if n.endswith(".lora_A.default.weight")]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        tensors[name] = 0.1 * torch.randn(rank, *a.shape[1:], generator=generator)
        tensors[other] = 0.1 * torch.randn(b.shape[0], rank, *b.shape[2:], generator=generator)
        ours = name.replace(".block.", ".").removesuffix(".lora_A.default.weight") + ".weight"
        weight = policy.vlm.get_parameter(ours)
        with torch.no_grad():
            weight.add_((tensors[other].flatten(1) @ tensors[name].flatten(1)).view(weight.shape), alpha=16 / rank)
    torch.save(tensors, path)
    again = Policy.load(bring_in(tmp_path, policy, base=base))
    np.testing.assert_allclose(again.act([observation()])[0].actions, policy.act([observation()])[0].actions, atol=1e-4)


def test_film_export_adapts_every_layer(tmp_path):
    """The reference loads the file into towers in which every linear layer is adapted, strictly."""
    policy = publishable(film=True)
    tensors = torch.load(published(policy, tmp_path) / "vision_backbone--7_checkpoint.pt", weights_only=True)
    modules = dict(policy.vlm.vision_backbone.named_modules())
    layers = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d) and not n.endswith(("scale", "shift"))]
    assert sum(name.endswith("lora_A.default.weight") for name in tensors) == len(layers)
    assert not any(t.any() for name, t in tensors.items() if ".lora_" in name)


def test_stored_padding_and_truncation_are_ignored(folder):
    """Settings of whoever saved the tokenizer last."""
    policy = Policy.load(bring_in(folder, publishable()))
    (folder / "again").rename(folder / "plain")
    path = folder / "published" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_padding(length=500)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    again = Policy.load(bring_in(folder, publishable()))
    np.testing.assert_array_equal(again.act([observation()])[0].actions, policy.act([observation()])[0].actions)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        import_checkpoint(ImportRequest(source=str(folder / "published")), folder / "more")


def test_the_index_of_weights_stays_in_its_folder(folder):
    source = folder / "published"
    (source / "model.safetensors").rename(folder / "secret.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="only \\*.safetensors in the same folder"):
        bring_in(folder, publishable())
    index.write_text("{}")
    with pytest.raises(ValueError, match="is not an index of weights"):
        bring_in(folder, publishable())
    (folder / "secret.safetensors").rename(source / "model.safetensors")  # which wins over a stale index
    assert bring_in(folder, publishable()).is_dir()


def test_a_mask_of_the_state_is_honoured(folder):
    path = folder / "published" / "dataset_statistics.json"
    document = json.loads(path.read_text())
    document["libero_tiny"]["proprio"]["mask"] = [True] * 7 + [False]
    document["libero_tiny"]["action"]["mask"] = None
    path.write_text(json.dumps(document))
    policy = Policy.load(bring_in(folder, publishable()))
    assert policy.state_normalizer.normalize(np.full(8, 0.625))[-1] == 0.625
    assert policy.statistics.normalize_mask.all()
    assert Policy.load(folder / "again").statistics.to_dict()["proprio"]["mask"][-1] is False


def test_incomplete_downloads(folder):
    source = folder / "published"
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        bring_in(folder, publishable())
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        bring_in(folder, publishable())


def test_missing_descriptions(folder):
    source = folder / "published"
    (source / "dataset_statistics.json").unlink()
    edit_config(folder, norm_stats={})
    with pytest.raises(ValueError, match=r"neither dataset_statistics\.json nor norm_stats"):
        bring_in(folder, publishable())
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        bring_in(folder, publishable())


def test_lone_adapter_names_its_base(folder):
    source = folder / "published"
    (source / "model.safetensors").unlink()
    Adapter({"projector.fc2": Factors(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)}).save(source / "lora_adapter")
    with pytest.raises(ValueError, match="--base"):
        bring_in(folder, publishable())


def test_unknown_robot(folder):
    """The reference takes LIBERO's constants for whatever it does not know."""
    path = folder / "published" / "dataset_statistics.json"
    save_statistics(path, {"my_lab": next(iter(load_statistics(path).values()))})
    assert Policy.load(bring_in(folder, publishable())).config.robot.name == "libero"
    (folder / "again").rename(folder / "guessed")
    with pytest.raises(ValueError, match="robot 'aloha' has 14 action dimensions, the checkpoint 7"):
        bring_in(folder, publishable(), robot="aloha")
    assert Policy.load(bring_in(folder, publishable(), robot="bridge", cameras=1)).config.chunk_len == 5


def test_too_little_memory_is_said_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr("vla_oft.weights._RESERVE_BYTES", 10**18)
    out = bring_in(folder, publishable())
    with pytest.raises(ValueError, match=r"needs .* GB of memory, .* are free; load it with dtype=torch.bfloat16"):
        Policy.load(out)


def test_no_such_source(tmp_path):
    with pytest.raises(ValueError, match="no such folder, and not a hub id"):
        import_checkpoint(ImportRequest(source=str(tmp_path / "nowhere" / "at" / "all")), tmp_path / "out")


def test_policies_without_a_published_form(tmp_path):
    publishable(pooled.Config()).save(tmp_path / "pooled")
    with pytest.raises(ValueError, match="head 'pooled' does not exist in the published layout"):
        export_checkpoint(tmp_path / "pooled", tmp_path / "out")


def test_output_must_be_empty(folder):
    bring_in(folder, publishable())
    with pytest.raises(ValueError, match="not empty"):
        bring_in(folder, publishable())
