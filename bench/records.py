"""What was measured: the files of bench/results as one.

A file is of bench.run's form, {"provenance", "cases"}, or of its own. One below gpu/ is a visit of bench.gpu to a GPU,
{"provenance", "parts", "cases"}; gpu/ledger.json is bench.gpu's own. Timings compare within one case of one file only,
so a case is taken whole: of the same benchmark, size, dtype and card the newest in which ours ran.
"""

import json

LEDGER = "gpu/ledger"
PROVENANCE = ("kind", "device", "driver", "python", "versions", "commit", "uncommitted", "command", "time")
VISIT = {"part": ("part", "status", "seconds", "said"), "case": ("bench", "size", "dtype", "rows")}
ROW = ("rival", "status", "why")
NOT_RUN = ("absent", "skipped")


def timed(case):
    """The rows that have a time."""
    return [row for row in case["rows"] if row["status"] == "ok" and row.get("median") is not None]


def title(fields):
    return " ".join(f"{name}={value}" for name, value in fields.items() if value)


def kind_of(file):
    about = file["provenance"]
    return about.get("kind") or ("cuda" if about["driver"] else "cpu")


def card_of(file):
    """The GPU's full name; of a CPU the instruction set, "" where that was not recorded."""
    about = file["provenance"]
    return about["device"] if kind_of(file) == "cuda" else about.get("isa") or ""


def has(what, entry, keys):
    """ValueError unless `entry` is a dict with these keys."""
    lacking = [key for key in keys if key not in entry] if isinstance(entry, dict) else ["fields"]
    if lacking:
        raise ValueError(f"{what} has no {', '.join(lacking)}")


def check_visit(file):
    """ValueError unless the file is what bench.gpu writes about a GPU."""
    has("it", file, ("provenance", "parts", "cases"))
    has("its provenance", file["provenance"], PROVENANCE)
    if file["provenance"]["kind"] != "cuda":
        raise ValueError(f"it was measured on {file['provenance']['kind']!r}, which is no GPU")
    for what, keys in VISIT.items():
        for entry in file[f"{what}s"] or ():
            has(f"a {what}", entry, keys)
    for case in file["cases"]:
        for row in case["rows"]:
            has(f"a row of {case['bench']}", row, ROW)


def refuse(constant):
    raise ValueError(f"{constant} is no measurement")


def read(path, name):
    """The file parsed; ValueError that names it where it is not what it should be."""
    try:
        file = json.loads(path.read_text(), parse_constant=refuse)
        if name.startswith("gpu/"):
            check_visit(file)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be shown: {error}") from None
    return file


def failed(row):
    return row["status"] not in ("ok", *NOT_RUN)


def rank(case):
    """Larger is better, before age: ours ran, nothing of ours failed (nothing at all where none is named so), anything
    ran."""
    times, is_ours = timed(case), lambda row: row["rival"].startswith("ours")
    ours = list(filter(is_ours, case["rows"])) or case["rows"]
    return any(map(is_ours, times)), not any(map(failed, ours)), bool(times)


def best_of(tries):
    """The (case, file's name) that counts, of all with its size and dtype, the oldest first."""
    return max(reversed(tries), key=lambda pair: rank(pair[0]))


def widest(cases):
    """Of cases in bf16 that differ in their rows alone, the one with the most: what a GPU is bought for."""
    most = {}
    for case, name in sorted(cases, key=lambda pair: next(iter(pair[0]["size"].values()))):
        _, *shape = case["size"].items()
        if case["dtype"] == "bf16":
            most[tuple(shape)] = (case, name)
    return list(most.values())


def by_algo(rows):
    return {algo: [row for row in rows if row["algo"] == algo] for algo in dict.fromkeys(row["algo"] for row in rows)}


