"""`vla-oft doctor`: this machine, a run before it starts, a trained policy."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_policy
from vla_oft.doctor import checkpoint, gpus, probes, recipe
from vla_oft.doctor.command import DoctorRequest, run
from vla_oft.heads import discrete
from vla_oft.policy import Policy
from vla_oft.recipes import base
from vla_oft.vlm import llama


def verdicts(policy: Policy) -> dict[str, bool | None]:
    return {check["name"]: check["ok"] for check in checkpoint._checks(policy)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_policy().save(tmp_path / "policy")
    return tmp_path / "policy"


def test_a_sound_policy_passes(folder: Path) -> None:
    document, lines, healthy = run(DoctorRequest(target=str(folder), device="cpu"))
    assert healthy and {check["name"]: check["ok"] for check in document["checks"]} == dict.fromkeys(
        ("finite", "images", "instruction", "state", "attention", "statistics"), True
    )
    assert len(lines) == 7


def test_a_blind_policy_is_found_out() -> None:
    policy = tiny_policy()
    torch.nn.init.zeros_(policy.vlm.projector.fc1.weight)
    found = verdicts(policy)
    assert found["images"] is False and found["instruction"] is True


def test_a_deaf_policy_is_found_out() -> None:
    policy = tiny_policy()
    policy.interface.encode_prompts.style = "blind"
    found = verdicts(policy)
    assert found["instruction"] is False and found["images"] is True


def test_a_policy_that_was_trained_blind_must_not_listen() -> None:
    assert verdicts(tiny_policy(prompt_style="blind"))["instruction"] is True


def test_a_policy_that_ignores_its_state_is_found_out() -> None:
    policy = tiny_policy()
    assert policy.state_projector is not None
    torch.nn.init.zeros_(policy.state_projector.fc1.weight)
    assert verdicts(policy)["state"] is False
    assert verdicts(tiny_policy(use_state=False))["state"] is None


def test_lost_bidirectional_attention_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(tiny_policy())["attention"] is True
    whole = llama.Attention.forward

    def causal(self, x, rope, padding, _, rows, cache=None):
        return whole(self, x, rope, padding, True, rows, cache)

    monkeypatch.setattr(llama.Attention, "forward", causal)
    assert verdicts(tiny_policy())["attention"] is False


def test_autoregressive_policies_are_causal_on_purpose() -> None:
    assert verdicts(tiny_policy(head=discrete.Config(decoding="autoregressive")))["attention"] is None


def test_actions_that_are_not_finite_are_found_out() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        next(policy.action_head.parameters()).fill_(float("nan"))
    assert verdicts(policy)["finite"] is False


def test_a_policy_that_is_too_large_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.memory, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"needs up to 0\.0 GB on cpu, 0\.0 GB are free"):
        checkpoint.examine(folder)


def test_a_checkpoint_without_statistics_is_refused(folder: Path) -> None:
    (folder / "statistics.json").unlink()
    with pytest.raises(ValueError, match=r"statistics\.json"):
        checkpoint.examine(folder)


def small(*changes: str):
    chosen = base.load("debug")
    return chosen, base.override(chosen.train, base.parse_changes(list(changes)))


def test_a_recipe_is_examined_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    chosen, config = small("precision=bf16")
    document = recipe.examine(chosen, config, gpus.find("4090"), gpus=1, out=tmp_path)
    assert recipe.is_healthy(document) and document["fits"] and not document["advice"]
    assert {(row["recompute"], row["micro_batch"]) for row in document["table"]} == {
        (mode, size) for mode in ("none", "selective", "full") for size in (1, 2, 4, 8)
    }
    assert [row["micro_batch"] for row in document["table"] if row["own"]] == [8]
    assert any("RTX 4090" in line for line in recipe.lines(document))
    json.dumps(document)


def test_a_recipe_that_cannot_fit_comes_with_advice(tmp_path: Path) -> None:
    chosen, config = small("precision=bf16")
    document = recipe.examine(chosen, config, gpus.find("0.75"), gpus=1, out=tmp_path)
    assert not document["fits"] and not recipe.is_healthy(document)
    assert document["advice"] and all(entry["needed"] <= 0.75e9 for entry in document["advice"])
    assert any(line.startswith("  it would with ") for line in recipe.lines(document))


def test_gpus_without_bfloat16_are_noticed(tmp_path: Path) -> None:
    chosen, config = small("precision=bf16")
    document = recipe.examine(chosen, config, gpus.find("t4"), gpus=1, out=tmp_path)
    assert not recipe.is_healthy(document) and "bfloat16" in document["refused"][0]


def test_settings_that_cannot_run_are_refused(tmp_path: Path) -> None:
    chosen, config = small("batch_size=10")
    document = recipe.examine(chosen, config, gpus.find("80"), gpus=4, out=tmp_path)
    assert not recipe.is_healthy(document) and "10" in document["refused"][0] and document["table"] == []


def test_gpus_are_known_by_name_or_memory() -> None:
    assert gpus.find("H200").memory == 143_771 << 20
    assert gpus.find("24").memory == 24_000_000_000
    for wrong in ("gtx", "-3", "nan"):
        with pytest.raises(ValueError, match="memory in GB"):
            gpus.find(wrong)


def test_an_unknown_target_is_refused_with_the_nearest_recipe() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'debug'\?"):
        run(DoctorRequest(target="debgu"))


def test_options_of_another_target_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--gpu needs a recipe"):
        run(DoctorRequest(target=str(folder), gpu="h200"))
    with pytest.raises(ValueError, match="--set needs a recipe"):
        run(DoctorRequest(changes=("lr=1",)))


def test_the_machine_is_described_in_words_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "renderer", lambda: (None, "no driver"))
    document, lines, healthy = run(DoctorRequest(out=tmp_path / "runs"))
    assert healthy and json.loads(json.dumps(document))["disk"]["writable"] is True
    assert document["versions"]["torch"] == torch.__version__ and document["packages"]["train"]["peft"]
    assert any("simulators cannot draw: no driver" in line for line in lines)


def test_the_renderer_is_tried_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_RENDER", "print('egl')")
    assert probes.renderer() == ("egl", "")
    monkeypatch.setattr(probes, "_RENDER", "import os; os.abort()")
    assert probes.renderer() == (None, "the graphics driver ended the process (code -6)")
    monkeypatch.setattr(probes, "_RENDER", "raise ValueError('no display')")
    assert probes.renderer() == (None, "no display")


def test_lateness_is_what_the_clock_says() -> None:
    time_s = [0.0]

    def sleep(seconds: float) -> None:
        time_s[0] += seconds + 0.003

    found = probes.lateness(sleep, lambda: time_s[0], ticks=10)
    assert found["median"] == pytest.approx(0.003) and found["worst"] == pytest.approx(0.003)


def test_a_disk_is_measured_where_the_run_will_be(tmp_path: Path) -> None:
    found = probes.disk(tmp_path / "not" / "there" / "yet")
    assert found["folder"] == str(tmp_path) and found["write_bytes_per_s"] > 0
    assert found["free"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vla_oft.cli_doctor import doctor

    with pytest.raises(SystemExit) as ended:
        doctor(str(folder), json=True, device="cpu")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["healthy"] is True and printed.count("\n") == 1


def test_a_failed_test_ends_with_code_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vla_oft.cli_doctor import doctor

    monkeypatch.setattr(checkpoint, "is_healthy", lambda document: False)
    with pytest.raises(SystemExit) as ended:
        doctor(str(folder), device="cpu")
    assert ended.value.code == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the sizes of memory are read from /proc and sysconf")
def test_memory_of_the_machine_is_plausible() -> None:
    from vla_oft.doctor import machine
    from vla_oft.train.memory import free_bytes

    free, total = free_bytes(torch.device("cpu")), machine.total_memory()
    assert free is not None and total is not None and 0 < free < total
    assert np.isfinite(total)
