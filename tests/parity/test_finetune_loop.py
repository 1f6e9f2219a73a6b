"""LoRA fine-tuning against recordings of the reference: seven optimizer steps, every gradient norm, every learning rate (float32)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import adapting
from tests.parity.fixtures import checkpoint, close, expected, recording, training_batch
from vla_oft import preprocess
from vla_oft.adapter import load_adapter
from vla_oft.merge import load_unmerged
from vla_oft.policy import Batch, Policy
from vla_oft.train import lora
from vla_oft.train.lora import Lora
from vla_oft.train.optimizer import AdamW
from vla_oft.train.schedule import Reference
from vla_oft.train.step import backward

pytest.importorskip("peft", reason="needs the extra 'train'")
REFERENCE_ADAMW = AdamW(weight_decay=0.01, betas=(0.9, 0.999), decay="all")
FINAL_STEP, SAVED_AFTER = 7, 6


def our_name(name: str) -> str:
    """A trained parameter of the reference -> ours."""
    name = name.removeprefix("vla.").replace("base_model.model.", "vlm.").replace("proprio_projector.", "state_projector.")
    return name.replace("vision_backbone.vision_backbone.", "vision_backbone.").replace(".block.", ".")


def adapted(folder: Path, rank: int, *, base: bool) -> Policy:
    """The fixture's policy with fresh updates of all the reference's targets, ready to train."""
    return adapting.adapted(load_unmerged(checkpoint(folder, base=base), torch.float32), Lora(rank=rank, targets="reference")).train()


def set_weights(policy: Policy, weights: dict[str, Tensor]) -> None:
    _, unexpected = policy.load_state_dict(weights, strict=False)
    assert not unexpected


def factors(folder: Path) -> dict[str, Tensor]:
    """The adapter of an imported checkpoint under peft's parameter names."""
    pairs = load_adapter(folder / "adapter").factors.items()
    return {f"{m}.lora_{side}.default.weight": factor.float() for m, pair in pairs for side, factor in zip("AB", pair[:2], strict=True)}


def recorded(path: Path) -> dict[str, Tensor]:
    return {our_name(name): torch.from_numpy(array) for name, array in np.load(path).items()}


def samples(folder: Path, policy: Policy, numbers: Sequence[int]) -> Batch:
    data = np.load(folder / "train_data.npz")
    pick = lambda key: np.stack([data[f"sample{i}_{key}"] for i in numbers])  # noqa: E731
    images = np.stack([pick("image_primary")[:, 0], pick("image_wrist")[:, 0]], axis=1)
    ids, mask = policy.encode_prompts([str(data[f"sample{i}_language_instruction"]) for i in numbers])
    return Batch(
        pixels=preprocess.to_pixels(policy.config.preprocess, torch.from_numpy(images)),
        prompt_ids=torch.from_numpy(ids),
        prompt_mask=torch.from_numpy(mask),
        state=torch.from_numpy(pick("proprio")[:, 0]),
        actions=torch.from_numpy(pick("action")),
        valid=torch.ones(len(numbers), policy.config.chunk_len, dtype=torch.bool),
    )


def merged_norms(policy: Policy) -> dict[str, float]:
    """L2 norms of the backbone's weights with the updates added."""
    update, norms = lora.adapter(policy), {}
    for name, parameter in policy.vlm.named_parameters(prefix="vlm"):
        if ".lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            merged = update.merged(plain.removesuffix(".weight"), parameter.detach().clone())
            norms[plain.removeprefix("vlm.")] = merged.double().norm().item()
    return norms


