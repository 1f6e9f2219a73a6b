"""The choice between kernels: what is tried, what is refused, what is remembered. Times are given, not taken."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from interpreter import DEVICE, Call, interpreter

from vla_oft.engine import ops
from vla_oft.engine.kernels.attention import Attention
from vla_oft.engine.kernels.candidates import MAX_TILES, Machine, Shape, estimated_seconds
from vla_oft.engine.kernels.products import Candidate, Product
from vla_oft.engine.kernels.tiles import Tiles
from vla_oft.engine.kernels.trials import Trial, bench
from vla_oft.engine.tuner import Choice, Tuner, default_path

H200 = Machine(name="NVIDIA H200", capability=90, multiprocessors=132, shared_bytes=232448)
A100 = Machine(name="NVIDIA A100-SXM4-40GB", capability=80, multiprocessors=108, shared_bytes=166912)
DOWN = Product(rows=600, columns=4096, inner=11008, parts=True)
SHAPES = {  # (columns, inner) of the products of Llama-2-7B and both towers
    "qkv": {"columns": 12288, "inner": 4096},
    "o": {"columns": 4096, "inner": 4096, "parts": True},
    "gate and up": {"columns": 22016, "inner": 4096, "activation": "swiglu"},
    "down": {"columns": 4096, "inner": 11008, "parts": True},
    "dino fc1": {"columns": 4096, "inner": 1024, "bias": True, "activation": "gelu"},
    "siglip fc2": {"columns": 1152, "inner": 4304, "bias": True, "parts": True},
}


class Bench:
    """Answers with prepared trials; a candidate without one takes `slow` ms. Counts what is asked."""

    def __init__(self, trials: dict[str, Trial | Exception | list[Trial]], slow: float = 9.0) -> None:
        self.trials, self.slow, self.asked = trials, slow, []

    def __call__(self, task) -> Callable[[Candidate], Trial]:
        def trial(candidate: Candidate) -> Trial:
            self.asked.append((task.key, str(candidate)))
            found = self.trials.get(str(candidate), Trial(time_ms=self.slow, error=1e-3))
            if isinstance(found, list):
                found = found.pop(0) if len(found) > 1 else found[0]
            if isinstance(found, Exception):
                raise found
            return found

        return trial


def at(time_ms: float, error: float = 1e-3) -> Trial:
    return Trial(time_ms=time_ms, error=error)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deeper" / "times.json"


def test_the_fastest_candidate_that_is_right_is_chosen(path):
    names = [str(c) for c in DOWN.candidates(H200)]
    broken = RuntimeError("out of shared memory\nand much more")
    trials = {"torch": at(1.0), names[1]: at(0.5, error=0.3), names[2]: at(0.6, error=float("nan")), names[3]: broken, names[4]: at(0.7)}
    choice = Tuner(H200, Bench(trials), path).choose(DOWN)
    assert (choice.way, choice.tiles) == ("matmul", DOWN.candidates(H200)[4].tiles)
    assert (choice.time_ms, choice.torch_ms) == (0.7, 1.0)
    assert set(choice.refused) == {names[1], names[2], names[3]}
    assert choice.refused[names[1]] == "differs from torch by 0.3, more than 0.02"
    assert choice.refused[names[3]] == "RuntimeError: out of shared memory"
    assert choice.times_ms == {"torch": 1.0, names[4]: 0.7} | dict.fromkeys(names[5:], 9.0)


def test_torch_stays_unless_it_is_clearly_slower(path):
    names = [str(c) for c in DOWN.candidates(H200)]
    choice = Tuner(H200, Bench({"torch": at(1.0), names[1]: at(0.985)}), path).choose(DOWN)
    assert choice == Choice(way="torch", time_ms=1.0, torch_ms=1.0)
    warmed_up = Bench({"torch": [at(1.0), at(0.7)], names[1]: at(0.71)})
    assert Tuner(H200, warmed_up, path.with_name("other.json")).choose(DOWN) == Choice(way="torch", time_ms=0.7, torch_ms=0.7)


def test_a_failure_of_torch_itself_is_not_hidden(path):
    with pytest.raises(RuntimeError, match="no memory"):
        Tuner(H200, Bench({"torch": RuntimeError("no memory")}), path).choose(DOWN)


def test_choices_are_measured_once_and_kept_on_disk(path):
    first = Bench({str(DOWN.candidates(H200)[2]): at(0.1), str(DOWN.candidates(H200)[1]): ValueError("odd")})
    chosen = Tuner(H200, first, path).choose(DOWN)
    assert chosen.tiles is not None
    second = Bench({})
    again = Tuner(H200, second, path).choose(DOWN)
    assert again == chosen and (again.refused, again.times_ms) == (chosen.refused, chosen.times_ms) and not second.asked
    Tuner(H200, second, path).choose(Product(rows=601, columns=4096, inner=11008, parts=True))
    assert second.asked, "another number of rows is another product"
    assert Tuner(H200, None, path).choose(DOWN) == chosen
    assert Tuner(H200, None, path).choose(Product(rows=7, columns=64, inner=64)) == Choice()


def test_choices_that_another_process_stored_meanwhile_survive(path):
    here, there = Tuner(H200, Bench({}), path), Tuner(H200, Bench({}), path)
    other = Product(rows=1, columns=64, inner=64)
    assert not here.known and not there.known
    here.choose(DOWN)
    there.choose(other)
    assert set(Tuner(H200, None, path).known) == {DOWN.key, other.key}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"format": 1}',
        '{"format": 1, "choices": {"x": {"way": "matmul", "tiles": {"block_m": 7}}}}',
        '{"format": 1, "choices": [1]}',
        "[]",
    ],
)
def test_a_cache_that_cannot_be_read_is_named_and_measured_again(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"times\.json cannot be read"):
        Tuner(H200, Bench({}), path).choose(DOWN)
    assert set(json.loads(path.read_text())["choices"]) == {DOWN.key}


def test_times_of_older_kernels_are_forgotten(path):
    path.parent.mkdir()
    path.write_text('{"format": 0, "choices": {}}')
    bench_ = Bench({})
    Tuner(H200, bench_, path).choose(DOWN)
    assert bench_.asked


def test_without_a_gpu_everything_is_torchs():
    tuner = Tuner.for_device(torch.device("cpu"))
    assert tuner.choose_all([DOWN, Product(rows=1, columns=64, inner=64)]) == [Choice(), Choice()]
    assert Tuner.for_device(torch.device("cuda"), enabled=False).choose(DOWN) == Choice()


def test_the_cache_lies_where_the_platform_keeps_caches(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    path = default_path(A100)
    assert path.parent == Path("/caches/vla_oft")
    assert path.name.startswith(f"gemm-NVIDIA-A100-SXM4-40GB-torch{torch.__version__}-triton")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path(A100).parent == Path.home() / ".cache" / "vla_oft"


@pytest.mark.parametrize("machine", [H200, A100], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("kind", ["dense", "fp8", "int8-dynamic", "int8", "int4"])
@pytest.mark.parametrize("rows", [56, 343, 600, 1150])
def test_every_product_of_the_models_has_a_few_candidates_that_fit(rows, kind, machine):
    for name, shape in SHAPES.items():
        if kind == "int4" and name.startswith(("dino", "siglip")):
            continue
        candidates = Product(rows=rows, kind=kind, **shape).candidates(machine)
        assert candidates[0] == Candidate(way="torch")
        if kind == "fp8" and machine is A100:
            assert len(candidates) == 1, "no float8 before sm_89"
            continue
        assert 4 <= len(candidates) <= MAX_TILES + 3 and len(set(candidates)) == len(candidates)
        for tiles in (c.tiles for c in candidates[1:]):
            assert not (machine is A100 and (tiles.tma or tiles.specialized))
            assert tiles.splits == 1 or shape.get("parts")


def test_tiles_that_fill_the_last_wave_are_preferred():
    shape = Shape(rows=600, columns=4096, inner=4096)
    busy, idle = (estimated_seconds(shape, H200, geometry, 1) for geometry in ((128, 128, 32), (128, 128, 0)))
    assert busy < 0.7 * idle, "one wave of 130 tiles against two of 80"
    best = Product(rows=600, columns=4096, inner=4096).candidates(H200)[1].tiles
    assert best is not None and best.width == 160


def test_products_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="activation='swiglu' with bias=True"):
        Product(rows=1, columns=64, inner=64, bias=True, activation="swiglu")
    with pytest.raises(ValueError, match="a norm takes plain sums only"):
        Product(rows=1, columns=64, inner=64, parts=True, activation="gelu")


def test_keys_tell_products_and_attentions_apart():
    tasks = [Product(rows=2, columns=64, inner=32), Product(rows=2, columns=64, inner=32, bias=True)]
    tasks += [
        Product(rows=2, columns=64, inner=32, kind="fp8", quantize=torch.float8_e4m3fn),
        Product(rows=2, columns=64, inner=32, kind="fp8"),
    ]
    tasks += [Product(rows=2, columns=64, inner=32, activation=a) for a in ("gelu", "swiglu")]
    attention = {"batch": 1, "heads": 4, "kv_heads": 2, "rows": 3, "keys": 3, "head_dim": 8}
    tasks += [Attention(**attention), Attention(**attention, masked=True), Attention(**attention, causal=True)]
    assert len({task.key for task in tasks}) == len(tasks)


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    pytest.importorskip("triton")
    with interpreter() as call:
        yield call


SMALL, GROUP = Tiles(block_m=16, block_n=32, block_k=32), Tiles(block_m=16, block_n=32, block_k=128)
TASKS = [
    Product(rows=20, columns=96, inner=128, bias=True),
    Product(rows=20, columns=96, inner=128, bias=True, activation="gelu"),
    Product(rows=20, columns=96, inner=128, activation="swiglu"),
    Product(rows=20, columns=96, inner=128, parts=True),
    Product(rows=20, columns=96, inner=128, kind="int8-dynamic", bias=True, activation="gelu", quantize=torch.int8),
    Product(rows=20, columns=96, inner=128, kind="int8-dynamic", activation="swiglu", quantize=torch.int8),
    Product(rows=20, columns=96, inner=128, kind="int8", bias=True, activation="gelu"),
    Product(rows=20, columns=96, inner=128, kind="int4", parts=True),
    Product(rows=20, columns=96, inner=128, kind="int4", activation="swiglu"),
]


def trials_of(task: Product, candidates: list[Candidate]) -> list[tuple[Trial, int]]:
    """In the interpreter's process: the trials of a task, and how many sets of operands its timer was given."""
    copies = []

    def timer(run, candidate, count) -> float:
        copies.append(count)
        run(candidate, count - 1)
        return 1.0

    trial = bench(task, DEVICE, ops.TORCH, cache_bytes=20_000, timer=timer)
    return list(zip([trial(c) for c in candidates], copies, strict=True))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.key)
