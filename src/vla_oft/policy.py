"""A policy: backbone, FiLM, state projector and action head as ONE module, with its robot, normalisation and tokenizer.

Policy.load(dir)  ->  policy.act([observation, ...])  ->  [ActionChunk, ...]
policy(batch)     ->  (loss, metrics)                     one wrapper, one optimizer, one checkpoint
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from vla_oft import hub, preprocess, weights
from vla_oft.atomic import atomic_directory
from vla_oft.config import PLUGIN, from_dict, to_dict
from vla_oft.heads import diffusion, discrete, grounding, l1, pooled
from vla_oft.heads.base import ActionHead, Metrics, Steps
from vla_oft.statistics import DatasetStatistics, Normalizer, load_statistics, save_statistics
from vla_oft.vlm import prismatic, tokens
from vla_oft_client import ActionChunk, Observation, RobotSpec

HeadConfig = l1.Config | diffusion.Config | discrete.Config | pooled.Config
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Every fact about a trained model. Written to `policy.json`; nothing of it is ever a command-line flag of `eval` or `serve`.

    dataset: name of the statistics that normalise state and actions.
    use_state: whether the proprioceptive state is an input token.
    grounding: auxiliary dense supervision, or None.
    parity: behave as the reference does where this package deliberately does not, see docs/parity.md. Imported checkpoints do.
    """

    robot: RobotSpec
    vlm: prismatic.Config
    head: Annotated[HeadConfig, PLUGIN]
    preprocess: preprocess.Config
    dataset: str
    chunk_len: int
    use_state: bool
    prompt_style: tokens.PromptStyle
    grounding: grounding.Config | None
    parity: bool = False

    def __post_init__(self) -> None:
        if self.preprocess.image_size != self.vlm.dino.image_size:
            raise ValueError(f"preprocess.image_size={self.preprocess.image_size} differs from the towers' {self.vlm.dino.image_size}")
        if self.use_state and not self.robot.state_dim:
            raise ValueError(f"use_state=True, but robot '{self.robot.name}' has no state")
        if self.chunk_len < 1:
            raise ValueError(f"chunk_len={self.chunk_len} must be positive")

    @property
    def num_cameras(self) -> int:
        """V."""
        return len(self.robot.cameras)


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """What the model reads.

    pixels: float (B, V, 6, H, W), see `preprocess.to_pixels`.
    prompt_ids: int64 (B, L) without BOS, padded on the left; prompt_mask: bool (B, L), or None when nothing is padded.
    state: float32 (B, S) normalised, or None.
    """

    pixels: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor | None
    state: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Batch(PolicyInputs):
    """Inputs and targets.

    actions: float32 (B, K, D) normalised; valid: bool (B, K). grounding: uint8 (B, V, 2, S, S), see `heads/grounding.py`, and
    landmarks: float32 (B, 2, 3) in metres, or None where the data has none.
    """

    actions: Tensor
    valid: Tensor
    grounding: Tensor | None = None
    landmarks: Tensor | None = None


