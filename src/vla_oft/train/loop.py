"""The training loop: reads top to bottom, on one process or many, saves in the background and resumes exactly."""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_oft.data.chunks import ChunkDataset
from vla_oft.data.loader import BatchLoader
from vla_oft.data.mixture import MixtureOrder
from vla_oft.data.skipped import SkippedFrames
from vla_oft.train import assemble, checkpoint, companions, folder, interrupts, memory_fit, parallel, preflight, provenance, setup
from vla_oft.train.batches import Both, Collate, Finish
from vla_oft.train.checkpoint import Checkpoints, Keep
from vla_oft.train.config import TrainConfig
from vla_oft.train.ema import Ema
from vla_oft.train.guard import StepGuard
from vla_oft.train.parallel import Ranks
from vla_oft.train.snapshot import Exact, Photographer, Scalars
from vla_oft.train.step import Stepper


def train(config: TrainConfig, out: Path, *, resume: bool = False, device: str = "cpu") -> Path:
    """Run (or continue) training in folder `out`; returns the last checkpoint. Under torchrun every process calls this.

    device: "cpu" or "cuda". Raises ValueError before any work for data that does not fit, for an `out` that is not empty without `resume`,
    and for a resumed run whose configuration has changed; FloatingPointError when the loss stops being finite for good, OSError when a
    checkpoint cannot be written (either way the last good one stays). On SIGTERM, SIGUSR1 or Ctrl-C it saves, then ends the program.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(parallel.start(device))
        stack.enter_context(ranks.silent_others())
        config = ranks.on_main(lambda: companions.check(config, out, resume=resume, device=device, world_size=ranks.world_size))
        stack.enter_context(ranks.held_by_main(folder.locked(out)))
        return _train(config, out, resume, ranks, stack)


def _train(config: TrainConfig, out: Path, resume: bool, ranks: Ranks, stack: ExitStack) -> Path:
    sources = ranks.main_first(lambda: setup.open_datasets(config))
    learned, held_out = setup.split(config, sources)
    preflight.check_data(config, learned)
    facts = provenance.facts(config, setup.dataset_facts(config, learned, held_out), device=ranks.device, world_size=ranks.world_size)
    saved = ranks.on_main(lambda: checkpoint.newest(out)) if resume else None
    if saved:
        setup.same_data(saved, facts["datasets"])
    blueprint = assemble.prepare(setup.open_policy(saved) if saved else setup.build_policy(config, learned), config)
    ranks.on_main(lambda: memory_fit.require(config, blueprint.policy.config, ranks.device, ranks.world_size))
    dataset = ranks.main_first(lambda: setup.build_dataset(config, blueprint.policy, learned))
    setup.rest_unused(blueprint.policy, dataset)
    ranks.on_main(lambda: companions.begin(config, out, facts))
    state = checkpoint.load_state(saved) if saved else {"step": 0, "phase": 0, "loader": None}
    step = state["step"]
    tracker = stack.enter_context(companions.tracker(config, out, ranks, step, sources))
    skipped = SkippedFrames(dataset, out / "skipped.txt")
    trainee = assemble.assemble(blueprint, config, ranks)
    policy = trainee.policy

    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = config.optimizer.build(policy, config.lr, masters=config.weights == "bfloat16+master")
    ema = Ema(trained, optimizer.weights(), config.ema_decay) if config.ema_decay is not None else None
    guard = StepGuard(config.guard, ranks.device)
    exact = Exact(trained, optimizer, ema)
    plateau = companions.plateau(config)
    scalars = Scalars({"guard": guard, "tracker": tracker, "plateau": plateau, "ema": ema})
    if saved:
        checkpoint.load_tensors(saved, exact.tensors())
        scalars.load(state["scalars"])
    photographer = Photographer(policy, exact, blueprint.weights, ranks, getattr(torch, config.save_dtype), facts)
    keep = Keep(last=config.keep_last, every=config.keep_every, best=config.keep_best)
    checkpoints = Checkpoints(out, keep, rank=ranks.rank, world_size=ranks.world_size, barrier=ranks.barrier)
    stack.callback(checkpoints.join)
    if saved:
        ranks.on_main(lambda: checkpoints.settle(step))
    collate, finish = Collate(policy), Finish(policy, config.augment)
    learn = Stepper(trainee, optimizer, guard, ema, finish, ranks, config.clip_norm)
    validator = companions.validator(config, policy, held_out, ranks, collate)
    setup.announce(config, policy, dataset, step, ranks)

    interrupted = stack.enter_context(interrupts.watch())
    stop, leaving = None, False
    waiting_since = time.monotonic()
    for phase, loader, batches in _steps(config, dataset, Both(collate, finish) if ranks.on_cpu else collate, ranks, state, skipped):
        passes = list(batches)
        counts = [policy.action_head.weight(batch.valid) for batch in passes]
        wait_s = time.monotonic() - waiting_since
        total, leaving, failed = ranks.agree(sum(counts), interrupted.received is not None, checkpoints.failed)
        checkpoints.check(elsewhere=failed)
        seed_step(config.seed, step, ranks.rank)
        lr = config.lr * config.schedule.factor(step, config.total_steps)
        outcome = learn(passes, counts, total, lr)
        step += 1

        last = step == config.total_steps
        errors = None
        if validator and config.validation and (step % config.validation.every == 0 or last):
            with tracker.paused():
                weights, autocast = ema.applied() if ema else None, lambda: trainee.autocasting(ranks.device)
                errors = validator.measure(policy, weights=weights, autocast=autocast)
            parallel.forget_gathered(policy)
        row = tracker.add(step, outcome.metrics, lr=lr, wait_s=wait_s, skipped=outcome.bad, validation=errors.row() if errors else None)
        if row:
            if report := guard.report(checkpoints.last):
                tracker.say(report.line)
            stop = plateau.should_stop(row) if plateau else None
        if step % config.save_every == 0 or last or leaving or stop:
            place = {"phase": phase, "loader": loader.state_dict(), "scalars": scalars.state()}
            checkpoints.wait()  # one copy of the run on the host at a time
            checkpoints.save(photographer.take(step, place, errors.action_l1 if errors and math.isfinite(errors.action_l1) else None))
            ranks.on_main(lambda: companions.draw(config, out, sources))
        if leaving or stop:
            break
        waiting_since = time.monotonic()
    checkpoints.wait()
    ranks.barrier()  # the first process writes longest; where another one ends early, torchrun ends them all
    if line := skipped.summary():
        tracker.say(line)
    if stop:
        tracker.say(f"stopped early at step {step}: {stop}")
    if leaving and step < config.total_steps:
        interrupted.leave()
    return checkpoints.last or out


def seed_step(seed: int, step: int, rank: int) -> None:
    """Draw what this step draws (dropout, noise) from a seed of its own: nothing to save, nothing that an interruption can shift."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def _steps(
    config: TrainConfig, dataset: ChunkDataset, collate: Any, ranks: Ranks, state: dict[str, Any], skipped: SkippedFrames
) -> Iterator[tuple[int, BatchLoader[Any], Iterator[Any]]]:
    """All remaining steps, phase by phase, each with its phase, the loader whose position it advances, and its batches."""
    step, loader_state = state["step"], state["loader"]
    count = config.passes(ranks.world_size)
    size = config.batch_size // (count * ranks.world_size)
    for phase in range(state["phase"], len(config.phases)):
        weights = [float(w) for w in config.phases[phase].mixture]
        order = MixtureOrder(dataset.sizes, seed=config.seed + 7919 * phase, weights=weights, neighbours=config.neighbours)
        loader = BatchLoader(
            dataset, order, size, collate, rank=ranks.rank, world_size=ranks.world_size, num_workers=config.num_workers, skipped=skipped
        )
        if loader_state is not None:
            loader.load_state_dict(loader_state)
            loader_state = None
        end = sum(p.steps for p in config.phases[: phase + 1])
        batches = iter(loader)
        for _ in range(end - step):
            yield phase, loader, itertools.islice(batches, count)
        step = end
