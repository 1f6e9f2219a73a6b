import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vla_oft.evaluate import reading
from vla_oft.evaluate.latency import Query, summarize
from vla_oft.evaluate.report import ActionPlot, Media, Report, SuccessRow, Tile, read_metrics, render, write_report
from vla_oft.evaluate.results import Results, Trial
from vla_oft.evaluate.success import Rate
from vla_oft.evaluate.table import print_results
from vla_oft.evaluate.tally import tally
from vla_oft.plots import Series, chart, log_ticks, number, smooth, thin, ticks


def trial(seed=0, success=True, condition="normal", **changes):
    values = {
        "suite": "table",
        "family": "touch",
        "condition": condition,
        "seed": 1_000_000_000 + seed,
        "task": "touch the red block",
        "instruction": "touch the red block",
        "success": success,
        "chosen": "red" if success else None,
        "correct": True if success else None,
        "chose_original": False if condition == "swapped" else None,
        "steps": 20,
        "attempts": 1,
        "sim_error": None,
    }
    return Trial(**{**values, **changes})


def results(*trials, **changes):
    queries = (Query(8, 500.0), *(Query(8, 40.0 + i) for i in range(11)))
    values = {
        "config": {"suite": "table", "trials": 20},
        "trials": trials,
        "queries": queries,
        "versions": {"numpy": "2.0"},
        "wall_s": 12.5,
    }
    return Results(**{**values, **changes})


def printed(r, width=100):
    screen = Console(file=io.StringIO(), width=width)
    print_results(r, screen)
    return screen.file.getvalue()


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.replace("\N{NO-BREAK SPACE}", " ")))


@pytest.fixture
def full_report(tmp_path):
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "strip.png")
    (tmp_path / "film.mp4").write_bytes(b"not really a film")
    rows = [{"step": s, "loss": 1.0 / (s + 1), "action_l1": 0.5, "lr": 1e-4} for s in range(0, 100, 2)]
    predicted = np.random.default_rng(0).normal(size=(30, 2))
    return Report(
        title="Touching <blocks>",
        lead="60 demonstrations",
        tiles=(Tile(value="73 %", label="success"),),
        reading=("It listens.",),
        success=(
            SuccessRow(
                group="As instructed", label="table/touch", success=Rate(37, 50), correct=Rate(40, 44), mean_steps=31.4, sim_errors=2
            ),
        ),
        metrics=tuple(rows),
        actions=(ActionPlot(title="Episode 3", names=("x", "gripper"), predicted=predicted, expert=predicted + 0.25),),
        media=(
            Media(path=tmp_path / "film.mp4", caption="touch the red block", verdict="success", good=True),
            Media(path=tmp_path / "strip.png", caption="a strip"),
        ),
        timing={"collect": 30.0, "train": 90.0},
        facts={"Versions": {"numpy": "2.4.6"}},
        command="vla-oft quickstart --out here",
    )


def test_a_report_contains_the_numbers_it_was_given(full_report):
    text = text_of(render(full_report))
    for expected in (
        "73 %",
        "74 % (37/50), 60-84 %",
        "40/44, 79-96 %",
        "31",
        "2 broken by the simulator; as failures 37/52, 58-82 %",
        "0.250",
        "90.0 s",
        "75 %",
        "2.4.6",
        "It listens.",
    ):
        assert expected in text, expected
    assert "vla-oft quickstart --out here" in text


def test_a_report_needs_nothing_from_elsewhere_and_escapes_its_text(full_report, tmp_path):
    page = write_report(tmp_path / "new" / "report.html", full_report).read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    sources = re.findall(r'(?:src|href|poster)="([^"]{0,30})', page)
    assert len(sources) == 2
    assert all(s.startswith("data:") for s in sources)
    assert "Touching &lt;blocks&gt;" in page
    assert "<blocks>" not in page


def test_empty_parts_leave_no_headings():
    page = render(Report(title="Nothing yet"))
    assert "<h2>" not in page
    assert "Nothing yet" in page


def test_media_beyond_the_limit_are_named_not_embedded(full_report, tmp_path):
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(6_000_000))
    page = render(replace(full_report, media=(Media(path=large, caption="too large"), *full_report.media)))
    assert len(page) < 1_000_000
    assert "Left out to keep this page small: large.mp4" in page
    assert page.count("<figure") == 2


def test_media_of_an_unknown_kind_are_refused(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF")
    with pytest.raises(ValueError, match=r"a\.gif"):
        render(Report(title="t", media=(Media(path=tmp_path / "a.gif", caption="c"),)))


def test_metrics_survive_a_line_cut_off_by_a_kill(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == ({"step": 1, "loss": 2.0},)


def test_a_loss_that_became_nan_leaves_a_gap():
    drawn = chart([Series(x=np.arange(6), y=np.array([1, 2, np.nan, np.nan, 3, 4.0]))], label="loss")
    assert drawn.count("<polyline") == 2
    assert "nan" not in drawn
    assert "no finite values" in chart([Series(x=np.arange(2), y=np.full(2, np.nan))], label="loss")


def test_axes_have_round_numbers():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(-0.13, 0.11, 4) == [-0.1, 0.0, 0.1]
    assert [round(10**t, 6) for t in log_ticks(-1, 0.5)] == [0.1, 0.2, 0.5, 1.0, 2.0]
    assert [number(v) for v in (0, 0.0005, 0.25, 1500, 200000)] == ["0", "5.0e-4", "0.25", "1500", "2.0e5"]


def test_smoothing_keeps_constants_and_thinning_keeps_size_in_check():
    np.testing.assert_allclose(smooth(np.full(9, 3.0), 5), 3.0)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 6.0]), 3), [1.5, 3.0, 4.5])
    assert len(thin(Series(x=np.arange(100_000), y=np.arange(100_000))).x) <= 400