class StateProjector(nn.Module):
    """Normalised state to one token embedding: linear, exact GELU, linear."""

    def __init__(self, state_dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        """(B, S) -> (B, W)."""
        return self.fc2(F.gelu(self.fc1(state)))


class Policy(nn.Module):
    """A vision-language-action policy for one robot."""

    def __init__(self, config: PolicyConfig, statistics: DatasetStatistics, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.statistics, self.tokenizer = config, statistics, tokenizer
        robot, width = config.robot, config.vlm.llm.width
        statistics.check(robot)
        self.vlm = prismatic.Prismatic(config.vlm)
        self.state_projector = StateProjector(robot.state_dim, width) if config.use_state else None
        self.action_head: ActionHead = head_module(config.head).Head(config.head, width, config.chunk_len, robot.action_dim)
        self.grounding_head = grounding.Head(config.grounding, width) if config.grounding else None
        self.encode_prompts = tokens.PromptEncoder(tokenizer, config.vlm.tokens, config.prompt_style, verbatim=config.parity)
        self.action_normalizer = Normalizer(
            statistics.action, statistics.normalize_mask, robot.normalization, "train" if config.parity else None
        )
        self.state_normalizer = self._state_normalizer("eval") if config.use_state else None
        for parameter in self.unread_parameters():
            parameter.requires_grad_(False)

    @classmethod
    def create(cls, config: PolicyConfig, statistics: DatasetStatistics, tokenizer: Tokenizer, *, seed: int) -> "Policy":
        """A policy with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = cls(config, statistics, tokenizer)
            policy.vlm.init_weights(torch.Generator().manual_seed(seed))
        return policy

    def _state_normalizer(self, when: str) -> Normalizer:
        statistics, c = self.statistics, self.config
        assert statistics.state is not None  # checked against the robot in __init__
        return Normalizer(statistics.state, statistics.state_mask, c.robot.normalization, when if c.parity else None)

    @property
    def training_state_normalizer(self) -> Normalizer | None:
        """Normalises the state of demonstrations. With `parity` it treats constant dimensions otherwise than at inference."""
        return self._state_normalizer("train") if self.config.use_state else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vlm.projector.fc1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.vlm.projector.fc1.weight.dtype

    def unread_parameters(self) -> list[nn.Parameter]:
        """Parameters that no output depends on: they never train (and would stall gradient averaging across processes)."""
        backbone = self.vlm.vision_backbone
        unread = backbone.featurizer.unread_parameters() + backbone.fused_featurizer.unread_parameters()
        return unread if self.action_head.reads_logits else [*unread, *self.vlm.language_model.lm_head.parameters()]

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss (scalar) and detached metrics of one training batch."""
        decoder = _Decoder(self, batch)
        loss, metrics = self.action_head.loss(decoder, batch.actions, batch.valid)
        if self.grounding_head is not None and batch.grounding is not None:
            extra, extra_metrics = self.grounding_head.mask_loss(decoder.patch_states, batch.grounding)
            loss, metrics = loss + extra, {**metrics, **extra_metrics}
            if batch.landmarks is not None:
                extra, extra_metrics = self.grounding_head.landmark_loss(decoder.first_hidden, batch.landmarks)
                loss, metrics = loss + extra, {**metrics, **extra_metrics}
        return loss, metrics

    def predict(self, inputs: PolicyInputs, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Normalised actions (B, K, D), float32. See `act` for the noise."""
        return self.action_head.sample(_Decoder(self, inputs), generator, noise)

    @torch.inference_mode()
    def act(
        self,
        observations: Sequence[Observation],
        noise: np.ndarray | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> list[ActionChunk]:
        """One chunk of actions in robot units for each observation.

        noise: (K, D) for all, or (B, K, D): the start of a diffusion policy's denoising, standard normal, instead of a draw from
        `generator` (on the CPU). Deterministic heads ignore both.
        Raises ValueError for an observation that does not fit the robot, FloatingPointError when the model's answer is not finite.
        """
        inputs, given = self.prepare(observations), self._check_noise(noise, len(observations))
        was_training = self.training
        self.eval()
        try:
            predicted = self.predict(inputs, generator, given)
        finally:
            self.train(was_training)
        actions = self.action_normalizer.unnormalize(predicted.double().cpu().numpy())
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy's actions are not finite: its weights are broken, nothing was sent to the robot")
        period_s = self.config.robot.period_s
        return [ActionChunk(a.astype(np.float32), o.time_s, period_s) for a, o in zip(actions, observations, strict=True)]

    def prepare(self, observations: Sequence[Observation]) -> PolicyInputs:
        """Raw observations to model inputs on the policy's device; checks every observation first."""
        c = self.config
        for observation in observations:
            observation.check(c.robot)
        images = np.stack([preprocess.prepare_images(c.preprocess, o, c.robot.cameras) for o in observations])
        state = None
        if c.use_state and self.state_normalizer is not None:
            raw = np.stack([np.asarray(o.state, np.float64 if c.parity else np.float32) for o in observations])
            state = torch.from_numpy(self.state_normalizer.normalize(raw).astype(np.float32)).to(self.device)
        ids, mask = self.encode_prompts([o.instruction for o in observations])
        return PolicyInputs(
            pixels=preprocess.to_pixels(c.preprocess, torch.from_numpy(images).to(self.device)),
            prompt_ids=torch.from_numpy(ids).to(self.device),
            prompt_mask=None if mask.all() else torch.from_numpy(mask).to(self.device),
            state=state,
        )

    def _check_noise(self, noise: np.ndarray | Tensor | None, count: int) -> Tensor | None:
        if noise is None:
            return None
        shape = (self.config.chunk_len, self.config.robot.action_dim)
        tensor = torch.as_tensor(noise, dtype=torch.float32, device=self.device)
        if tensor.shape not in (shape, (count, *shape)):
            raise ValueError(f"noise must have shape {shape} or {(count, *shape)}, got {tuple(tensor.shape)}")
        return tensor.expand(count, *shape)

    def save(self, path: Path) -> None:
        """Write a checkpoint folder, atomically. Raises ValueError when `path` is not empty."""
        with atomic_directory(Path(path)) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the files of a checkpoint into an existing folder."""
        self.write_facts(folder)
        weights.write_shards({name: weights.LazyTensor.of(tensor) for name, tensor in self.state_dict().items()}, folder)

    def write_facts(self, folder: Path, **changes: Any) -> None:
        """Everything but the weights. changes: fields of `policy.json` to write otherwise."""
        document = {"format_version": FORMAT_VERSION, **to_dict(self.config), **changes}
        (folder / "policy.json").write_text(json.dumps(document, indent=2) + "\n")
        save_statistics(folder / "statistics.json", {self.config.dataset: self.statistics})
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        dataset: str | None = None,
    ) -> "Policy":
        """Read a checkpoint: its folder, its run's folder, or a hub id. Never executes code from it; a LoRA adapter is merged in float32.

        dtype: of the weights; None means float32 on a CPU, and elsewhere what they are stored in, or bfloat16 if that is mixed.
        dataset: whose statistics normalise, where a checkpoint has several; None takes its own choice.
        Raises ValueError naming what is missing or does not fit.
        """
        folder = checkpoint_folder(hub.resolve(path))
        config = load_config(folder, dataset)
        statistics = load_statistics(folder / "statistics.json")
        with torch.device("meta"):
            policy = cls(config, statistics[config.dataset], tokens.load_tokenizer(folder))
        load_weights(policy, folder, device, dtype or _default_dtype(folder, torch.device(device)))
        return policy.eval()


def head_module(config: HeadConfig) -> ModuleType:
    """The file in `heads/` that defines `config`; its `Head` is built from it."""
    return sys.modules[type(config).__module__]


def checkpoint_folder(path: Path) -> Path:
    """`path` itself when it is a checkpoint, or the newest checkpoint of a run folder. Raises ValueError when there is none."""
    if (path / "policy.json").is_file():
        return path
    last = path / "checkpoints" / "last"
    if (last / "policy.json").is_file():
        return last.resolve()
    published = " (a published one: bring it in with `vla-oft ckpt import`)" if (path / "dataset_statistics.json").is_file() else ""
    raise ValueError(f"{path} is not a checkpoint: it has no policy.json, and no checkpoints/last/policy.json{published}")


def load_config(folder: Path, dataset: str | None = None) -> PolicyConfig:
    """Read and check `policy.json` of a checkpoint folder. dataset: whose statistics normalise, None for the checkpoint's own choice.

    Raises ValueError for a checkpoint without statistics, or with several of which none is chosen.
    """
    document = json.loads((folder / "policy.json").read_text())
    version = document.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder}/policy.json has format_version {version!r}; this program reads {FORMAT_VERSION}")
    if not (folder / "statistics.json").is_file():
        raise ValueError(f"{folder} has no statistics.json: without it actions cannot be un-normalised; copy it from the training run")
    known = sorted(load_statistics(folder / "statistics.json"))
    chosen = dataset or document.get("dataset")
    if chosen is None:
        raise ValueError(f"{folder} was trained on {known}: choose whose statistics normalise, Policy.load(path, dataset=...)")
    if chosen not in known:
        raise ValueError(f"{folder}/statistics.json has {known}, not '{chosen}'")
    return from_dict(PolicyConfig, {**document, "dataset": chosen}, "policy.json")


def some_dataset(folder: Path) -> str:
    """The dataset that a checkpoint's policy chooses, or any where the choice is open: for work that does not act."""
    return json.loads((folder / "policy.json").read_text()).get("dataset") or min(load_statistics(folder / "statistics.json"))


def load_weights(policy: Policy, folder: Path, device: str | torch.device, dtype: torch.dtype, *, merge: bool = True) -> None:
    """Fill a policy (one on the meta device ends on `device`) from a checkpoint folder; see `weights.load_fitting`."""
    expected = {name: tensor.shape for name, tensor in policy.state_dict().items()}
    found = weights.load_fitting(folder, expected, device, dtype, merge=merge)
    policy.load_state_dict(found, strict=True, assign=policy.device.type == "meta")


def _default_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """See `Policy.load`."""
    if device.type == "cpu":
        return torch.float32
    stored = {tensor.dtype for tensor in weights.open_weights(folder).values()}
    return stored.pop() if len(stored) == 1 else torch.bfloat16


class _Decoder:
    """The sequence of one batch, embedded once; see `vlm/tokens.py` for its layout. Implements `heads.base.Decode`."""

    def __init__(self, policy: Policy, inputs: PolicyInputs) -> None:
        self.vlm, self.inputs = policy.vlm, inputs
        special = policy.config.vlm.tokens
        self.num_tokens, self.stop = special.num_tokens, special.stop
        B, device = len(inputs.prompt_ids), inputs.prompt_ids.device
        ends = torch.tensor([special.bos, special.stop], device=device).expand(B, 2)
        self.bos_embed, self.stop_embed = self.embed(ends).split(1, dim=1)
        self.prompt = self.embed(inputs.prompt_ids)
        padding_counts = policy.config.parity and policy.training
        patches = self.vlm.embed_images(inputs.pixels.to(policy.dtype), self._mean_language(padding_counts))
        self.num_patches = patches.shape[1]
        self.prefix = [self.bos_embed, patches]
        if policy.state_projector is not None:
            assert inputs.state is not None, "a policy with use_state got no state"
            self.prefix.append(policy.state_projector(inputs.state.to(policy.dtype))[:, None])
        self.patch_states = self.first_hidden = patches  # of the latest call: see __call__

    def _mean_language(self, padding_counts: bool) -> Tensor:
        """(B, W): mean embedding of BOS, prompt and stop token. FiLM's input. The reference's training lets padding count."""
        mask = None if padding_counts else self.inputs.prompt_mask
        prompt = self.prompt if mask is None else self.prompt * mask[..., None]
        count = self.prompt.shape[1] if mask is None else mask.sum(1, keepdim=True)
        return (self.bos_embed[:, 0] + self.stop_embed[:, 0] + prompt.sum(1)) / (count + 2)

    def zeros(self, num_slots: int) -> Tensor:
        return self.prompt.new_zeros(len(self.prompt), num_slots, self.prompt.shape[-1])

    def embed(self, ids: Tensor) -> Tensor:
        return self.vlm.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.vlm.language_model.lm_head(hidden).float()

    def __call__(self, slots: Tensor, context: Tensor | None = None, *, causal: bool = False, predict_stop: bool = False) -> Tensor:
        prefix = self.prefix if context is None else [*self.prefix, context[:, None]]
        embeds = torch.cat([*prefix, self.prompt, slots, self.stop_embed], dim=1)
        num_fixed, num_slots = sum(p.shape[1] for p in prefix), slots.shape[1]
        rows = slice(embeds.shape[1] - num_slots - 2, embeds.shape[1] - 2 + predict_stop)
        hidden, penultimate = self.vlm.language_model(
            embeds,
            self._positions(num_fixed, embeds.shape[1]),
            key_mask=self._key_mask(num_fixed, embeds.shape[1]),
            causal=causal,
            rows=rows,
        )
        self.patch_states = penultimate[:, 1 : 1 + self.num_patches]  # (B, V * P, W) where they enter the last layer
        self.first_hidden = hidden[:, 0]  # (B, W)
        return hidden

    def steps(self) -> Steps:
        embeds = torch.cat([*self.prefix, self.prompt], dim=1)
        num_fixed, length = embeds.shape[1] - self.prompt.shape[1], embeds.shape[1]
        cache = self.vlm.language_model.new_cache()

        def step(token: Tensor | None) -> Tensor:
            nonlocal length
            length += token is not None
            new = embeds if token is None else token[:, None]
            hidden, _ = self.vlm.language_model(
                new,
                self._positions(num_fixed, length)[:, -new.shape[1] :],
                key_mask=self._key_mask(num_fixed, length),
                causal=True,
                rows=slice(new.shape[1] - 1, new.shape[1]),
                cache=cache,
            )
            return hidden[:, 0]

        return step

    def _positions(self, num_fixed: int, length: int) -> Tensor:
        positions = torch.arange(length, device=self.prompt.device)[None]
        mask = self.inputs.prompt_mask
        if mask is None:
            return positions
        padding = (~mask).sum(1, keepdim=True)
        return torch.where(positions < num_fixed, positions, (positions - padding).clamp(min=num_fixed))

    def _key_mask(self, num_fixed: int, length: int) -> Tensor | None:
        mask = self.inputs.prompt_mask
        return None if mask is None else F.pad(mask, (num_fixed, length - num_fixed - mask.shape[1]), value=True)
