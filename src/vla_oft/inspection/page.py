"""The page of an inspection: problems first, then pictures, plots of whole episodes and histograms; one file without external resources."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vla_oft.atomic import replace_file
from vla_oft.data.base import Source
from vla_oft.html import embedded, escape, grid, key_values, page, section, tile
from vla_oft.inspection import words
from vla_oft.inspection.blocks import read_episode
from vla_oft.inspection.facts import Dimension, Inspection, Problem
from vla_oft.inspection.motion import still_steps
from vla_oft.inspection.strips import Strips, shown_episodes, suspect_episodes
from vla_oft.noops import THRESHOLD
from vla_oft.plots import Series, chart, histogram

PICTURES_BYTES = 1_500_000
"""JPEG bytes of all film strips together; as text in the page they take a third more."""

MAX_DIMS, MAX_INSTRUCTIONS, PLOTTED = 32, 200, 2
"""Dimensions that are drawn, instructions that are listed, episodes that are plotted."""


def write_page(path: Path, found: Inspection, source: Source) -> None:
    """Write the page in one step; pictures and plots are read from `source`, which `found` describes."""
    replace_file(path, render(found, source))


def render(found: Inspection, source: Source) -> str:
    """The page as text, below 3 MB."""
    strips = Strips(source, PICTURES_BYTES)
    suspects = "".join(_episode_strips(strips, episode) for episode in suspect_episodes(found))
    films = "".join(
        f'<div class="card"><h3>{escape(words.printable(text) or "(empty instruction)")}</h3>'
        + "".join(_episode_strips(strips, episode) for episode in episodes)
        + "</div>"
        for text, episodes in shown_episodes(found).items()
    )
    note = "Five moments from the first to the last step."
    note += f" {strips.left_out} more would make this page too large." if strips.left_out else ""
    note += f" {len(strips.failures)} could not be read: {words.printable(strips.failures[0])}" if strips.failures else ""
    parts = [
        f"<h1>{escape(words.printable(found.name))}</h1>",
        f'<p class="lead">{escape(words.printable(found.path))}</p>',
        _tiles(found),
        section("Problems", _problems(found.problems), "" if found.problems else "None were found."),
        section("Episodes with suspect pictures", f'<div class="card">{suspects}</div>' if suspects else ""),
        section("Episodes", films, note),
        *(_episode_plots(found, source, episode) for episode in _plotted(found)),
        section(
            "Values of the actions", _histograms(found.action), "Over all steps; columns that hold anything are at least a pixel high."
        ),
        section("Values of the state", _histograms(found.state)),
        section("Lengths", _lengths(found)),
        section("Instructions", _instructions(found)),
        section("Dataset", f'<div class="card">{key_values(words.facts(found))}</div>'),
    ]
    return page(f"Inspection of {words.printable(found.name)}", "\n".join(p for p in parts if p))


def _tiles(found: Inspection) -> str:
    counts = {severity: sum(p.severity == severity for p in found.problems) for severity in ("error", "warning", "note")}
    trouble = ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items() if count)
    time = f"frames, {words.duration(found.duration_s)}" if found.duration_s else "frames"
    shown = [
        (f"{found.num_episodes:,}", "episodes"),
        (f"{found.num_frames:,}", time),
        (f"{len(found.state)} / {len(found.action)}", "dimensions of state / action"),
        (f"{len(found.cameras)}", f"camera{'' if len(found.cameras) == 1 else 's'}"),
        (f"{sum(i.episodes > 0 for i in found.instructions)}", "instructions"),
        (f"{len(found.problems)}", f"problems: {trouble}" if trouble else "problems"),
    ]
    return f'<div class="tiles">{"".join(tile(value, label) for value, label in shown)}</div>'


def _problems(problems: Sequence[Problem]) -> str:
    cards = []
    for p in problems:
        seen = [f"{words.counted(p)}.", words.printable(p.where)]
        body = "".join(f'<p class="quiet">{escape(line)}</p>' for line in seen if line) + f"<p>{escape(f'{p.effect} {p.fix}')}</p>"
        pill = f'<span class="pill {p.severity}">{p.severity}</span>'
        cards.append(f'<div class="card problem {p.severity}"><h3>{pill}{escape(words.printable(p.title))}</h3>{body}</div>')
    return "".join(cards)


def _episode_strips(strips: Strips, episode: int) -> str:
    figures = []
    for camera, (picture, steps) in strips.make(episode).items():
        caption = f"episode {episode}, {words.printable(camera)}: steps {', '.join(map(str, steps))}"
        figures.append(
            f'<figure class="strip"><img src="{embedded(picture, "image/jpeg")}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return "".join(figures)


def _plotted(found: Inspection) -> list[int]:
    """Episodes whose numbers are drawn: one of the most frequent instruction, and one that a problem names."""
    broken = {episode for episode, _ in found.records.unreadable}
    if found.kind != "demonstrations":
        return []
    named = [p.seen.first.episode for p in found.problems if p.seen.first is not None and p.seen.first.step is not None]
    usual = [episode for episodes in shown_episodes(found).values() for episode in episodes]
    return list(dict.fromkeys(e for e in [*named[:1], *usual] if e not in broken))[:PLOTTED]


def _episode_plots(found: Inspection, source: Source, episode: int) -> str:
    try:
        states, actions = read_episode(source, episode)
    except ValueError as error:
        return section(f"Episode {episode} over time", f'<p class="bad">{escape(words.printable(str(error)))}</p>')
    marks = sorted({step for g in found.grippers for step in _switches(actions[:, g.index])})
    absolute = found.following.kind == "absolute"
    pauses = _bands(_still(actions, absolute, [g.index for g in found.grippers]))
    parts = []
    for what, values, dimensions in (("action", actions, found.action), ("state", states, found.state)):
        cards = []
        for d in dimensions[:MAX_DIMS]:
            name = words.printable(words.label(d))
            lines = [Series(x=np.arange(len(values)), y=values[:, d.index], style="a" if what == "action" else "b")]
            cards.append(f"<div><h3>{escape(name)}</h3>{chart(lines, label=f'{what} {name}', marks=marks[:60], bands=pauses[:200])}</div>")
        if cards:
            parts.append(f'<div class="card"><h3>{what}</h3>{grid(cards)}</div>')
    legend = "Over the steps. Dashed lines: a gripper's command changes. Shaded: pauses." if found.grippers else "Shaded: pauses."
    return section(f"Episode {episode} over time", "".join(parts), legend)


def _still(actions: np.ndarray, absolute: bool, grippers: Sequence[int]) -> np.ndarray:
    """bool (T,): steps in which nothing is done; none where the actions are not all finite."""
    if not np.isfinite(actions).all():
        return np.zeros(len(actions), bool)
    if absolute:
        return np.concatenate([[False], np.abs(np.diff(actions, axis=0)).max(axis=1, initial=0) < THRESHOLD])
    return still_steps(actions, grippers)


def _bands(still: np.ndarray) -> list[tuple[float, float]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], still.astype(int), [0]])))
    return [(float(first) - 0.5, float(last) - 0.5) for first, last in edges.reshape(-1, 2)]


def _switches(command: np.ndarray) -> list[int]:
    """Steps in which a gripper's command passes the middle of its range."""
    finite = command[np.isfinite(command)]
    if not finite.size or finite.min() == finite.max():
        return []
    high = command > (finite.min() + finite.max()) / 2
    return (np.flatnonzero(high[1:] != high[:-1]) + 1).tolist()


