"""Metrics arrive in TensorBoard, Weights & Biases and trackio, also after a resume, and no failure there stops a training."""

import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest

from vla_oft.train import sinks
from vla_oft.train.sinks import GIVE_UP, Patient, TensorBoard, Trackio, Wandb

TRAIN = {"name": "a run", "lr": 1e-3, "datasets": [{"name": "demos", "path": "x"}], "stop": None}


def record(config: TensorBoard | Wandb | Trackio, run: Path, start: int, count: int) -> None:
    """Rows start + 1 ... start + count."""
    run.mkdir(exist_ok=True)
    sink = sinks.open_sink(config, run, TRAIN, start)
    assert sink is not None
    for step in range(start + 1, start + count + 1):
        sink.write(step, {"loss": 1 / step, "validation_l1_by_dim/x": 0.5, "samples_per_s": 10.0})
    sink.close()


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    record(TensorBoard(), tmp_path / "run", 0, 5)
    record(TensorBoard(), tmp_path / "run", 3, 5)  # steps 4 and 5 are trained again
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"train/loss", "validation/l1_by_dim/x", "speed/samples_per_s"}
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(s, pytest.approx(1 / s)) for s in range(1, 9)]
    text = found.Tensors("train.json/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lr": 0.001' in text


def test_wandb_continues_the_same_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = Wandb(mode="offline", group="a group", tags=("one", "two"), notes="some notes")
    record(config, tmp_path / "run", 0, 5)
    record(config, tmp_path / "run", 3, 5)
    state = json.loads((tmp_path / "run" / "wandb.json").read_text())
    first, second = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{state['id']}.wandb"))
    assert b"train/loss" in first.read_bytes() and b"some notes" in first.read_bytes() and b"two" in first.read_bytes()
    assert state["sent"] == 8
    assert second.read_bytes().count(b"train/loss") < first.read_bytes().count(b"train/loss"), "steps 4 and 5 are not sent again"


def test_trackio_continues_the_same_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "db", raising=False)
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "db", raising=False)
    for _, (start, count) in enumerate([(0, 5), (3, 5)]):
        record(Trackio(project="vla-oft-tests"), tmp_path / "run", start, count)
    (database,) = (tmp_path / "db").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [step for _, step, _ in rows] == list(range(1, 9))
    assert {name for name, _, _ in rows} == {f"run-{json.loads((tmp_path / 'run' / 'trackio.json').read_text())['id']}"}
    assert json.loads(rows[0][2]) == {"train/loss": 1.0, "validation/l1_by_dim/x": 0.5, "speed/samples_per_s": 10.0}


@pytest.mark.parametrize("config", [Wandb(), Trackio()])
def test_a_missing_package_is_named_before_the_training(config, tmp_path, monkeypatch):
    package = type(config).__name__.lower()
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"pip install {package}; or set sink=null"):
        sinks.check(config)
    (tmp_path / package).mkdir()  # what an earlier run has left behind is no package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        sinks.open_sink(config, tmp_path, TRAIN, 0)


def test_no_sink_is_a_choice(tmp_path):
    sinks.check(None)
    assert sinks.open_sink(None, tmp_path, TRAIN, 0) is None
    assert not list(tmp_path.iterdir())


def test_a_sink_that_cannot_start_says_so_before_the_training(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="TensorBoard cannot start: .*sink=null"):
        sinks.open_sink(TensorBoard(), tmp_path, TRAIN, 0)


class Failing:
    """A service whose network comes and goes."""

    def __init__(self) -> None:
        self.up, self.tried, self.seen = True, 0, []

    def write(self, step: int, values: dict[str, float]) -> None:
        self.tried += 1
        if not self.up:
            raise ConnectionError("no route to host")
        self.seen.append(step)

    def close(self, *, failed: bool = False) -> None:
        raise ConnectionError("still no route")


def test_a_service_that_fails_is_reported_once_and_tried_again(capsys):
    service = Failing()
    sink = Patient("Wandb", service)
    for step in range(6):
        service.up = step not in (1, 2, 4)
        sink.write(step, {"loss": 1.0})
    sink.close()
    assert service.seen == [0, 3, 5]
    shown = capsys.readouterr().err
    assert shown.count("warning") == 1 and "Wandb failed and may lack rows (no route to host); the training goes on" in shown


def test_a_service_that_is_gone_is_left_alone():
    service = Failing()
    service.up = False
    sink = Patient("Wandb", service)
    for step in range(3 * GIVE_UP):
        sink.write(step, {"loss": 1.0})
    assert service.tried == GIVE_UP
    service, count = Failing(), 5 * GIVE_UP
    sink = Patient("Wandb", service)
    for step in range(count):
        service.up = step % (GIVE_UP - 1) == 0
        sink.write(step, {"loss": 1.0})
    assert service.tried == count, "it came back in time, again and again"


def test_ctrl_c_is_no_failure_of_the_service():
    class Interrupted(Failing):
        def write(self, step: int, values: dict[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Patient("Wandb", Interrupted()).write(1, {})
