"""What earlier visits found, in one committed file: {part: {device class: row}}.

A row holds the part's key (a digest of what it measured), seconds, status, the visit's file, versions and commit.
The newest row of a part on a class counts, with one exception: what is not good leaves a good row of the same key.
A row is good for a key when its status is "ok" and its key is that one.
"""

import json
from pathlib import Path

from .parts import ROOT

LEDGER = ROOT / "bench" / "results" / "gpu" / "ledger.json"


def read(path=LEDGER):
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else {}


def find(ledger, part, device_class):
    """The row, or {}."""
    return ledger.get(part, {}).get(device_class, {})


def good(row, key):
    return row.get("status") == "ok" and row["key"] == key


def record(ledger, part, device_class, row):
    """Writes the row into the ledger, by the rule above."""
    if row["status"] == "ok" or not good(find(ledger, part, device_class), row["key"]):
        ledger.setdefault(part, {})[device_class] = row


def seen(ledger, device_class):
    """Whether any part has a good result on the class, of whatever key."""
    return any(rows.get(device_class, {}).get("status") == "ok" for rows in ledger.values())


def estimate(part, row):
    """Seconds: those of its last good run, else its limit."""
    return row["seconds"] if row.get("status") == "ok" else part.limit_s
