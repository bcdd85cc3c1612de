"""The numbers of README.md and bench/README.md come from bench/results, and are those of today."""

import json
import re

import pytest

from bench import headline, pictures, report
from bench.records import Results

ABOUT = {
    "kind": "cpu", "device": "A Chip", "driver": None, "cuda": None, "threads": 1, "python": "3.11.0",
    "versions": {"torch": "2.13.0", "trl": None}, "commit": "c0ffee0123456789", "uncommitted": False,
    "command": "python -m bench.run logprob", "time": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
EAGER = {"rival": "eager", "status": "ok", "why": "", "note": "", "median": 0.5, "extra_bytes": 1 << 20, "bytes": None}
OURS = EAGER | {
    "rival": "ours chunked",
    "time_ratio": 0.25,
    "extra_ratio": 0.5,
    "errors": {"logp_N": {"max_abs": 1e-5}},
}
ABSENT = {"rival": "CCE", "status": "absent", "why": "no module", "note": ""}
CASE = {"bench": "logprob", "size": {"N": 8, "D": 0, "V": 32}, "dtype": "fp32", "rows": [EAGER, OURS, ABSENT]}


CARD = "NVIDIA H100 80GB HBM3"
ROOFS = {"matmul": 8e14, "copy": 2e12, "sum": 4e12}


def put(folder, name, file):
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(file))


def visit(time, *cases, device=CARD, parts=()):
    about = {"kind": "cuda", "device": device, "driver": "580.1", "threads": None, "time": time}
    return {"provenance": ABOUT | about, "parts": list(parts), "cases": list(cases)}


def bf16(*rows, **size):
    return {"bench": "logprob", "size": {"N": 8, "V": 32} | size, "dtype": "bf16", "roofs": ROOFS, "rows": list(rows)}


def results(folder, **visits):
    for name, file in visits.items():
        put(folder, f"gpu/{name}", file)
    return Results(folder)


def marks(axis):
    """{label: [(x, y)]} of what is drawn as lines or markers."""
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines if len(line.get_xydata())}


@pytest.fixture
def page(tmp_path):
    """page(text, name={...}) -> the text of a page after the report."""

    def write(text, *flags, **files):
        for name, file in files.items():
            put(tmp_path, name, file)
        readme = tmp_path / "README.md"
        readme.write_text(text)
        report.main(list(flags), [readme], tmp_path)
        return readme.read_text()

    return write


def region(name, content="old\n"):
    return f"before\n<!-- bench:{name} -->\n{content}<!-- end -->\nafter\n"


def test_both_pages_are_up_to_date():
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
    rows = [EAGER | {"median": 2.0}, OURS]
    newer = {"provenance": ABOUT | {"time": "2026-02-01"}, "cases": [CASE | {"rows": rows}]}
    text = page(region("kernels-cpu"), a_new=newer, b_old={"provenance": ABOUT, "cases": [CASE]})
    assert "2 s" in text and "500 ms" not in text


def test_instruction_sets_are_told_apart(page):
    ran = {isa: {"provenance": ABOUT | {"isa": isa}, "cases": [CASE]} for isa in ("AVX2", "AVX512")}
    text = page(region("kernels-cpu"), slow=ran["AVX2"], fast=ran["AVX512"])
    assert text.count("| eager | 500 ms") == 2
    for isa in ran:
        assert f"| {isa}: `logprob`" in text and f"A Chip, {isa}, 1 thread" in text


@pytest.mark.parametrize("name", report.REGIONS)
def test_what_is_missing_is_not_measured(page, name):
    text = page(region(name))
    figures = [f"{figure.what} ({headline.KINDS[figure.kind]})" for figure in headline.FIGURES]
    assert all(words in text for words in (figures if name == "headline" else [report.NOT_MEASURED]))


