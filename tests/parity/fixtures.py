"""Fixtures of recorded numbers, imported the way a user would, and hooks that record what happens inside our model."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_oft import preprocess
from vla_oft.policy import Batch, Policy, PolicyInputs
from vla_oft.reference import ImportRequest, import_checkpoint
from vla_oft_client import Observation

INFERENCE = {
    "libero-l1": "infer_center_crop_true",
    "aloha-l1-film": "infer_center_crop_true",
    "libero-diffusion": "infer_50steps_center_crop_true",
    "libero-discrete-pd": "infer_center_crop_true",
    "openvla-ar": "infer_center_crop_true",
    "libero-l1-lora": "infer_center_crop_true",
}

KEPT: list[TemporaryDirectory] = []
"""Imported checkpoints, removed when the process ends."""


@cache
def checkpoint(folder: Path, *, base: bool = False, center_crop: bool = True) -> Path:
    """The imported checkpoint of a fixture folder; `base`: base weights and adapter instead of the merged weights."""
    kept = TemporaryDirectory(prefix="parity-")
    KEPT.append(kept)
    out = Path(kept.name) / folder.name
    request = ImportRequest(
        source=str(folder / "checkpoint"),
        base=str(folder / "base_checkpoint") if base else None,
        vision_overrides=folder / "vision_tower_overrides.json",
        center_crop=center_crop,
    )
    return import_checkpoint(request, out, report=lambda line: None)


def load(folder: Path, *, base: bool = False, center_crop: bool = True) -> Policy:
    """A fresh policy of a fixture folder, float32."""
    return Policy.load(checkpoint(folder, base=base, center_crop=center_crop))


def observation(folder: Path, policy: Policy) -> Observation:
    """The recorded raw input."""
    inputs = np.load(folder / "inputs.npz")
    images = [inputs[name] for name in sorted(n for n in inputs.files if n.startswith("image_"))]
    cameras = policy.config.robot.cameras
    return Observation(
        images=dict(zip(cameras, images, strict=True)),
        state=inputs["proprio"] if policy.config.use_state else None,
        instruction=str(inputs["instruction"]),
    )


def expected(folder: Path, name: str | None = None) -> Any:
    """The arrays of one recording."""
    return np.load(folder / f"{name or INFERENCE[folder.name]}.npz")


def noise(folder: Path, name: str | None = None) -> np.ndarray | None:
    """The recorded start of denoising (K, D), or None where nothing is drawn."""
    recorded = expected(folder, name)
    return recorded["initial_noise"].reshape(recorded["normalized_actions"].shape) if "initial_noise" in recorded else None


def inputs(folder: Path, policy: Policy, *, center_crop: bool = True) -> PolicyInputs:
    """The recorded raw input, prepared; with the recorded images where there are any, so that no pixel differs by a level."""
    prepared = policy.prepare([observation(folder, policy)])
    recorded = expected(folder, INFERENCE[folder.name].replace("true", str(center_crop).lower()))
    if "images_after_prepare" not in recorded:
        return prepared
    images = torch.from_numpy(recorded["images_after_prepare"])[None]
    return dataclasses.replace(prepared, pixels=preprocess.to_pixels(policy.config.preprocess, images))


def training_batch(folder: Path, policy: Policy) -> Batch:
    """The recorded training samples as our batch: padded on the left, which changes nothing but the layout."""
    samples = np.load(folder / "train_inputs.npz")
    keys = {name.split("_", 1)[1] for name in samples.files}
    order = [k for k in ("image_primary", "image_wrist", "image_left_wrist", "image_right_wrist") if k in keys]
    pick = lambda key: np.stack([samples[f"sample{i}_{key}"] for i in range(2)])  # noqa: E731
    images = np.stack([pick(key)[:, 0] for key in order], axis=1)
    ids, mask = policy.encode_prompts([str(samples[f"sample{i}_language_instruction"]) for i in range(2)])
    actions = torch.from_numpy(pick("action")).float()
    K = policy.config.chunk_len
    return Batch(
        pixels=preprocess.to_pixels(policy.config.preprocess, torch.from_numpy(images)),
        prompt_ids=torch.from_numpy(ids),
        prompt_mask=torch.from_numpy(mask),
        state=torch.from_numpy(pick("proprio")[:, 0]).float() if policy.config.use_state else None,
        actions=actions.reshape(2, K, -1),
        valid=torch.ones(2, K, dtype=torch.bool),
    )


def recorded_training(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The reference's metrics, and gradient norms under our parameter names."""
    document = json.loads((folder / "train_metrics_and_grad_norms.json").read_text())
    return document["metrics"], {our_name(name): norm for name, norm in document["grad_norms"].items()}


def our_name(name: str) -> str:
    """Name of a parameter of the reference's modules -> ours."""
    for theirs, ours in (
        ("vla.", "vlm."),
        ("proprio_projector.", "state_projector."),
        ("noisy_action_projector.", "action_head.noisy_action_projector."),
        ("action_head.noise_predictor.mlp_resnet.", "action_head.noise_predictor."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


@contextmanager
def recording(policy: Policy) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs and outputs of the parts of a policy, by name, in order of the calls."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, value: Tensor | tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append((value if isinstance(value, Tensor) else value[0]).detach().clone())

    parts = {
        "vision_features": policy.vlm.vision_backbone,
        "projected_patches": policy.vlm.projector,
        "proprio_embedding": policy.state_projector,
        "head_output": getattr(policy.action_head, "model", None),
    }
    hooks = [
        part.register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name, part in parts.items()
        if part is not None
    ]
    llm = policy.vlm.language_model
    hooks.append(llm.register_forward_pre_hook(lambda module, args: note("multimodal_embeddings", args[0])))
    hooks.append(llm.register_forward_hook(lambda module, args, output: note("actions_hidden_states", output)))
    if parts["head_output"] is not None:
        hooks.append(parts["head_output"].register_forward_pre_hook(lambda module, args: note("head_input", args[0])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def close(actual: Tensor, wanted: np.ndarray, *, atol: float = 1e-4, rtol: float = 1e-4) -> None:
    """Assert that a tensor equals a recorded array of any shape of the same size."""
    np.testing.assert_allclose(actual.detach().float().numpy().reshape(wanted.shape), wanted, atol=atol, rtol=rtol)
