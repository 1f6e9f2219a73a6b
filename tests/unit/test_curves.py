"""The page of a run: what is drawn, from whatever is there, small and in one piece."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from vla_oft.train import curves
from vla_oft.train.heat import heat

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def rows(count: int, every: int = 20, validated: int = 5) -> list[dict]:
    found = []
    for number in range(1, count + 1):
        level = 0.01 + 0.4 * 0.97**number
        row = {"step": every * number, "loss": 1.2 * level, "action_l1": level, "grad_norm": 1.0, "lr": 5e-4}
        row |= {"samples_per_s": 27.0 + number % 3, "data_wait": 0.02, "time_s": 2.3 * number, "skipped": int(number == 7)}
        if number % validated == 0:
            row |= {"validation_action_l1": 1.3 * level, "validation_action_l1_first": level}
            row["validation_l1_by_dim"] = [level * (d + 1) for d in range(7)]
            row["validation_l1_by_dim_robot"] = [level * (d + 1) / 100 for d in range(7)]
            row["validation_l1_by_step"] = [level * (1 + k / 8) for k in range(8)]
        found.append(row)
    return found


def write(run: Path, found: list[dict], total: int = 10_000) -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (run / "train.json").write_text(json.dumps({"name": "a <run>", "phases": [{"steps": total // 2}, {"steps": total // 2}]}))
    return run


class Page(HTMLParser):
    """Headings of cards, classes of marks, open tags at the end, and everything that would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings, self.classes, self.open, self.external = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.classes.append(f"{tag}.{values.get('class')}")
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        self.external += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.classes.append(f"{tag}.{dict(attrs).get('class')}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.headings.append(data)


def test_a_run_is_drawn_whole(tmp_path):
    path = curves.refresh(write(tmp_path / "run", rows(60)), dimensions=NAMES)
    assert path == tmp_path / "run" / "training.html"
    text = path.read_text()
    page = Page(text)
    assert page.headings[:3] == ["Loss", "Action L1, policy units", "Validation action L1"]
    for expected in (
        "By dimension of the action, at step 1,200",
        "By step of the chunk, over time",
        "By dimension, over time",
        "Learning rate",
    ):
        assert expected in page.headings, expected
    assert all(name in text for name in NAMES) and "a &lt;run&gt;" in text and "Step 1,200 of 10,000" in text
    assert page.classes.count("line.mark") == 1, "one row has a skipped step"
    assert not page.open and not page.external and "http" not in text
    assert [p.name for p in sorted(tmp_path.glob("run/*"))] == ["metrics.jsonl", "train.json", "training.html"]


def test_the_page_reloads_itself_until_the_run_is_done(tmp_path):
    run = write(tmp_path / "run", rows(60))
    assert "location.reload" in curves.refresh(run).read_text()
    write(run, rows(60), total=1200)
    assert "location.reload" not in curves.refresh(run).read_text()


def test_there_is_a_page_before_there_is_anything_to_draw(tmp_path):
    assert "No step has been recorded yet" in curves.refresh(tmp_path).read_text()
    assert "Loss" in curves.refresh(write(tmp_path, rows(1))).read_text()
    assert Page(curves.refresh(write(tmp_path, rows(2))).read_text()).classes.count("polyline.a") >= 4


def test_broken_numbers_leave_gaps_and_cut_lines_are_ignored(tmp_path):
    found = rows(30)
    found[3] |= {"loss": None, "grad_norm": 0.0, "action_l1": None}
    found[9] |= {"validation_action_l1": None, "validation_l1_by_dim": [None] * 7, "validation_l1_by_step": [None] * 8}
    found[-1] |= {"validation_l1_by_dim_robot": None, "validation_l1_by_dim": [None, *[0.1] * 6]}
    run = write(tmp_path, found)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 620, "lo')
    text = curves.refresh(run).read_text()
    assert "nan" not in re.sub(r"<title>.*?</title>", "", text).lower() and "Step 600" in text


def test_metrics_of_any_head_are_drawn(tmp_path):
    found = [{**row, "grounding_hit": 0.5, "loss": row["loss"] - 1} for row in rows(30)]  # and a loss may be negative
    assert "Grounding hit" in Page(curves.refresh(write(tmp_path, found)).read_text()).headings


def test_names_that_do_not_fit_are_replaced_by_numbers(tmp_path):
    text = curves.refresh(write(tmp_path, rows(10)), dimensions=("only", "two")).read_text()
    assert "<td>0</td>" in text and "only" not in text


def test_a_long_run_makes_no_large_page_and_loses_no_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "MAX_ROWS", 100)
    found = rows(5000, validated=500)
    found[4321]["skipped"] = 2
    text = curves.refresh(write(tmp_path, found), dimensions=NAMES).read_text()
    assert len(text) < 150_000
    assert "3 in all" in text and "at step 100,000" in text
    assert text.count('<rect class="bar"') == 10 * (8 + 7), "all ten validations of eight steps and seven dimensions"
    assert text.count("Over thousands of optimizer steps") == 2


def test_shades_grow_with_the_error_and_keep_to_the_page():
    drawn = heat(np.array([[0.1, 1.0, 10.0], [1.0, np.nan, 0.0]]), [100, 200, 300], ["a & b", "a very long name of a joint"], label="l")
    shades = [float(s) for s in re.findall(r'fill-opacity="([\d.]+)"', drawn)]
    assert shades[:3] == pytest.approx([0.06, 0.53, 1.0]) and shades[3] == 0.53 and len(shades) == 4, "what is no number stays empty"
    assert "a &amp; b" in drawn and "…" in drawn
    wide = heat(np.random.default_rng(0).random((2, 500)), range(500), ["a", "b"], label="l")
    edges = [float(x) + float(w) for x, w in re.findall(r'<rect class="bar" x="([\d.]+)" y="\d+" width="([\d.]+)"', wide)]
    assert max(edges) <= 320 and len(edges) < 120
    assert "no values" in heat(np.zeros((1, 2)), [1, 2], ["a"], label="l")
    assert 'fill-opacity="0.06"' in heat(np.ones((1, 1)), [1], ["a"], label="l")