def test_whatever_is_measured_is_shown_once_and_the_readme_has_the_headline_alone():
    readme, shown = ([name for _, name, _ in report.REGION.findall(page.read_text())] for page in report.PAGES)
    results = Results(report.RESULTS)
    measured = {name for name, region in report.REGIONS.items() if region(results) != report.NOT_MEASURED}
    assert readme == ["headline"] and len(shown) == len(set(shown)) and measured <= {*readme, *shown}


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.parent.name)
def test_what_a_page_points_to_is_there(path):
    targets = re.findall(r"\]\(([^)#:]+)[)#]", path.read_text())
    assert targets and not [target for target in targets if not (path.parent / target).exists()]


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


def test_real_weights_are_shown_with_what_they_gained(page):
    exam = {"status": "ok", "why": "", "note": "", "problems": 512, "length": 200.0, "at_limit": 0.1, "steps": 0,
            "seconds": 0.0}  # fmt: skip
    rows = [exam | {"rival": "before", "greedy": 0.25, "sampled": 0.2},
            exam | {"rival": "after", "greedy": 0.375, "sampled": 0.3, "gain": 0.125, "steps": 90}]  # fmt: skip
    size = {"model": "qwen", "problems": 512, "minutes": 9.0}
    case = {"bench": "gsm8k", "size": size, "dtype": "bf16", "rows": rows}
    text = page(region("gsm8k-cuda"), **{"gpu/H100-a": visit("2026-01-02", case)})
    assert "+12.5%" in text and "25%" in text and CARD in text


def test_ranges_over_seeds(page):
    keys = ("accuracy_before", "accuracy_after", "accuracy_before_sampled", "accuracy_after_sampled")
    row = lambda algo, seed, x: dict.fromkeys(keys, x) | {"algo": algo, "seed": seed, "wall_seconds": 10.0 + seed}
    rows = [row(algo, seed, 0.5 + 0.25 * seed) for algo in ("grpo", "sft continued") for seed in (0, 1)]
    text = page(region("learning") + region("headline"), learning={"provenance": ABOUT, "rows": rows})
    assert "| grpo | 50.0 - 75.0% |" in text and "10, 11" in text
    said = "50.0 - 75.0% from imitation, 50.0 - 75.0% after grpo; 50.0 - 75.0% where it goes on for as long"
    assert "| grpo | 50.0 - 75.0% |" in page(region("teachers"), teachers={"provenance": ABOUT, "rows": rows})
    assert f"| sampled answers that are right, 2 seeds | {said} | [commit c0ffee012345](bench/" in text


def test_runs_of_several_commits_are_said_to_be_of_those(page):
    about = lambda commit, uncommitted: {"commit": commit, "uncommitted": uncommitted}
    runs = [about("a" * 40, True), about("a" * 40, True), about("b" * 40, False)]
    keys = ("accuracy_before", "accuracy_after", "accuracy_before_sampled", "accuracy_after_sampled", "wall_seconds")
    rows = [dict.fromkeys(keys, 0.5) | run | {"algo": str(i), "seed": 0} for i, run in enumerate(runs)]
    text = page(region("learning") + region("headline"), learning={"provenance": ABOUT, "rows": rows})
    said = f"commit {'a' * 12} with changes, {'b' * 12}"
    assert f"; {said}; `" in text and f"[{said}](bench/" in text and "c0ffee" not in text


def test_a_gpu_table_keeps_the_largest_of_each_shape(page):
    sizes = [(N, D, dtype) for N in (8, 16) for D in (4, 6) for dtype in ("fp32", "bf16")]
    cases = [CASE | {"size": {"N": N, "D": D, "V": 32}, "dtype": dtype} for N, D, dtype in sizes]
    text = page(region("kernels-cuda") + region("kernels-cpu"), **{"gpu/a": visit("2026-03-01", *cases)})
    assert f"| {CARD}: `logprob` N=16 V=32 | bf16 D=4 | bf16 D=6 |" in text and "driver 580.1" in text
    assert text.count(report.NOT_MEASURED) == 1


