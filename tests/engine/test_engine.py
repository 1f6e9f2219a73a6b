"""A compiled policy answers as the plain one: every removal, every head, every shape."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import INSTRUCTIONS, observation, tiny_policy
from vla_oft import engine
from vla_oft.adapter import Adapter, Factors
from vla_oft.heads import diffusion, discrete, l1, pooled
from vla_oft.interface import Interface
from vla_oft.policy import Policy
from vla_oft.statistics import save_statistics

HEADS = {
    "l1": l1.Config(),
    "pooled": pooled.Config(),
    "discrete": discrete.Config(),
    "discrete, any token": discrete.Config(any_token=True),
    "autoregressive": discrete.Config(decoding="autoregressive"),
    "diffusion": diffusion.Config(inference_steps=4),
}
LONG = "stack the green block on the blue block and then touch the red block twice"
NOISE = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)
BATCHES = {
    "one": [observation(seed=3)],
    "two, the same instruction": [observation(seed=1), observation(seed=2)],
    "three, two of them padded": [observation(seed=i, instruction=text) for i, text in enumerate([*INSTRUCTIONS, LONG])],
}


def actions(policy, observations, **arguments) -> np.ndarray:
    return np.stack([chunk.actions for chunk in policy.act(observations, **arguments)])


def same(fast, policy, observations, tolerance=1e-5) -> None:
    """Actions span about -3 to 3."""
    wanted = actions(policy, observations, noise=NOISE)
    assert np.ptp(wanted) > 0.01, "a test that cannot fail"
    np.testing.assert_allclose(actions(fast, observations, noise=NOISE), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_answers_as_the_plain_policy(head, film, batch):
    policy = tiny_policy(head=HEADS[head], film=film)
    same(engine.compile_policy(policy), policy, BATCHES[batch])


@pytest.mark.parametrize("head", HEADS)
def test_prompts_padded_to_a_fixed_length_change_nothing(head):
    policy = tiny_policy(head=HEADS[head])
    fast = engine.compile_policy(policy, max_prompt_len=30)
    for batch in BATCHES.values():
        same(fast, policy, batch)


def unusual_vlm():
    """Other constants, one key-value head, a tower without class token, towers of unequal depth."""
    vlm = tiny_policy().config.vlm
    return dataclasses.replace(
        vlm,
        llm=dataclasses.replace(vlm.llm, rope_theta=500.0, rms_eps=1e-2, num_kv_heads=1, depth=3),
        dino=dataclasses.replace(vlm.dino, class_token=False, depth=2),
    )


@pytest.mark.parametrize(
    "changes",
    [{"use_state": False}, {"parity": True}, {"prompt_style": "openvla"}, {"chunk_len": 1}, {"vlm": unusual_vlm()}],
    ids=["no state", "parity", "another prompt", "one action", "other shapes"],
)
def test_other_policies_too(changes):
    policy = tiny_policy(**changes)
    observations = BATCHES["three, two of them padded"]
    np.testing.assert_allclose(actions(engine.compile_policy(policy), observations), actions(policy, observations), atol=1e-5)


def test_one_row_for_all_empty_slots_is_exact_and_can_be_turned_off(monkeypatch):
    policy, rows = tiny_policy(), []
    layer = engine.decoder.Layer
    merged = layer.merged
    monkeypatch.setattr(layer, "merged", lambda self, x, *rest: (rows.append(len(x)), merged(self, x, *rest))[1])
    fast, slow = (engine.compile_policy(policy, options=engine.Options(zero_row=on)) for on in (True, False))
    same(fast, policy, BATCHES["one"])
    assert len(rows) == 1
    same(slow, policy, BATCHES["one"])
    assert len(rows) == 1


@pytest.mark.parametrize("option", engine.Options.names())
def test_every_optimisation_can_be_left_out(option):
    policy = tiny_policy()
    fast = engine.compile_policy(policy, options=dataclasses.replace(engine.Options(), **{option: False}))
    for batch in BATCHES.values():
        same(fast, policy, batch)


def test_slots_that_are_not_empty_are_not_merged():
    policy = tiny_policy(head=HEADS["diffusion"])
    fast = engine.compile_policy(policy)
    first, second = (actions(fast, BATCHES["one"], noise=noise) for noise in (NOISE, NOISE[::-1].copy()))
    assert np.abs(first - second).max() > 0.01
    same(fast, policy, BATCHES["one"])


def test_weights_that_no_output_depends_on_are_dropped():
    small = tiny_policy(head=pooled.Config())
    towers = {name: dataclasses.replace(getattr(small.config.vlm, name), unread_weights=True) for name in ("dino", "siglip")}
    imported = Policy.create(
        dataclasses.replace(small.config, vlm=dataclasses.replace(small.config.vlm, **towers)), small.statistics, small.tokenizer, seed=0
    ).eval()
    fast = engine.compile_policy(imported)
    same(fast, imported, BATCHES["one"])
    assert fast.num_bytes == engine.compile_policy(small).num_bytes
    assert not hasattr(fast._model, "lm_head")


def test_instructions_may_alternate():
    policy = tiny_policy()
    for fast in (engine.compile_policy(policy), engine.compile_policy(policy, max_prompt_len=24)):
        for text in [INSTRUCTIONS[0], "touch the blue block", LONG, INSTRUCTIONS[0], "touch the blue block", LONG]:
            same(fast, policy, [observation(seed=5, instruction=text)])


def test_graphs_and_prompts_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(engine.compiled, "KEPT_RUNNERS", 2)
    monkeypatch.setattr(engine.compiled, "KEPT_PROMPTS", 2)
    policy = tiny_policy()
    fast = engine.compile_policy(policy)
    for count in (1, 2, 3, 4, 1, 3):
        same(fast, policy, [observation(seed=i, instruction=f"touch block {count}") for i in range(count)])
        assert len(fast._runners) <= 2 and len(fast._prompts) <= 2


def test_the_number_of_denoising_steps_is_the_policys_and_may_be_changed():
    policy = tiny_policy(head=diffusion.Config(inference_steps=4))
    policy.action_head.inference_steps = 2
    fast = engine.compile_policy(policy)
    same(fast, policy, BATCHES["one"])
    fast.action_head.inference_steps = policy.action_head.inference_steps = 5
    same(fast, policy, BATCHES["one"])
    with pytest.raises(ValueError, match="inference_steps=0"):
        fast.action_head.inference_steps = 0


def test_the_same_generator_gives_the_same_noise():
    policy = tiny_policy(head=HEADS["diffusion"])
    fast, observations = engine.compile_policy(policy), BATCHES["two, the same instruction"]
    ours, theirs = (actions(p, observations, generator=torch.Generator().manual_seed(5)) for p in (fast, policy))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_preparing_and_running_are_two_steps():
    policy = tiny_policy()
    fast = engine.compile_policy(policy)
    call = fast.prepare(BATCHES["one"])
    predicted = call()
    assert isinstance(predicted, Tensor) and predicted.shape == (1, 8, 7) and predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, policy.predict(policy.prepare(BATCHES["one"])), atol=1e-5, rtol=0)


def test_the_policy_is_not_changed_and_not_needed():
    policy = tiny_policy()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    wanted = actions(policy, BATCHES["one"])
    fast = engine.compile_policy(policy)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        tensor.zero_()
    np.testing.assert_allclose(actions(fast, BATCHES["one"]), wanted, atol=1e-5)


# Checkpoints


def save(policy: Policy, folder, adapter: Adapter | None = None):
    policy.save(folder)
    if adapter:
        adapter.save(folder / "adapter")
    return folder


def random_adapter(policy: Policy, seed: int) -> Adapter:
    """For all of the decoder's products and one layer of a tower."""
    generator = torch.Generator().manual_seed(seed)
    names = [
        n for n, m in policy.named_modules() if isinstance(m, torch.nn.Linear) and (".layers." in n or n.endswith("blocks.0.attn.qkv"))
    ]
    shapes = {name: policy.get_submodule(name).weight.shape for name in names}
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3  # noqa: E731
    return Adapter({name: Factors(draw(2, shape[1]), draw(shape[0], 2), 0.5) for name, shape in shapes.items()})


