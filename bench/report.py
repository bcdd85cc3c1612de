"""The README's tables and pictures, made from bench/results/*.json.

    python -m bench.report [--check]

Whatever stands between `<!-- bench:NAME -->` and `<!-- end -->` in the README is written anew from the results; with
--check nothing is written and the exit code is 1 when the README differs. A result that is missing is a sentence that
says so. A results file is one of
  bench.run's      {"provenance", "cases"}: of cases of the same size and dtype the newest counts
  learning.json    {"provenance", "rows"} of bench.learning
  budgets.json     of bench.budgets
  lag.json         of bench.lag
  cuda-summary.json {"provenance", "parts"} of bench.gpu
  any other        {"provenance", "facts": [{"what", "measured"}]}
"""

import argparse
import json
import re
import sys
from pathlib import Path

from . import BENCHES, table
from .harness import Experiment
from .run import known

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
REGION = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet."
NOT_RUN = ("absent", "skipped")
BUDGETS = {"registers": "registers a thread", "spills": "spills", "shared_bytes": "bytes of shared memory"}


class Results:
    """The files of a folder: `files` by name without suffix."""

    def __init__(self, folder):
        self.folder = folder
        self.files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}

    def cases(self, bench, kind):
        """[(case, its file's name)] of a benchmark on "cpu" or "cuda", for each size and dtype the newest."""
        found = {}
        for name, file in self.files.items():
            for case in file.get("cases", []) if isinstance(file, dict) else []:
                if case["bench"] == bench and kind_of(file) == kind:
                    key, time = (json.dumps(case["size"]), case["dtype"]), file["provenance"]["time"]
                    found[key] = max(found.get(key, ("",)), (time, name, case), key=lambda entry: entry[0])
        return [(case, name) for _, name, case in found.values()]

    def source(self, name):
        """A line: where and with what the results of a file were measured."""
        about = self.files[name]["provenance"]
        threads = about["threads"] if about.get("kind") != "cuda" else None
        versions = {"python": about["python"], **about["versions"]}
        return "; ".join(filter(None, [
            ", ".join(filter(None, [about["device"], threads and f"{threads} thread{'s' * (threads > 1)}"])),
            about["driver"] and f"driver {about['driver']}",
            ", ".join(f"{package} {version}" for package, version in versions.items() if version),
            f"commit {(about['commit'] or 'not recorded')[:12]}" + " with changes" * bool(about["uncommitted"]),
            f"`{about['command']}`", f"[{name}.json](bench/results/{name}.json)",
        ]))  # fmt: skip


def kind_of(file):
    about = file["provenance"]
    return about.get("kind") or ("cuda" if about["driver"] else "cpu")


def markdown(headings, lines):
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def with_sources(results, text, names):
    return "\n\n".join([text, *[f"<sub>{results.source(name)}</sub>" for name in dict.fromkeys(names)]])


def title(fields):
    return " ".join(f"{name}={value}" for name, value in fields.items() if value)


def common_fields(cases):
    """-> the fields of a size that all cases share, and size -> those of its own."""
    sizes = [case["size"] for case, _ in cases]
    common = {name: x for name, x in sizes[0].items() if all(size[name] == x for size in sizes)}
    return common, lambda size: {name: x for name, x in size.items() if name not in common}


def kernel_cell(row):
    """Time / memory / error: eager's own, the others' as ratios to it."""
    if row is None or row["status"] in NOT_RUN:
        return "-"
    if row["status"] != "ok":
        return row["status"]
    own, times = row["rival"] == "eager", lambda key: f"{row[key]:.2f}x" if key in row else "-"
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


def widest(cases):
    """Of cases in bf16 that differ in their rows alone, the one with the most: what a GPU is bought for."""
    most = {}
    for case, name in sorted(cases, key=lambda pair: next(iter(pair[0]["size"].values()))):
        _, *shape = case["size"].values()
        if case["dtype"] == "bf16":
            most[tuple(shape)] = (case, name)
    return list(most.values())


def kernel_table(results, bench, kind):
    """Rivals down, cases across."""
    cases = results.cases(bench, kind)
    cases = widest(cases) if kind == "cuda" else cases
    if not cases:
        return ""
    common, own = common_fields(cases)
    by_rival = [{row["rival"]: row for row in case["rows"]} for case, _ in cases]
    rivals = dict.fromkeys(name for rows in by_rival for name in rows)
    lines = [[mark(name), *[kernel_cell(rows.get(name)) for rows in by_rival]] for name in rivals]
    lines = [line for line in lines if any(cell != "-" for cell in line[1:])]
    heads = [
        f"`{bench}` {title(common)}",
        *[f"{case['dtype']} {title(own(case['size']))}".strip() for case, _ in cases],
    ]
    text = markdown(heads, lines)
    return with_sources(results, "\n\n".join(filter(None, [text, left_out(cases)])), [name for _, name in cases])


def mark(rival):
    return f"**{rival}**" if rival.startswith("ours") else rival


def kernels(kind):
    def region(results):
        names = [name for name, bench in BENCHES.items() if not isinstance(bench, Experiment)]
        return "\n\n".join(filter(None, [kernel_table(results, name, kind) for name in names])) or NOT_MEASURED

    return region


