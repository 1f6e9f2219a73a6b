"""The embedded simulator keeps the promises of `sims/base.py` and of its own docstrings. Real physics, real pictures."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from vla_oft.sims import tabletop
from vla_oft.sims.base import SimulatorError, simulators
from vla_oft.sims.experts.tabletop import Expert
from vla_oft.sims.tabletop_tasks import FAMILIES

pytestmark = pytest.mark.skipif(
    not (find_spec("mujoco") and find_spec("gym_aloha")), reason="pip install 'vla-oft[sim]'; pip install --no-deps gym-aloha"
)


@pytest.fixture(scope="module")
def env():
    env = tabletop.TabletopEnv("pick_place", camera_size=64)
    yield env
    env.close()


@pytest.fixture(scope="module")
def envs(env):
    made = {family: env if family == env.family else tabletop.TabletopEnv(family, camera_size=64) for family in tabletop.FAMILIES}
    yield made
    for other in made.values():
        other.close()


def play(env, seed, num_steps=None, noise=0.0, swap=0):
    """Run the expert until success or the end; returns the states (T, 8)."""
    env.reset(seed, swap=swap)
    expert, rng, states = Expert(env), np.random.default_rng(seed), []
    for _ in range(env.max_steps if num_steps is None else num_steps):
        action = expert()
        action[:3] += rng.normal(0, noise, 3)
        env.step(action)
        states.append(env.state())
        if num_steps is None and env.outcome().success:
            break
    return np.array(states)


def test_observations_fit_the_robot(env):
    env.reset(3)
    observation = env.observe().check(env.spec)
    assert {camera: image.shape for camera, image in observation.images.items()} == {"front": (64, 64, 3), "wrist": (64, 64, 3)}
    assert observation.state.dtype == np.float32 and observation.time_s == 0.0
    assert all(image.std() > 10 for image in observation.images.values())
    env.step(np.zeros(7))
    assert env.observe().time_s == pytest.approx(0.05)


def test_the_same_seed_gives_the_same_scene_and_the_same_trajectory_bit_for_bit(env):
    first = play(env, 11, num_steps=20)
    instruction, image = env.instruction, env.observe().images["front"]
    play(env, 12, num_steps=5)
    second = play(env, 11, num_steps=20)
    assert np.array_equal(first, second) and env.instruction == instruction
    assert np.array_equal(image, env.observe().images["front"])


def test_another_environment_agrees_bit_for_bit(env):
    other = tabletop.TabletopEnv("pick_place", camera_size=64)
    assert np.array_equal(play(env, 13, num_steps=20), play(other, 13, num_steps=20))
    other.close()


def test_different_seeds_give_different_scenes_and_instructions(env):
    instructions, scenes = set(), set()
    for seed in range(12):
        env.reset(seed)
        instructions.add(env.instruction)
        scenes.add(env.layout.positions_m.tobytes())
    assert len(scenes) == 12 and len(instructions) >= 4


@pytest.mark.parametrize("family", tabletop.FAMILIES)
def test_the_expert_does_what_it_is_told(envs, family):
    for seed in range(4):
        play(envs[family], seed)
        outcome = envs[family].outcome()
        assert outcome.success and outcome.correct and outcome.chosen in envs[family].instruction, (family, seed)


@pytest.mark.parametrize("family", tabletop.FAMILIES)
def test_the_expert_recovers_from_disturbances(envs, family):
    succeeded = 0
    for seed in range(5):
        play(envs[family], seed, noise=0.15)
        succeeded += envs[family].outcome().success
    assert succeeded >= 4


@pytest.mark.parametrize("family", tabletop.FAMILIES)
def test_the_expert_stays_successful_afterwards(envs, family):
    env = envs[family]
    play(env, 1)
    expert = Expert(env)
    for _ in range(15):
        env.step(expert())
    assert env.outcome().success
    assert np.abs(expert()[:3]).max() < 0.1, "the hand has come to rest"


@pytest.mark.parametrize("family", tabletop.FAMILIES)
def test_doing_nothing_is_neither_success_nor_a_choice(envs, family):
    env = envs[family]
    env.reset(2)
    for _ in range(10):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    outcome = env.outcome()
    assert (outcome.success, outcome.chosen, outcome.correct) == (False, None, None)


@pytest.mark.parametrize("family", tabletop.FAMILIES)
def test_carrying_out_another_instruction_is_reported_as_the_wrong_object(envs, family):
    env = envs[family]
    env.reset(5, swap=1)
    named = env.layout.colours[env.target]
    asked = (env.target - 1) % 3
    expert = Expert(env)
    wrong = env.target
    env.set_instruction(family, asked, next(i for i in range(3) if i not in (asked, wrong)))
    other = env.other
    for _ in range(env.max_steps):
        env.target, env.other = wrong, other  # the expert is misled, the judge is not
        action = expert()
        env.target = asked
        env.step(action)
        if env.outcome().chosen:
            break
    outcome = env.outcome()
    assert (outcome.chosen, outcome.correct, outcome.success) == (named, False, False)


def test_a_swapped_instruction_names_another_block_in_the_same_picture(env):
    targets, images = set(), []
    for swap in range(3):
        env.reset(21, swap=swap)
        targets.add(env.instruction)
        images.append(env.observe().images["front"])
    assert len(targets) == 3
    assert all(np.array_equal(image, images[0]) for image in images)


def test_the_instruction_alone_decides_what_the_expert_does(env):
    env.reset(4)
    expert = Expert(env)
    actions = []
    for target in range(3):
        env.set_instruction("pick_place", target)
        actions.append(expert()[:2])
    distances = [np.linalg.norm(a - b) for i, a in enumerate(actions) for b in actions[:i]]
    assert min(distances) > 0.1


def test_the_expert_has_no_memory(env):
    env.reset(6)
    veteran = Expert(env)
    for _ in range(25):
        assert np.array_equal(veteran(), Expert(env)())
        env.step(veteran())


def test_a_reset_returns_to_the_family_of_the_environment(env):
    env.set_instruction("touch", 0)
    assert env.instruction.startswith("touch")
    env.reset(0)
    assert env.family == "pick_place" and "plate" in env.instruction


def test_an_action_of_one_moves_the_hand_five_centimetres(env):
    env.reset(0)
    for axis in range(3):
        start = env.tcp()
        action = np.zeros(7)
        action[axis] = 0.5
        env.step(action)
        for _ in range(3):
            env.step(np.zeros(7))
        assert (env.tcp() - start)[axis] == pytest.approx(0.025, abs=0.001)
    assert env.state()[3:6] == pytest.approx([0, np.pi / 2, 0], abs=0.02), "the hand keeps pointing down"


def test_the_gripper_opens_at_minus_one_and_closes_at_plus_one(env):
    env.reset(0)
    for value, finger in ((1.0, 0.021), (-1.0, 0.062)):
        for _ in range(6):
            env.step(np.array([0, 0, 0, 0, 0, 0, value]))
        assert env.finger() == pytest.approx(finger, abs=0.002)


def test_the_hand_never_strays_from_its_workspace(env):
    env.reset(0)
    low, high = tabletop.WORKSPACE_M
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 7)).round():
        for _ in range(8):
            env.step(action)
            assert np.all(env.tcp() > low - 0.025) and np.all(env.tcp() < high + 0.025)  # a hand at 1 m/s swings a little past its goal


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no task family 'fly'.*touch, push, lift, pick_place, stack"):
        tabletop.make("fly")


def test_actions_that_are_not_seven_finite_numbers_are_refused(env):
    env.reset(0)
    for action in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            env.step(action)


def test_unstable_physics_is_a_simulator_error_not_a_failed_task(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # mujoco writes its warning into a file here
    env.reset(0)
    env._data.qvel[0] = np.nan
    with pytest.raises(SimulatorError, match="unstable at step 1"):
        env.step(np.zeros(7))
    env.reset(0)
    env.step(np.zeros(7))  # and a reset repairs it


def test_only_modules_that_run_tasks_count_as_simulators():
    assert "tabletop" in simulators()
    assert not {"base", "experts", "rendering", "viperx", "tabletop_scene", "tabletop_tasks"} & set(simulators())


def test_importing_the_simulator_does_not_import_mujoco():
    code = "import sys, vla_oft.sims.tabletop, vla_oft.sims.experts.tabletop; assert not {'mujoco', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_forgotten_renderer_ends_quietly():
    code = "from vla_oft.sims import tabletop\nenv = tabletop.make('touch')\nenv.observe()\nenv.frame(48, 64)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    complaints = [line for line in result.stderr.splitlines() if not line.startswith("libEGL warning")]  # Mesa's, where there is no GPU
    assert (result.returncode, complaints) == (0, [])


def test_pictures_for_people_have_the_size_asked_for(env):
    env.reset(0)
    frame = env.frame(120, 160)
    assert frame.shape == (120, 160, 3) and frame.dtype == np.uint8 and frame.mean() > 80
    assert np.array_equal(env.observe().images["front"], env.observe().images["front"])


def test_every_family_has_an_instruction_that_names_its_object():
    for family in FAMILIES.values():
        assert "{target}" in family.instruction
        assert ("{other}" in family.instruction) == (family.destination == "other")
