"""profiling/reports: what the finished reports say is what their numbers say."""

import json
import re
from statistics import median

import page
import pytest
import sections
from summary import STEP, Change, spread_of

from tests.captures import ROOT

FOLDERS = sorted(path.parent for path in ROOT.glob("profiling/reports/*/verdict.json"))
IN_UPDATE = ("logp_old", "reference", "forward", "backward", "optimizer", "rest of update")
IN_STEP = ("wait", "rollout", "reward", "advantage", "update", "weight_sync", "rest of step")


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture
def verdict(folder):
    return json.loads((folder / "verdict.json").read_text())


def changes_of(verdict: dict, label: str) -> dict[str, Change]:
    """Recomputed from the host times of every step."""
    first = next(iter(verdict["host"]))
    pooled = lambda of, name: [ns for capture in verdict["host"][of] for ns in capture.get(name, {}).values()]
    changes = {}
    for name in {name for of in (first, label) for capture in verdict["host"][of] for name in capture}:
        sides = [pooled(of, name) for of in (first, label)]
        spreads = [spread_of(side) for side in sides if side]
        middles = [median(side) if side else None for side in sides]
        changes[name] = Change(name, *middles, None if None in spreads else max(spreads), "host")
    return changes


def test_there_are_three():
    assert [folder.name for folder in FOLDERS] == ["cpu-algorithms", "cpu-eager-chunked", "cpu-lag0-lag1"]


def test_the_parts_of_a_step_and_of_an_update_add_up(folder, verdict):
    notes = (folder / "report.md").read_text().rpartition("## Notes")[2]
    for label, captures in verdict["host"].items():
        (beside,) = re.findall(rf"- {label}: on threads of their own, beside the rest of a step: (.*)\.", notes)
        parts = [name for name in IN_STEP if name not in beside.split(", ")]
        assert len(parts) == len(IN_STEP) - 1 - 2 * (label == "lag 1"), "rewards at least"
        for host in captures:
            for step, ns in host[STEP].items():
                assert ns == sum(host[name].get(step, 0) for name in parts if name in host)
                assert host["update"][step] == sum(host[name].get(step, 0) for name in IN_UPDATE if name in host)


def test_the_comparisons_are_those_of_the_host_times(verdict):
    for label in {c["label"] for c in verdict["comparisons"]}:
        found = {c["name"]: c for c in verdict["comparisons"] if c["label"] == label}
        changes = changes_of(verdict, label)
        assert found.keys() == changes.keys()
        for name, change in changes.items():
            keys = ("first", "other", "spread", "speedup", "verdict")
            assert {key: found[name][key] for key in keys} == {key: getattr(change, key) for key in keys}, name


def test_the_table_shows_them(folder, verdict):
    (table,) = re.findall(r"## Where the time goes\n(.*?)\n## ", (folder / "report.md").read_text(), re.S)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    cells = {(row[0].lstrip("- "), row[1]): row for row in rows}
    first = next(iter(verdict["host"]))
    for label in verdict["host"]:
        for name, change in changes_of(verdict, label).items():
            if change.other and (name, first) in cells:
                row = cells[name, label]
                assert row[3].split(" ± ")[0] == sections.show_time(change.other)
                assert label == first or row[-1] == sections.show_change(change)
    assert {name for name, _ in cells} >= {STEP, "update", "rest of update", "rest of step"}


def test_the_sentences_are_true(folder, verdict):
    text = (folder / "report.md").read_text()
    for said in verdict["sentences"]:
        assert page.literal(said) in text
        first, *others = verdict["host"]
        label = next(label for label in others if re.match(rf"(No change between )?{label} ", said))
        changes = changes_of(verdict, label)
        whole = changes[STEP]
        ratio = sections.show_ratio(whole.speedup)
        assert said.startswith(
            f"{label} is {ratio} than {first}: " if whole.moved else f"No change between {label} and "
        )
        assert f"takes {sections.show_time(whole.other)} instead of {sections.show_time(whole.first)}" in said
        least = sections.LEAST * max(whole.first, whole.other)
        leaves = [c for name, c in changes.items() if name in (*IN_STEP, *IN_UPDATE) and name != "update"]
        moved = [c for c in leaves if c.moved and abs(c.difference) >= least]
        for change in sorted(moved, key=lambda c: -abs(c.difference))[: sections.WORST]:
            assert f"{change.name} ({sections.show_times(change, first, label)})" in said or "update (" in said
        assert ("No part of it" in said) == (not moved and not changes["update"].moved)


def test_they_say_where_they_come_from_and_name_no_folder_of_a_machine(folder):
    for label, captures in json.loads((folder / "provenance.json").read_text()).items():
        for known in captures:
            assert re.fullmatch("[0-9a-f]{40}", known["commit"]) and known["dirty"] is False and known["steps"], label
    for path in folder.iterdir():
        assert not re.search(rb"/(home|root|tmp|work|mnt|usr)/", path.read_bytes()), path