BROKEN = OURS | {"status": "error", "why": "RuntimeError: no kernel image"}


def test_a_failed_newer_visit_does_not_erase_and_is_said(page):
    visits = {"gpu/a": visit("2026-03-01", bf16(EAGER, OURS)), "gpu/b": visit("2026-03-02", bf16(EAGER, BROKEN))}
    text = page(region("kernels-cuda"), **visits)
    assert "| **ours chunked** | 0.25x /" in text and "gpu/a.json" in text
    assert "Failed since: ours chunked at N=8 V=32 bf16 (error: RuntimeError: no kernel image; gpu/b.json)." in text
    text = page(region("kernels-cuda"), **{"gpu/c": visit("2026-03-03", bf16(EAGER, OURS | {"time_ratio": 0.125}))})
    assert "| **ours chunked** | 0.12x /" in text and "Failed since" not in text


def test_a_case_is_shown_whole_from_one_file(page):
    peer = EAGER | {"rival": "CCE", "time_ratio": 0.75}
    visits = {"gpu/a": visit("2026-03-01", bf16(EAGER, OURS)), "gpu/b": visit("2026-03-02", bf16(EAGER, peer))}
    text = page(region("kernels-cuda"), **visits)
    assert "0.25x" in text and "CCE" not in text and "gpu/b.json" not in text
    visits["gpu/c"] = visit("2026-03-03", bf16(EAGER, OURS), bf16(EAGER, OURS, peer))
    text = page(region("kernels-cuda"), **visits)
    assert "| **ours chunked** | 0.25x" in text and "| CCE | 0.75x" in text and "gpu/a.json" not in text


def test_beside_an_eager_that_did_not_run_times_are_absolute(page):
    alone = {key: x for key, x in OURS.items() if not key.endswith("_ratio")}
    case = bf16(EAGER | {"status": "out of memory"}, alone)
    text = page(region("kernels-cuda"), **{"gpu/a": visit("2026-03-01", case)})
    assert "| eager | out of memory |" in text and "| **ours chunked** | 500 ms / 1 MiB / 1.0e-05 |" in text


def test_cards_are_kept_apart(page):
    slow = bf16(EAGER | {"median": 3.0}, OURS)
    visits = {"gpu/a": visit("2026-03-01", slow), "gpu/b": visit("2026-03-02", bf16(EAGER, OURS), device="NVIDIA H200")}
    text = page(region("kernels-cuda"), **visits)
    first, second = text.split("| NVIDIA H200: `logprob` N=8 V=32 | bf16 |")
    assert f"| {CARD}: `logprob` N=8 V=32 | bf16 |" in first
    assert "| eager | 3 s /" in first and "| eager | 500 ms /" in second and "3 s" not in second
    assert "gpu/a.json" in first and "gpu/a.json" not in second


def step_case(update, **size):
    rows = [EAGER | {"median": update}, OURS | {"rival": "ours fused", "median": update / 8}]
    size = {"model": "qwen2.5-0.5b"} | size | {"zero_advantage": 0.0}
    return {"bench": "step", "size": size, "dtype": "bf16", "rows": rows}


def test_sizes_of_other_fields_have_tables_of_their_own_the_newest_first(page):
    older = visit("2026-03-01", step_case(3.0, micro_batch=16), step_case(4.0, micro_batch=8))
    newer = visit("2026-03-02", step_case(2.0, micro_tokens=8192))
    text = page(region("step-cuda") + region("headline"), **{"gpu/a": older, "gpu/b": newer})
    tables, head = text.split("bench:headline")
    first, second = tables.split("gpu/b.json](results/gpu/b.json)")
    assert "micro_tokens=8192 | rival |" in first and "|  | eager | 2 s |" in first and "micro_batch" not in first
    assert "model=qwen2.5-0.5b | rival |" in second and "| micro_batch=16 | eager | 3 s |" in second
    assert "| an update of a 0.5B model | 2 s eager, 250 ms ours fused |" in head and "3 s" not in head


