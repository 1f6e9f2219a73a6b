import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.unit import demonstrations
from tests.unit.recordings import ARM, STEPS, arm
from vla_oft import robots
from vla_oft.data.adapt import for_robot
from vla_oft.data.base import ReadOptions, open_source
from vla_oft.inspection import Inspection, Options, inspect_source, run
from vla_oft.inspection.blocks import blocks
from vla_oft.inspection.histograms import GridHistogram, SizeHistogram
from vla_oft.inspection.page import render
from vla_oft.inspection.text import print_inspection, sparkline
from vla_oft.plots import Series, chart, histogram

# --- what is measured -----------------------------------------------------------------------------------------------------------------


def test_numbers_are_exact():
    source = arm()
    found = inspect_source(source)
    values = np.concatenate(source.action_arrays).astype(np.float64)
    for d in found.action:
        column = values[:, d.index]
        expected = [column.min(), column.max(), column.mean(), column.std(), *np.quantile(column, [0.01, 0.99])]
        np.testing.assert_allclose([d.min, d.max, d.mean, d.std, d.q01, d.q99], expected, rtol=1e-9, atol=1e-12)
        assert d.histogram is not None
        np.testing.assert_array_equal(d.histogram.counts[:-1], np.histogram(column, d.histogram.edges)[0][:-1])
        assert sum(d.histogram.counts) == len(column)
    assert found.action[6].values == ((-1.0, (column < 0).sum()), (1.0, (column > 0).sum()))
    assert found.action[0].values is None


def test_sizes_lengths_and_instructions_are_counted():
    source = arm()
    source.action_arrays[1], source.state_arrays[1] = source.action_arrays[1][:31], source.state_arrays[1][:31]
    found = inspect_source(source)
    assert (found.num_episodes, found.num_frames, found.duration_s) == (6, 331, 331 / 20)
    assert (found.lengths.min, found.lengths.median, found.lengths.max) == (31, 60, 60)
    assert sum(found.lengths.histogram.counts) == 6
    bowl, drawer = found.instructions
    assert (bowl.text, bowl.episodes, bowl.frames, bowl.first, bowl.last) == ("pick up the bowl", 3, 180, 0, 4)
    assert (drawer.episodes, drawer.frames, drawer.first, drawer.last) == (3, 151, 1, 5)
    assert [(c.name, dict(c.sizes)) for c in found.cameras] == [("front", {(32, 32): 30}), ("wrist", {(32, 32): 30})]
    sampled = [source.pictures["front"][e][np.linspace(0, n - 1, 5).round().astype(int)] for e, n in enumerate(source.lengths)]
    assert found.cameras[0].brightness == pytest.approx(np.concatenate(sampled).mean())


def test_blocks_hold_whole_episodes_and_pairs_stay_within_them():
    source = arm(episodes=3, steps=5)
    (block,) = blocks(source, {})
    assert block.pairs(2, block.finite_states, block.finite_actions).tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert str(block.place(7, "x")) == "episode 1, step 2, dimension x"
    assert block.pairs(99, block.finite_states, block.finite_actions).size == 0


def test_results_do_not_depend_on_where_blocks_end(monkeypatch):
    whole = inspect_source(arm()).to_json()
    monkeypatch.setattr("vla_oft.inspection.blocks.ROWS", 1)
    pieces = inspect_source(arm()).to_json()
    assert _rounded(whole) == _rounded(pieces)


def test_histograms_grow_without_losing_a_count(rng):
    grid, parts = GridHistogram(), [rng.normal(size=50) * scale + shift for scale, shift in ((1e-6, 0.5), (1, 0), (1e4, -7), (1e-3, 3e5))]
    for part in parts:
        grid.update(part)
    found = grid.result()
    assert found is not None
    assert len(found.counts) <= 48
    edges = np.array(found.edges)
    expected = np.bincount(np.searchsorted(edges, np.concatenate(parts), side="right") - 1, minlength=len(found.counts))
    assert expected.tolist() == list(found.counts)


def test_a_histogram_of_a_constant_is_one_bin():
    for value in (0.0, 5.0, -1e30):
        grid = GridHistogram()
        grid.update(np.full(7, value))
        found = grid.result()
        assert found is not None
        assert found.counts == (7,)
        assert found.edges[0] <= value < found.edges[1]
    assert GridHistogram().result() is None


