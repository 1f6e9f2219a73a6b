import json
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest

import vla_oft.sims.experts
from vla_oft.collect.workers import check_seeds
from vla_oft.evaluate import suite
from vla_oft.evaluate.controls import chose_original, remove_words
from vla_oft.evaluate.episode import executable
from vla_oft.evaluate.plan import FIRST_SEED, EvalConfig, plan_trials
from vla_oft.evaluate.reading import evaluation_report
from vla_oft.evaluate.report import render
from vla_oft.evaluate.runner import evaluate
from vla_oft.evaluate.success import Rate
from vla_oft.evaluate.video import hold_frames
from vla_oft.robots import tabletop
from vla_oft.sims.base import SimulatorError, expert_class, make
from vla_oft_client import ActionChunk

STANDIN = Path(__file__).parent / "evaluate_standin"


@pytest.fixture(autouse=True)
def standin(monkeypatch):
    """The file name is the registry: one more folder of simulators."""
    monkeypatch.setattr(vla_oft.sims, "__path__", [*vla_oft.sims.__path__, str(STANDIN)])
    monkeypatch.setattr(vla_oft.sims.experts, "__path__", [*vla_oft.sims.experts.__path__, str(STANDIN / "experts")])


class Reader:
    """Reads the picture: drives to the pad whose colour the instruction names, or to `habit` when it names none."""

    chunk_len = 4

    def __init__(self, habit="red"):
        self.habit, self.batches, self.heard = habit, [], []

    def act(self, observations):
        self.batches.append(len(observations))
        self.heard += [o.instruction for o in observations]
        return [self.answer(o) for o in observations]

    def answer(self, observation):
        from vla_oft.sims.point import RGB

        image, words = observation.images["front"], observation.instruction.split()
        colour = next((w for w in words if w in RGB), self.habit)
        rows, columns = np.nonzero((image == RGB[colour]).all(-1))
        goal = np.array([columns.mean() + 0.5, len(image) - rows.mean() - 0.5]) / len(image)
        position, actions = observation.state.astype(float), []
        for _ in range(self.chunk_len):
            actions.append(np.clip((goal - position) * 10, -1, 1))
            position = position + 0.1 * actions[-1]
        return ActionChunk(np.array(actions, np.float32), observation.time_s, 0.05)


class Deaf(Reader):
    """Knows the normal instruction of every scene by heart and never listens."""

    def __init__(self, config):
        super().__init__()
        self.targets = {}
        for plan in plan_trials(config):
            env = plan.task.make(64)
            env.reset(plan.seed)
            self.targets[env.observe().images["front"].tobytes()] = env.target
        self.target = None

    def answer(self, observation):
        self.target = self.targets.get(observation.images["front"].tobytes(), self.target)
        return super().answer(type(observation)(observation.images, observation.state, f"the {self.target} one", observation.time_s))


class Idle:
    def act(self, observations):
        return [ActionChunk(np.zeros((4, 2), np.float32), o.time_s, 0.05) for o in observations]


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def config(**changes):
    return EvalConfig(**{"suite": "point/touch", "trials": 12, "num_envs": 4, "camera_size": 64, **changes})


def test_a_policy_that_follows_words_succeeds_everywhere_and_an_idle_one_nowhere():
    assert evaluate(Reader(), config()).success == Rate(12, 12)
    idle = evaluate(Idle(), config())
    assert idle.success == Rate(0, 12)
    assert {t.steps for t in idle.trials} == {30}


def test_a_policy_with_a_habit_succeeds_exactly_where_the_habit_is_right():
    results = evaluate(Reader(), config(trials=30), instruction_filter=lambda text: remove_words(text, ("red", "green", "blue")))
    expected = {t.seed: "red" in t.task for t in results.trials}
    assert {t.seed: t.success for t in results.trials} == expected
    assert results.success == Rate(sum(expected.values()), 30)
    assert results.score().correct == Rate(sum(expected.values()), 30)