def test_a_figure_is_of_the_most_rows_and_those_of_one_file_stand_together(page):
    decode = [decode_case(rows, 0.5, 0.25) for rows in (8, 32)]
    decode[1]["rows"][1] |= {"tokens_per_second": 64.0, "roof_share": 0.5}
    text = page(region("headline"), **{"gpu/a": visit("2026-03-01", *decode, step_case(2.0))})
    commit = "[commit c0ffee012345](bench/results/gpu/a.json)"
    assert f"| **{CARD}; torch 2.13.0** |  |  |" in text and "8 rows" not in text
    assert f"| a decode step | m, 32 rows: 64 tokens/s, 50% of the roof | {commit} |" in text
    assert "| an update of a 0.5B model | 2 s eager, 250 ms ours fused |  |" in text
    assert "rollouts beside `generate` (GPU)" in text and "a decode step (GPU)" not in text


def test_a_time_without_another_is_said_to_be_one(page):
    once = step_case(2.0)
    for row in once["rows"]:
        row["seconds"] = [row["median"]]
    text = page(region("headline"), **{"gpu/a": visit("2026-03-01", once)})
    assert "| 2 s eager, 250 ms ours fused (timed once) |" in text


def test_adapters_stand_beside_all_weights_of_the_same_kernels(page):
    case, rows = step_case(2.0), [OURS | {"rival": "ours fused"}, OURS | {"rival": "ours fused, LoRA"}]
    for row, update, memory in zip(rows, (2.0, 1.5), (800, 200)):
        row |= {"median": update, "all_bytes": memory}
    text = page(region("headline"), **{"gpu/a": visit("2026-03-01", case | {"rows": [EAGER, *rows]})})
    assert "| qwen2.5-0.5b 0.75x the time, 0.25x the memory in all |" in text
    assert "2 s ours fused |" in text, "adapters are no way to train all of it"


def test_a_figure_that_lacks_a_rival_is_not_measured(page):
    broken = step_case(2.0)
    broken["rows"][1]["status"] = "error"
    text = page(region("headline"), **{"gpu/a": visit("2026-03-01", broken)})
    assert "an update of a 0.5B model (GPU)" in text and "2 s" not in text


def test_how_parts_ended_on_each_card(page):
    part = lambda status, said: {"part": "tests", "status": status, "seconds": 90.0, "said": said}
    visits = {
        "gpu/b": visit("2026-03-02T10:00", parts=[part("timed out", "a | b") | {"failed": ["x", "y"]}]),
        "gpu/d": visit("2026-03-03T10:00", parts=[part("left out", "")]),
        "gpu/a": visit("2026-03-01T10:00", parts=[part("ok", "9 passed")]),
        "gpu/c": visit(
            "2026-03-01T11:00", parts=[part("ok", "9 passed"), part("absent", "") | {"part": "ncu"}], device="X"
        ),
        "gpu/ledger": {"tests": {}},
    }  # fmt: skip
    text = page(region("gpu"), **visits)
    assert f"| part | {CARD} | X |" in text and "gpu/a.json" not in text
    assert "| tests | timed out, 2 tests failed, 90 s, 2026-03-02; a \\| b | ok, 90 s, 2026-03-01; 9 passed |" in text
    assert "| ncu | - | absent, 90 s, 2026-03-01;  |" in text


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ([], "it has no fields"),
        ({"provenance": ABOUT, "cases": []}, "it has no parts"),
        (visit("") | {"provenance": {"kind": "cuda"}}, "its provenance has no device, driver"),
        (visit("") | {"provenance": ABOUT}, "it was measured on 'cpu', which is no GPU"),
        (visit("", parts=[{"part": "tests"}]), "a part has no status, seconds, said"),
        (visit("", {"bench": "logprob"}), "a case has no size, dtype, rows"),
        (visit("", bf16({"rival": "eager"})), "a row of logprob has no status, why"),
        (visit("", bf16(EAGER | {"median": float("nan")})), "NaN is no measurement"),
    ],
)
def test_a_malformed_visit_is_refused_by_name(page, file, said):
    with pytest.raises(SystemExit, match=f"error: broken.json cannot be shown: {said}"):
        page(region("gpu"), **{"gpu/broken": file})


