"""The training step as it is usually written, to compare with: same model, same batch, same precision.

What it does and ours does not: images augmented and normalised one by one on the host, in the training process; prompts with a mask
although nothing is padded; every row through the last layer; vocabulary scores of every row and their cross-entropy, which nobody uses;
LoRA on layers that nothing reads; an optimizer that walks over the weights one by one; loss and metrics read back in every step.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_oft import preprocess
from vla_oft.data.augment import AugmentConfig, augment
from vla_oft.data.random_numbers import Draws
from vla_oft.policy import Policy
from vla_oft.sequence import Batch, Sequence
from vla_oft.train.batches import Examples, to_device


class PlainSequence(Sequence):
    """Decodes like `Sequence`, and scores every row against the vocabulary on the way."""

    language_loss: Tensor

    def __call__(self, slots: Tensor, context: Tensor | None = None, *, causal: bool = False, predict_stop: bool = False) -> Tensor:
        prefix = self.prefix if context is None else [*self.prefix, context[:, None]]
        embeds = torch.cat([*prefix, self.prompt, slots, self.stop_embed], dim=1)
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        hidden, _ = self.vlm.language_model(embeds, positions, key_mask=mask, causal=causal)
        scores = self.logits(hidden)
        ids = torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device)
        self.language_loss = F.cross_entropy(scores.flatten(0, 1), ids.flatten())
        return hidden[:, -slots.shape[1] - 2 : -2]


class PlainLoop:
    """One process, one pass a step. policy: on its device, with LoRA if it has any."""

    def __init__(self, policy: Policy, lr: float, augmentation: AugmentConfig | None, *, bf16: bool) -> None:
        self.policy, self.augmentation, self.bf16 = policy, augmentation, bf16
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, foreach=False, fused=False)

    def __call__(self, examples: Examples) -> float:
        """A step; its loss."""
        batch = self._batch(examples)
        policy = self.policy
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=self.bf16):
            decoder = PlainSequence(policy.vlm, policy.state_projector, batch)
            loss, metrics = policy.action_head.loss(decoder, batch.actions, batch.valid)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        read = {name: value.item() for name, value in {**metrics, "language_loss": decoder.language_loss.detach()}.items()}
        assert read
        return loss.item()

    def _batch(self, examples: Examples) -> Batch:
        pixels = []
        for number, images in enumerate(examples.images):
            for camera in range(len(images)):
                one = images[camera : camera + 1][None]
                if self.augmentation is not None:
                    one, _ = augment(one, self.augmentation, Draws(examples.seeds[number : number + 1] + np.uint64(camera)))
                pixels.append(preprocess.to_pixels(self.policy.config.preprocess, one))
        stacked = torch.cat(pixels, dim=1).unflatten(1, (len(examples.images), -1))[0]
        return to_device(examples, self.policy.device).seen(stacked.to(self.policy.device))