def _histograms(dimensions: Sequence[Dimension]) -> str:
    cards = []
    for d in dimensions[:MAX_DIMS]:
        name = words.printable(words.label(d))
        if d.histogram is None or d.constant:
            drawn = f'<p class="quiet">{"always " + words.number(d.min) if d.constant else "no finite values"}</p>'
        else:
            drawn = histogram(d.histogram.edges, d.histogram.counts, label=f"values of {name}")
        span = f"{words.number(d.q01)} to {words.number(d.q99)} (98 %), mean {words.number(d.mean)}, std {words.number(d.std)}"
        cards.append(f'<div><h3>{escape(name)}</h3>{drawn}<p class="quiet">{escape(span)}</p></div>')
    more = f'<p class="quiet">{len(dimensions) - MAX_DIMS} more are in the JSON.</p>' if len(dimensions) > MAX_DIMS else ""
    return f'<div class="card">{grid(cards)}{more}</div>' if cards else ""


def _lengths(found: Inspection) -> str:
    bars = found.lengths.histogram
    drawn = histogram(bars.edges, bars.counts, label="steps of an episode") if bars.counts else ""
    text = f"{found.lengths.min} to {found.lengths.max} steps, median {found.lengths.median:g}"
    return f'<div class="card"><div class="grid3"><div>{drawn}<p class="quiet">{text}</p></div></div></div>'


def _instructions(found: Inspection) -> str:
    ordered = sorted(found.instructions, key=lambda i: -i.episodes)
    rows = "".join(
        f'<tr><td class="value">{escape(words.printable(i.text) or "(empty)")}</td>'
        f'<td class="num">{i.episodes:,}</td><td class="num">{i.frames:,}</td></tr>'
        for i in ordered[:MAX_INSTRUCTIONS]
    )
    more = f'<p class="quiet">{len(ordered) - MAX_INSTRUCTIONS} more are in the JSON.</p>' if len(ordered) > MAX_INSTRUCTIONS else ""
    head = "<tr><th>Instruction</th><th>Episodes</th><th>Frames</th></tr>"
    return f'<div class="card scroll"><table>{head}{rows}</table>{more}</div>' if rows else ""
