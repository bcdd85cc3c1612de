"""The README's numbers come from bench/results, and are those of today."""

import json

import pytest

from bench import report

ABOUT = {
    "kind": "cpu", "device": "A Chip", "driver": None, "cuda": None, "threads": 1, "python": "3.11.0",
    "versions": {"torch": "2.13.0", "trl": None}, "commit": "c0ffee0123456789", "uncommitted": False,
    "command": "python -m bench.run logprob", "time": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
EAGER = {"rival": "eager", "status": "ok", "why": "", "note": "", "median": 0.5, "extra_bytes": 1 << 20}
OURS = EAGER | {
    "rival": "ours chunked",
    "time_ratio": 0.25,
    "extra_ratio": 0.5,
    "errors": {"logp_N": {"max_abs": 1e-5}},
}
ABSENT = {"rival": "CCE", "status": "absent", "why": "no module", "note": ""}
CASE = {"bench": "logprob", "size": {"N": 8, "D": 0, "V": 32}, "dtype": "fp32", "rows": [EAGER, OURS, ABSENT]}


@pytest.fixture
def page(tmp_path):
    """page(text, name={...}) -> the README's text after the report."""

    def write(text, *flags, **files):
        for name, file in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(file))
        readme = tmp_path / "README.md"
        readme.write_text(text)
        report.main(list(flags), readme, tmp_path)
        return readme.read_text()

    return write


def region(name, content="old\n"):
    return f"before\n<!-- bench:{name} -->\n{content}<!-- end -->\nafter\n"


def test_the_readme_is_up_to_date():
    with pytest.raises(SystemExit) as done:
        report.main(["--check"])
    assert done.value.code == 0, done.value.code


def test_a_region_is_written_and_the_rest_is_left(page):
    text = page(region("kernels-cpu"), cpu={"provenance": ABOUT, "cases": [CASE]})
    assert text.startswith("before\n<!-- bench:kernels-cpu -->\n") and text.endswith("<!-- end -->\nafter\n")
    assert "| eager | 500 ms / 1 MiB / - |" in text and "| **ours chunked** | 0.25x / 0.50x / 1.0e-05 |" in text
    assert "Not run: CCE (no module)." in text and "old" not in text
    for known in ("A Chip", "1 thread", "torch 2.13.0", "commit c0ffee012345", "`python -m bench.run logprob`"):
        assert known in text
    assert page(text) == text


def test_of_two_results_the_newer_counts(page):
    newer = {"provenance": ABOUT | {"time": "2026-02-01"}, "cases": [CASE | {"rows": [EAGER | {"median": 2.0}]}]}
    text = page(region("kernels-cpu"), a_new=newer, b_old={"provenance": ABOUT, "cases": [CASE]})
    assert "2 s" in text and "500 ms" not in text


@pytest.mark.parametrize("name", report.REGIONS)
def test_what_is_missing_is_not_measured(page, name):
    assert report.NOT_MEASURED in page(region(name))


def test_an_unknown_region_is_refused(page):
    with pytest.raises(SystemExit, match="nearest: 'kernels-cpu'"):
        page(region("kernels-cpus"))


def test_check_writes_nothing_and_names_what_is_out_of_date(page, tmp_path):
    with pytest.raises(SystemExit, match="kernels-cpu"):
        page(region("kernels-cpu"), "--check")
    assert "old" in (tmp_path / "README.md").read_text()


def test_an_experiment_shows_its_own_columns(page):
    row = {"rival": "eager", "status": "ok", "why": "", "note": "", "median": 0.5, "loss": 0.125}
    case = {"bench": "step", "size": {"model": "tiny", "sequences": 8}, "dtype": "fp32", "rows": [row]}
    text = page(region("step-cpu"), step={"provenance": ABOUT, "cases": [case]})
    assert "model=tiny sequences=8" in text and "500 ms" in text and "0.125000" in text


def test_ranges_over_seeds(page):
    keys = ("accuracy_before", "accuracy_after", "accuracy_before_sampled", "accuracy_after_sampled")
    row = lambda algo, seed, x: dict.fromkeys(keys, x) | {"algo": algo, "seed": seed, "wall_seconds": 10.0 + seed}
    rows = [row(algo, seed, 0.5 + 0.25 * seed) for algo in ("grpo", "sft continued") for seed in (0, 1)]
    text = page(region("learning") + region("headline"), learning={"provenance": ABOUT, "rows": rows})
    assert "| grpo | 50.0 - 75.0% |" in text and "10, 11" in text and "after grpo" in text


def test_a_gpu_table_keeps_the_largest_of_each_shape(page):
    about = ABOUT | {"kind": "cuda", "driver": "580.1"}
    sizes = [(N, D, dtype) for N in (8, 16) for D in (4, 6) for dtype in ("fp32", "bf16")]
    cases = [CASE | {"size": {"N": N, "D": D, "V": 32}, "dtype": dtype} for N, D, dtype in sizes]
    text = page(region("kernels-cuda") + region("kernels-cpu"), cuda={"provenance": about, "cases": cases})
    assert "| `logprob` N=16 V=32 | bf16 D=4 | bf16 D=6 |" in text and "driver 580.1" in text
    assert text.count(report.NOT_MEASURED) == 1
