"""Rollouts on a GPU: graphs against the plain step, tokens against transformers, refreshes, memory, both lags."""

import copy
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from engine.config import Config
from engine.linears import convert
from engine.model import attention_of, export_model, load_model, load_tokenizer
from engine.policy import Policy
from engine.replica import Replica
from engine.rollouts.cache import slot_bytes
from engine.rollouts.graphs import Graphs
from engine.rollouts.native import NativeRollout
from engine.rollouts.sampling import Sampling
from engine.rollouts.slots import attend
from engine.streams import on_side_stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
PROMPTS = [[5], list(range(7, 18)), [21, 22, 23, 24], [31, 5] * 20]
RUN = {"num_samples": 6, "seed": 3}


WINDOWS = {"head_dim": 256, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, WINDOWS | {"tie_word_embeddings": False}),
}


def build(vocab_size=500, family="qwen2"):
    config_class, model_class, own = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": vocab_size}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return model_class(config_class(**sizes, **heads, **ids, **own)).to(GPU).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module", params=FAMILIES)
def each(request):
    return build(family=request.param)


def rollout_of(model, eos_ids=(3, 9, 27, 40), **settings):
    from kernels import fused

    sizes = {"max_batch": 7, "max_prompt": 40, "max_new": 30} | settings
    return NativeRollout(Replica(convert(model, Config())), eos_ids=eos_ids, pad_id=0, ops=fused, **sizes)


def ids_of(groups):
    return [[completion.ids for completion in group] for group in groups]


def logp_of(groups):
    return torch.tensor([x for group in groups for c in group for x in c.logp])


@pytest.fixture
def policy(model, monkeypatch):
    """Other weights for `model`, which are trained: those alone does `Replica.refresh` take."""
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda self: self, raising=False)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.mul_(-1.5)
    return Policy(other.requires_grad_(True), torch.device("cuda"))


@pytest.mark.parametrize("filters", [{}, {"temperature": 0}, {"top_k": 5}, {"top_k": 50, "top_p": 0.9}])
def test_graphs_give_what_the_plain_step_gives(each, monkeypatch, filters):
    sampling = Sampling(30, **filters)
    recorded = rollout_of(each)
    ours = recorded(PROMPTS, sampling=sampling, **RUN)
    assert {rows for rows, _ in recorded.slots.graphs.graphs} == {1, 2, 4, 7}
    monkeypatch.setattr(Graphs, "record", lambda *args: None)
    monkeypatch.setattr(Graphs, "run", lambda self, step, rows, key: step(rows, key))
    plain = rollout_of(each)(PROMPTS, sampling=sampling, **RUN)
    assert ids_of(ours) == ids_of(plain)
    torch.testing.assert_close(logp_of(ours), logp_of(plain), atol=1e-5, rtol=0)


def test_greedy_tokens_are_those_of_generate(each):
    groups = rollout_of(each, ())(PROMPTS, num_samples=2, sampling=Sampling(24, temperature=0), seed=0)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt], device=GPU)
        limits = {"max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
        out = each.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        assert [c.ids for c in group] == [out[0, len(prompt) :].tolist()] * 2


def test_a_refresh_between_replays_is_seen(policy):
    lm = build()
    rollout, sampling = rollout_of(lm), Sampling(20)
    before = rollout(PROMPTS, sampling=sampling, **RUN)
    graphs = dict(rollout.slots.graphs.graphs)
    rollout.replica.refresh(policy, 1)
    after = rollout(PROMPTS, sampling=sampling, **RUN)
    assert rollout.slots.graphs.graphs == graphs, "recorded anew"
    assert ids_of(after) == ids_of(rollout_of(policy.lm)(PROMPTS, sampling=sampling, **RUN)) != ids_of(before)
    assert {c.version for group in after for c in group} == {1}


def test_nothing_is_recorded_after_prepare(model, monkeypatch):
    rollout, sampling = rollout_of(model), Sampling(30)
    rollout.prepare(sampling)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: pytest.fail("recorded in a call"))
    for count in (1, 2, 4):
        rollout(PROMPTS[:count], sampling=sampling, **RUN)


def test_graphs_of_all_sizes_share_their_memory():
    rollout, sampling = rollout_of(build(vocab_size=32_000), max_batch=64), Sampling(30)
    gc.collect()
    torch.cuda.empty_cache()
    empty = torch.cuda.memory_reserved()
    with torch.inference_mode(), attention_of(rollout.lm, attend):
        rollout.slots.start()
        rollout.slots.record(64, sampling)
    one = torch.cuda.memory_reserved()
    rollout.prepare(sampling)
    assert one - empty > 20 << 20 and torch.cuda.memory_reserved() - one < 0.25 * (one - empty)


def test_memory_does_not_creep_over_500_refreshes_and_rollouts(policy):
    rollout, sampling = rollout_of(build()), Sampling(4)

    def turn(version):
        rollout.replica.refresh(policy, version)
        rollout(PROMPTS[:2], sampling=sampling, **RUN)

    for version in range(20):
        turn(version)
    before = torch.cuda.memory_reserved()
    for version in range(500):
        turn(version)
    assert torch.cuda.memory_reserved() <= before * 1.01


def test_slots_stay_within_the_memory_given(model):
    columns = 40 + 30
    memory = 3 * slot_bytes(model.config, columns, torch.float32) + 1
    rollout = rollout_of(model, memory=memory)
    groups = rollout(PROMPTS, sampling=Sampling(30), **RUN)
    assert sum(x.nbytes for layer in rollout.slots.cache.layers_SKLD for x in layer) <= memory
    assert rollout.slots.cache.num_slots == 3
    assert ids_of(groups) == ids_of(rollout_of(model)(PROMPTS, sampling=Sampling(30), **RUN))


def test_on_the_side_stream_beside_other_work_the_tokens_are_the_same(model):
    """As at lag 1: a thread of its own, while this one launches and allocates."""
    rollout, sampling, landed = rollout_of(model), Sampling(30), []
    expected = rollout(PROMPTS, sampling=sampling, **RUN)

    def aside():
        with on_side_stream(GPU):
            for _ in range(5):
                landed.append(rollout(PROMPTS, sampling=sampling, **RUN))

    thread = threading.Thread(target=aside)
    thread.start()
    while thread.is_alive():
        (torch.full((1500, 1500), float("nan"), device=GPU) @ torch.rand(1500, 1500, device=GPU)).sum().item()
    thread.join()
    assert len(landed) == 5 and all(ids_of(groups) == ids_of(expected) for groups in landed)


def test_with_lr_0_both_lags_draw_the_same_samples(tmp_path):
    export_model(load_model("tiny", 0, torch.float32), load_tokenizer("tiny"), tmp_path / "model")
    fixed = "--algo grpo --steps 4 --lr 0 --num_samples 99 --eval_size 8 --prompts_per_step 4 --group_size 4".split()
    fixed += "--max_new_tokens 24 --tensorboard false --device cuda".split()
    drawn = []
    for lag in ("0", "1"):
        args = [*fixed, "--model", tmp_path / "model", "--out", tmp_path, "--name", lag, "--lag", lag]
        words = [sys.executable, "train.py", *map(str, args)]
        done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        drawn.append([json.loads(line) for line in (tmp_path / lag / "samples.jsonl").read_text().splitlines()])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4 * 16
