"""`vla-oft data ...` as a user meets it: one JSON object, one line for each mistake, the same reading options everywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.unit.demonstrations import write
from vla_oft import cli, cli_data
from vla_oft.cli_reading import Reading
from vla_oft.data.base import ReadOptions, open_source
from vla_oft.statistics import load_statistics


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vla_oft", "data", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=300)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Commands in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vla-oft", "data", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_help_lists_every_command_with_one_line(tmp_path):
    lines = run("--help", cwd=tmp_path).stdout.splitlines()
    for name in cli_data.COMMANDS:
        line = next(line for line in lines if f"• {name} " in line)
        assert len(line.split("•")[1].split()) > 4 and line.rstrip(" │").endswith(".")


@pytest.mark.parametrize("command", ["inspect", "stats", "convert", "replay"])
def test_every_command_reads_with_the_same_options(tmp_path, command):
    text = run(command, "--help", cwd=tmp_path).stdout
    for name in Reading.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text


def test_options_reach_the_reader():
    reading = Reading(cameras="front=image, wrist=wrist_image", colour_order="bgr", fps=5, split="val", skip_bad=True, every=2)
    expected = ReadOptions(cameras=(("front", "image"), ("wrist", "wrist_image")), colour_order="bgr", fps=5, split="val", skip_bad=True)
    assert reading.options() == expected and reading.filters().every == 2
    assert reading.named() == {
        "cameras": "front=image, wrist=wrist_image", "colour_order": "bgr", "fps": 5, "split": "val", "skip_bad": True, "every": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", "demos", "--out", "page.txt"], "page page.txt must be an .html file"),
        (["stats", "nowhere"], "nowhere does not exist"),
        (["stats", "demos", "--robot", "tricycle"], "unknown robot 'tricycle'; known: aloha"),
        (["stats", "demos", "--robot", "tabletop"], "has 3 state and 2 action dimensions, robot 'tabletop' has 8 state and 7 action"),
        (["stats", "demos", "--layout", "rlds"], "layout='rlds' is one of a robot's: name the robot, too"),
        (["stats", "demos", "--cameras", "front"], "cameras='front': write NAME=DATASET'S NAME"),
        (["stats", "demos", "--cameras", "front=top"], "has no camera top; it has front, wrist"),
        (["stats", "demos", "--episodes", "7"], "episodes='7': '7' is no range of 0..2"),
        (["stats", "demos", "--every", "0"], "every=0 must be at least 1"),
        (["stats", "demos", "--out", "demos"], "output demos exists; choose another file"),
        (["stats", "demos", "--out", "no/where.json"], "there is no folder no; create it first"),
        (["convert", "demos", "demos"], "output demos exists and is not empty"),
        (["convert", "demos", "out", "--crf", "52"], "crf=52 must lie between 0 (best) and 51"),
        (["convert", "demos", "out", "--workers", "-1"], "workers=-1 must be 0 (this process) or more"),
        (["convert", "demos", "out", "--fps", "30"], "info.json says fps=10, the options fps=30"),
        (["replay", "demos"], "episode 0: no suite is recorded"),
        (["replay", "demos", "--record", "1"], "record=1 films the first episodes into a folder: give out"),
        (["replay", "demos", "--every", "2"], "a replay needs every step that was recorded"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(here, tmp_path, arguments, message):
    write(tmp_path / "demos", (6, 5, 4))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = here(*arguments)
    assert code == 2 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and err.splitlines()[-1] == errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_statistics_are_exact_and_written_as_training_reads_them(here, tmp_path):
    write(tmp_path / "demos")
    source = open_source(tmp_path / "demos")
    code, out, _ = here("stats", "demos", "--out", "dataset_statistics.json", "--json")
    assert code == 0 and out.count("\n") == 1
    document = json.loads(out)
    actions = np.concatenate([source.actions(e) for e in range(3)]).astype(np.float64)
    found = document["statistics"]["demos"]["action"]
    np.testing.assert_allclose(found["q01"], np.quantile(actions, 0.01, axis=0))
    np.testing.assert_allclose(found["q99"], np.quantile(actions, 0.99, axis=0))
    assert found["mask"] == [True, False], "the recording knows its robot"
    assert (document["num_episodes"], document["num_frames"], document["skipped"]) == (3, 30, [])
    assert load_statistics(tmp_path / "dataset_statistics.json")["demos"].to_dict() == document["statistics"]["demos"]
    table = here("stats", "demos", "--episodes", "1")[1]
    assert "1 episodes, 5 frames" in table and "1*" in table and "not normalised" in table


@pytest.mark.shared
def test_statistics_of_the_sample_are_those_of_its_data(here, shared):
    document = json.loads(here("stats", str(shared / "formats" / "lerobot_v3_sample"), "--json")[1])
    state = next(iter(document["statistics"].values()))["proprio"]
    assert (round(state["q01"][0], 6), round(state["q99"][0], 6)) == (0.0035, 2.1365)
    assert "x  " in here("stats", str(shared / "formats" / "lerobot_v3_sample"))[1].replace("0  x", "x  "), "dimensions have names"


@pytest.mark.shared
def test_statistics_in_a_robots_units(here, shared):
    path = str(shared / "formats" / "libero_hdf5_sample")
    own, robots = (json.loads(here("stats", path, "--json", *more)[1]) for more in ([], ["--robot", "libero"]))
    own, robots = (next(iter(document["statistics"].values()))["action"] for document in (own, robots))
    assert (own["min"][6], own["max"][6]) == (-1.0, 1.0) and (robots["min"][6], robots["max"][6]) == (0.0, 1.0)
    assert own["mask"][6] is True and robots["mask"][6] is False


def test_converting_reports_what_was_written(here, tmp_path):
    write(tmp_path / "demos")
    code, out, _ = here("convert", "demos", "copy", "--images", "--workers", "0", "--episodes", "2,1", "--json")
    document = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (document["num_episodes"], document["num_frames"], document["comparison"]["max_error"]) == (2, 19, 0)
    assert open_source(tmp_path / "copy").recording["provenance"]["converted_from"]["options"] == {"episodes": "2,1"}
    code, out, _ = here("convert", "copy", "again", "--workers", "0")
    assert code == 0 and out.startswith("again: 2 episodes, 19 steps, 2 cameras; ") and "bit for bit" in out


def test_what_is_skipped_is_listed(here, tmp_path):
    write(tmp_path / "demos", data_files_size_in_mb=0)
    files = sorted((tmp_path / "demos" / "data").rglob("*.parquet"))
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:200])
    assert here("stats", "demos")[0] == 2
    code, out, err = here("stats", "demos", "--skip-bad", "--json")
    document = json.loads(out)
    assert code == 0 and document["num_episodes"] == 2 and len(document["skipped"]) == 1
    assert files[1].name in document["skipped"][0] and f"skipped {document['skipped'][0]}" in err.splitlines()
    document = json.loads(here("convert", "demos", "copy", "--skip-bad", "--workers", "0", "--json")[1])
    assert document["num_episodes"] == 2 and len(document["skipped"]) == 1


def test_inspecting_prints_json_or_writes_a_page(here, tmp_path):
    write(tmp_path / "demos")
    code, out, _ = here("inspect", "demos", "--json")
    assert code == 0 and json.loads(out)["episodes"] == 3 and out.count("\n") == 1
    code, out, _ = here("inspect", "demos", "--out", "page.html")
    assert code == 0 and "demos" in out and "<html" in (tmp_path / "page.html").read_text()[:300].lower()
