"""Demonstrations are held out whole, and a policy is judged on them: always the same steps, whatever the batches and processes."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import INSTRUCTIONS, tiny_policy
from vla_oft.data.base import Source, open_source
from vla_oft.data.chunks import Samples
from vla_oft.data.lerobot_writer import Episode, LeRobotWriter
from vla_oft.heads import diffusion, l1, pooled
from vla_oft.policy import Batch, Policy
from vla_oft.robots.tabletop import SPEC
from vla_oft.train.batches import Collate, Finish
from vla_oft.train.validation import Errors, Validation, Validator, dimension_names, held_out_dataset, split, split_episodes, spread

LENGTHS = (5, 9, 12, 6, 7, 10)


def write(out: Path, lengths: tuple[int, ...] = LENGTHS, kind: str = "demonstrations") -> Source:
    rng = np.random.default_rng(len(lengths))
    with LeRobotWriter(out, SPEC, kind=kind) as writer:
        for number, length in enumerate(lengths):
            writer.append_episode(
                Episode(
                    images={camera: rng.integers(0, 256, (length, 16, 16, 3), dtype=np.uint8) for camera in SPEC.cameras},
                    states=rng.normal(size=(length, 8)).astype(np.float32),
                    actions=rng.normal(size=(length, 7)).astype(np.float32),
                    instructions=INSTRUCTIONS[number % 2],
                )
            )
    return open_source(out)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return write(tmp_path_factory.mktemp("data") / "demos")


class Prepare:
    """What the loop does between the dataset and the policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.sizes = policy, []

    def __call__(self, samples: Samples) -> Batch:
        self.sizes.append(len(samples))
        return Finish(self.policy, None)(Collate(self.policy)(samples))


def validator(policy: Policy, source: Source, samples: int = 20, **options) -> Validator:
    dataset = held_out_dataset(policy, [source])
    return Validator(Validation(samples=samples), dataset, options.pop("prepare", Prepare(policy)), **{"batch_size": 8, **options})


def same(a: Errors, b: Errors, tolerance: float) -> None:
    for name, value in dataclasses.asdict(a).items():
        np.testing.assert_allclose(value, getattr(b, name), rtol=tolerance, err_msg=name)


# --- what is held out ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_every_dataset_gives_at_least_one_episode_and_never_all(source, share, count):
    kept, out = split_episodes(count, share, 0, source)
    assert sorted([*kept, *out]) == list(range(count))
    assert len(kept) >= 1 and len(out) >= 1
    assert len(out) == min(max(1, round(share * count)), count - 1)


def test_the_split_depends_on_the_seed_and_on_the_dataset_alone(source, tmp_path):
    first, second = (split([source], Validation(share=0.4), seed=3) for _ in range(2))
    assert [s.fingerprint() for part in first for s in part] == [s.fingerprint() for part in second for s in part]
    seeds = {split([source], Validation(share=0.4), seed=seed)[1][0].fingerprint() for seed in range(8)}
    assert len(seeds) > 4
    other = write(tmp_path / "others")
    assert {tuple(split_episodes(50, 0.1, 0, s)[1]) for s in (source, other)} != {tuple(split_episodes(50, 0.1, 0, source)[1])}


def test_episodes_that_are_appended_do_not_bring_others_into_the_held_out_ones(source):
    before = set(split_episodes(100, 0.1, 0, source)[1])
    after = set(split_episodes(104, 0.1, 0, source)[1])
    assert {e for e in after if e < 100} <= before


def test_whole_episodes_go_to_one_side_or_the_other(source):
    (training,), (held_out,) = split([source], Validation(share=0.3), seed=0)
    assert sorted([*training.lengths, *held_out.lengths]) == sorted(LENGTHS)
    actions = {tuple(s.actions(e)[0]) for s in (training, held_out) for e in range(len(s))}
    assert actions == {tuple(source.actions(e)[0]) for e in range(len(source))}
    assert training.fingerprint() != held_out.fingerprint() != source.fingerprint()


def test_pictures_without_actions_are_all_trained_on(source, tmp_path):
    scenes = write(tmp_path / "scenes", kind="scenes")
    training, held_out = split([scenes, source], Validation(), seed=0)
    assert training[0] is scenes and len(training) == 2 and len(held_out) == 1
    with pytest.raises(ValueError, match="validation needs demonstrations"):
        split([scenes], Validation(), seed=0)


def test_a_single_episode_cannot_be_divided(tmp_path):
    with pytest.raises(ValueError, match=r"demos has 1 episode: .*validation=null"):
        split([write(tmp_path / "demos", (5,))], Validation(), seed=0)


@pytest.mark.parametrize(("count", "wanted"), [(1, 1), (10, 3), (10, 10), (10, 99), (1000, 256), (3, 2)])
def test_samples_are_spread_evenly_without_repetition(count, wanted):
    chosen = spread(count, wanted)
    assert len(set(chosen)) == min(count, wanted) and chosen.min() >= 0 and chosen.max() < count
    gaps = np.diff([-1, *chosen, count])
    assert gaps.max() - gaps[1:-1].min(initial=gaps.max()) <= count // min(count, wanted)