def test_a_checkpoint_is_compiled_without_loading_it_first(tmp_path):
    policy = tiny_policy()
    folder = save(policy, tmp_path / "base", random_adapter(policy, 0))
    same(engine.load_compiled(folder), Policy.load(folder), BATCHES["three, two of them padded"])


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "fp8"])
def test_adapters_are_exchanged_in_place(tmp_path, precision):
    """As if compiled anew, bit for bit, and the memory that graphs read stays where it is."""
    policy = tiny_policy()
    folders = [save(policy, tmp_path / str(seed), random_adapter(policy, seed)) for seed in range(2)]
    fast = engine.load_compiled(folders[0], precision=precision)
    first = actions(fast, BATCHES["one"])
    packed = engine.linear_cpu.PackedDense
    where = [t.data_ptr() for layer in fast._model.linears() if not isinstance(layer, packed) for t in layer.tensors()]
    fast.swap(folders[1])
    second = actions(fast, BATCHES["one"])
    assert np.abs(first - second).max() > 0.01
    assert where == [t.data_ptr() for layer in fast._model.linears() if not isinstance(layer, packed) for t in layer.tensors()]
    np.testing.assert_array_equal(second, actions(engine.load_compiled(folders[1], precision=precision), BATCHES["one"]))
    fast.swap(folders[0])
    np.testing.assert_array_equal(first, actions(fast, BATCHES["one"]))