def work(rival, median, flops, num_bytes, roof="copy"):
    row = {"rival": rival, "status": "ok", "why": "", "note": "", "median": median, "roof": roof}
    return row | {"flops": flops, "bytes": num_bytes}


def test_a_roofline_is_flops_over_bytes_under_the_measured_roofs(tmp_path):
    head = bf16(
        work("eager", 8.0, 4e15, 1e13), work("ours fused", 5.0, 4e15, 1e13), work("GEMMs alone", 4.0, None, None),
        work("CCE", 1.0, 4e15, 1e13) | {"status": "wrong"}, D=4,
    ) | {"bench": "linear_logprob"}  # fmt: skip
    moving = bf16(work("eager", 4.0, 0, 4e12), work("ours fused", 2.0, 0, 4e12, "sum"))
    found = pictures.points(results(tmp_path, a=visit("2026-03-01", head, moving)), CARD)
    above, below = pictures.roofline(found, "a card").axes
    roofs = {label: xy for label, xy in marks(above).items() if label[0] != "_"}
    copy, read = roofs["800 Tflop/s, 2.00 TB/s (copy)"], roofs["800 Tflop/s, 4.00 TB/s (sum)"]
    assert copy[1:] == [[400, 800], [1200, 800]] and read[1:] == [[200, 800], [1200, 800]]
    assert copy[0] == pytest.approx([200 / 3, 400 / 3]) and read[0] == pytest.approx([200 / 3, 800 / 3])
    at = lambda axis: {label: xy for label, xy in marks(axis).items() if label.startswith("_") and ", " in label}
    assert at(above) == {
        "_linear_logprob, eager": [[400, 500]], "_linear_logprob, ours fused": [[400, 800]],
        "_linear_logprob, GEMMs alone": [[400, 1000]],
    }  # fmt: skip
    assert at(below) == {
        "_logprob, eager": [[50, 0]], "_logprob, ours fused": [[50, 0]], "_linear_logprob, eager": [[62.5, 1]],
        "_linear_logprob, ours fused": [[100, 1]], "_linear_logprob, GEMMs alone": [[125, 1]],
    }  # fmt: skip
    assert [text.get_text() for text in below.get_yticklabels()] == ["logprob N=8 V=32", "linear_logprob N=8 V=32 D=4"]


def test_without_flops_only_the_shares_are_drawn(tmp_path):
    found = pictures.points(results(tmp_path, a=visit("2026-03-01", bf16(work("eager", 4.0, 0, 4e12)))), CARD)
    (axis,) = pictures.roofline(found, "a card").axes
    assert marks(axis)["_logprob, eager"] == [[50, 0]]


def decode_case(rows, median, floor, model="m"):
    step = work("step", median, None, None) | {"floor": floor}
    body = work("body", median / 2, None, None)
    size = {"model": model, "rows": rows, "context": 400}
    return {"bench": "decode_step", "size": size, "dtype": "bf16", "rows": [body, step]}


def decoding_case(slots, **speeds):
    rows = [work(rival, 1.0, None, None) | {"tokens_per_second": speed} for rival, speed in speeds.items()]
    return {"bench": "decoding", "size": {"model": "m", "slots": slots}, "dtype": "bf16", "rows": rows}


