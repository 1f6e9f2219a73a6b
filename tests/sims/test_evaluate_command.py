"""`vla-oft eval` as a function: a real tiny checkpoint in the embedded simulator."""

import json
from importlib.util import find_spec

import pytest

from tests.tiny import tiny_policy
from vla_oft.evaluate.command import EvalRequest, run

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