def test_all_ways_of_a_product_agree(call, task):
    tiles = GROUP if task.kind == "int4" else SMALL
    candidates = [Candidate(way="matmul", tiles=tiles)]
    if task.parts:
        candidates += [Candidate(way="matmul", tiles=Tiles(**{**tiles.as_dict(), "splits": 2}))] if task.kind != "int4" else []
    if task.activation == "swiglu" and task.kind not in ("int8", "int4"):
        candidates += [Candidate(way="gated", tiles=tiles)]
    trials, _ = call(trials_of, task, [Candidate(way="torch"), *candidates])
    assert trials[0][0].error == 0
    for (trial, copies), candidate in zip(trials[1:], candidates, strict=True):
        assert trial.error <= task.tolerance, candidate
        assert copies == (5 if task.kind == "int8-dynamic" else 3), "copies of the weight fill the cache three times"


def forgetful_trial(task: Product) -> Trial:
    """A kernel that forgets one value."""
    from vla_oft.engine.kernels import gemm

    whole = gemm.matmul
    gemm.matmul = lambda x, *args, **kwargs: whole(x, *args, **kwargs).index_put_(
        (torch.tensor(3, device=x.device), torch.tensor(5, device=x.device)), torch.zeros((), dtype=x.dtype, device=x.device)
    )
    try:
        return bench(task, DEVICE, ops.TORCH, 0, timer=lambda *_: 1.0)(Candidate(way="matmul", tiles=SMALL))
    finally:
        gemm.matmul = whole


def test_one_missing_value_is_enough_to_be_refused(call):
    task = Product(rows=20, columns=96, inner=128)
    trial, _ = call(forgetful_trial, task)
    assert trial.error > task.tolerance


@pytest.mark.parametrize("rows,masked", [(5, False), (5, True), (16, True)])
def test_attention_through_torchs_own_choice_is_its_own_reference(rows, masked):
    task = Attention(batch=2, heads=4, kv_heads=2, rows=rows, keys=16, head_dim=8, dtype=torch.float32, masked=masked)
    as_expected = lambda run, candidate, copies: float(run(candidate, 0).shape == (2, 4, rows, 8))  # noqa: E731
    trial = bench(task, torch.device("cpu"), ops.TORCH, 0, timer=as_expected)
    assert trial(Candidate(way="torch")) == Trial(time_ms=1.0, error=0.0)
    assert [c.way for c in task.candidates(H200)] == ["torch", "flash", "cudnn", "efficient"]