def test_sizes_are_counted_exactly_above_an_edge(rng):
    sizes, values = SizeHistogram(2), rng.exponential(size=(1000, 2)) * [1, 0]
    sizes.update(values[:400])
    sizes.update(values[400:])
    count, edge = sizes.above(0, 1.3)
    assert 1.3 <= edge <= 1.3 * 2**0.25
    assert count == (values[:, 0] >= edge).sum()
    assert np.quantile(values[:, 0], 0.95) <= sizes.quantile(0, 0.95) <= 1.2 * np.quantile(values[:, 0], 0.95)
    assert sizes.quantile(1, 0.95) == 0
    assert sizes.above(1, 1e-3)[0] == 0


# --- how it is shown ------------------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_small_and_complete(tmp_path):
    source = arm()
    source.state_arrays[3][33:, 2] += 1
    found = run(source, tmp_path / "new" / "page.html", quiet=True)
    page = (tmp_path / "new" / "page.html").read_text()
    _check_html(page)
    assert len(page) < 1_000_000
    assert page.count("data:image/jpeg;base64,") == 2 * 2 * 2, "two instructions, first and last episode, two cameras"
    text = re.sub(r"<[^>]+>", " ", page)
    for expected in ("Jumps of the state", "episode 3, step 33, dimension 2", "pick up the bowl", "Episode 3 over time", "median 60"):
        assert expected in text, expected
    assert found.problems[0].rule == "jumps"


