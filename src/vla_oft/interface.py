"""Between robot and network: observations to arrays, normalised actions to chunks. Nothing here depends on weights.

Observation -> check -> images uint8 (V, S, S, 3), state (S,) normalised, token ids -> network -> actions (K, D) normalised -> ActionChunk
"""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from vla_oft import preprocess
from vla_oft.policy_config import PolicyConfig
from vla_oft.statistics import DatasetStatistics, Normalizer
from vla_oft.vlm import tokens
from vla_oft_client import ActionChunk, Observation


class Interface:
    """Of one policy. Its normalisers treat constant dimensions as the reference does at inference when `config.parity` asks for it."""

    def __init__(self, config: PolicyConfig, statistics: DatasetStatistics, tokenizer: Tokenizer) -> None:
        statistics.check(config.robot)
        self.config, self.statistics, self.tokenizer = config, statistics, tokenizer
        self.encode_prompts = tokens.PromptEncoder(tokenizer, config.vlm.tokens, config.prompt_style, verbatim=config.parity)
        kind = config.robot.normalization
        self.action_normalizer = Normalizer(statistics.action, statistics.normalize_mask, kind, "train" if config.parity else None)
        self.state_normalizer = self._state_normalizer("eval")
        self.training_state_normalizer = self._state_normalizer("train")

    def _state_normalizer(self, when: str) -> Normalizer | None:
        if not self.config.use_state:
            return None
        assert self.statistics.state is not None  # checked against the robot in __init__
        kind = self.config.state_normalization or self.config.robot.normalization
        return Normalizer(self.statistics.state, self.statistics.state_mask, kind, when if self.config.parity else None)

    def check(self, observations: Sequence[Observation]) -> None:
        """Raise ValueError for an observation that does not fit the robot."""
        for observation in observations:
            observation.check(self.config.robot)

    def images(self, observations: Sequence[Observation]) -> np.ndarray:
        """uint8 (B, V, S, S, 3), resized and cropped on the host."""
        c = self.config
        return np.stack([preprocess.prepare_images(c.preprocess, o, c.robot.cameras) for o in observations])

    def state(self, observations: Sequence[Observation]) -> np.ndarray | None:
        """float32 (B, S) normalised, or None for a policy without state."""
        if self.state_normalizer is None:
            return None
        raw = np.stack([np.asarray(o.state, np.float64 if self.config.parity else np.float32) for o in observations])
        return self.state_normalizer.normalize(raw).astype(np.float32)

    def noise(self, noise: np.ndarray | Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """A start for denoising, (K, D) or (count, K, D), as float32 (count, K, D) on `device`. Raises ValueError for another shape."""
        if noise is None:
            return None
        shape = (self.config.chunk_len, self.config.robot.action_dim)
        tensor = torch.as_tensor(noise, dtype=torch.float32, device=device)
        if tensor.shape not in (shape, (count, *shape)):
            raise ValueError(f"noise must have shape {shape} or {(count, *shape)}, got {tuple(tensor.shape)}")
        return tensor.expand(count, *shape)

    def chunks(self, predicted: np.ndarray, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Normalised actions (B, K, D) in robot units. Raises FloatingPointError when they are not finite."""
        actions = self.action_normalizer.unnormalize(predicted.astype(np.float64))
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy's actions are not finite: its weights are broken, nothing was sent to the robot")
        period_s = self.config.robot.period_s
        return [ActionChunk(a.astype(np.float32), o.time_s, period_s) for a, o in zip(actions, observations, strict=True)]
