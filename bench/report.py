"""The tables and pictures of README.md (headline.py) and bench/README.md (all others), from bench/results/*.json.

    python -m bench.report [--check]

Whatever stands between `<!-- bench:NAME -->` and `<!-- end -->` in them is written anew from the results; with --check
nothing is written and the exit code is 1 when one of them differs. A result that is missing is a sentence that says
so. A results file is one of
  bench.run's      {"provenance", "cases"}
  gpu/*.json       {"provenance", "parts", "cases"} of bench.gpu
  learning.json    {"provenance", "rows"} of bench.learning
  teachers.json    the same of bench.teachers
  budgets.json     of bench.budgets
  lag.json         of bench.lag
  any other        {"provenance", "facts": [{"what", "measured"}]}
records.py says which cases count. Each GPU has tables and pictures of its own.
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

from . import BENCHES, gsm8k, table
from .harness import Experiment
from .headline import headline
from .pictures import PICTURES
from .records import NOT_RUN, Results, by_algo, card_of, title, widest
from .run import known
from .table import markdown, span

ROOT = Path(__file__).resolve().parents[1]
PAGES, RESULTS = (ROOT / "README.md", ROOT / "bench" / "README.md"), ROOT / "bench" / "results"
REGION = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet."
BUDGETS = {"registers": "registers a thread", "spills": "spills", "shared_bytes": "bytes of shared memory"}


def with_sources(results, text, names):
    return "\n\n".join([text, *[f"<sub>{results.source(name)}</sub>" for name in dict.fromkeys(names)]])


def common_fields(cases):
    """-> the fields of a size that all cases share, and size -> those of its own."""
    sizes = [case["size"] for case, _ in cases]
    common = {name: x for name, x in sizes[0].items() if all(size.get(name) == x for size in sizes)}
    return common, lambda size: {name: x for name, x in size.items() if name not in common}


def kernel_cell(row):
    """Time / memory / error: as ratios to eager's; eager's own, and of all where eager did not run."""
    if row is None or row["status"] in NOT_RUN:
        return "-"
    if row["status"] != "ok":
        return row["status"]
    own, times = "time_ratio" not in row, lambda key: f"{row[key]:.2f}x" if key in row else "-"
    time = table.cell(row, "median", table.seconds) if own else times("time_ratio")
    memory = table.cell(row, "extra_bytes", table.megabytes) if own else times("extra_ratio")
    return f"{time} / {memory} / {error_of(row)}"


def error_of(row):
    """Largest difference of a log-probability where there is one, else the largest relative error of any output."""
    logp = table.largest_error(row, lambda name: name == "logp_N", "max_abs")
    return logp if logp != "-" else table.largest_error(row, lambda name: True, "relative")


def left_out(cases):
    """A sentence that names the rivals which ran in no case, and why."""
    rows = [row for case, _ in cases for row in case["rows"]]
    ran = {row["rival"] for row in rows if row["status"] not in NOT_RUN}
    why = {row["rival"]: row["why"] for row in rows if row["rival"] not in ran}
    reasons = {reason: ", ".join(name for name in why if why[name] == reason) for reason in why.values()}
    return "Not run: " + "; ".join(f"{names} ({reason})" for reason, names in reasons.items()) + "." if why else ""


def since(results, bench, kind, card):
    """A sentence that names what has failed where an older case is shown."""
    said = [
        f"{row['rival']} at {title(case['size'])} {case['dtype']} ({row['status']}: {row['why']}; {name}.json)"
        for case, name, row in results.failures(bench, kind, card)
    ]
    return f"Failed since: {'; '.join(said)}." if said else ""


def kernel_table(results, bench, kind, card):
    """Rivals down, cases across -> text and the names of its files."""
    cases = results.cases(bench, kind, card)
    cases = widest(cases) if kind == "cuda" else cases
    if not cases:
        return None
    common, own = common_fields(cases)
    by_rival = [{row["rival"]: row for row in case["rows"]} for case, _ in cases]
    rivals = dict.fromkeys(name for rows in by_rival for name in rows)
    lines = [[mark(name), *[kernel_cell(rows.get(name)) for rows in by_rival]] for name in rivals]
    lines = [line for line in lines if any(cell != "-" for cell in line[1:])]
    heads = [
        on(card, f"`{bench}` {title(common)}"),
        *[f"{case['dtype']} {title(own(case['size']))}".strip() for case, _ in cases],
    ]
    said = markdown(heads, lines), left_out(cases), since(results, bench, kind, card)
    return "\n\n".join(filter(None, said)), list(dict.fromkeys(name for _, name in cases))


def on(card, text):
    return f"{card}: {text}" if card else text


def mark(rival):
    return f"**{rival}**" if rival.startswith("ours") else rival


def kernels(kind):
    """A table a benchmark; neighbours from the same files share the lines that say so."""

    def region(results):
        names = [name for name, bench in BENCHES.items() if not isinstance(bench, Experiment)]
        tables = [kernel_table(results, name, kind, card) for card in results.cards(kind) for name in names]
        groups = itertools.groupby(filter(None, tables), lambda pair: pair[1])
        texts = [with_sources(results, "\n\n".join(text for text, _ in some), files) for files, some in groups]
        return "\n\n".join(texts) or NOT_MEASURED

    return region


def experiment(bench, kind):
    """The columns of the terminal, a line per case and rival; a table for sizes of the same fields."""

    def table_of(results, card, cases):
        columns, (common, own) = COLUMNS[bench], common_fields(cases)
        heads = [on(card, title(common)), *[heading or "note" for heading, _ in columns]]
        lines = [
            [title(own(case["size"])) if i == 0 else "", *[mark(show(row)) for _, show in columns]]
            for case, _ in cases
            for i, row in enumerate(case["rows"])
        ]
        return with_sources(results, markdown(heads, lines), [name for _, name in cases])

    def tables_of(results, card):
        groups = results.by_fields(results.cases(bench, kind, card))
        return [*[table_of(results, card, cases) for cases in groups], since(results, bench, kind, card)]

    def region(results):
        texts = [text for card in results.cards(kind) for text in tables_of(results, card)]
        return "\n\n".join(filter(None, texts)) or NOT_MEASURED

    return region


def seeded(name):
    """Ranges over the seeds, a line an algorithm."""

    def region(results):
        if name not in results.files:
            return NOT_MEASURED
        keys = ("accuracy_before_sampled", "accuracy_after_sampled", "accuracy_before", "accuracy_after")
        groups = by_algo(results.files[name]["rows"])
        seconds = lambda rows: ", ".join(f"{row['wall_seconds']:.0f}" for row in rows)
        lines = [[algo, *[span(rows, key) for key in keys], seconds(rows)] for algo, rows in groups.items()]
        seeds = ", ".join(str(row["seed"]) for row in next(iter(groups.values())))
        modes = [f"{mode} {when}" for mode in ("sampled", "greedy") for when in ("before", "after")]
        heads = [f"embedded task, seeds {seeds}", *modes, "seconds"]
        return with_sources(results, markdown(heads, lines), [name])

    return region


def facts(results):
    found = {name: file["facts"] for name, file in results.files.items() if isinstance(file, dict) and "facts" in file}
    if not found:
        return NOT_MEASURED
    lines = [[fact["what"], fact["measured"]] for rows in found.values() for fact in rows]
    return with_sources(results, markdown(["what", "measured"], lines), found)


def lags(results):
    """The learning runs of each lag, and the mean difference over the seeds."""
    if "lag" not in results.files:
        return NOT_MEASURED
    file = results.files["lag"]
    heads = ["lag", "seed", "sampled before", "sampled after", "greedy before", "greedy after"]
    keys = ("accuracy_before_sampled", "accuracy_after_sampled", "accuracy_before", "accuracy_after")
    lines = [[row["algo"][-1], row["seed"], *(f"{100 * row[key]:.1f}%" for key in keys)] for row in file["rows"]]
    gaps = ", ".join(
        f"{word} {100 * gap['mean']:+.1f} points (standard error {100 * gap['standard_error']:.1f}; "
        f"{'within' if gap['within_noise'] else 'beyond'} the noise)"
        for word, gap in zip(("greedy", "sampled"), file["lag 1 less lag 0"].values(), strict=True)
    )
    return with_sources(results, f"Lag 1 less lag 0 over the seeds: {gaps}.\n\n{markdown(heads, lines)}", ["lag"])


def budgets(results):
    """Per kernel and architecture the most of any variant."""
    if "budgets" not in results.files:
        return NOT_MEASURED
    table, groups = results.files["budgets"], {}
    for name, row in table["rows"].items():
        kernel, *_, arch = name.split()
        groups.setdefault(kernel, {}).setdefault(arch, []).append(row)
    archs = list(next(iter(groups.values())))
    most = lambda rows: " / ".join(str(max(row[key] for row in rows)) for key in BUDGETS)
    lines = [[f"`{kernel}`", *[most(by_arch[arch]) for arch in archs]] for kernel, by_arch in groups.items()]
    source = f"Triton {table['triton']}; `python -m bench.budgets`; [budgets.json](results/budgets.json)"
    return markdown([" / ".join(BUDGETS.values()), *archs], lines) + f"\n\n<sub>{source}</sub>"


def gpu(results):
    """How each part of bench.gpu ended the last time it was run on a card."""
    last = {}
    for name in results.visits():
        for part in results.files[name]["parts"]:
            if part["status"] == "left out":
                continue
            failed = f", {len(part['failed'])} tests failed" if part.get("failed") else ""
            ended = f"{part['status']}{failed}, {table.seconds(part['seconds'])}, {results.time(name)[:10]}"
            last[part["part"], card_of(results.files[name])] = f"{ended}; {part['said']}", name
    parts, cards = (list(dict.fromkeys(names)) for names in zip(*last)) if last else ((), ())
    lines = [[part, *[last.get((part, card), ("-",))[0] for card in cards]] for part in parts]
    names = [name for _, name in last.values()]
    return with_sources(results, markdown(["part", *cards], lines), names) if last else NOT_MEASURED


def drawn(results, name):
    """[(picture, card, what is to be seen)] of a region: nothing where nothing was measured."""
    picture = PICTURES.get(name)
    seen = [(card, picture.measured(results, card)) for card in results.cards(picture.kind)] if picture else []
    return [(picture, card, found) for card, found in seen if found]


COLUMNS = {name: bench.columns for name, bench in BENCHES.items() if isinstance(bench, Experiment)}
COLUMNS["gsm8k"] = gsm8k.COLUMNS
REGIONS = {
    "headline": headline,
    "learning": seeded("learning"),
    "teachers": seeded("teachers"),
    "lags": lags,
    "facts": facts,
    "budgets": budgets,
    "gpu": gpu,
    **{f"kernels-{kind}": kernels(kind) for kind in ("cpu", "cuda")},
    **{f"{name}-{kind}": experiment(name, kind) for name in COLUMNS for kind in ("cpu", "cuda")},
}


def region_of(name, results):
    """The region below its pictures."""
    pictures = [f"![{picture.name}](results/{picture.file(card)})" for picture, card, _ in drawn(results, name)]
    return "\n\n".join([*pictures, REGIONS[known("region", name, list(REGIONS))](results)])


def write_regions(text, results):
    """A page's text with every region made anew; ValueError for one that nobody makes."""

    def filled(match):
        return f"{match[1]}{region_of(match[2], results)}\n{match[3]}"

    return REGION.sub(filled, text)


def draw(results):
    for name in PICTURES:
        for picture, card, found in drawn(results, name):
            heading = results.heading(item.file for item in found)
            picture.draw(found, heading).savefig(results.folder / picture.file(card), dpi=110)


def main(argv, pages=PAGES, folder=RESULTS):
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    args = parser.parse_args(argv)
    old = [page.read_text() for page in pages]
    try:
        results = Results(folder)
        new = [write_regions(text, results) for text in old]
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.check:
        pairs = [pair for texts in zip(old, new) for pair in zip(*map(REGION.finditer, texts))]
        stale = [a[2] for a, b in pairs if a[0] != b[0]]
        files = [picture.file(card) for name in PICTURES for picture, card, _ in drawn(results, name)]
        stale += [file for file in files if not (folder / file).exists()]
        sys.exit(f"out of date: {', '.join(stale)}; run python -m bench.report" if stale else 0)
    draw(results)
    for page, text in zip(pages, new):
        page.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