def test_a_swap_brings_statistics_and_all_other_weights(tmp_path):
    policies = [tiny_policy(seed=seed, head=HEADS["discrete"]) for seed in range(2)]
    action = policies[1].statistics.action
    wider = dataclasses.replace(policies[1].statistics, action=dataclasses.replace(action, q99=action.q99 + 1))
    policies[1].interface = Interface(policies[1].config, wider, policies[1].tokenizer)
    folders = [save(policy, tmp_path / str(seed)) for seed, policy in enumerate(policies)]
    fast = engine.load_compiled(folders[0])
    for folder in (folders[1], folders[0], folders[1]):
        fast.swap(folder)
        same(fast, Policy.load(folder), BATCHES["three, two of them padded"])


def test_a_checkpoint_of_several_datasets_is_normalised_by_the_one_that_is_chosen(tmp_path):
    policy = tiny_policy()
    folder = save(policy, tmp_path / "mixed")
    action = policy.statistics.action
    other = dataclasses.replace(policy.statistics, action=dataclasses.replace(action, q01=action.q01 - 3, q99=action.q99 + 3))
    save_statistics(folder / "statistics.json", {"tiny": policy.statistics, "wide": other})
    facts = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps({**facts, "dataset": None}))
    fast = engine.compile_policy(policy)
    for compiling in (fast.swap, engine.load_compiled):
        with pytest.raises(ValueError, match=r"trained on \['tiny', 'wide'\]: choose whose"):
            compiling(folder)
    same(fast, policy, BATCHES["one"])
    fast.swap(folder, dataset="wide")
    same(fast, Policy.load(folder, dataset="wide"), BATCHES["one"])
    same(engine.load_compiled(folder, dataset="tiny"), policy, BATCHES["one"])


def test_the_estimate_of_memory_is_about_what_weights_take():
    policy = tiny_policy()
    for precision in ("fp32", "bf16", "int8"):
        fast = engine.compile_policy(policy, precision=precision)
        assert fast.num_bytes < engine.factory.weight_bytes(policy.config, precision) < 6 * fast.num_bytes


def test_a_checkpoint_of_another_shape_is_refused_and_nothing_changes(tmp_path):
    policy = tiny_policy()
    fast = engine.compile_policy(policy)
    other = save(tiny_policy(head=pooled.Config()), tmp_path / "pooled")
    with pytest.raises(ValueError, match="differs from the compiled policy in head"):
        fast.swap(other)
    same(fast, policy, BATCHES["one"])