def test_dimensions_are_named_by_the_dataset_or_by_number(source):
    assert dimension_names(SPEC, [source])[0] == (source.action_names[0] if source.action_names else "0")

    class Named:
        action_names = tuple("abcdefg")

    class Nameless:
        action_names = ()

    assert dimension_names(SPEC, [Nameless(), Named()]) == tuple("abcdefg")
    assert dimension_names(SPEC, [Nameless()]) == ("0", "1", "2", "3", "4", "5", "6 gripper")


# --- what is measured ------------------------------------------------------------------------------------------------------------------


def test_the_errors_are_those_of_predictions_one_by_one(source):
    policy = tiny_policy()
    measured = validator(policy, source, samples=9).measure(policy)
    dataset, prepare = held_out_dataset(policy, [source]), Prepare(policy)
    ours, robot, masks = [], [], []
    for index in spread(len(dataset), 9):
        batch = prepare(dataset.batch([int(index)]))
        with torch.no_grad():
            predicted, actions = policy.predict(batch)[0].double().numpy(), batch.actions[0].double().numpy()
        ours.append(abs(predicted - actions))
        robot.append(abs(policy.action_normalizer.unnormalize(predicted) - policy.action_normalizer.unnormalize(actions)))
        masks.append(batch.valid[0].numpy())
    ours, robot, mask = np.stack(ours), np.stack(robot), np.stack(masks)
    assert not mask.all(), "some chunks reach beyond their episode"
    assert measured.action_l1 == pytest.approx(ours[mask].mean(), rel=1e-5)
    assert measured.first == pytest.approx(ours[:, 0].mean(), rel=1e-5)
    np.testing.assert_allclose(measured.by_dim, ours[mask].mean(0), rtol=1e-5)
    np.testing.assert_allclose(measured.by_dim_robot, robot[mask].mean(0), rtol=1e-5)
    np.testing.assert_allclose(measured.by_step, [ours[:, k][mask[:, k]].mean() for k in range(8)], rtol=1e-5)
    row = measured.row()
    assert row["validation_action_l1"] == measured.action_l1 and len(row["validation_l1_by_step"]) == 8
    assert len(row["validation_l1_by_dim"]) == len(row["validation_l1_by_dim_robot"]) == 7


@pytest.mark.parametrize("head", [l1.Config(), diffusion.Config(train_steps=4, inference_steps=2)])
def test_neither_batches_nor_processes_change_the_errors(source, head):
    policy = tiny_policy(head=head)
    whole = validator(policy, source, samples=17, batch_size=17).measure(policy)
    same(validator(policy, source, samples=17, batch_size=3).measure(policy), whole, 1e-5)
    parts, passes = [], []
    for rank in range(3):
        prepare = Prepare(policy)
        keep = lambda sums: parts.append(sums) or sums  # noqa: E731
        options = {"batch_size": 2, "rank": rank, "world_size": 3, "reduce": keep, "prepare": prepare}
        validator(policy, source, samples=17, **options).measure(policy)
        passes.append(prepare.sizes)
    assert passes[0] == passes[1] == passes[2] == [2, 2, 2], "every process makes the same passes"
    total = sum(parts)
    last = validator(policy, source, samples=17, batch_size=2, rank=2, world_size=3, reduce=lambda _: total)
    same(last.measure(policy), whole, 1e-5)


@pytest.mark.parametrize("head", [pooled.Config(), diffusion.Config(train_steps=4, inference_steps=2)])
def test_measuring_leaves_no_trace(source, head):
    policy = tiny_policy(head=head).train()
    policy.vlm.eval()  # a frozen backbone may stay so
    policy.state_projector.register_forward_hook(lambda *_: setattr(policy, "drawn", torch.rand(3)))  # a part that draws for itself
    modes = [module.training for module in policy.modules()]
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in policy.state_dict().items()}
    judge = validator(policy, source)
    first = judge.measure(policy)
    torch.rand(3)
    assert judge.measure(policy) == first, "the same every time"
    torch.set_rng_state(state)
    judge.measure(policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in policy.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_weights_that_are_given_are_judged(source):
    policy = tiny_policy()
    plain = validator(policy, source).measure(policy)
    last = list(policy.action_head.parameters())[-1]

    @contextmanager
    def averaged():
        with torch.no_grad():
            last.add_(1.0)
        yield
        with torch.no_grad():
            last.sub_(1.0)

    shifted = validator(policy, source).measure(policy, weights=averaged())
    assert abs(shifted.action_l1 - plain.action_l1) > 0.05
    same(validator(policy, source).measure(policy), plain, 1e-5)


def test_lower_precision_is_that_of_training(source):
    policy = tiny_policy()
    plain = validator(policy, source).measure(policy)
    rounded = validator(policy, source).measure(policy, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert rounded != plain
    same(rounded, plain, 0.1)


def test_a_failing_policy_is_left_as_it_was(source):
    policy = tiny_policy().train()

    def broken(samples: Samples) -> Batch:
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        validator(policy, source, prepare=broken).measure(policy)
    assert policy.training


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.0}, {"samples": 0}, {"every": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"validation.{next(iter(wrong))}"):
        Validation(**wrong)