def test_the_number_of_environments_does_not_change_the_outcome():
    def rows(num_envs):
        results = evaluate(Reader(), config(num_envs=num_envs, trials=10, controls=("swapped", "blind")))
        return [(t.condition, t.seed, t.instruction, t.success, t.chosen, t.steps) for t in results.trials]

    assert rows(1) == rows(4)


def test_the_policy_is_queried_in_batches():
    policy = Reader()
    results = evaluate(policy, config(trials=12, num_envs=4))
    assert max(policy.batches) == 4
    assert results.to_json()["latency"]["max_batch"] == 4
    assert len(results.queries) == len(policy.batches)
    assert all(len(t.latency_ms) == -(-(t.steps + 2) // 4) for t in results.trials)


def test_execute_steps_looks_more_often_and_refuses_more_than_a_chunk():
    often, seldom = Reader(), Reader()
    evaluate(often, config(execute_steps=1))
    evaluate(seldom, config())
    assert len(often.heard) > 2 * len(seldom.heard)
    with pytest.raises(ValueError, match="execute_steps=5"):
        evaluate(Reader(), config(execute_steps=5))


def test_success_must_hold(monkeypatch):
    class Passing(Reader):
        """Drives over the pad without stopping."""

        def answer(self, observation):
            chunk = super().answer(observation)
            return ActionChunk(np.where(abs(chunk.actions) < 1e-3, 1.0, chunk.actions).astype(np.float32), chunk.start_time_s, 0.05)

    assert evaluate(Passing(), config(hold_steps=1)).success.successes > evaluate(Passing(), config(hold_steps=3)).success.successes


class Late(Reader):
    """Waits, then drives to its pad; leaves it again after step `leave`."""

    chunk_len = 1

    def __init__(self, wait, leave=1000):
        super().__init__()
        self.wait, self.leave = wait, leave

    def answer(self, observation):
        step, chunk = round(observation.time_s * 20), super().answer(observation)
        still, away = np.zeros((1, 2), np.float32), -np.ones((1, 2), np.float32)
        return ActionChunk(still if step < self.wait else away if step >= self.leave else chunk.actions, observation.time_s, 0.05)


def test_a_success_at_the_last_step_must_hold_too():
    def trial(hold_steps, *policy):
        return evaluate(Late(*policy), config(trials=1, hold_steps=hold_steps)).trials[0]

    wait = 30 - trial(1, 0).steps  # then success begins with the last step, 30
    assert [(trial(hold, wait).success, trial(hold, wait).steps) for hold in (1, 3, 6)] == [(True, 30)] * 3
    assert trial(1, wait, 30).success
    assert (trial(3, wait, 30).success, trial(3, wait, 30).steps) == (False, 30)
    assert not trial(1, wait + 1).success, "it must begin in time"


def test_simulator_errors_are_repaired_once_and_never_counted_as_failures(tmp_path):
    results = evaluate(Reader(), config(suite="point/fragile", trials=10, num_envs=2, out=tmp_path))
    lost = {t.seed for t in results.trials if t.success is None}
    assert lost == {FIRST_SEED, FIRST_SEED + 5}
    assert results.success == Rate(8, 8)
    summary = results.to_json()
    assert (summary["episodes"], summary["sim_errors"]) == (8, 2)
    assert (summary["worst_case"]["successes"], summary["worst_case"]["episodes"]) == (8, 10)
    assert summary["sim_errors_repaired"] > 0
    messages = {t.sim_error for t in results.trials if t.seed in lost}
    assert messages == {"physics unstable", "RuntimeError: renderer lost"}
    assert len(rows_of(tmp_path)) == 10


def test_too_many_lost_trials_stop_the_evaluation_and_what_was_measured_stays(tmp_path):
    with pytest.raises(SimulatorError, match=r"broke in 3 of 40 trials.*what was measured is in"):
        evaluate(Reader(), config(suite="point/fragile", trials=40, num_envs=1, out=tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["episodes"], summary["sim_errors"], len(rows_of(tmp_path))) == (8, 3, 11)
    assert "broke in 3 of 40" in summary["stopped"]


def test_a_simulator_that_never_works_stops_the_evaluation(monkeypatch):
    from vla_oft.sims import point

    monkeypatch.setattr(point.Point, "observe", lambda self: 1 / 0)
    with pytest.raises(SimulatorError, match=r"no trial could be run.*ZeroDivisionError"):
        evaluate(Reader(), config())


def test_an_error_of_the_policy_stops_but_keeps_what_was_measured(tmp_path):
    class Dying(Reader):
        def act(self, observations):
            if len(self.batches) == 9:
                raise FloatingPointError("not finite")
            return super().act(observations)

    with pytest.raises(FloatingPointError):
        evaluate(Dying(), config(out=tmp_path, trials=30))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped"] == "FloatingPointError: not finite"
    assert 0 < summary["episodes"] == len(rows_of(tmp_path)) < 30


def test_broken_answers_of_a_policy_are_its_own_fault():
    class Wrong(Idle):
        def act(self, observations):
            return [ActionChunk(np.full((4, 2), np.nan, np.float32), 0.0, 0.05) for _ in observations]

    class Short(Idle):
        def act(self, observations):
            return super().act(observations)[:-1]

    with pytest.raises(ValueError, match="not finite"):
        evaluate(Wrong(), config())
    with pytest.raises(ValueError, match="4 observations with 3 chunks"):
        evaluate(Short(), config())


def test_swapping_changes_the_words_but_not_the_picture():
    env = suite.resolve("point/touch")[0].make(64)
    env.reset(FIRST_SEED)
    normal = env.observe()
    env.reset(FIRST_SEED, swap=1)
    swapped = env.observe()
    assert normal.instruction != swapped.instruction
    np.testing.assert_array_equal(normal.images["front"], swapped.images["front"])


def test_the_swapped_control_tells_listening_from_remembering():
    listening = evaluate(Reader(), config(controls=("swapped",)))
    assert listening.score("swapped").success == Rate(12, 12)
    assert listening.score("swapped").chose_original == Rate(0, 12)
    c = config(controls=("swapped",), num_envs=1)
    deaf = evaluate(Deaf(c), c)
    assert deaf.success == Rate(12, 12)
    assert deaf.score("swapped").success == Rate(0, 12)
    assert deaf.score("swapped").chose_original == Rate(12, 12)
    assert deaf.to_json()["separated_from_normal"] == {"swapped": True}


def test_blind_hides_the_colours_and_expert_shows_the_ceiling():
    policy = Reader()
    results = evaluate(policy, config(controls=("blind", "expert")))
    blind = [t for t in results.trials if t.condition == "blind"]
    assert {t.instruction for t in blind} == {"touch the pad"}
    assert {t.task for t in blind} > {"touch the red pad"}
    assert results.score("blind").success.value < 1
    assert results.score("expert").success == Rate(12, 12)
    assert all(t.latency_ms == () for t in results.trials if t.condition == "expert")


def test_removed_words_leave_clean_sentences():
    assert (
        remove_words("Put the Red block on the blue-ish plate, redder", ("red", "green")) == "Put the block on the blue-ish plate, redder"
    )


def test_the_original_object_is_the_first_word_that_swapping_replaced():
    original, swapped = "stack the red block on the blue block", "stack the green block on the red block"
    assert chose_original("red", original, swapped)
    assert chose_original("red_block", original, swapped)
    assert not chose_original("blue", original, swapped)
    assert not chose_original("red", original, original)


def test_a_recording_decodes_with_every_control_step(tmp_path):
    results = evaluate(Reader(), config(trials=3, record=1, out=tmp_path, hold_steps=2))
    filmed = [t for t in results.trials if t.video]
    assert [t.seed for t in filmed] == [FIRST_SEED]
    with av.open(str(tmp_path / filmed[0].video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 20)
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    executed = filmed[0].steps + 1  # hold_steps=2: one step beyond the first success
    assert len(frames) == 1 + executed + hold_frames(20.0)
    assert (frames[0][400:] != frames[-1][400:]).any()


def test_files_hold_what_the_results_say(tmp_path):
    results = evaluate(Reader(), config(out=tmp_path), checkpoint="sha256:abc")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads(json.dumps(results.to_json()))
    assert summary["checkpoint"] == "sha256:abc"
    assert summary["seeds"][0] == FIRST_SEED
    assert {"python", "numpy", "torch", "platform", "cpu"} <= set(summary["versions"])
    assert sorted(rows_of(tmp_path), key=lambda row: row["seed"]) == [json.loads(json.dumps(asdict(t))) for t in results.trials]
    with pytest.raises(ValueError, match="already holds an evaluation"):
        evaluate(Reader(), config(out=tmp_path))


def test_suites_are_found_by_name():
    assert [str(t) for t in suite.resolve("point")] == ["point/touch", "point/fragile"]
    assert [str(t) for t in suite.resolve("point/fragile, point")] == ["point/fragile", "point/touch"]
    with pytest.raises(ValueError, match=r"no simulator 'nowhere'.*point/touch"):
        suite.resolve("nowhere")
    with pytest.raises(ValueError, match="no family 'dance'; it has touch, fragile"):
        suite.resolve("point/dance")


def test_simulators_and_experts_come_from_one_registry():
    env = make("point/touch", 32)
    env.reset(1)
    assert env.observe().images["front"].shape == (32, 32, 3)
    assert expert_class("point")(env)().shape == (2,)
    for wrong in ("point", "nowhere/touch"):
        with pytest.raises(ValueError, match=f"unknown suite '{wrong}'.*point"):
            make(wrong, 32)
    with pytest.raises(ValueError, match=r"'nowhere' has no scripted expert: there is no sims/experts/nowhere.py"):
        expert_class("nowhere")


def test_an_expert_whose_dependency_is_missing_is_not_reported_as_absent(monkeypatch):
    import sys

    sys.modules.pop("vla_oft.sims.experts.point", None)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        expert_class("point")


def test_the_page_of_an_evaluation_shows_its_videos_and_its_command(tmp_path):
    results = evaluate(Reader(), config(trials=2, record=1, out=tmp_path))
    page = render(evaluation_report(results, tmp_path, "vla-oft eval here"))
    assert page.count("<video") == 1 and "vla-oft eval here" in page and "latency of a query, batch" in page


def test_evaluation_seeds_never_meet_collection_seeds():
    seeds = [p.seed for s in (0, 1, 9999) for p in plan_trials(config(seed=s))]
    assert min(seeds) == FIRST_SEED
    with pytest.raises(ValueError, match="seed"):
        check_seeds(FIRST_SEED - 10, FIRST_SEED)
    check_seeds(0, FIRST_SEED - 1)
    assert len(set(seeds)) == 36, "blocks do not overlap"
    assert max(seeds) < 2**31


@pytest.mark.parametrize(("field", "value"), [("trials", 0), ("controls", ("deaf",)), ("record", 1), ("num_envs", 0), ("seed", 10_000)])
def test_impossible_requests_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})


def test_actions_reach_the_simulator_within_limits_and_with_binary_grippers():
    actions = np.array([[3.0, -3.0, 0.5, 0, 0, 0, 0.2], [0, 0, 0, 0, 0, 0, -0.3]], np.float32)
    done = executable(tabletop.SPEC, actions)
    assert done[0].tolist() == [1.0, -1.0, 0.5, 0, 0, 0, 1.0]
    assert done[1, 6] == -1.0
    assert actions[0, 0] == 3.0