class Results:
    """The files of a folder: `files` by their path in it, without suffix."""

    def __init__(self, folder):
        paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("**/*.json"))}
        self.folder = folder
        self.files = {name: read(path, name) for name, path in paths.items() if name != LEDGER}

    def with_cases(self, kind):
        return {
            name: file
            for name, file in self.files.items()
            if isinstance(file, dict) and "cases" in file and kind_of(file) == kind
        }

    def visits(self):
        """Names of the files of bench.gpu, the oldest first."""
        return sorted((name for name, file in self.with_cases("cuda").items() if "parts" in file), key=self.time)

    def cards(self, kind):
        """The GPUs with results, or the CPUs' instruction sets."""
        return list(dict.fromkeys(map(card_of, self.with_cases(kind).values())))

    def tries(self, bench, kind, card):
        """[[(case, its file's name)]] of a benchmark: a list for each size and dtype, the oldest first."""
        found = {}
        for name, file in self.with_cases(kind).items():
            for case in file["cases"]:
                if case["bench"] == bench and card_of(file) == card:
                    found.setdefault((json.dumps(case["size"]), case["dtype"]), []).append((case, name))
        return [sorted(tries, key=lambda pair: self.time(pair[1])) for tries in found.values()]

    def time(self, name):
        return self.files[name]["provenance"]["time"]

    def cases(self, bench, kind, card):
        """[(case, its file's name)], the one that counts for each size and dtype."""
        return [best_of(tries) for tries in self.tries(bench, kind, card)]

    def by_fields(self, cases):
        """Of cases whose sizes do not all have the same fields, those that do; the newest first."""
        groups = {}
        for case, name in cases:
            groups.setdefault(tuple(case["size"]), []).append((case, name))
        newest = lambda group: max(self.time(name) for _, name in group)
        return sorted(groups.values(), key=newest, reverse=True)

    def failures(self, bench, kind, card):
        """[(case, its file's name, row)] of what failed the last time, where an older case counts."""
        tried = [(tries[-1], best_of(tries)) for tries in self.tries(bench, kind, card)]
        return [(*last, row) for last, best in tried if last is not best for row in last[0]["rows"] if failed(row)]

    def source(self, name):
        """A line of bench/README.md: where and with what the results of a file were measured."""
        about = self.files[name]["provenance"]
        versions = {"python": about["python"], **about["versions"]}
        driver, commit = about["driver"] and f"driver {about['driver']}", commits(self.files[name])
        said = [machine(about), driver, packages(versions), commit]
        return "; ".join(filter(None, [*said, f"`{about['command']}`", f"[{name}.json](results/{name}.json)"]))

    def where(self, name):
        """The same for README.md, in short: the machine with its versions, the commit."""
        about = self.files[name]["provenance"]
        versions = {package: about["versions"].get(package) for package in ("torch", "triton", "transformers")}
        return f"{machine(about)}; {packages(versions)}", f"[{commits(self.files[name])}](bench/results/{name}.json)"

    def heading(self, names):
        """The card and the commits behind a picture."""
        abouts = [self.files[name]["provenance"] for name in dict.fromkeys(names)]
        commits = dict.fromkeys((about["commit"] or "not recorded")[:12] for about in abouts)
        return f"{abouts[0]['device']}, commit {', '.join(commits)}"


def machine(about):
    threads = about["threads"] if about.get("kind") != "cuda" else None
    said = [about["device"], about.get("isa"), threads and f"{threads} thread{'s' * (threads > 1)}"]
    return ", ".join(filter(None, said))


def packages(versions):
    return ", ".join(f"{package} {version}" for package, version in versions.items() if version)


def commits(file):
    """Of the runs that a file tells of, its own where they do not say."""
    abouts = [row for row in file.get("rows", ()) if "commit" in row] or [file["provenance"]]
    said = [f"{(x['commit'] or 'not recorded')[:12]}{' with changes' * bool(x['uncommitted'])}" for x in abouts]
    return f"commit {', '.join(dict.fromkeys(said))}"
