"""`vla-oft eval` as a function: a real tiny checkpoint in the embedded simulator."""

import json
import re
from importlib.util import find_spec

import pytest

from tests.tiny import tiny_policy
from vla_oft.evaluate.command import EvalRequest, run
from vla_oft.recipes.nano_finetune import BASE

pytestmark = pytest.mark.skipif(
    not (find_spec("mujoco") and find_spec("gym_aloha")), reason="pip install 'vla-oft[sim]'; pip install --no-deps gym-aloha"
)


def request(checkpoint, out, **changes):
    values = {
        "checkpoint": str(checkpoint),
        "suite": "tabletop/touch",
        "trials": 1,
        "seed": 0,
        "num_envs": 1,
        "execute_steps": None,
        "controls": (),
        "record": 0,
        "out": out,
        "device": "cpu",
    }
    return EvalRequest(**{**values, **changes})


def test_an_evaluation_leaves_a_report_and_prints_its_latency(tmp_path, capsys):
    tiny_policy().save(tmp_path / "policy")
    run(request(tmp_path / "policy", tmp_path / "eval", camera_size=64))
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "Closed-loop evaluation: tabletop/touch" in page and "--camera-size 64" in page
    assert "latency of a query, batch of 1: P50" in capsys.readouterr().out
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["config"]["camera_size"] == 64 and summary["latency"]["max_batch"] == 1


def test_a_compiled_policy_is_evaluated_and_the_record_says_so(tmp_path, capsys):
    run(request(BASE, tmp_path / "eval", precision="bf16", gate=True))
    assert re.search(r"bf16: actions are \d\.\de-03 from those in float32", capsys.readouterr().out)
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["config"]["precision"] == "bf16"
    assert "--precision bf16" in (tmp_path / "eval" / "report.html").read_text()


def test_a_precision_that_a_policy_cannot_bear_is_refused_before_any_episode(tmp_path):
    tiny_policy().save(tmp_path / "policy")  # random weights enlarge every rounding
    with pytest.raises(ValueError, match="precision='int4': actions are .* choose a more precise one"):
        run(request(tmp_path / "policy", tmp_path / "eval", precision="int4", gate=True, camera_size=64))
    assert not (tmp_path / "eval").exists()


def test_an_unknown_precision_is_named(tmp_path):
    with pytest.raises(ValueError, match="precision='fp9' is unknown; choose one of fp32, bf16"):
        run(request(BASE, tmp_path / "eval", precision="fp9"))
