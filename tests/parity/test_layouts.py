"""Published checkpoints there and back: every weight returns with the same bits, under the same name, in a file of the same name."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.parity.fixtures import INFERENCE, checkpoint, load, noise, observation
from vla_oft.policy import Policy, load_config
from vla_oft.reference import ImportRequest, export_checkpoint, import_checkpoint
from vla_oft.reference.exporter import model_document, pixel_document
from vla_oft.weights import LazyTensor, write_shards


def same_tensors(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", INFERENCE)
def test_export_returns_every_bit(shared, tmp_path, name):
    source = shared / "parity" / name / "checkpoint"
    out = export_checkpoint(checkpoint(shared / "parity" / name), tmp_path / "out", report=lambda line: None)
    same_tensors(load_file(out / "model.safetensors"), load_file(source / "model.safetensors"))
    files = sorted(path.name for path in source.glob("*.pt"))
    assert sorted(path.name for path in out.glob("*.pt")) == files
    for file in files:
        same_tensors(torch.load(out / file, weights_only=True), torch.load(source / file, weights_only=True))
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} <= {"lora_adapter"}
    assert json.loads((out / "dataset_statistics.json").read_text()) == json.loads((source / "dataset_statistics.json").read_text())


@pytest.mark.parametrize("name", ["libero-l1", "aloha-l1-film", "openvla-ar"])
def test_exported_description_says_the_same(shared, tmp_path, name):
    source = shared / "parity" / name / "checkpoint"
    out = export_checkpoint(checkpoint(shared / "parity" / name), tmp_path / "out", report=lambda line: None)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert before == after
    config = load_config(checkpoint(shared / "parity" / name))
    for key, value in model_document(config).items():  # what a checkpoint that was trained since is described by
        if key != "text_config":
            assert value == before[key], key
    assert before["text_config"].items() <= model_document(config)["text_config"].items()
    before, after = (json.loads((folder / "preprocessor_config.json").read_text()) for folder in (source, out))
    assert before == after
    assert {k: v for k, v in pixel_document(config).items() if k not in ("means", "stds")}.items() <= before.items()


def test_adapter_survives_the_round_trip(shared, tmp_path):
    folder = shared / "parity" / "libero-l1-lora"
    out = export_checkpoint(checkpoint(folder, base=True), tmp_path / "out", unmerged=True, report=lambda line: None)
    same_tensors(load_file(out / "model.safetensors"), load_file(folder / "base_checkpoint" / "model.safetensors"))
    same_tensors(
        load_file(out / "lora_adapter" / "adapter_model.safetensors"),
        load_file(folder / "checkpoint" / "lora_adapter" / "adapter_model.safetensors"),
    )


@pytest.mark.parametrize("name", ["aloha-l1-film", "libero-diffusion"])
def test_import_of_an_export_acts_the_same(shared, tmp_path, name):
    folder = shared / "parity" / name
    out = export_checkpoint(checkpoint(folder), tmp_path / "out", report=lambda line: None)
    request = ImportRequest(source=str(out), vision_overrides=folder / "vision_tower_overrides.json")
    again = Policy.load(import_checkpoint(request, tmp_path / "again", report=lambda line: None))
    policy = load(folder)
    seen = [observation(folder, policy)]
    given = noise(folder)
    first, second = (p.act(seen, noise=given)[0].actions for p in (policy, again))
    np.testing.assert_array_equal(first, second)


def test_sharded_weights(shared, tmp_path):
    """Published 7B checkpoints come in several files with an index."""
    source, folder = shared / "parity" / "libero-l1" / "checkpoint", tmp_path / "sharded"
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    write_shards({name: LazyTensor.of(t) for name, t in tensors.items()}, folder, max_bytes=1_500_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    request = ImportRequest(source=str(folder), vision_overrides=shared / "parity" / "libero-l1" / "vision_tower_overrides.json")
    out = import_checkpoint(request, tmp_path / "out", report=lambda line: None)
    same_tensors(load_file(out / "model.safetensors"), load_file(checkpoint(shared / "parity" / "libero-l1") / "model.safetensors"))
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"no model-00002-of"):
        import_checkpoint(request, tmp_path / "again")
