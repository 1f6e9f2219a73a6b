"""Continuous actions by denoising diffusion: every slot holds one noisy scalar, the decoded slots tell its noise (paper section IV-C).

    loss     actions + noise of a random level -> slots, level -> context token -> decode -> predicted noise -> squared error
    sample   noise (B, K, D) -> [slots, context -> decode -> predicted noise -> a little less noise] x inference_steps -> actions

    levels   0 (hardly any noise) .. train_steps - 1 (noise only); with 50 of them, inference visits, from left to right

        inference_steps 50   49 48 47 .. 2 1 0
                        10   45 40 35 .. 10 5 0
                         2   25 0                  "leading" spacing, the reference's: the first level is train_steps - stride,
                         1   0                     so that few steps start from noise that the model takes for nearly clean actions

DDIM (Song et al. 2021, arXiv 2010.02502): deterministic given the initial noise. Squared-cosine schedule (Nichol and Dhariwal 2021,
arXiv 2102.09672), the model predicts noise, actions are clipped to [-1, 1] in each step. Float32 throughout, whatever the weights are.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft.heads.base import ActionHead, Decode, Metrics, masked_mean
from vla_oft.heads.l1 import MlpResNet, l1_metrics
from vla_oft.transfer import sent

MAX_BETA = 0.999
MAX_PERIOD = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """train_steps: noise levels. inference_steps: passes of the decoder per chunk, 1 to train_steps. num_blocks: residual blocks."""

    train_steps: int = 50
    inference_steps: int = 50
    num_blocks: int = 2

    def __post_init__(self) -> None:
        if self.train_steps < 1:
            raise ValueError(f"train_steps={self.train_steps} must be positive")
        check_inference_steps(self.inference_steps, self.train_steps)


def check_inference_steps(steps: int, train_steps: int) -> None:
    """Raises ValueError unless 1 <= steps <= train_steps."""
    if not 1 <= steps <= train_steps:
        raise ValueError(f"inference_steps={steps} must be between 1 and train_steps={train_steps}")


@functools.cache
def _tables(train_steps: int) -> tuple[list[float], list[float]]:
    """Betas and what is left of the signal's power at each level; rounded to float32 after each operation, as in the reference."""

    def left(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    exact = [min(1 - left((i + 1) / train_steps) / left(i / train_steps), MAX_BETA) for i in range(train_steps)]
    betas = torch.tensor(exact, dtype=torch.float32, device="cpu")
    return betas.tolist(), (1 - betas).cumprod(0).tolist()


def alphas_cumprod(train_steps: int) -> Tensor:
    """Share of the signal's power at each level: float32 (train_steps), on the CPU.

    Not a buffer: published checkpoints have none, and one that is created on the meta device would stay empty.
    """
    return torch.tensor(_tables(train_steps)[1], dtype=torch.float32, device="cpu")


def inference_levels(train_steps: int, inference_steps: int) -> list[int]:
    """The levels that are visited, noisiest first; see the top of this file."""
    stride = train_steps // inference_steps
    return [i * stride for i in reversed(range(inference_steps))]


def add_noise(actions: Tensor, noise: Tensor, levels: Tensor, train_steps: int) -> Tensor:
    """Normalised actions and standard normal noise (B, K, D), levels int64 (B) -> noisy actions float32 (B, K, D)."""
    signal = sent(alphas_cumprod(train_steps), actions.device)[levels].view(-1, 1, 1)
    return signal.sqrt() * actions + (1 - signal).sqrt() * noise


def denoise(noisy: Tensor, predicted: Tensor, level: int, train_steps: int, inference_steps: int) -> Tensor:
    """One DDIM step: noisy actions at `level` and their predicted noise, float32 (B, K, D) -> actions at the next level."""
    signals, following = alphas_cumprod(train_steps), level - train_steps // inference_steps
    signal, next_signal = signals[level], signals[following] if following >= 0 else signals.new_ones(())
    clean = ((noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()).clamp(-1, 1)
    return next_signal.sqrt() * clean + (1 - next_signal).sqrt() * predicted


def embed_levels(levels: Tensor, width: int) -> Tensor:
    """Levels (B) -> [sin, cos] at width / 2 frequencies from 1 down to 1 / 10000: float32 (B, width)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=levels.device) * -math.log(MAX_PERIOD) / (half - 1))
    angles = levels.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class NoisyActionProjector(nn.Module):
    """One noisy scalar to one token embedding: linear, exact GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, scalars: Tensor) -> Tensor:
        """(..., 1) -> (..., W)."""
        return self.fc2(F.gelu(self.fc1(scalars)))


class Head(ActionHead):
    """Diffusion. `inference_steps` may be changed at any time."""

    draws_noise = True

    def __init__(self, config: Config, width: int, chunk_len: int, action_dim: int) -> None:
        super().__init__()
        self.config, self.chunk_len, self.action_dim = config, chunk_len, action_dim
        self.inference_steps = config.inference_steps
        self.noisy_action_projector = NoisyActionProjector(width)
        self.noise_predictor = MlpResNet(action_dim * width, width, action_dim, config.num_blocks)

    @property
    def inference_steps(self) -> int:
        """Passes of the decoder per chunk. Raises ValueError when set below 1 or above config.train_steps."""
        return self._inference_steps

    @inference_steps.setter
    def inference_steps(self, steps: int) -> None:
        check_inference_steps(steps, self.config.train_steps)
        self._inference_steps = steps

    @property
    def variant(self) -> int:
        return self._inference_steps

    def _predict(self, decode: Decode, noisy: Tensor, levels: Tensor) -> Tensor:
        """Noise in `noisy` float32 (B, K, D) at levels (B): float32 (B, K, D)."""
        dtype = self.noisy_action_projector.fc1.weight.dtype
        slots = self.noisy_action_projector(noisy.reshape(len(noisy), -1, 1).to(dtype))
        hidden = decode(slots, embed_levels(levels, slots.shape[-1]).to(slots.dtype))
        return self.noise_predictor(hidden.reshape(len(hidden), self.chunk_len, -1)).float()

    def loss(self, decode: Decode, actions: Tensor, valid: Tensor) -> tuple[Tensor, Metrics]:
        """See `ActionHead.loss`; draws noise and levels from torch's global generator of the actions' device."""
        noise = torch.randn_like(actions)
        levels = torch.randint(self.config.train_steps, (len(actions),), device=actions.device)
        return self.noise_loss(decode, actions, valid, noise, levels)

    def noise_loss(self, decode: Decode, actions: Tensor, valid: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Metrics]:
        """The loss for given noise (B, K, D) and levels int64 (B): mean squared error of the predicted noise."""
        predicted = self._predict(decode, add_noise(actions, noise, levels, self.config.train_steps), levels)
        loss = masked_mean(F.mse_loss(predicted, noise, reduction="none"), valid)
        return loss, {"noise_mse": loss.detach()}

    @torch.no_grad()
    def sampled_l1(self, decode: Decode, actions: Tensor, valid: Tensor, noise: Tensor) -> Metrics:
        """The L1 metrics of `heads/l1.py`, by sampling from noise (B, K, D): `inference_steps` times as costly as the loss."""
        return l1_metrics(self.sample(decode, None, noise), actions, valid)

    def sample(self, decode: Decode, generator: torch.Generator | None, noise: Tensor | None = None) -> Tensor:
        """See `ActionHead.sample`. Noise that is not given is drawn on the CPU: the same seed gives the same actions on every device."""
        like = decode.zeros(1)
        shape = (len(like), self.chunk_len, self.action_dim)
        if noise is None:
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        assert noise.shape == shape
        actions = noise.to(like.device, torch.float32)
        for level in inference_levels(self.config.train_steps, self.inference_steps):
            predicted = self._predict(decode, actions, torch.full((len(like),), level, device=like.device))
            actions = denoise(actions, predicted, level, self.config.train_steps, self.inference_steps)
        return actions