def test_text_of_a_dataset_is_never_markup(tmp_path, capsys):
    source = arm()
    evil = '<script>alert("1")</script>\x1b[31m[red]x'
    source.name = source.format = evil
    source.path = Path("/data") / "<b>"
    source.tasks = (evil, "' onerror='1")
    source.state_names = tuple(f"{evil}{i}" for i in range(8))
    source.action_names = source.state_names[:7]
    source.pictures = {evil: source.pictures["front"], '"><img src=x>': source.pictures["wrist"]}
    source.extra_arrays = {evil: [np.zeros((STEPS, 1)) for _ in range(len(source))]}
    source.recording = {"provenance": {evil: [evil]}}
    source.skipped = (evil,)
    source.damage = {1: evil}
    source.state_arrays[3][33:, 2] += 1
    source.pictures[evil][2][20:] = source.pictures[evil][2][20]
    run(source, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    _check_html(page)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert not re.search(r"https?://|<link|@import|url\(", page)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "[red]x" in printed


def test_a_page_says_what_it_could_not_read():
    source = arm()
    found = inspect_source(source)
    source.unreadable = dict.fromkeys(range(6), "the disk is gone")
    source.pictures = {"front": source.pictures["front"], "clip.mp4": []}
    page = render(found, source)
    assert page.count("data:image/jpeg;base64,") == 4
    assert "4 could not be read: no frames of clip.mp4" in page
    assert "the disk is gone" in page


def test_histograms_show_single_outliers():
    drawn = histogram((0.0, 1.0, 2.0, 3.0), (100_000, 0, 1), label="<values>")
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([0-9.]+)"', drawn)]
    assert heights == [148.0, 1.0]
    assert "&lt;values&gt;" in drawn
    assert "no values" in histogram((0.0, 1.0), (0,), label="x")


def test_charts_mark_what_happened_when():
    drawn = chart([Series(x=np.arange(11), y=np.arange(11.0))], label="x", marks=[5], bands=[(-3.0, 1.0)])
    assert re.search(r'class="mark" x1="179.0" x2="179.0"', drawn)
    assert re.search(r'class="band" x="46.0" y="8" width="26.6"', drawn), "cut off at the axis"


def test_pictures_beyond_the_budget_are_left_out_and_counted(monkeypatch):
    monkeypatch.setattr("vla_oft.inspection.page.PICTURES_BYTES", 20_000)
    source = arm()
    page = render(inspect_source(source), source)
    shown = page.count("data:image/jpeg;base64,")
    assert 0 < shown < 8
    assert sum(len(data) for data in re.findall('data:image/jpeg;base64,([^"]+)', page)) <= 20_000 * 4 / 3 + 4 * shown
    assert f"{8 - shown} more would make this page too large" in page


def test_json_is_one_object_of_finite_numbers():
    source = arm()
    source.recording = {"provenance": {"seed": np.int64(3), "noise": float("nan"), "at": Path("/x")}}
    document = json.loads(json.dumps(inspect_source(source, ARM).to_json(), allow_nan=False))
    assert document["robot"] == "arm"
    assert document["cameras"][0]["sizes"] == [{"height": 32, "width": 32, "frames": 30}]
    assert document["provenance"] == {"seed": 3, "noise": None, "at": "/x"}
    assert document["action"][6]["values"][0][0] == -1
    assert (document["episodes"], document["frames"], document["duration_s"]) == (6, 360, 18)
    assert (document["state_dim"], document["action_dim"]) == (8, 7)


def test_the_table_is_plain_without_a_terminal_and_says_everything():
    source = arm()
    source.state_arrays[3][33:, 2] += 1
    found = inspect_source(source)
    text = _printed(found, force_terminal=False)
    assert "\x1b" not in text
    for expected in (
        "front",
        "32 x 32",
        "pick up the bowl",
        "warning: Jumps of the state",
        "increments of the state",
        "low values open it",
    ):
        assert expected in text, expected
    assert "\x1b" in _printed(found, force_terminal=True)


def test_sparklines_show_bins_that_hold_anything():
    found = inspect_source(arm()).action[6].histogram
    assert found is not None
    assert re.fullmatch(r"[▁-█] +[▁-█]", sparkline(found))
    assert sparkline(None) == ""


def test_a_page_that_cannot_be_written_is_refused_before_reading(tmp_path):
    source = arm()
    source.states = lambda episode: pytest.fail("nothing may be read")
    for out, reason in ((tmp_path / "page.txt", "html"), (tmp_path, "html"), (Path("/proc/none/page.html"), "cannot be written")):
        with pytest.raises(ValueError, match=reason):
            run(source, out, quiet=True)


def test_a_quiet_run_prints_nothing(capsys):
    run(arm(episodes=2), quiet=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    run(arm(episodes=2))
    captured = capsys.readouterr()
    assert "Dataset arm" in captured.out
    assert "inspecting" in captured.err


def test_a_recorded_dataset_is_inspected_from_disk(tmp_path):
    demonstrations.write(tmp_path / "set")
    found = run(open_source(tmp_path / "set"), tmp_path / "page.html", demonstrations.SPEC, quiet=True)
    assert (found.format, found.num_episodes, found.num_frames, found.robot) == ("lerobot", 3, 30, "pair")
    assert [i.text for i in found.instructions] == ["first task", "second task"]
    assert {c.name: dict(c.sizes) for c in found.cameras} == {"front": {(32, 32): 15}, "wrist": {(32, 32): 15}}
    assert not [p for p in found.problems if p.severity == "error"]
    _check_html((tmp_path / "page.html").read_text())


@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "format_name", "robot", "lengths", "expected"),
    [
        ("lerobot_v3_sample", "lerobot", None, [9, 12, 15], {"gripper"}),
        ("lerobot_v21_openpi_sample", "lerobot", "libero", [9, 12, 15], set()),  # its wrong rate is known
        ("rlds_sample/libero_spatial_no_noops", "rlds", "libero", [7, 9, 12, 15], {"short-episodes", "rate"}),
        ("libero_hdf5_sample", "libero_hdf5", None, [9, 12], {"gripper", "pauses", "frozen-camera"}),  # its pictures never change
        ("aloha_hdf5_sample", "aloha_hdf5", None, [10, 14], {"gripper", "rate", "frozen-camera"}),  # nor do these
    ],
)
def test_samples_of_every_format_are_inspected_without_false_alarms(shared, tmp_path, folder, format_name, robot, lengths, expected):
    aloha = {"instruction": "fold the shirt"} if format_name == "aloha_hdf5" else {}
    source = open_source(shared / "formats" / folder, ReadOptions(**aloha, cache_dir=tmp_path / "cache"))
    spec = robots.load(robot) if robot else None
    found = run(for_robot(source, spec) if spec else source, tmp_path / "page.html", spec, quiet=True)
    assert (found.format, sorted(source.lengths)) == (format_name, lengths)
    assert {p.rule for p in found.problems} == expected
    assert all(camera.frames and not camera.black.count for camera in found.cameras)
    _check_html((tmp_path / "page.html").read_text())


def test_memory_does_not_grow_with_the_number_of_steps():
    import tracemalloc

    peaks = []
    for episodes in (100, 400):
        source = arm(episodes=1, steps=200)
        source.action_arrays, source.state_arrays = source.action_arrays * episodes, source.state_arrays * episodes
        tracemalloc.start()
        inspect_source(source, options=Options(max_episodes=0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    data = 300 * 200 * 15 * 8
    assert peaks[1] - peaks[0] < 0.3 * data


# --- helpers --------------------------------------------------------------------------------------------------------------------------


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _printed(found: Inspection, force_terminal: bool) -> str:
    screen = Console(file=io.StringIO(), width=140, force_terminal=force_terminal, color_system="standard" if force_terminal else None)
    print_inspection(found, screen)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def _check_html(page: str) -> None:
    """Every tag is closed in the order in which it was opened."""
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    Checker().feed(page)
    assert open_tags == []
