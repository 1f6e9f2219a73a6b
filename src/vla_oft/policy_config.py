"""Every fact about a trained model, and where its checkpoint keeps them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

from vla_oft import preprocess
from vla_oft.config import PLUGIN, from_dict
from vla_oft.heads import diffusion, discrete, grounding, l1, pooled
from vla_oft.statistics import load_statistics
from vla_oft.vlm import prismatic, tokens
from vla_oft_client import RobotSpec

HeadConfig = l1.Config | diffusion.Config | discrete.Config | pooled.Config
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Every fact about a trained model. Written to `policy.json`; nothing of it is ever a command-line flag of `eval` or `serve`.

    dataset: name of the statistics that normalise state and actions.
    use_state: whether the proprioceptive state is an input token.
    grounding: auxiliary dense supervision, or None.
    parity: behave as the reference does where this package deliberately does not, see docs/parity.md. Imported checkpoints do.
    state_normalization: of the state, where it is another than the robot's, which the actions have.
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
    state_normalization: Literal["bounds_q99", "bounds", "zscore"] | None = None

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
