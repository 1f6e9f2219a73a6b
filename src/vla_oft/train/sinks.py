"""Where metrics go beside `metrics.jsonl`: TensorBoard, Weights & Biases or trackio, at most one.

A service is imported only when it is used. What it needs is checked before the training begins; once it has begun, a service that fails is
reported once and never stops it. A resumed run continues the same run of the service: its id lies in the run folder (`wandb.json`).
"""

import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from vla_oft.atomic import replace_file

GIVE_UP = 20
"""After so many failures in a row a service is left alone: each may cost a time-out."""

FINISH_S = 600
"""How long the end of a run waits for Weights & Biases; what is not sent by then stays in the run folder for `wandb sync`."""

SPEED = ("samples_per_s", "data_wait", "time_s", "memory_gb")


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """Event files in the run folder, under `tensorboard/`."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases. project, entity, group, tags, notes: where the run appears, and as what. mode: `offline` writes files only, into
    the run folder, to be sent later with `wandb sync`; None does what WANDB_MODE says, which is `online` by default.
    """

    project: str = "vla-oft"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    mode: Literal["online", "offline"] | None = None


@dataclass(frozen=True, kw_only=True)
class Trackio:
    """trackio: a database on this machine (in TRACKIO_DIR), or a Space. project, group: where the run appears. space: `owner/name` to send
    it to; private: whether a new Space is.
    """

    project: str = "vla-oft"
    group: str | None = None
    space: str | None = None
    private: bool = True


class Sink(Protocol):
    """One run in one service."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step; steps ascend."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Send what is left. failed: whether the run ended by an error."""
        ...


def check(config: TensorBoard | Wandb | Trackio | None) -> None:
    """Raise ValueError when the package that `config` needs is not installed. Imports nothing."""
    if config is None:
        return
    package = type(config).__name__.lower()
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a folder `wandb/` that happens to lie here is no package
        raise ValueError(f"sink '{package}' needs a package that is not installed: pip install {package}; or set sink=null")


def open_sink(config: TensorBoard | Wandb | Trackio | None, run: Path, train: Mapping[str, Any], start_step: int) -> Sink | None:
    """Begin, or continue, recording the run in folder `run`, which exists; None without a `config`. For one process only.

    train: what the service shows as the configuration. start_step: where the training continues.
    Raises ValueError when the package is missing or the service does not answer.
    """
    check(config)
    if config is None:
        return None
    name = type(config).__name__
    try:
        if isinstance(config, TensorBoard):
            return Patient(name, _TensorBoard(run, train, start_step))
        return Patient(name, _Wandb(config, run, train) if isinstance(config, Wandb) else _Trackio(config, run, train))
    except Exception as error:  # whatever a service raises: no login, no network, no rights
        words = " ".join(str(error).split()).rstrip(".")
        fix = {"Wandb": "run `wandb login`, set sink.mode=offline", "Trackio": "run `hf auth login`, leave sink.space unset"}
        raise ValueError(f"{name} cannot start: {words}; {fix.get(name, f'make {run} writable')}, or set sink=null") from error


class _TensorBoard:
    def __init__(self, run: Path, train: Mapping[str, Any], start_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # rows beyond the checkpoint that the run continues from are hidden
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None, flush_secs=30)
        if not start_step:
            self.writer.add_text("train.json", "```\n" + json.dumps(train, indent=2, default=str) + "\n```")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(grouped(name), value, step)

    def close(self, *, failed: bool = False) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, config: Wandb, run: Path, train: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_S))  # without it a run whose network is gone never ends
        self.state = _State(run / "wandb.json")
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags or None,
            notes=config.notes,
            mode=config.mode,
            id=self.state.id,
            name=run.resolve().name,
            resume="allow",
            dir=str(run),
            config=dict(train),
            allow_val_change=True,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.state.once(step, lambda: self.run.log({grouped(name): value for name, value in values.items()}, step=step))

    def close(self, *, failed: bool = False) -> None:
        self.run.finish(exit_code=1 if failed else 0)


class _Trackio:
    def __init__(self, config: Trackio, run: Path, train: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.state = _State(run / "trackio.json")
        self.run = trackio.init(
            project=config.project,
            group=config.group,
            space_id=config.space,
            private=config.private if config.space else None,
            name=f"{run.resolve().name}-{self.state.id}",  # names are all that tells runs apart
            resume="allow",
            config=dict(train),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.state.once(step, lambda: self.run.log({grouped(name): value for name, value in values.items()}, step=step))

    def close(self, *, failed: bool = False) -> None:
        self.run.finish()


class _State:
    """Which run of the service this is, and how much of it has been sent: what is trained again after a resume is not sent again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text()) if path.is_file() else {}
        self.id, self.sent = str(found.get("id") or secrets.token_hex(4)), int(found.get("sent", 0))
        self._save()

    def once(self, step: int, send: Callable[[], Any]) -> None:
        """Send unless that has been done."""
        if step > self.sent:
            send()
            self.sent = step
            self._save()

    def _save(self) -> None:
        replace_file(self.path, json.dumps({"id": self.id, "sent": self.sent}) + "\n")


class Patient:
    """A sink whose failures never reach the training."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.sink, self.failures, self.warned = name, sink, 0, False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.failures < GIVE_UP:
            self._try(lambda: self.sink.write(step, values))

    def close(self, *, failed: bool = False) -> None:
        self._try(lambda: self.sink.close(failed=failed))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
            self.failures = 0
        except Exception as error:  # whatever a service raises
            self.failures += 1
            if not self.warned:
                self.warned = True
                text = f"warning: {self.name} failed and may lack rows ({error}); the training goes on, metrics.jsonl has them all"
                print(os.linesep + text, file=sys.stderr, flush=True)


def grouped(name: str) -> str:
    """A metric's name as the services group it: `validation_l1_by_dim/x` becomes `validation/l1_by_dim/x`."""
    if name.startswith("validation_"):
        return "validation/" + name.removeprefix("validation_")
    return ("speed/" if name in SPEED else "train/") + name
