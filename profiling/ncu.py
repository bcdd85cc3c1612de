"""Nsight Compute captures: one row per kernel, with hardware counters and no timeline.

Read from `ncu --page raw --csv` (a row of names, a row of units) or from an .ncu-rep, through the ncu program or the
package `ncu_report`. ncu replays every kernel alone with cold caches: why a kernel is slow, never how long a step is.
"""

import csv
import importlib
import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from traces import DOMAIN, BadInput, Trace

# metric: (heading, unit)
METRICS = {
    "gpu__time_duration.sum": ("time", "ns"),
    "dram__bytes_read.sum": ("DRAM read", "bytes"),
    "dram__bytes_write.sum": ("DRAM written", "bytes"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("DRAM of peak", "%"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("SM of peak", "%"),
    "sm__inst_executed_pipe_tensor_op_gmma.sum": ("tensor instructions", ""),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy", "%"),
    "lts__t_sector_hit_rate.pct": ("L2 hits", "%"),
    "smsp__sass_inst_executed_op_local_ld.sum": ("local loads (spills)", ""),
    "smsp__sass_inst_executed_op_local_st.sum": ("local stores (spills)", ""),
    "launch__registers_per_thread": ("registers", ""),
    "launch__shared_mem_per_block": ("shared memory a block", "bytes"),
    "launch__waves_per_multiprocessor": ("waves", ""),
}
PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "": 1.0}


@dataclass(frozen=True)
class Kernel:
    name: str
    ranges: tuple[str, ...]  # open at its launch, outermost first
    metrics: dict[str, float]  # times in ns, memory in bytes; one that was not measured is absent


def read_csv(path: Path) -> Trace:
    """The kernels of a raw page; lines before the header are ncu's own messages."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    except (OSError, csv.Error) as error:
        raise BadInput(f"{path.name} cannot be read as CSV ({error}); export it again.") from None
    at = next((i for i, row in enumerate(rows) if "Kernel Name" in row and "ID" in row), None)
    if at is None or len(rows) < at + 2:
        raise BadInput(f"{path.name} is no raw page of ncu: make it with `ncu --import FILE --page raw --csv`.")
    header, units = rows[at], rows[at + 1]
    if "Metric Name" in header:
        raise BadInput(f"{path.name} is ncu's details page; the report reads the raw one: `ncu --page raw --csv`.")
    whole = [row for row in rows[at + 2 :] if len(row) == len(header)]
    trace = Trace("ncu", kernels=[kernel_of(dict(zip(header, row)), dict(zip(header, units))) for row in whole])
    if len(whole) < len(rows) - at - 2:
        trace.notes.append(f"{len(rows) - at - 2 - len(whole)} rows of {path.name} were cut short and are left out.")
    if not whole:
        trace.notes.append("ncu measured no kernel: the ranges or steps it was given were never reached.")
    return trace


def kernel_of(cells: dict[str, str], units: dict[str, str]) -> Kernel:
    metrics = {name: number(cells[name], units.get(name, "")) for name in METRICS if name in cells}
    ranges = [match for key, cell in cells.items() if "Push/Pop_Range" in key for match in range_names(cell)]
    return Kernel(cells["Kernel Name"], tuple(ranges), {k: v for k, v in metrics.items() if v is not None})


def range_names(cell: str) -> list[str]:
    """The names in `thread "domain:name:payload..." "..."`: those of our domain, or of the default one."""
    return [
        name for domain, name in re.findall(r'"([^":]*):([^":]*)[^"]*"', cell) if domain in (DOMAIN, "<default domain>")
    ]


def number(text: str, unit: str) -> float | None:
    """The value in ns or bytes when the unit is of time or memory, without thousands separators; None for n/a."""
    try:
        read = float(text.replace(",", ""))
    except ValueError:
        return None
    if match := re.fullmatch(r"([num]?)(?:second|s|sec)", unit):
        return read * PREFIXES[match[1]] * 1e9
    if match := re.fullmatch(r"([KMGT]?)byte(?:/\w+)?", unit):
        return read * PREFIXES[match[1]]
    return read


def read_report(path: Path, ncu: str | None, aside: Path) -> Trace:
    """An .ncu-rep, through the program `ncu` when there is one, else the package; `aside` is a folder to write in."""
    if ncu:
        page = aside / "raw.csv"
        command = [ncu, "--import", str(path), "--page", "raw", "--csv", "--print-units", "base"]
        with page.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise BadInput(f"ncu could not read {path.name}: {(done.stderr.strip() or page.read_text()[-300:])}")
        return read_csv(page)
    if importlib.util.find_spec("ncu_report") is None:
        raise BadInput(
            f"Reading {path.name} needs the program ncu (from NVIDIA's CUDA toolkit) or `pip install ncu-report`."
        )
    try:
        context = importlib.import_module("ncu_report").load_report(str(path))
        return Trace("ncu", kernels=[kernel_of_action(action) for part in context for action in part])
    except Exception as error:  # noqa: BLE001 - the package is another's, and says neither what it raises nor when
        raise BadInput(f"ncu_report could not read {path.name} ({error}).") from None


def kernel_of_action(action) -> Kernel:
    """A kernel of the package `ncu_report`, whose values are in base units."""
    found = {name: action.metric_by_name(name) for name in METRICS}
    state, ranges = action.nvtx_state(), []
    for domain in state.domains if state else ():
        info = state.domain_by_id(domain)
        ranges += info.push_pop_ranges() if info.name() in (DOMAIN, "<default domain>") else ()
    return Kernel(action.name(), tuple(ranges), {k: float(m.as_double()) for k, m in found.items() if m is not None})
