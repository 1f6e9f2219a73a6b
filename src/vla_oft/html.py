"""The look of every HTML page: one file without any external resource, light or dark as the reader's system is."""

import base64
import html
from collections.abc import Mapping, Sequence

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191f; --quiet: #667080; --line: #e3e7ec; --track: #eceff3;
  --a: #2f62e8; --b: #e0862b; --good: #1d9a5b; --bad: #d2483e; --whisker: #16191f; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0e1116; --card: #161b22; --ink: #e8ebf0; --quiet: #929dab; --line: #272e38; --track: #232a34;
  --a: #7ba0ff; --b: #f2a65a; --good: #4cc98a; --bad: #ff7d72; --whisker: #e8ebf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, "Segoe UI", Inter, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 44px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 40px 0 12px; }
h3 { font-size: 13.5px; font-weight: 600; margin: 0 0 8px; } .grid3 h3 { margin-bottom: 4px; }
p { margin: 6px 0; } .quiet { color: var(--quiet); } .lead { color: var(--quiet); margin-top: 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 26px; }
.tile b { display: block; font-size: 30px; font-weight: 650; letter-spacing: -.02em; line-height: 1.25; }
.tile span { color: var(--quiet); font-size: 13px; }
.reading { padding-left: 20px; margin: 6px 0; } .reading li { margin: 5px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--quiet); font-weight: 500; font-size: 12.5px; padding: 0 12px 6px 0; white-space: nowrap; }
td { padding: 7px 12px 7px 0; border-top: 1px solid var(--line); white-space: nowrap; }
tr.group td { border-top: 0; padding-top: 20px; font-weight: 600; white-space: normal; } tr.group.first td { padding-top: 4px; }
tr.group + tr td { border-top: 0; } tr.total td { font-weight: 600; }
td.bar { width: 42%; min-width: 170px; }
.track { position: relative; height: 16px; border-radius: 5px; background: var(--track); }
.fill { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--a); }
.control .fill { background: var(--b); } .ceiling .fill { background: var(--good); }
.whisker { position: absolute; top: 7px; height: 2px; background: var(--whisker); }
.whisker::before, .whisker::after { content: ""; position: absolute; top: -3px; width: 2px; height: 8px; background: var(--whisker); }
.whisker::before { left: 0; } .whisker::after { right: 0; }
.grid3 { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 14px; }
svg { display: block; width: 100%; height: auto; } polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polyline.a { stroke: var(--a); } polyline.b { stroke: var(--b); } polyline.faint { opacity: .28; stroke-width: 1; }
line.grid { stroke: var(--line); } line.mark { stroke: var(--b); stroke-width: 1; stroke-dasharray: 3 3; }
rect.bar { fill: var(--a); } rect.band { fill: var(--track); } text.tick { fill: var(--quiet); font-size: 11.5px; }
.legend { font-size: 13px; color: var(--quiet); margin: 0 0 10px; } 
.legend i { display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin: 0 6px 3px 0; vertical-align: middle; }
.legend i + i, .legend span + i { margin-left: 16px; } i.a { background: var(--a); } i.b { background: var(--b); }
figure { margin: 0; } figure.card { padding: 0; overflow: hidden; }
video, img { display: block; background: #11141a; width: 100%; height: auto; }
figcaption { padding: 10px 14px 12px; font-size: 13.5px; } .good { color: var(--good); } .bad { color: var(--bad); }
.stack { display: flex; height: 22px; border-radius: 6px; overflow: hidden; gap: 2px; background: var(--track); margin-bottom: 14px; }
.stack div { min-width: 2px; }
.c0 { background: var(--a); } .c1 { background: var(--b); } .c2 { background: var(--good); } 
.c3 { background: #9a6bd8; } .c4 { background: #c75a86; } .c5 { background: var(--quiet); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
tr:first-child td { border-top: 0; }
.problem { margin: 0 0 14px; border-left: 4px solid var(--quiet); } .problem p { max-width: 90ch; } .problem h3 { font-size: 15px; }
.problem.error { border-left-color: var(--bad); } .problem.warning { border-left-color: var(--b); }
.pill { font-size: 12px; font-weight: 600; padding: 2px 8px; margin-right: 8px; border-radius: 999px; background: var(--track); }
.pill.error { color: var(--bad); } .pill.warning { color: var(--b); } .pill.note { color: var(--quiet); }
.strip { margin: 10px 0 0; } .strip img { border-radius: 6px; }
.strip figcaption { padding: 4px 0 0; color: var(--quiet); font-size: 12.5px; }
td.num { text-align: right; } td.value { white-space: normal; overflow-wrap: anywhere; } td.key { color: var(--quiet); width: 32%; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { margin-top: 40px; color: var(--quiet); font-size: 13px; }
@media print { main { padding: 0; } .card { break-inside: avoid; } }
"""


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, body: str, note: str = "") -> str:
    """A heading, a line of explanation and their content; nothing at all without content."""
    if not body:
        return ""
    return f"<h2>{escape(heading)}</h2>\n" + (f'<p class="quiet">{escape(note)}</p>\n' if note else "") + body + "\n"


def key_values(values: Mapping[str, str]) -> str:
    """A two-column table."""
    rows = "".join(f'<tr><td class="key">{escape(k)}</td><td class="value">{escape(v)}</td></tr>' for k, v in values.items() if v)
    return f"<table>{rows}</table>" if rows else ""


def bullets(lines: Sequence[str]) -> str:
    """A list of sentences."""
    return '<ul class="reading">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def grid(cards: Sequence[str]) -> str:
    """Cards side by side, as many as fit; nothing without cards."""
    return f'<div class="grid3">{"".join(cards)}</div>' if cards else ""


def tile(value: object, label: object) -> str:
    """One headline number."""
    return f'<div class="card tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def embedded(data: bytes, kind: str) -> str:
    """The address under which a page carries `data` itself; `kind`: "image/png", "video/mp4"."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def escape(text: object) -> str:
    """Text as HTML, also inside attributes; a percent sign stays with its number."""
    return html.escape(str(text).replace(" %", "\N{NO-BREAK SPACE}%"), quote=True)
