"""profiling/capture.py: which nsys, ncu and importer of a machine are taken, and which tool `auto` is."""

from pathlib import Path

import capture as capturing
import pytest

NSYS = "opt/nvidia/nsight-systems/9.9"

INNER = "opt/nvidia/nsight-compute/9.9"


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """-> add(path): a program on a disk where nothing else is installed, on PATH where it lies in usr/bin."""
    places = {name: tuple(f"{tmp_path}{place}" for place in known) for name, known in capturing.PLACES.items()}
    monkeypatch.setattr(capturing, "PLACES", places)
    monkeypatch.setenv("PATH", str(tmp_path / "usr/bin"))
    monkeypatch.setattr(capturing, "has_nvtx", lambda: True)

    def add(path: str) -> str:
        program = tmp_path / path
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch(0o755)
        return str(program)

    return add


def test_the_nsys_inside_nsight_compute_is_none(disk):
    """What a CUDA image has: it records, and nothing there makes a report."""
    inner, ncu = disk(f"{INNER}/host/target-linux-x64/nsys"), disk(f"{INNER}/ncu")
    assert capturing.usable([{}]) == {"nsys": None, "ncu": ncu, "auto": "torch"}
    Path(disk("usr/bin/ls")).with_name("nsys").symlink_to(inner)
    assert capturing.find_tool("nsys") is None


@pytest.mark.parametrize("where", [f"{NSYS}/host-linux-x64", "usr/bin"])
def test_auto_is_nsys_where_a_report_can_be_made_of_its_recording(disk, monkeypatch, where):
    disk(f"{INNER}/host/target-linux-x64/nsys")
    nsys = disk(f"{NSYS}/bin/nsys")
    assert capturing.usable([{}]) == {"nsys": None, "ncu": None, "auto": "torch"}
    importer = disk(f"{where}/QdstrmImporter")
    assert capturing.find_importer(nsys) == importer
    assert capturing.usable([{}]) == {"nsys": nsys, "ncu": None, "auto": "nsys"}
    assert capturing.usable([])["auto"] == "torch", "the window of steps needs a GPU"
    monkeypatch.setattr(capturing, "has_nvtx", lambda: False)
    assert capturing.usable([{}])["auto"] == "torch", "nsys would see no phases"


def test_an_installation_off_the_usual_places_brings_its_own_importer(disk):
    nsys, importer = disk("home/tools/bin/nsys"), disk("home/tools/host-linux-x64/QdstrmImporter")
    Path(disk("usr/bin/ls")).with_name("nsys").symlink_to(nsys)
    assert capturing.find_importer(capturing.find_tool("nsys")) == importer


def test_of_several_versions_the_newest_is_taken_and_path_goes_first(disk):
    old, new = (disk(f"opt/nvidia/nsight-systems/{year}/bin/nsys") for year in (2024, 2025))
    assert old < new == capturing.find_tool("nsys")
    assert disk("usr/bin/nsys") == capturing.find_tool("nsys")