def test_decoding_over_rows_with_its_roof_and_the_rollouts_of_the_same_file(tmp_path):
    steps = [decode_case(8, 0.5, 0.25), decode_case(1, 0.25, 0.125), decode_case(1, 1.0, 0.5, "n")]
    one = visit("2026-03-02", *steps, decoding_case(64, generate=5.0, ours=50.0))
    older = visit("2026-03-01", decode_case(32, 1.0, 0.5), decoding_case(64, generate=1.0))
    newer = visit("2026-03-03", decoding_case(64, generate=9.0, ours=90.0))
    found = pictures.curves(results(tmp_path, a=one, b=older, c=newer), CARD)
    first, second = pictures.decode(found, "a card").axes
    assert first.get_title() == "model=m context=400" and second.get_title() == "model=n context=400"
    assert marks(first) == {
        "decode step": [[1, 4], [8, 16]], "roof of the step": [[1, 8], [8, 32]],
        "whole rollout, generate": [[64, 5]], "whole rollout, ours": [[64, 50]],
    }  # fmt: skip
    assert marks(second) == {"decode step": [[1, 1]], "roof of the step": [[1, 2]]}


def overlap_case(*rows):
    return {"bench": "overlap", "size": {"model": "m"}, "dtype": "bf16", "rows": list(rows)}


def test_phases_are_stacked_and_at_lag_1_the_rollout_lies_beside_the_update(tmp_path):
    lengths = {"rollout": 4.0, "reward": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 0.5, "weight_sync": 0.25}
    lag = lambda rival, median, **more: work(rival, median, None, None) | lengths | more
    rows = lag("lag 0", 11.0), lag("lag 0, eager", 12.0, backward=4.0), lag("lag 1", 7.0, wait=1.0)
    found = pictures.bars(results(tmp_path, a=visit("2026-03-01", overlap_case(*rows))), CARD)
    (axis,) = pictures.phases(found, "a card").axes
    labels = ["eager, lag 0", "fused, lag 0", "fused, lag 1: update", "fused, lag 1: rollout"]
    assert [text.get_text() for text in axis.get_yticklabels()] == labels
    spans = {
        bars.get_label(): [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in bars]
        for bars in axis.containers
    }
    assert spans["rollout"] == [(0, 0, 4), (1, 0, 4), (3, 0, 4)]
    assert spans["reward"] == [(0, 4, 1), (1, 4, 1), (3, 4, 1)]
    assert spans["wait"] == [(0, 5, 0), (1, 5, 0), (2, 0, 1)]
    assert spans["forward"] == [(0, 5, 2), (1, 5, 2), (2, 1, 2)]
    assert spans["backward"] == [(0, 7, 4), (1, 7, 3), (2, 3, 3)]
    assert spans["weight_sync"] == [(0, 11.5, 0.25), (1, 10.5, 0.25), (2, 6.5, 0.25)]
    assert marks(axis) == {"whole step": [[12, 0], [11, 1], [7, 2], [7, 3]]}


def test_a_picture_names_its_card_and_is_missed_when_it_is_not_there(page, tmp_path):
    head, file = bf16(work("eager", 4.0, 4e15, 1e13)), tmp_path / "roofline-h100-80gb-hbm3.png"
    text = page(region("kernels-cuda"), **{"gpu/a": visit("2026-03-01", head)})
    assert f"![roofline](results/{file.name})" in text and file.read_bytes().startswith(b"\x89PNG")
    assert Results(tmp_path).heading(["gpu/a"]) == f"{CARD}, commit c0ffee012345"
    file.unlink()
    with pytest.raises(SystemExit, match=file.name):
        page(text, "--check")


def test_nothing_is_drawn_of_what_was_not_measured(page, tmp_path):
    failed = bf16(work("eager", 4.0, 4e15, 1e13) | {"status": "error"})
    stepless = overlap_case(work("lag 0", 1.0, None, None))
    text = page(region("kernels-cuda") + region("overlap-cuda"), **{"gpu/a": visit("2026-03-01", failed, stepless)})
    assert "![" not in text and not list(tmp_path.glob("*.png"))
