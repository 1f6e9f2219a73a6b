"""Named configurations to measure: the paper's at their true size, a small one for CPUs, and `nano`, the shipped base's shape.

    name   cameras         state   chunk    FiLM   model                                                     images (pixels)
    A      1               no      8 x 7    no     7.5 B: DINOv2-L, SigLIP-SO400M, Llama-2-7B                256 x 256
    B      2               yes     8 x 7    no     7.5 B                                                     256 x 256
    C      3               yes     25 x 14  yes    7.5 B                                                     480 x 640
    cpu    2               yes     8 x 7    no     0.3 B: towers 384 x 12 and 768 x 12, decoder 1024 x 8     256 x 256
    nano   2               yes     8 x 7    yes    3 M, 64-px images                                         128 x 128

Prompts have exactly L tokens (30 with BOS), made of words that are one token each; images are random but smooth, like photographs.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from vla_oft import preprocess
from vla_oft.heads import l1
from vla_oft.policy import HeadConfig, PolicyConfig
from vla_oft.robots import aloha, libero, tabletop
from vla_oft.statistics import DatasetStatistics, compute_statistics
from vla_oft.vlm import llama, prismatic, sizes, tokens, vit
from vla_oft_client import Observation, RobotSpec

PROMPT_LEN = 30
NANO_VOCABULARY = 1024
VERBS, FILLERS = ("pick", "up", "the", "red", "bowl"), ("and", "place", "it", "on", "the", "plate", "next", "to", "blue", "cup")
TEMPLATE_WORDS = ("In:", "What", "action", "should", "the", "robot", "take", "to", "?\nOut:")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured. prompt_len: L, tokens of the prompt including BOS. camera_size: (height, width) of the raw images in pixels."""

    name: str
    config: PolicyConfig
    camera_size: tuple[int, int]
    prompt_len: int = PROMPT_LEN

    def tokenizer(self) -> Tokenizer:
        """A tokenizer whose ids fit the model's vocabulary."""
        return _tokenizer(self.config.vlm.tokens.num_tokens)

    @property
    def instruction(self) -> str:
        """Words that make a prompt of exactly `prompt_len` tokens."""
        return instruction(self.config, self.tokenizer(), self.prompt_len)

    def statistics(self) -> DatasetStatistics:
        """Of random numbers: they decide no time, only units."""
        return random_statistics(self.config.robot)


def names() -> tuple[str, ...]:
    """Of all workloads."""
    return ("A", "B", "C", "cpu", "nano")


def load(name: str) -> Workload:
    """The workload `name`. Raises ValueError listing the known ones."""
    if name not in names():
        raise ValueError(f"unknown workload '{name}'; known: {', '.join(names())}")
    robot = {"A": cameras(libero.SPEC, 1), "C": aloha.SPEC, "nano": tabletop.SPEC}.get(name, libero.SPEC)
    if name == "nano":
        _, ids = tokens.train_tokenizer([_corpus()], NANO_VOCABULARY)
        vlm = sizes.nano(ids)
    else:
        vlm = _cpu_size() if name == "cpu" else sizes.openvla_7b(film=name == "C", unread_weights=False)
    sides = {"C": (480, 640), "nano": (128, 128)}
    return Workload(name=name, config=policy_config(vlm, robot, use_state=name != "A"), camera_size=sides.get(name, (256, 256)))


def policy_config(vlm: prismatic.Config, robot: RobotSpec, *, use_state: bool, head: HeadConfig = l1.Config()) -> PolicyConfig:
    """A policy that crops as those trained on random crops do, and resizes as policies trained here do."""
    nano = vlm.dino.image_size == sizes.nano(vlm.tokens).dino.image_size
    return PolicyConfig(
        robot=robot,
        vlm=vlm,
        head=head,
        preprocess=preprocess.Config(image_size=vlm.dino.image_size, resize="box" if nano else "bicubic", crop_area=1.0 if nano else 0.9),
        dataset="random",
        chunk_len=robot.chunk_len,
        use_state=use_state,
        prompt_style="plain" if nano else "openvla",
        grounding=None,
    )


def cameras(robot: RobotSpec, count: int) -> RobotSpec:
    """The same robot, seen by its first `count` cameras."""
    return dataclasses.replace(robot, cameras=robot.cameras[:count])


def _cpu_size() -> prismatic.Config:
    """The shape on which the reference was measured on two CPU cores: 1.90 s per chunk of 8."""
    siglip = vit.Config(image_size=224, patch_size=14, width=768, depth=12, num_heads=12, mlp_dim=3072)
    dino = dataclasses.replace(siglip, width=384, num_heads=6, mlp_dim=1536, num_registers=4, class_token=True, layer_scale=True)
    return prismatic.Config(
        dino=dino,
        siglip=siglip,
        llm=llama.Config(vocab_size=32064, width=1024, depth=8, num_heads=16, num_kv_heads=16, mlp_dim=2816),
        tokens=sizes.LLAMA2_TOKENS,
        film=False,
    )


def _corpus() -> str:
    prompt = tokens.PROMPTS["openvla"].format(instruction=" ".join((*VERBS, *FILLERS)))
    return " ".join([prompt, " ".join((*VERBS, *FILLERS)), *TEMPLATE_WORDS])


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Trained on a few sentences: its ids are the lowest of the vocabulary, those of special tokens the usual ones."""
    tokenizer, _ = tokens.train_tokenizer([_corpus()] * 2, vocab_size)
    return tokenizer


def instruction(config: PolicyConfig, tokenizer: Tokenizer, prompt_len: int) -> str:
    """Raises ValueError when no such prompt can be made, which is so below about 15 tokens."""
    encode = tokens.PromptEncoder(tokenizer, config.vlm.tokens, config.prompt_style)
    words = list(VERBS)
    while (length := 1 + len(encode.ids(" ".join(words)))) < prompt_len:
        words.append(FILLERS[(len(words) - len(VERBS)) % len(FILLERS)])
    if length != prompt_len:
        raise ValueError(f"prompt_len={prompt_len} cannot be made; the shortest prompt has {length} tokens")
    return " ".join(words)


def random_statistics(robot: RobotSpec) -> DatasetStatistics:
    """Actions and states of a random walk in [-1, 1]."""
    rng = np.random.default_rng(0)
    states = [rng.uniform(-1, 1, (100, robot.state_dim))] if robot.state_dim else None
    return compute_statistics([rng.uniform(-1, 1, (100, robot.action_dim))], states, robot.normalize_mask)


def observations(robot: RobotSpec, words: str, camera_size: tuple[int, int], count: int, seed: int = 0) -> list[Observation]:
    """`count` different observations: smooth random images of camera_size (height, width) with a little noise, random states."""
    rng = np.random.default_rng(seed)
    height, width = camera_size

    def image() -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        return (np.asarray(coarse) + rng.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)

    def state() -> np.ndarray | None:
        return rng.uniform(-1, 1, robot.state_dim).astype(np.float32) if robot.state_dim else None

    return [Observation({camera: image() for camera in robot.cameras}, state(), words, float(i)) for i in range(count)]
