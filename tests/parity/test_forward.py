"""The forward pass against recorded answers of the reference: L1 head; FiLM with LoRA in the vision backbone, merged in float32."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from vla_oft import preprocess
from vla_oft.heads import l1
from vla_oft.policy import Policy, PolicyConfig, PolicyInputs
from vla_oft.robots.tabletop import SPEC
from vla_oft.statistics import load_statistics
from vla_oft.vlm import llama, prismatic, sizes, vit


def build(folder: Path) -> Policy:
    meta = json.loads((folder / "meta.json").read_text())
    K, D = meta["NUM_ACTIONS_CHUNK"], meta["ACTION_DIM"]
    tower = {"image_size": 224, "patch_size": 14, "unread_weights": True}
    dino, siglip = meta["dino"], meta["siglip"]
    vlm = prismatic.Config(
        dino=vit.Config(
            width=dino["embed_dim"], depth=dino["depth"], num_heads=dino["num_heads"], mlp_dim=4 * dino["embed_dim"],
            num_registers=4, class_token=True, layer_scale=True, **tower,
        ),
        siglip=vit.Config(
            width=siglip["embed_dim"], depth=siglip["depth"], num_heads=siglip["num_heads"], mlp_dim=int(siglip["embed_dim"] * 3.7362),
            attention_pool=True, **tower,
        ),
        llm=llama.Config(
            vocab_size=32064, width=meta["hidden"], depth=meta["layers"], num_heads=meta["heads"], num_kv_heads=meta["heads"],
            mlp_dim=meta["inter"],
        ),
        tokens=sizes.LLAMA2_TOKENS,
        film=meta["film"],
    )  # fmt: skip
    robot = dataclasses.replace(
        SPEC, cameras=tuple("abc"[: meta["images"]]), state_dim=meta["proprio"], action_dim=D, chunk_len=K, gripper=(),
        absolute_mask=(False,) * D, normalize_mask=(True,) * D, action_limits=((-1.0, 1.0),) * D, normalization=meta["normalization"],
    )  # fmt: skip
    config = PolicyConfig(
        robot=robot,
        vlm=vlm,
        head=l1.Config(),
        preprocess=preprocess.Config(
            image_size=224, resize="lanczos", crop_area=1.0,
            dino_mean=(0.484375, 0.455078125, 0.40625), dino_std=(0.228515625, 0.2236328125, 0.224609375),
        ),
        dataset=meta["unnorm_key"], chunk_len=K, use_state=True, prompt_style="openvla", grounding=None,
    )  # fmt: skip
    statistics = load_statistics(folder / "checkpoint" / "dataset_statistics.json")[meta["unnorm_key"]]
    policy = Policy(config, statistics, Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))).eval()
    policy.load_state_dict(weights(folder / "checkpoint", meta), strict=True)
    return policy


def weights(checkpoint: Path, meta: dict) -> dict[str, torch.Tensor]:
    def part(name: str) -> dict[str, torch.Tensor]:
        (file,) = checkpoint.glob(f"{name}--*.pt")
        return {k: v.float() for k, v in torch.load(file, weights_only=True).items()}

    found = {f"vlm.{k}": v.float() for k, v in load_file(str(checkpoint / "model.safetensors")).items()}
    found |= {k.replace("module.", "action_head.", 1): v for k, v in part("action_head").items()}
    found |= {k.replace("module.", "state_projector.", 1): v for k, v in part("proprio_projector").items()}
    backbone = part("vision_backbone") if meta["film"] else {}
    for key, value in backbone.items():
        if ".lora_" in key:
            continue
        if key.endswith(".base_layer.weight"):
            a, b = (backbone[key.replace("base_layer.weight", f"lora_{side}.default.weight")] for side in "AB")
            value = value + min(meta["lora"], 16) / meta["lora"] * (b.flatten(1) @ a.flatten(1)).view(value.shape)
        found["vlm." + key.replace(".block.", ".").replace(".base_layer", "")] = value
    return found


@pytest.mark.parametrize("name", ["libero-l1", "aloha-l1-film"])
@pytest.mark.parametrize("padding", [0, 3])
def test_actions_equal_the_references(shared, name, padding):
    folder = shared / "parity" / name
    policy, inputs, expected = build(folder), np.load(folder / "inputs.npz"), np.load(folder / "infer_center_crop_true.npz")
    ids, _ = policy.encode_prompts([str(inputs["instruction"])])
    num_slots = policy.config.chunk_len * policy.config.robot.action_dim
    np.testing.assert_array_equal(expected["full_input_ids"][0, 1 : -num_slots - 1], ids[0])
    pixels = preprocess.to_pixels(policy.config.preprocess, torch.from_numpy(expected["images_after_prepare"])[None])
    np.testing.assert_allclose(pixels.reshape(1, -1, 224, 224).numpy(), expected["pixel_values"], atol=1e-6)
    prompt = torch.from_numpy(ids)
    with torch.inference_mode():
        actions = policy.predict(
            PolicyInputs(
                pixels=pixels,
                prompt_ids=F.pad(prompt, (padding, 0), value=32000),
                prompt_mask=F.pad(torch.ones_like(prompt, dtype=torch.bool), (padding, 0)) if padding else None,
                state=torch.from_numpy(expected["normalized_proprio"].reshape(1, -1)).float(),
            )
        )
    np.testing.assert_allclose(actions[0].numpy(), expected["normalized_actions"], atol=5e-5)