def test_seven_steps_end_at_the_references_weights(shared):
    folder = shared / "parity" / "finetune-loop"
    record = json.loads((folder / "trajectory.json").read_text())
    saved = json.loads((folder / "saved_checkpoint_info.json").read_text())["merged_model_param_norms"]
    policy = adapted(shared / "parity" / "libero-l1-lora", record["cfg"]["lora_rank"], base=True)
    initial, final = (recorded(folder / f"{when}_trainable.npz") for when in ("initial", "final"))
    set_weights(policy, initial)
    peak, schedule = record["cfg"]["learning_rate"], Reference(decay_at=record["cfg"]["num_steps_before_decay"])
    optimizer = REFERENCE_ADAMW.build(policy, peak)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for step in range(FINAL_STEP):
        metrics = backward(policy, samples(folder, policy, (0, 1) if step % 2 == 0 else (2, 3)))
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        lr = peak * schedule.factor(step, FINAL_STEP)
        optimizer.step(lr)
        wanted = record["metrics_per_batch"][step]
        assert lr == pytest.approx(record["lr_used_at_each_optimizer_step"][step], rel=1e-9)
        assert metrics["loss"].item() == pytest.approx(wanted["loss_value"], abs=1e-5)
        assert metrics["action_l1_first"].item() == pytest.approx(wanted["curr_action_l1_loss"], abs=1e-5)
        assert metrics["action_l1_rest"].item() == pytest.approx(wanted["next_actions_l1_loss"], abs=1e-5)
        assert norm.item() == pytest.approx(record["global_grad_norm_at_each_optimizer_step"][step], rel=1e-4)
        if step + 1 == SAVED_AFTER:
            norms = merged_norms(policy)
            assert norms.keys() == saved.keys()
            assert all(norms[name] == pytest.approx(value, rel=1e-7) for name, value in saved.items())
    ours = policy.state_dict()
    moved = max((weight - initial.get(name, torch.zeros(()))).abs().max() for name, weight in final.items())
    assert moved > 2e-3
    for name, weight in final.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def check_batch(folder: Path, policy: Policy, wanted_keys: tuple[str, ...]) -> None:
    """Loss, metrics, every gradient norm and the selected gradients of one batch."""
    record = json.loads((folder / "train_metrics_and_grad_norms.json").read_text())
    with recording(policy) as seen:
        metrics = backward(policy, training_batch(folder, policy))
    arrays = expected(folder, "train_expected")
    for key in wanted_keys:
        close(seen[key][0], arrays[key])
    names = {"loss_value": "loss", "curr_action_l1_loss": "action_l1_first", "next_actions_l1_loss": "action_l1_rest"}
    for theirs, value in record["metrics"].items():
        assert metrics[names[theirs]].item() == pytest.approx(value, abs=1e-5), theirs
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    norms = {our_name(name): norm for name, norm in record["grad_norms"].items()}
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    for name, gradient in recorded(folder / "train_grads_selected.npz").items():
        close(gradients[name], gradient.numpy(), atol=1e-5, rtol=1e-3)


PARTS = ("vision_features", "projected_patches", "proprio_embedding", "head_input", "head_output")


def test_gradients_of_an_unmerged_adapter(shared):
    folder = shared / "parity" / "libero-l1-lora"
    policy = adapted(folder, 8, base=True)
    set_weights(policy, factors(checkpoint(folder, base=True)))
    check_batch(folder, policy, PARTS)


def test_gradients_with_film_and_a_fresh_adapter_of_the_decoder(shared):
    folder = shared / "parity" / "aloha-l1-film"
    policy = adapted(folder, 4, base=False)
    set_weights(policy, factors(checkpoint(folder)))
    set_weights(policy, recorded(folder / "train_initial_llm_lora.npz"))
    check_batch(folder, policy, PARTS)


@pytest.mark.parametrize("name", ["lr_nowarmup_decay10", "lr_warmup5_decay10", "lr_accum2_warmup3_decay4", "trajectory"])
def test_learning_rates_are_the_references(shared, name):
    record = json.loads((shared / "parity" / "finetune-loop" / f"{name}.json").read_text())
    cfg, used = record["cfg"], record["lr_used_at_each_optimizer_step"]
    schedule = Reference(decay_at=cfg["num_steps_before_decay"], warmup_steps=cfg["lr_warmup_steps"])
    ours = [cfg["learning_rate"] * schedule.factor(step, len(used)) for step in range(len(used))]
    assert ours == pytest.approx(used, rel=1e-9)
