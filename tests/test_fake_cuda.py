"""What the engine and the kernels do on a GPU, seen without one: tests/fake_cuda.py runs them, in one process."""

import json
import os
import subprocess
from typing import NamedTuple

import pytest
import torch

from engine.streams import ALIGNED, pack, parts
from tests import fake_cuda
from tests.warm import command

LAYERS = 2  # of the models there
LINEARS = 7  # of a layer
MOST_LAUNCHES = {"": (42, 49), ", adapters": (42 + 2 * LINEARS, 49), ", windows": (86, 63)}
"""Of a decode step, per layer, and outside the layers with the sampler; Gemma 3 has four norms a layer, two of heads.
Lower them when layers or sampling get fused."""
MOST_OF_AN_UPDATE, MOST_OF_ADAPTERS = 470, 490
"""Of forward, backward and statistics of a micro-batch, where attention is as many as its plain form has; with adapters
on all linears, of which 28 cast a factor's gradient, which FSDP2 does a unit at a time."""
SCORED = {"update, cap and entropy": 1, "update, adapters and reference": 1, "update, dpo": 1, "update, distill": 2}
"""Parts where another policy's log-probabilities come first, in the same update, and in how many tensors."""


@pytest.fixture(scope="module")
def seen():
    done = subprocess.run(
        command("-m", "tests.fake_cuda"),
        cwd=fake_cuda.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if "guard_impl_registry" in done.stderr:
        pytest.skip("this build of torch has no table of device guards to lend CUDA one from")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def launched(found, *regions):
    return sum(count for region in regions for count in found["launches"].get(region, {}).values())


class Finding(NamedTuple):
    kind: str
    region: str
    what: str
    place: str
    times: int


def findings(found, *regions, kinds=("sync", "upload", "mixed", "copy")):
    rows = [Finding(*row) for row in found["findings"]]
    return [row for row in rows if row.kind in kinds and (not regions or row.region in regions)]


def times(rows):
    return sum(row.times for row in rows)


@pytest.mark.parametrize("model", MOST_LAUNCHES)
@pytest.mark.parametrize("way", ["", "greedy", "top-k", "top-p", "padded"])
def test_what_a_graph_records_neither_waits_nor_copies(seen, way, model):
    assert seen[f"decode{model}"][way]["findings"] == []


@pytest.mark.parametrize("model", MOST_LAUNCHES)
def test_a_decode_step_launches_no_more_than_it_did(seen, model):
    step, deeper = (launched(seen[f"{part}{model}"][""], "capture") for part in ("decode", "deeper"))
    a_layer, (most, outside) = deeper - step, MOST_LAUNCHES[model]
    assert a_layer <= most and step - LAYERS * a_layer <= outside, (step, deeper)


def test_logits_of_a_decode_step_come_unrounded_from_the_product(seen):
    assert seen["decode"][""]["launches"]["capture"]["mm"] == 1
    assert seen["decode"][""]["logits"] == "torch.float32"


def test_a_step_is_recorded_once_for_all_limits_and_stop_strings(seen):
    graphs = [tuple(graph) for graph in seen["rollout"]["graphs"]]
    assert len(graphs) == len(set(graphs)) == 5, "buckets of 16 slots, for two calls of other limits"


@pytest.mark.parametrize("model", ["", ", windows"])
def test_a_rollout_waits_once_a_look_and_once_for_the_answers_that_ended(seen, model):
    """Of prompts that are longer than the windows, where there are some."""
    call, steps = (seen[f"rollout{model}"][name] for name in ("call", "steps"))
    waits = {region: times(findings(call, region, kinds=("sync",))) for region in ("look", "read", "eager")}
    assert 0 < waits["look"] <= steps / 8 + 6, waits
    assert 0 < waits["read"] <= 6 and not waits["eager"], "six lengths end together, eight answers each"
    assert findings(call, kinds=("upload", "mixed")) == [], "prefill and place copy from pinned memory alone"
    placed = 3  # prefills of 16 rows, of two prompts each
    assert times(findings(call, kinds=("copy",))) <= 3 * placed + 2 * 6 + 6, call["findings"]


def test_a_refresh_is_one_launch_a_parameter_and_no_wait(seen):
    assert seen["refresh"]["findings"] == []
    assert launched(seen["refresh"], "eager") == seen["refresh"]["parameters"]


@pytest.mark.parametrize("base", ["", " of a sharded base"])
def test_a_refresh_with_adapters_copies_them_alone(seen, base):
    found = seen[f"refresh, adapters{base}"]
    assert found["findings"] == [] and len(found["trained"]) == 2 * LINEARS * LAYERS
    assert found["launches"] == {"eager": {"copy_": len(found["trained"])}}


def test_rollout_and_reference_have_the_memory_of_the_policys_base(seen):
    found = seen["refresh, adapters"]
    assert found["copied"] == {"rollout": found["trained"], "reference": []} and found["trained"]


def test_of_a_sharded_base_rollout_and_reference_have_their_own(seen):
    found = seen["refresh, adapters of a sharded base"]
    base = found["parameters"] - len(found["trained"])
    assert {name: len(x) for name, x in found["copied"].items()} == {"rollout": found["parameters"], "reference": base}


def test_offloaded_weights_cross_pinned_and_are_rounded_on_the_device(seen):
    found = seen["refresh from the host"]
    rows = findings(found)
    assert {(row.kind, row.what.split()[-1]) for row in rows} == {("copy", "torch.float32")}
    assert times(rows) == found["parameters"] == launched(found, "eager")


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float32"])
@pytest.mark.parametrize(
    "name, kernels",
    {
        "logprob": {"_logprob_fwd_kernel", "_logprob_bwd_kernel"},
        "linear_logprob": {"fwd", "_logprob_bwd_kernel"},
        "clipped_surrogate": {"_clipped_surrogate_kernel"},
        "linear_clipped_surrogate": {"fwd", "_logprob_bwd_kernel"},
        "linear_match": {"fwd", "_logprob_bwd_kernel", "exact"},
        "linear_topk": {"_topk_kernel"},
        "decode_attention": {"_decode_attention_split_kernel", "_decode_attention_sum_kernel"},
    }.items(),
)
def test_a_public_function_launches_its_kernels_and_waits_for_nothing(seen, name, kernels, dtype):
    found = seen["functions"][f"{name} {dtype}"]
    ran = {op.removeprefix("triton ") for ops in found["launches"].values() for op in ops if op.startswith("triton")}
    rounds = dtype == "torch.bfloat16"
    named = {"fwd": "_linear_logprob_fwd_kernel" if rounds else "_logprob_fwd_kernel"}
    named |= {"exact": "_exact_logits_kernel" if rounds else None}
    assert ran == {named.get(kernel, kernel) for kernel in kernels} - {None}
    assert findings(found, kinds=("sync", "upload", "mixed")) == []


@pytest.mark.parametrize("part", [part for part in fake_cuda.PARTS if part.startswith("update")])
def test_the_host_runs_ahead_through_a_whole_update(seen, part):
    found = seen[part]
    assert findings(found, "forward", "backward", "stats", kinds=("sync", "upload", "mixed")) == []
    assert findings(found, "update", kinds=("upload", "mixed")) == []
    copies = findings(found, kinds=("copy",))
    scored = found["micros"] * SCORED.get(part, 0)
    assert times(copies) == found["micros"] * (2 if scored else 1), "one piece a micro-batch"
    waits = findings(found, kinds=("sync",))
    assert [row.region for row in waits if "to the host" not in row.what] == ["optimizer"] * 2, "the norm and the loss"
    assert times(row for row in waits if "to the host" in row.what) == scored
    if not scored:
        assert found["before_a_wait"] >= launched(found, "update", "forward", "backward", "stats"), "once all is queued"
    assert found["wrong"] == [], "gradients that are missing, elsewhere or of another dtype; or of what is frozen"
    assert found["trained"] == ["torch.float32" if "adapters" in part else "torch.bfloat16"]


@pytest.mark.parametrize("part, most", {"update": MOST_OF_AN_UPDATE, "update, adapters": MOST_OF_ADAPTERS}.items())
def test_an_update_launches_no_more_than_it_did(seen, part, most):
    found = seen[part]
    a_micro = launched(found, "forward", "backward", "stats") / found["micros"]
    assert a_micro <= most


@pytest.mark.parametrize(
    "part, products",
    {
        "update": 3,
        "update, dpo": 5,
        "update, distill": 4,
        "update, adapters": 2,
        "update, adapters and reference": 3,
    }.items(),
)
def test_the_heads_products(seen, part, products):
    """Logits and both gradients, of a frozen head one; a reference makes logits too."""
    found = seen[part]
    assert found["head_products"] == products * found["micros"] and found["score"]["head_products"] == found["micros"]


def test_scoring_waits_after_all_micro_batches_are_queued(seen):
    score = seen["update"]["score"]
    assert findings(score, kinds=("upload", "mixed")) == []
    assert times(findings(score, kinds=("sync",))) == seen["update"]["micros"]
    assert score["before_a_wait"] == launched(score, "score") > 100


@pytest.mark.parametrize(
    "mistake, kind",
    [
        ("a value read", "sync"),
        ("a mask as index", "sync"),
        ("a tensor made of numbers", "upload"),
        ("an operand on the host", "mixed"),
        ("a decision on values", "sync"),
        ("a pinned copy", "copy"),
        ("a number through an index", "upload"),
    ],
)
def test_a_mistake_planted_in_the_decode_step_is_found(seen, mistake, kind):
    found = findings(seen["planted"]["decode"][mistake][""])
    assert [(row.kind, row.region) for row in found] == [(kind, "capture")]


@pytest.mark.parametrize("mistake, kind", {"a value read": "sync", "an upload": "upload"}.items())
def test_a_mistake_planted_in_the_statistics_is_found(seen, mistake, kind):
    found = seen["planted"]["update"][mistake]
    assert [row.kind for row in findings(found, "stats")] == [kind]


def test_what_travels_in_one_piece_arrives_as_it_left():
    wide = torch.arange(24).view(4, 6)
    tensors = {"ids": wide[:, ::2], "mask": torch.tensor([True, False, True]), "none": torch.zeros(0, 3)}
    tensors |= {"weight": torch.rand(3, 5), "column": wide.T[1]}
    packed = pack(tensors)
    arrived = parts(packed.clone(), tensors)
    assert all(torch.equal(part, tensors[name]) for name, part in arrived.items())
    assert all(part.storage_offset() * part.itemsize % ALIGNED == 0 for part in arrived.values())
