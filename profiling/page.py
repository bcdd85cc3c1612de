"""How a report is written: Markdown, and one HTML page that needs no network."""

import re
from html import escape

from sections import LEGEND, Table, Variant, device_line, notes, show_time, tables, verdict
from timeline import COLOURS, colour, svg, window_of


def markdown(title: str, variants: list[Variant], gates: list[str]) -> str:
    out = [literal(device_line(variants)), "", f"# {literal(title)}", ""]
    out += [*map(literal, verdict(variants)), "", *map(literal, gates)]
    for table in tables(variants):
        cells = [[literal(cell, in_line=True) for cell in row] for row in (table.header, *table.rows)]
        cells.insert(1, ["---"] * len(table.header))
        lines = [f"| {' | '.join(row)} |" for row in cells]
        out += ["", f"## {table.title}", "", *([literal(table.note), ""] if table.note else []), *lines]
    out += ["", "## What the words mean", "", *(f"- {literal(f'{word}: {what}.')}" for word, what in LEGEND.items())]
    if found := notes(variants):
        out += ["", "## Notes", "", *(f"- {literal(note)}" for note in found)]
    return "\n".join(out) + "\n"


def literal(text: str, in_line: bool = False) -> str:
    """Markdown that shows this text, whatever stands in it, on one line; `in_line`: behind something else on it."""
    shown = MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
    shown = shown.replace("://", ":\\//").replace("www.", "www\\.")  # which GitHub links
    return shown if in_line else BLOCK.sub(lambda found: found[0][:-1] + "\\" + found[0][-1], shown)


MARKUP = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])|(?<!\S)#")
"""Not an underscore within a word, nor a # or ! that begins none of it."""
BLOCK = re.compile(r"^(?:[-+=]|\d{1,9}[.)](?!\S))")
"""What begins a list, a rule or a heading of the line before."""


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --line: #d5dae0; --tint: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14181d; --soft: #9aa4af; --line: #353c45; --tint: #1d232a; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: .2rem 0 1rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
.device, .note, dt { color: var(--soft); } .note { margin: 0 0 .5rem; }
.verdict { background: var(--tint); border-left: 4px solid #5b8fd0; padding: .7rem 1rem; margin: .5rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; white-space: nowrap; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 14rem; text-align: left; }
.left { text-align: left; } tr.group td { border-top: 1px solid var(--soft); } .faster { color: #1f8a4c; }
.slower { color: #c8453a; } .same { color: var(--soft); }
@media (prefers-color-scheme: dark) { .faster { color: #5ccf8c; } .slower { color: #f0857b; } }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em; }
svg { display: block; width: 100%; min-width: 700px; margin-bottom: .6rem; }
svg text { font: 11px system-ui, sans-serif; }
.small, .label { fill: var(--soft); } .inside { fill: #14181d; pointer-events: none; }
.tick { stroke: var(--line); } .step { stroke: var(--soft); stroke-dasharray: 2 3; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1.2rem; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 700; }
details { margin: 2rem 0; }
"""


def html(title: str, variants: list[Variant], gates: list[str]) -> str:
    out = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f'<p class="device">{escape(device_line(variants))}</p><h1>{escape(title)}</h1>',
        *(f'<p class="verdict">{escape(line)}</p>' for line in verdict(variants)),
        *(f"<p>{escape(line)}</p>" for line in gates),
        timelines_html(variants),
    ]
    shown = tables(variants)
    out += [table_html(shown[0]), legend_html(), *(table_html(table) for table in shown[1:])]
    if found := notes(variants):
        out += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in found), "</ul>"]
    return "\n".join([*out, "</body></html>\n"])


def timelines_html(variants: list[Variant]) -> str:
    shown = [s for v in variants for s in v.summaries[:1]]
    if not shown:
        return ""
    span = max(end - start for start, end in (window_of(s.trace) for s in shown))
    names = {r.name for s in shown for r in s.trace.ranges}
    keys = [name for name in COLOURS if name in names or name == "other"]
    out = ["<h2>Timelines</h2>"]
    said = "One scale for all, from the start of the first step of each. Above: what the program was doing; below: the "
    out.append(f'<p class="note">{said}work that ran for it. Point at a bar for its time.</p><p>')
    out += [f'<span class="key"><i style="background:{colour(name)}"></i>{name}</span>' for name in keys]
    out.append('</p><div class="wide">')
    for s in shown:
        out += [f"<strong>{escape(s.trace.label)}</strong>", svg(s, span, show_time)]
    return "\n".join([*out, "</div>"])


def legend_html() -> str:
    items = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in LEGEND.items())
    return f"<h2>What the words mean</h2><dl>{items}</dl>"


def table_html(table: Table) -> str:
    left = len(table.header) if table.words else 2
    head = "".join(
        f'<th class="{"left" if i < left else ""}">{escape(cell)}</th>' for i, cell in enumerate(table.header)
    )
    rows, before = [], None
    for row in table.rows:
        group = "group" if row[0] != before else ""
        cells = "".join(cell_html(i < left, "" if i == 0 and not group else cell) for i, cell in enumerate(row))
        rows.append(f'<tr class="{group}">{cells}</tr>')
        before = row[0]
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f'{note}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{body}</details>"
    return f"<h2>{escape(table.title)}</h2>{body}"


def cell_html(left: bool, cell: str) -> str:
    kinds = ["left"] * left + ["long"] * (len(cell) > 40)
    kinds += ["same"] * cell.startswith("no change")
    kinds += [word for word in ("faster", "slower") if cell.endswith(f"x {word}")]
    return f'<td class="{" ".join(kinds)}">{escape(cell)}</td>'
