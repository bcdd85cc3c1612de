"""profiling/ncu.py: the raw page of Nsight Compute."""

import ncu
import pytest
from traces import BadInput

from tests.captures import ncu_csv


def test_ncu_csv(tmp_path):
    trace = ncu.read_csv(ncu_csv(tmp_path / "a.csv"))
    gemm, norm = trace.kernels
    assert gemm.ranges == ("update", "forward") and norm.ranges == ()
    assert gemm.metrics["gpu__time_duration.sum"] == 1_234_500 and gemm.metrics["dram__bytes_read.sum"] == 1_500_250_000
    assert gemm.metrics["dram__bytes_write.sum"] == 2_000_000 and gemm.metrics["launch__registers_per_thread"] == 96
    assert "dram__bytes_read.sum" not in norm.metrics
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "cut.csv").write_text(text[: text.index('"norm"') + 10])
    trace = ncu.read_csv(tmp_path / "cut.csv")
    assert len(trace.kernels) == 1 and "cut short" in trace.notes[0]
    header, _, *rows = text.splitlines()[1:]
    (tmp_path / "units.csv").write_text("\n".join([header, '"",""', *rows]))
    assert ncu.read_csv(tmp_path / "units.csv").kernels[0].metrics["launch__registers_per_thread"] == 96
    for content in ("", "a,b\n1,2\n", text.splitlines()[1]):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(BadInput, match="no raw page of ncu"):
            ncu.read_csv(tmp_path / "bad.csv")


def test_ncu_report_needs_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(ncu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs the program ncu"):
        ncu.read_report(tmp_path / "a.ncu-rep", None, tmp_path)
