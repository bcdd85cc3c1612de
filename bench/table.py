"""Rows of results as a table, for the terminal or a page."""


def seconds(x):
    unit, scale = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("us", 1e-6)) if x >= s), ("us", 1e-6))
    return f"{x / scale:.3g} {unit}"


def megabytes(x):
    return f"{x / 2**20:.4g} MiB"


def cell(row, key, show):
    return show(row[key]) if row.get(key) is not None else "-"


def largest_error(row, names, kind):
    found = [error[kind] for name, error in row.get("errors", {}).items() if names(name)]
    return f"{max(found):.1e}" if found else "-"


def remarks(row):
    spread = "difference within the spread" if row.get("within_spread") else ""
    status = "" if row["status"] == "ok" else f"{row['status'].upper()}: {row['why']}"
    return "; ".join(x for x in (status, row["note"], spread) if x)


def spread(row):
    return f"{seconds(row['p20'])}-{seconds(row['p80'])}" if "p20" in row else "-"


def share(x):
    return f"{100 * x:.0f}%"


def ratio(x):
    return f"{x:.2f}"


def span(rows, key):
    """The range of a share."""
    values = [100 * row[key] for row in rows]
    return f"{min(values):.1f} - {max(values):.1f}%"


def shown(key, show=str):
    """row -> its value for `key` as text, "-" without one."""
    return lambda row: cell(row, key, show)


COLUMNS = (
    ("rival", shown("rival")),
    ("time", shown("median", seconds)),
    ("p20-p80", spread),
    ("x eager", shown("time_ratio", ratio)),
    ("memory", shown("extra_bytes", megabytes)),
    ("x eager", shown("extra_ratio", ratio)),
    ("roof", shown("roof_share", share)),
    ("GEMMs", shown("gemm_share", share)),
    ("logp err", lambda row: largest_error(row, lambda name: name.startswith("logp"), "max_abs")),
    ("grad err", lambda row: largest_error(row, lambda name: name.startswith("d"), "relative")),
    ("", remarks),
)
"""memory: beyond inputs and returned gradients; roof, GEMMs: share of the time they need; logp err: largest
|difference|; grad err: relative (Frobenius), the worst gradient."""


def render(title, rows, columns=COLUMNS):
    lines = [[heading for heading, _ in columns], *[[show(row) for _, show in columns] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) - 1)]
    pad = lambda line: [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))]
    return "\n".join([title, *["  ".join([*pad(line), line[-1]]).rstrip() for line in lines]])


def markdown(headings, lines):
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