def test_a_swap_that_breaks_off_is_not_acted_on(tmp_path, monkeypatch):
    policy = tiny_policy()
    folder = save(policy, tmp_path / "base")
    fast = engine.load_compiled(folder)

    def broken(*arguments):
        def read(name):
            raise OSError("the disk is gone")

        return read

    with monkeypatch.context() as patched:
        patched.setattr(engine.compiled, "checkpoint_weights", broken)
        with pytest.raises(OSError, match="gone"):
            fast.swap(folder)
    with pytest.raises(RuntimeError, match="broke off half-way"):
        fast.act(BATCHES["one"])
    fast.swap(folder)
    same(fast, policy, BATCHES["one"])


# Precisions


def test_less_precise_numbers_take_less_memory():
    policy = tiny_policy()
    size = {p: engine.compile_policy(policy, precision=p).num_bytes for p in engine.PRECISIONS}
    assert all(size[a] > size[b] for a, b in pairwise(("fp32", "bf16", "fp8-llm", "fp8")))
    assert size["int8"] == size["int8-dynamic"] == size["fp8"]


@pytest.mark.parametrize("precision", engine.PRECISIONS)
@pytest.mark.parametrize("head", ["l1", "diffusion", "autoregressive"])
def test_every_precision_runs_every_head_and_batch(precision, head):
    policy = tiny_policy(head=HEADS[head])
    fast = engine.compile_policy(policy, precision=precision)
    for batch in BATCHES.values():
        assert np.isfinite(actions(fast, batch, noise=NOISE)).all()


# Wrong input


def test_wrong_input_is_named():
    policy = tiny_policy()
    with pytest.raises(ValueError, match="precision='fp4' is unknown; choose one of fp32, bf16, fp8"):
        engine.compile_policy(policy, precision="fp4")
    with pytest.raises(ValueError, match=r"cameras=\['left'\] are not cameras of robot 'tabletop'"):
        engine.compile_policy(policy, cameras={"left": (10, 10)})
    for wrong in (0, -3, 2.5):
        with pytest.raises(ValueError, match=f"max_prompt_len={wrong} must be a positive number"):
            engine.compile_policy(policy, max_prompt_len=wrong)
    with pytest.raises(ValueError, match=r"has \d+ tokens, but max_prompt_len=8"):
        engine.compile_policy(policy, max_prompt_len=8, instruction=LONG)
    with pytest.raises(ValueError, match="cameras without instruction"):
        engine.compile_policy(policy, cameras={policy.config.robot.cameras[0]: (10, 10)})
    with pytest.raises(ValueError, match=r"has size \(0, 10\); give \(height, width\)"):
        engine.compile_policy(policy, cameras={policy.config.robot.cameras[0]: (0, 10)}, instruction="go")
    with pytest.raises(ValueError, match="device='nonsense': policies are compiled for cpu and cuda"):
        engine.compile_policy(policy, device="nonsense")
    fast = engine.compile_policy(policy, max_prompt_len=8)
    with pytest.raises(ValueError, match=r"has \d+ tokens, but max_prompt_len=8"):
        fast.act([observation(instruction=LONG)])
    with pytest.raises(ValueError, match=r"noise must have shape"):
        fast.act([observation()], noise=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="no observations"):
        fast.act([])
    with pytest.raises(ValueError, match="state is not finite"):
        fast.act([dataclasses.replace(observation(), state=np.full(8, np.nan, np.float32))])
    with pytest.raises(ValueError, match="no camera 'wrist'|observation has no camera"):
        fast.act([dataclasses.replace(observation(), images={})])
    with pytest.raises(ValueError, match=r"noise must have shape \(8, 7\)"):
        engine.compile_policy(tiny_policy(head=HEADS["diffusion"])).act(BATCHES["one"], noise=np.zeros((1, 2)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        engine.compile_policy(tiny_policy(), device="cuda")


def test_broken_weights_never_reach_the_robot():
    policy = tiny_policy()
    with torch.no_grad():
        policy.vlm.projector.fc1.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.compile_policy(policy).act(BATCHES["one"])


def test_too_little_memory_is_found_before_any_work(monkeypatch):
    policy = tiny_policy()
    monkeypatch.setattr(engine.factory, "weight_bytes", lambda config, precision: 10**15)
    with pytest.raises(ValueError, match="needs 1000000.0 GB of memory"):
        engine.compile_policy(policy)