def experiment(bench, kind):
    """The columns of the terminal, a line per case and rival."""

    def region(results):
        cases = results.cases(bench, kind)
        if not cases:
            return NOT_MEASURED
        columns, (common, own) = BENCHES[bench].columns, common_fields(cases)
        heads = [title(common), *[heading or "note" for heading, _ in columns]]
        lines = [
            [title(own(case["size"])) if i == 0 else "", *[mark(show(row)) for _, show in columns]]
            for case, _ in cases
            for i, row in enumerate(case["rows"])
        ]
        return with_sources(results, markdown(heads, lines), [name for _, name in cases])

    return region


def span(rows, key):
    values = [100 * row[key] for row in rows]
    return f"{min(values):.1f} - {max(values):.1f}%"


def by_algo(rows):
    return {algo: [row for row in rows if row["algo"] == algo] for algo in dict.fromkeys(row["algo"] for row in rows)}


def learning(results):
    """Ranges over the seeds."""
    if "learning" not in results.files:
        return NOT_MEASURED
    keys = ("accuracy_before_sampled", "accuracy_after_sampled", "accuracy_before", "accuracy_after")
    groups = by_algo(results.files["learning"]["rows"])
    seconds = lambda rows: ", ".join(f"{row['wall_seconds']:.0f}" for row in rows)
    lines = [[algo, *[span(rows, key) for key in keys], seconds(rows)] for algo, rows in groups.items()]
    seeds = ", ".join(str(row["seed"]) for row in next(iter(groups.values())))
    modes = [f"{mode} {when}" for mode in ("sampled", "greedy") for when in ("before", "after")]
    heads = [f"embedded task, seeds {seeds}", *modes, "seconds"]
    return with_sources(results, markdown(heads, lines), ["learning"])


def headline(results):
    """One sentence on what the verifier adds to imitation."""
    if "learning" not in results.files:
        return NOT_MEASURED
    *rl, control = by_algo(results.files["learning"]["rows"]).items()
    gains = ", ".join(f"{span(rows, 'accuracy_after_sampled')} after {algo}" for algo, rows in rl)
    return (
        f"Sampled answers that are right: {span(control[1], 'accuracy_before_sampled')} from imitation, {gains}; "
        f"{span(control[1], 'accuracy_after_sampled')} where imitation goes on for as long (dashed)."
    )


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
    source = f"Triton {table['triton']}; `python -m bench.budgets`; [budgets.json](bench/results/budgets.json)"
    return markdown([" / ".join(BUDGETS.values()), *archs], lines) + f"\n\n<sub>{source}</sub>"


def gpu(results):
    """What bench.gpu ran, and how it ended."""
    if "cuda-summary" not in results.files:
        return NOT_MEASURED
    parts = results.files["cuda-summary"]["parts"]
    lines = [[part["part"], part["status"], table.seconds(part["seconds"]), part["said"]] for part in parts]
    return with_sources(results, markdown(["part", "outcome", "time", "last line"], lines), ["cuda-summary"])


def pictured(name, region):
    """The region below its picture, which `draw` makes of the same results."""

    def both(results):
        text = region(results)
        return text if text == NOT_MEASURED else f"![{name}](bench/results/{name}.png)\n\n{text}"

    return both


REGIONS = {
    "headline": headline,
    "learning": learning,
    "lags": lags,
    "facts": facts,
    "budgets": budgets,
    "gpu": gpu,
    **{f"kernels-{kind}": kernels(kind) for kind in ("cpu", "cuda")},
    **{
        f"{name}-{kind}": experiment(name, kind)
        for name, bench in BENCHES.items()
        if isinstance(bench, Experiment)
        for kind in ("cpu", "cuda")
    },
}
REGIONS["trl-cpu"] = pictured("trl", REGIONS["trl-cpu"])


def write_regions(text, results):
    """The README's text with every region made anew; ValueError for one that nobody makes."""

    def filled(match):
        region = REGIONS[known("region", match[2], list(REGIONS))]
        return f"{match[1]}{region(results)}\n{match[3]}"

    return REGION.sub(filled, text)


def draw(results):
    """bench/results/trl.png: where a step goes, on both sides."""
    cases = results.cases("trl", "cpu")
    if not cases:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [(case["size"], row) for case, _ in cases for row in case["rows"] if row["status"] == "ok"]
    names = [f"{row['rival']}: {size['loss']}, {size['reward']}, from {size['start']}" for size, row in bars]
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(bars) + 1))
    left = [0.0] * len(bars)
    for part, colour in (("rollout", "tab:blue"), ("update", "tab:orange")):
        widths = [row[part] for _, row in bars]
        axis.barh(names, widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a step (medians)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(results.folder / "trl.png", dpi=110)
    plt.close(figure)


def main(argv, readme=README, folder=RESULTS):
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the README is out of date")
    args = parser.parse_args(argv)
    results, old = Results(folder), readme.read_text()
    try:
        new = write_regions(old, results)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.check:
        stale = [a[2] for a, b in zip(REGION.finditer(old), REGION.finditer(new)) if a[0] != b[0]]
        sys.exit(f"{readme.name} is out of date: {', '.join(stale)}; run python -m bench.report" if stale else 0)
    draw(results)
    readme.write_text(new)


if __name__ == "__main__":
    main(sys.argv[1:])