def test_action_plots_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="ActionPlot"):
        ActionPlot(title="t", names=("x",), predicted=np.zeros((3, 1)), expert=np.zeros((4, 1)))


def test_the_first_query_is_kept_out_of_the_percentiles():
    speed = summarize([Query(8, 900.0), Query(8, 40.0), Query(4, 60.0)])
    assert speed is not None
    assert (speed.first_ms, speed.p50_ms, speed.max_batch, speed.queries) == (900.0, 50.0, 8, 3)
    assert summarize([]) is None


def normal(successes, episodes):
    return [trial(i, i < successes) for i in range(episodes)]


def other(condition, successes, episodes, **changes):
    return [trial(i, i < successes, condition, **changes) for i in range(episodes)]


def test_sentences_claim_a_difference_only_where_intervals_part():
    clear = reading.reading(results(*normal(18, 20), *other("blind", 4, 20)))
    unclear = reading.reading(results(*normal(7, 10), *other("blind", 4, 10)))
    assert any("words removed at test time" in line and "hangs on the words" in line for line in clear)
    assert any("trained without words would do is another question" in line for line in clear)
    assert any("does not show that it uses the words" in line for line in unclear)
    assert any("18 of 20" in line and "70-97 %" in line for line in clear)


def test_sentences_tell_listening_from_habit_and_from_doing_nothing():
    listens = reading.reading(results(*normal(18, 20), *other("swapped", 18, 20)))
    habit = reading.reading(results(*normal(18, 20), *other("swapped", 0, 20, chosen="red", correct=False, chose_original=True)))
    idle = reading.reading(results(*normal(0, 20), *other("swapped", 0, 20)))
    assert any("it follows the words" in line for line in listens)
    assert any("habit, not the words" in line for line in habit)
    assert any("chose no object at all" in line for line in idle)


def test_broken_trials_and_early_stops_are_said_out_loud():
    lines = reading.reading(results(trial(0), trial(1, None, correct=None, sim_error="gone"), stopped="KeyboardInterrupt: "))
    assert any("simulator broke in 1 trials" in line for line in lines)
    assert any("as instructed would be 1 of 2 (9-91 %)" in line for line in lines)
    assert any("stopped early: KeyboardInterrupt" in line for line in lines)


def test_lost_trials_show_the_worst_case_everywhere():
    r = results(*normal(8, 10), *[trial(20 + i, None, correct=None, sim_error="gone") for i in range(2)])
    assert r.score().worst_case == Rate(8, 12)
    assert r.to_json()["worst_case"]["rate"] == r.to_json()["conditions"]["normal"]["overall"]["worst_case"]["rate"] == 8 / 12
    shown = printed(r)
    assert "80 % (8/10)" in shown
    assert re.search(r"2 simulator errors as failures .* 67 % \(8/12\) .* 39-86 %", shown)
    assert "simulator errors" not in printed(results(*normal(8, 10)))


def test_latency_is_printed_with_its_batch_size():
    full = printed(results(*normal(8, 10)), width=200)
    assert "latency of a query, batch of 8: P50 45.0 ms, P95 49.5 ms, P99 49.9 ms (12 queries; the first took 500 ms)" in full
    mixed = printed(results(*normal(8, 10), queries=(Query(8, 40.0), Query(2, 20.0))), width=200)
    assert "batches of up to 8, 5.0 on average" in mixed
    assert "latency" not in printed(results(*normal(8, 10), queries=()))


def test_results_become_rows_tiles_and_a_terminal_table():
    r = results(*normal(15, 20), *[replace(t, family="push") for t in normal(5, 20)], *other("expert", 20, 20))
    rows = reading.success_rows(r)
    assert [(row.label, row.success, row.total) for row in rows[:3]] == [
        ("table/touch", Rate(15, 20), False),
        ("table/push", Rate(5, 20), False),
        ("all tasks", Rate(20, 40), True),
    ]
    assert rows[-1].role == "ceiling"
    assert [t.value for t in reading.tiles(r)] == ["50 %", "100 %", "45 ms"]
    assert "50 % (20/40)" in printed(r)
    assert "- The policy succeeded in 20 of 40 episodes." in printed(r)


def test_progress_off_a_terminal_is_a_line_now_and_then():
    now_s = iter(np.arange(0, 100, 2.0))
    screen = Console(file=io.StringIO(), width=120)
    with tally(20, screen, clock=lambda: float(next(now_s))) as count:
        for i in range(20):
            count(trial(i, None if i == 3 else i % 2 == 0))
    lines = screen.file.getvalue().splitlines()
    assert 2 <= len(lines) <= 8
    assert lines[-1].startswith("evaluating: 20/20 episodes")
    assert "success 10/19, 1 simulator errors" in lines[-1]
