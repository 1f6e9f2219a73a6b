"""`metrics.jsonl` says what happened, exactly, also after a resume, on several processes, and when numbers break or the disk is full."""

import errno
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from vla_oft.train.tracking import Tracker, append_row, flat, read_rows

VALIDATION = {"validation_action_l1": 0.5, "validation_action_l1_first": 0.4, "validation_l1_by_dim": [0.1, 0.2]}
TIMES = {"samples_per_s": 0, "time_s": 0, "data_wait": 0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.closed: list[bool] = []

    def write(self, step: int, values: dict) -> None:
        self.rows.append((step, values))

    def close(self, *, failed: bool = False) -> None:
        self.closed.append(failed)


def tracker(path: Path | None, **options) -> Tracker:
    return Tracker(path, **{"log_every": 2, "total_steps": 6, "batch_size": 8, "start_step": 0, **options})


def add(tracker: Tracker, step: int, wait_s: float = 0.0, validation=None, skipped: bool | None = None, **metrics: float):
    values = {name: torch.tensor(value) for name, value in {"loss": 1.0, "grad_norm": 2.0, **metrics}.items()}
    flag = None if skipped is None else torch.tensor(skipped)
    return tracker.add(step, values, lr=1e-3, wait_s=wait_s, skipped=flag, validation=validation)


# --- what a row says -------------------------------------------------------------------------------------------------------------------


def test_a_row_is_the_mean_of_the_steps_since_the_last_one(tmp_path):
    run, clock = tmp_path / "metrics.jsonl", Clock()
    t = tracker(run, clock=clock)
    for step, loss in enumerate([1.0, 2.0, 4.0, 6.0], start=1):
        clock.now += 0.5
        row = add(t, step, loss=loss, wait_s=0.1, skipped=step == 1)
        assert (row is None) == (step % 2 == 1)
    first, second = read_rows(run)
    assert (first["step"], first["loss"], first["grad_norm"], first["lr"], first["skipped"]) == (2, 1.5, 2.0, 1e-3, 1)
    assert (first["samples_per_s"], first["time_s"]) == (16.0, 1.0) and first["data_wait"] == pytest.approx(0.2)
    assert (second["step"], second["loss"], second["skipped"], second["time_s"]) == (4, 5.0, 0, 2.0)
    assert second == row


def test_the_last_step_has_a_row_too(tmp_path):
    t = tracker(tmp_path / "m", log_every=4)
    assert [step for step in range(1, 7) if add(t, step)] == [4, 6]


def test_numbers_that_are_not_finite_leave_the_others_their_mean(tmp_path):
    t = tracker(tmp_path / "m")
    add(t, 1, loss=math.nan, action_l1=0.5, mask=math.nan, grad_norm=math.inf)
    row = add(t, 2, loss=3.0, action_l1=math.nan, mask=math.nan, grad_norm=1.0)
    assert row is not None and (row["loss"], row["action_l1"], row["grad_norm"]) == (3.0, 0.5, 1.0)
    assert "mask" not in row, "a metric that nobody knows is left out"


def test_a_row_is_strict_json_whatever_breaks(tmp_path):
    t = tracker(tmp_path / "m")
    add(t, 1, loss=math.nan)
    add(t, 2, loss=math.inf, validation={**VALIDATION, "validation_action_l1": math.nan, "validation_l1_by_dim": [1.0, math.inf]})
    (line,) = (tmp_path / "m").read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["loss"] is None and row["validation_action_l1"] is None and row["validation_l1_by_dim"] == [1.0, None]


def test_validation_joins_the_row_of_its_step(tmp_path):
    t = tracker(tmp_path / "m")
    assert [step for step in range(1, 7) if add(t, step, loss=float(step), validation=VALIDATION if step in (2, 3) else None)] == [
        2,
        3,
        4,
        6,
    ]
    rows = read_rows(tmp_path / "m")
    assert [(r["step"], r["loss"], r.get("validation_l1_by_dim")) for r in rows] == [
        (2, 1.5, [0.1, 0.2]),
        (3, 3.0, [0.1, 0.2]),
        (4, 4.0, None),
        (6, 5.5, None),
    ]


def test_time_that_is_no_training_does_not_slow_it_down(tmp_path):
    clock = Clock()
    t = tracker(tmp_path / "m", clock=clock)
    for step in (1, 2):
        clock.now += 1
        with t.paused():
            clock.now += 100
        row = add(t, step, wait_s=0.5)
    assert row is not None
    assert (row["samples_per_s"], row["data_wait"], row["time_s"]) == (8.0, 0.5, 202.0)


def test_adding_never_reads_from_the_device():
    t = tracker(None, device="meta")  # tensors without values: reading one is an error
    one = torch.ones((), device="meta")
    assert t.add(1, {"loss": one}, lr=1.0, wait_s=0.0, skipped=one.bool()) is None


# --- several processes -----------------------------------------------------------------------------------------------------------------


def test_every_process_has_the_same_rows(tmp_path):
    first, other = tracker(tmp_path / "m"), tracker(None)
    for step in range(1, 5):
        rows = [add(t, step, loss=1.0 / step, skipped=step == 4) for t in (first, other)]
        assert (rows[0] is None) == (rows[1] is None)
        assert rows[0] is None or {**rows[1], **TIMES} == {**rows[0], **TIMES}


def test_all_processes_but_the_first_are_silent(tmp_path, capsys):
    t = tracker(None)
    add(t, 1)
    add(t, 2, validation=VALIDATION)
    t.say("hello")
    t.close()
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


# --- resuming --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_a_resumed_run_writes_the_rows_of_an_uninterrupted_one(tmp_path, cut):
    losses = [0.1, 0.7, math.nan, 0.3, 1.1, 0.9]

    def steps(t: Tracker, first: int, last: int) -> None:
        for step in range(first, last + 1):
            add(t, step, loss=losses[step - 1], skipped=step in (1, 4))

    steps(tracker(tmp_path / "whole", log_every=3), 1, 6)
    killed = tracker(tmp_path / "resumed", log_every=3)
    steps(killed, 1, cut)
    state = killed.state_dict()
    steps(killed, cut + 1, 6)
    (tmp_path / "resumed").open("a").write('{"step": 7, "lo')  # a kill in the middle of a row
    resumed = tracker(tmp_path / "resumed", log_every=3, start_step=cut)
    resumed.load_state_dict(state)
    steps(resumed, cut + 1, 6)
    whole, found = ([{**row, **TIMES} for row in read_rows(tmp_path / name)] for name in ("whole", "resumed"))
    assert found == whole


def test_the_runs_duration_goes_on_where_it_stopped(tmp_path):
    clock = Clock()
    t = tracker(tmp_path / "m", clock=clock)
    clock.now = 100.0
    add(t, 1), add(t, 2)
    state = t.state_dict()
    later = Clock()
    resumed = tracker(tmp_path / "m", start_step=2, clock=later)
    resumed.load_state_dict(state)
    later.now = 7.0
    add(resumed, 3)
    row = add(resumed, 4)
    assert row is not None and row["time_s"] == 107.0 and row["samples_per_s"] == pytest.approx(16 / 7)


# --- what can go wrong -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk to write to: /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    t = tracker(tmp_path / "metrics.jsonl")
    add(t, 1)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        add(t, 2)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_lines_that_were_cut_off_are_left_out(tmp_path):
    append_row(tmp_path / "m", {"step": 1, "loss": 2.0})
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n{"st')
    assert [row["step"] for row in read_rows(tmp_path / "m")] == [1, 3]


# --- sinks and lines -------------------------------------------------------------------------------------------------------------------


def test_a_sink_gets_every_number_under_a_name_of_its_own(tmp_path):
    sink = Recorder()
    t = tracker(tmp_path / "m", sink=sink, names={"by_dim": ("x", "y", "grip")})
    add(t, 1)
    add(t, 2, loss=math.nan, validation={"by_dim": [0.1, math.nan, 0.3], "by_step": [1.0, 2.0]})
    ((step, values),) = sink.rows
    assert step == 2 and all(isinstance(value, float | int) for value in values.values())
    assert {k: v for k, v in values.items() if "by_" in k} == {"by_dim/x": 0.1, "by_dim/grip": 0.3, "by_step/0": 1.0, "by_step/1": 2.0}
    assert "step" not in values and values["loss"] == 1.0
    t.close(failed=True)
    t.close()
    assert sink.closed == [True]


def test_an_error_closes_the_sink_as_failed(tmp_path):
    sink = Recorder()
    with pytest.raises(ZeroDivisionError), tracker(tmp_path / "m", sink=sink):
        raise ZeroDivisionError
    with tracker(tmp_path / "m", sink=sink):
        pass
    assert sink.closed == [True, False]


def test_flat_leaves_out_what_is_not_known():
    assert flat({"step": 3, "loss": None, "lr": 0.1, "l": [None, 2.0]}, {}) == {"lr": 0.1, "l/1": 2.0}


def test_lines_say_rate_and_time_left(tmp_path, capsys):
    clock = Clock()
    t = tracker(tmp_path / "m", clock=clock, total_steps=100)
    for step in (1, 2):
        clock.now += 60
        add(t, step, action_l1=0.25, skipped=step == 1, validation=VALIDATION if step == 2 else None)
    t.say("a warning")
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("step   2/100  loss 1.0000  action L1 0.2500  grad   2.00")
    assert "0.1 samples/s" in first and "skipped 1" in first and first.endswith("ETA 1:38:00")
    assert second == "validation at step 2: action L1 0.5000, first step of a chunk 0.4000" and third == "a warning"


def test_on_a_terminal_a_line_replaces_the_one_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    t = tracker(tmp_path / "m")
    for step in range(1, 5):
        add(t, step)
    t.say("a warning")
    add(t, 5), add(t, 6)
    shown = capsys.readouterr().err
    assert shown.count("\r\x1b[2Kstep") == 3 and "\r\x1b[2Ka warning\n" in shown and shown.endswith("\n")
    lines = [part for part in shown.replace("\n", "\r\x1b[2K").split("\r\x1b[2K") if part.startswith("step")]
    assert all(len(line) < 40 for line in lines[:-1]), "a line that wraps cannot be replaced"
