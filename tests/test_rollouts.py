"""Rollouts against `generate` and a plain forward; a request's tokens against everything that shares its batch."""

import functools
import gc
import heapq
import math
import os
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.algos.advantage import group_center
from engine.asking import Asker
from engine.config import Config, load_config
from engine.data import Item
from engine.dist import World
from engine.errors import UserError
from engine.linears import convert
from engine.model import load_tokenizer
from engine.replica import Replica
from engine.rewards import load_rewards
from engine.rollouts import native, schedule
from engine.rollouts.cache import slot_bytes
from engine.rollouts.native import NativeRollout
from engine.rollouts.protocol import Completion
from engine.rollouts.sampling import Sampling
from engine.rollouts.slots import Slots
from engine.sources.answers import Explorer
from kernels import chunked

WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
"""Shorter than a prompt, and than what follows the others."""
TIED = {"initializer_range": 0.04}
"""Gemma's layers add vectors of one length: with longer embeddings a head that shares them repeats the last token."""
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24, "tie_word_embeddings": False}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        WINDOWS | TIED | {"head_dim": 24, "query_pre_attn_scalar": 32},
    ),
    "gemma3_text, heads of 256": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        WINDOWS | {"head_dim": 256, "tie_word_embeddings": False},
    ),
    "qwen2, windows": (Qwen2Config, Qwen2ForCausalLM, WINDOWS | {"use_sliding_window": True}),
    "qwen3, windows": (Qwen3Config, Qwen3ForCausalLM, WINDOWS | {"head_dim": 24, "use_sliding_window": True}),
}
VOCAB = 60
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24], [31, 5, 31, 5, 31, 5, 31]]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567"


def build(family="qwen2", **settings):
    config_class, model_class, own = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return model_class(config_class(**sizes | heads | ids | own | settings)).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def rollout_of(model, eos_ids=(), pad_id=0, **settings):
    return NativeRollout(Replica(convert(model, Config())), eos_ids=eos_ids, pad_id=pad_id, ops=chunked, **settings)


def spell(ids):
    return "".join(LETTERS[token] for token in ids)


def ids_of(groups):
    return [[completion.ids for completion in group] for group in groups]


def generate(model, prompt, max_new_tokens, eos_ids=None):
    """Greedy tokens of transformers, one prompt at a time, so without any padding."""
    ids = torch.tensor([prompt])
    limits = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_ids, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def forward_logp(model, prompt, completion, temperature):
    ids = torch.tensor([prompt + completion.ids])
    logp_TV = (model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature).log_softmax(-1)
    return logp_TV.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_are_those_of_generate(family, attention):
    model = build(family, attn_implementation=attention)
    greedy = Sampling(24, temperature=0)
    groups = rollout_of(model)(PROMPTS, num_samples=3, sampling=greedy, seed=0)
    expected = [generate(model, prompt, 24) for prompt in PROMPTS]
    assert ids_of(groups) == [[ids] * 3 for ids in expected]
    assert len({token for ids in expected for token in ids}) > 10, "the model repeats itself: the test sees nothing"
    one = Sampling(24, top_k=1)
    assert ids_of(rollout_of(model)(PROMPTS, num_samples=3, sampling=one, seed=0)) == ids_of(groups)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}])
def test_logp_is_that_of_a_plain_forward(family, filters):
    model = build(family)
    sampling = Sampling(20, temperature=1.3, **filters)
    groups = rollout_of(model, eos_ids=[3, 4])(PROMPTS, num_samples=4, sampling=sampling, seed=1)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = forward_logp(model, prompt, completion, 1.3)
            torch.testing.assert_close(torch.tensor(completion.logp), expected, atol=1e-5, rtol=0)
            assert len(completion.ids) == len(completion.logp)


def test_a_vocabulary_of_262144_is_drawn_from_whole():
    model = build("gemma3_text", vocab_size=262_144)
    (greedy,), (drawn,) = (
        rollout_of(model, vocabulary=262_140)([PROMPTS[1]], num_samples=2, sampling=Sampling(10, temperature=t), seed=0)
        for t in (0, 1)
    )
    assert ids_of([greedy]) == [[generate(model, PROMPTS[1], 10)] * 2]
    assert min(i for c in drawn for i in c.ids) < 65_536 and max(i for c in drawn for i in c.ids) > 196_608
    for completion in drawn:
        expected = forward_logp(model, PROMPTS[1], completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logp), expected, atol=1e-4, rtol=0)


def test_bf16_logp_is_fp32_and_near_that_of_a_plain_forward():
    model = build().bfloat16()
    [group] = rollout_of(model)([PROMPTS[1]], num_samples=4, sampling=Sampling(16), seed=1)
    difference = torch.stack([forward_logp(model, PROMPTS[1], c, 1.0) - torch.tensor(c.logp) for c in group])
    assert 0 < difference.abs().mean() < 0.05


@pytest.mark.parametrize("way", [{}, {"temperature": 0.0}, {"top_p": 0.9}], ids=str)
def test_ids_beyond_the_vocabulary_are_never_drawn(model, way):
    drawn = {}
    for vocabulary in (20, None):
        groups = rollout_of(model, vocabulary=vocabulary)(PROMPTS, num_samples=2, sampling=Sampling(8, **way), seed=0)
        drawn[vocabulary] = {i for group in ids_of(groups) for ids in group for i in ids}
    assert max(drawn[20]) < 20 <= max(drawn[None])


def test_request_is_not_changed_by_what_shares_its_batch(model, monkeypatch):
    """Alone, in every wave size, beside other prompts, looked at every 8 tokens: the same completions."""
    shrunk = []
    move = Slots.move
    monkeypatch.setattr(Slots, "move", lambda self, *args: (shrunk.append(len(args[0])), move(self, *args)))
    settings = {"sampling": Sampling(30), "seed": 11}
    run = functools.partial(rollout_of(model, eos_ids=[3, 17, 40]), num_samples=12, **settings)
    groups = run(PROMPTS)
    lengths = {len(completion.ids) for group in groups for completion in group}
    assert len(lengths) > 5 and len(shrunk) > 1, "the rows end together: nothing was moved on the way"

    def same(others, expected=groups):
        assert ids_of(others) == ids_of(expected)
        for group, other in zip(expected, others, strict=True):
            for ours, theirs in zip(group, other, strict=True):
                assert ours.finish == theirs.finish
                torch.testing.assert_close(torch.tensor(ours.logp), torch.tensor(theirs.logp), atol=1e-5, rtol=0)

    for max_batch in (1, 3, 7, 8, 20, 1000):
        rollout = rollout_of(model, eos_ids=[3, 17, 40], max_batch=max_batch)
        same(rollout(PROMPTS, num_samples=12, **settings))
    same([run([prompt], requests=[12 * p])[0] for p, prompt in enumerate(PROMPTS)])
    same(run([[50] * 20, *PROMPTS])[1:], run(PROMPTS, requests=[12, 24, 36, 48]))
    polled = rollout_of(model, eos_ids=[3, 17, 40], decode=spell)
    same(polled(PROMPTS, num_samples=12, sampling=Sampling(30, stop=("none such",)), seed=11))


def test_same_seed_same_tokens_other_seed_others(model):
    run = functools.partial(rollout_of(model), PROMPTS, num_samples=2, sampling=Sampling(12))
    assert run(seed=3) == run(seed=3)
    flat = [tuple(ids) for seed in (3, 4, 3 + 2**32) for group in ids_of(run(seed=seed)) for ids in group]
    assert len(set(flat)) == len(flat)


def test_prompt_is_prefilled_once_and_the_head_sees_one_position_per_row(model):
    body, head, grads = [], [], []
    handles = [
        model.model.embed_tokens.register_forward_pre_hook(lambda _, args: body.append(tuple(args[0].shape))),
        model.lm_head.register_forward_pre_hook(lambda _, args: head.append(tuple(args[0].shape))),
        model.lm_head.register_forward_hook(lambda _, args, out: grads.append(out.requires_grad)),
    ]
    prompts = [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
    run = dict(num_samples=5, sampling=Sampling(3), seed=0)
    seen = {}
    for max_batch in (None, 10, 7):
        body.clear(), head.clear()
        rollout_of(model, max_batch=max_batch)(prompts, **run)
        seen[max_batch] = list(body)
        assert head == [(rows, 48) for rows, _ in body]
    for handle in handles:
        handle.remove()
    assert seen[None] == [(4, 6), (20, 1), (20, 1)]
    assert seen[10] == [(2, 6), (10, 1), (10, 1), (2, 6), (10, 1), (10, 1)]
    assert [shape for shape in seen[7] if shape[1] > 1] == [(2, 6), (2, 6)], "a prompt was prefilled twice, or alone"
    assert not any(grads)


@pytest.mark.parametrize("pad_id", [0, 3])
def test_several_eos_ids_and_a_pad_that_is_one_of_them(model, pad_id):
    free = [generate(model, prompt, 24) for prompt in PROMPTS]
    eos_ids = [free[0][4], free[2][9]]
    prompts = [[*eos_ids, *prompt] for prompt in PROMPTS]
    pad = eos_ids[0] if pad_id else 0
    groups = rollout_of(model, eos_ids, pad)(prompts, num_samples=2, sampling=Sampling(24, temperature=0), seed=0)
    for prompt, group in zip(prompts, groups, strict=True):
        expected = generate(model, prompt, 24, eos_ids)
        finish = "eos" if expected[-1] in eos_ids else "length"
        assert [(c.ids, c.finish) for c in group] == [(expected, finish)] * 2
    groups = rollout_of(model, eos_ids, pad)(PROMPTS, num_samples=1, sampling=Sampling(24, temperature=0), seed=0)
    assert ids_of(groups) == [[generate(model, prompt, 24, eos_ids)] for prompt in PROMPTS]
    assert groups[0][0].finish == "eos"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 8, 9])
def test_all_end_at_once_or_all_at_the_limit(model, max_new_tokens):
    run = dict(num_samples=3, sampling=Sampling(max_new_tokens), seed=0)
    for group in rollout_of(model, eos_ids=range(VOCAB))(PROMPTS, **run):
        assert [(len(c.ids), c.finish) for c in group] == [(1, "eos")] * 3
    for group in rollout_of(model)(PROMPTS, **run):
        assert [(len(c.ids), c.finish) for c in group] == [(max_new_tokens, "length")] * 3


def test_eos_as_the_last_token_allowed_is_an_eos(model):
    ids = generate(model, PROMPTS[1], 6)
    assert ids[5] not in ids[:5]
    [[completion]] = rollout_of(model, [ids[5]])(
        [PROMPTS[1]], num_samples=1, sampling=Sampling(6, temperature=0), seed=0
    )
    assert (completion.ids, completion.finish) == (ids, "eos")


@pytest.mark.parametrize("max_new_tokens", [5, 16, 29])
def test_stop_strings_across_tokens(model, max_new_tokens):
    """One letter per token, and a stop string is cut where its last letter falls, EOS before it or not."""
    run = dict(num_samples=16, seed=2)
    free = rollout_of(model)(PROMPTS, sampling=Sampling(max_new_tokens), **run)
    texts = [spell(completion.ids) for group in free for completion in group]
    stop = (texts[0][1:3], texts[20][2:5], texts[40][0], texts[50][3:5])
    eos_ids = [free[3][0].ids[0], free[1][2].ids[4], 13]
    rollout = rollout_of(model, eos_ids, decode=spell)
    groups = rollout(PROMPTS, sampling=Sampling(max_new_tokens, stop=stop), **run)
    seen = set()
    for completion, whole in zip(sum(groups, []), sum(free, []), strict=True):
        for length, token in enumerate(whole.ids, start=1):
            if token in eos_ids and not any(text in spell(whole.ids[: length - 1]) for text in stop):
                finish = "eos"
                break
            if any(text in spell(whole.ids[:length]) for text in stop):
                finish = "stop"
                break
        else:
            finish = "length"
        seen.add(finish)
        assert (completion.finish, completion.ids) == (finish, whole.ids[:length])
        assert len(completion.logp) == length
    assert {"eos", "stop"} <= seen


def test_refreshed_weights_are_used_and_nothing_is_left_behind(model):
    other = build()
    rollout, run = rollout_of(other), dict(num_samples=2, sampling=Sampling(8), seed=0)
    before = rollout(PROMPTS, **run)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    after = rollout(PROMPTS, **run)
    assert ids_of(before) != ids_of(after)
    assert after == rollout_of(other)(PROMPTS, **run)
    assert all(p.requires_grad and p.grad is None and not p.is_inference() for p in other.parameters())
    other(torch.tensor([[1, 2, 3]])).logits.sum().backward()


def draw_case(seed):
    """Prompts of very different lengths, some of them longer than a prefill, with limits from 1 token on."""
    dice = random.Random(seed)
    prompts = [[dice.randrange(VOCAB) for _ in range(dice.choice([1, 2, 9, 30]))] for _ in range(dice.randint(1, 7))]
    limits = [dice.choice([1, 2, 7, 20]) for _ in prompts]
    return prompts, limits, {"num_samples": dice.randint(1, 6), "sampling": Sampling(20), "seed": seed}


def power_of_two(rollout, rows):
    return min(1 << (rows - 1).bit_length(), rollout.slots.cache.num_slots)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_gives_what_each_prompt_gives_alone(model, monkeypatch, seed, as_on_a_gpu):
    """Slots for fewer rows than a group, prefills of a few tokens, blocks of two rows, looks every eight tokens."""
    prompts, limits, run = draw_case(seed)
    eos_ids = [3, 9, 17, 40, 41, 42][: seed % 4 * 2]
    alone = rollout_of(model, eos_ids)
    first = [p * run["num_samples"] for p in range(len(prompts))]
    expected = [
        alone([prompt], **run, requests=[n], limits=[limit])[0]
        for prompt, n, limit in zip(prompts, first, limits, strict=True)
    ]
    assert all(len(c.ids) <= limit for group, limit in zip(expected, limits, strict=True) for c in group)
    monkeypatch.setattr(schedule, "PREFILL_TOKENS", 20)
    monkeypatch.setattr(native, "ROWS_OF_A_BLOCK", 0 if as_on_a_gpu else 2)
    if as_on_a_gpu:
        monkeypatch.setattr(NativeRollout, "bucket", power_of_two)
    for max_batch in (1, 3, 7, 13):
        rollout, seen = rollout_of(model, eos_ids, decode=spell, max_batch=max_batch), {}
        for stop in ((), ("none such",)):
            sampling = Sampling(20, stop=stop)
            groups = rollout(prompts, **run | {"sampling": sampling}, limits=limits, on_group=seen.__setitem__)
            assert [[(c.ids, c.finish) for c in group] for group in groups] == [
                [(c.ids, c.finish) for c in group] for group in expected
            ]
            assert [seen[p] for p in range(len(prompts))] == groups


def test_stop_strings_with_fewer_slots_than_rows(model):
    run = dict(num_samples=16, sampling=Sampling(20, stop=("a", "qZ", "K")), seed=2)
    expected = rollout_of(model, [13], decode=spell)(PROMPTS, **run)
    assert {"stop", "eos", "length"} == {c.finish for group in expected for c in group}
    for max_batch in (1, 6):
        assert ids_of(rollout_of(model, [13], decode=spell, max_batch=max_batch)(PROMPTS, **run)) == ids_of(expected)


@pytest.mark.parametrize("seed", range(6))
def test_decode_steps_are_those_of_the_ideal_list_schedule(model, seed):
    """A row of n tokens takes a slot for n - 1 steps, its first token being its prefill's."""
    dice = random.Random(seed)
    limits = [dice.choice([1, 2, 3, 5, 8, 13, 21]) for _ in range(dice.randint(3, 12))]
    num_samples = dice.randint(1, 4)
    for max_batch in (1, 3, 8, 64):
        free_at = [0] * max_batch
        for limit in limits:
            for _ in range(num_samples):
                heapq.heapreplace(free_at, free_at[0] + limit - 1)
        rollout = rollout_of(model, max_batch=max_batch)
        rollout([[5, 6]] * len(limits), num_samples=num_samples, sampling=Sampling(21), seed=0, limits=limits)
        assert rollout.decode_steps == max(free_at)


def kept(p_V, top_k, top_p):
    """The distribution that top-k then top-p leave, told plainly."""
    order = sorted(range(len(p_V)), key=lambda v: -p_V[v])[: top_k or None]
    total, upto, left = sum(p_V[v] for v in order), 0.0, torch.zeros(len(p_V), dtype=torch.float64)
    for v in order:
        if upto < top_p * total:
            left[v] = p_V[v]
        upto += p_V[v]
    return left / left.sum()


@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.7}])
def test_sampled_tokens_have_the_exact_probabilities(model, filters):
    """Chi-square of the token behind the prompt and of the next, over 3000 answers whose ends and refills of 48 slots
    depend on what is drawn."""
    eos_ids, prompt, count = [3, 7, 9, 17, 40], PROMPTS[2], 3000
    rule = {"top_k": 0, "top_p": 1.0} | filters
    rollout = rollout_of(model, eos_ids, max_batch=48)
    [group] = rollout([prompt], num_samples=count, sampling=Sampling(3, temperature=1.2, **filters), seed=5)
    assert rollout.decode_steps < 2 * count / 48, "no row ended early"

    def exact(prompts):
        with torch.no_grad():
            logits_NV = model(torch.tensor(prompts)).logits[:, -1].double()
        return torch.stack([kept(p_V, **rule) for p_V in (logits_NV / 1.2).softmax(-1)])

    [first_V], going_on = exact([prompt]), [v for v in range(VOCAB) if v not in eos_ids]
    second_V = first_V[going_on] @ exact([[*prompt, v] for v in going_on])
    for position, share_V in enumerate([first_V, second_V]):
        drawn = torch.tensor([c.ids[position] for c in group if len(c.ids) > position])
        seen_V = drawn.bincount(minlength=VOCAB).double()
        assert not seen_V[share_V == 0].any(), "a dropped token was drawn"
        often = share_V * count >= 5
        seen, wanted = (torch.cat([x[often], count - x[often].sum(0, True)]) for x in (seen_V, share_V * count))
        chi = ((seen - wanted) ** 2 / wanted.clamp(min=1)).sum().item()
        freedom = int(often.sum())
        assert chi < freedom + 5 * math.sqrt(2 * freedom), f"token {position}: {chi:.0f} with {freedom} degrees"


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}])
def test_a_sample_holds_the_whole_distributions_logp(model, filters):
    """What the trainer recomputes, also where the draw came from less of it."""
    settings = "--algo dr_grpo --max_new_tokens 9 --temperature 0.8 --prompts_per_step 4 --group_size 2 --num_samples 0"
    config = load_config(settings.split() + [f"--{key}={value}" for key, value in filters.items()])
    item = Item([{"role": "user", "content": "?"}], "5", None, {})
    asker = Asker(rollout_of(model, [3, 4], max_batch=3), load_tokenizer("tiny"), load_rewards(["answer"]), config)
    questions = iter([(number, item, prompt) for number, prompt in enumerate(PROMPTS)])
    more = {"items": [], "tokenizer": None, "stream": SimpleNamespace(cursor=0)}
    prompts = SimpleNamespace(draw=lambda: next(questions), count_dropped=lambda: 0, **more)
    samples = Explorer(config, group_center, prompts, asker, World(0, 1, 0, torch.device("cpu"), None))(0).samples
    assert [s.prompt for s in samples] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert {s.version for s in samples} == {0}
    for s in samples:
        expected = forward_logp(model, s.prompt, Completion(s.answer, [], "eos"), 0.8)
        torch.testing.assert_close(s.values["logp_behaviour"], expected, atol=1e-5, rtol=0)


def fail_in_prefill(model, rollout, run):
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout(PROMPTS, **run)
    handle.remove()


def fail_in_on_group(model, rollout, run):
    with pytest.raises(ZeroDivisionError):
        rollout(PROMPTS, **run, on_group=lambda *_: 1 / 0)


def stop_midway(model, rollout, run):
    looks = iter([False] * 5 + [True])
    rollout.should_stop = lambda: next(looks)
    with pytest.raises(InterruptedError):
        rollout(PROMPTS, **run)
    rollout.should_stop = None


@pytest.mark.parametrize("fail", [fail_in_prefill, fail_in_on_group, stop_midway])
def test_a_call_that_fails_leaves_nothing_behind(model, fail):
    run = dict(num_samples=3, sampling=Sampling(12), seed=0)
    rollout = rollout_of(model, [3, 9, 27], max_batch=4)
    expected = rollout(PROMPTS, **run)
    fail(model, rollout, run)
    assert rollout.slots.cache.staged is None and model.config._attn_implementation == "sdpa"
    assert rollout(PROMPTS, **run) == expected


def test_slots_that_do_not_fit_the_memory_are_not_made(model):
    run = dict(num_samples=5, sampling=Sampling(9), seed=0)
    expected = rollout_of(model)(PROMPTS, **run)
    each = slot_bytes(model.config, len(PROMPTS[1]) + 9, torch.float32)
    rollout = rollout_of(model, memory=3 * each + 1)
    assert ids_of(rollout(PROMPTS, **run)) == ids_of(expected)
    slots = rollout.slots
    assert slots.cache.num_slots == 3 and rollout(PROMPTS, **run) and rollout.slots is slots, "made anew for nothing"
    with pytest.raises(UserError, match="kv_memory_gib"):
        rollout([[5] * 99], **run)
    assert ids_of(rollout([[5] * 20], **run)) == ids_of(rollout_of(model)([[5] * 20], **run))
    assert rollout.slots.cache.columns == 29


def test_buffers_that_are_outgrown_go_before_new_ones_come(model):
    rollout, run = rollout_of(model), dict(num_samples=2, sampling=Sampling(4), seed=0)
    rollout([[5]], **run)
    gc.collect()
    gc.disable()
    try:
        old = weakref.ref(rollout.slots.cache)
        rollout([[5] * 9], **run)
        assert old() is None, "only the garbage collector would free them"
    finally:
        gc.enable()


def test_memory_nobody_wrote_is_not_read(model):
    run = dict(num_samples=3, sampling=Sampling(12), seed=0)
    expected = rollout_of(model, [3, 9, 27])(PROMPTS, **run)
    torch.use_deterministic_algorithms(True)  # fills every new buffer with nan
    try:
        assert torch.empty(2).isnan().all()
        assert rollout_of(model, [3, 9, 27])(PROMPTS, **run) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_prompt_gives_no_completion(model):
    assert rollout_of(model, max_batch=8)([], num_samples=4, sampling=Sampling(4), seed=0) == []


def test_bad_argument_is_named(model):
    run = dict(num_samples=2, sampling=Sampling(4), seed=0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        rollout_of(model)([[1], []], **run)
    with pytest.raises(ValueError, match="num_samples is 0"):
        rollout_of(model)([[1]], **run | {"num_samples": 0})
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        rollout_of(model)([[1]], **run | {"sampling": Sampling(4, stop=("x",))})
    with pytest.raises(UserError, match="eos_ids has 60"):
        rollout_of(model, eos_ids=[3, 60])
    with pytest.raises(UserError, match="pad_id has -1"):
        rollout_of(model, pad_id=-1)
    with pytest.raises(UserError, match="max_batch is 0"):
        rollout_of(model, max_batch=0)


def test_model_that_would_be_decoded_wrongly_is_refused():
    with pytest.raises(UserError, match="the model has final_logit_softcapping 30.0"):
        rollout_of(build("gemma3_text", final_logit_softcapping=30.0))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    of_a_type = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    for family, parameters in (("llama", rope), ("gemma3_text", of_a_type)):
        with pytest.raises(UserError, match="'dynamic'"):
            rollout_of(build(family, rope_parameters=parameters))
    with pytest.raises(UserError, match="no 'mistral' model"):
        rollout_of(MistralForCausalLM(MistralConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                   num_attention_heads=2, num_key_value_heads=2, vocab_size=VOCAB)).eval())  # fmt: skip


def test_broken_weights_are_said():
    model = build()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        rollout_of(model)(PROMPTS, num_samples=2, sampling=Sampling(4), seed=0)


@pytest.mark.skipif(not os.environ.get("RL_REAL_MODEL"), reason="RL_REAL_MODEL names no Hugging Face folder")
def test_greedy_tokens_of_a_pretrained_model():
    folder = os.environ["RL_REAL_MODEL"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = [
        "Tom has 3 boxes with 12 pencils each. He gives away 7 pencils. How many are left?",
        "A train runs 60 miles an hour. How far does it go in two and a half hours?",
        "What is 15% of 240?",
        "Anna is twice as old as Ben, who will be 10 in three years. In a family of five, where the youngest child is "
        "two years younger than Ben, how old is Anna now?",
    ]
    prompts = [
        tokenizer.encode(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
        )
        for question in questions
    ]
    eos_ids = model.generation_config.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    model.generation_config.update(repetition_penalty=1.0, do_sample=False, temperature=1.0, top_p=1.0, top_k=50)
    groups = rollout_of(model, eos_ids, eos_ids[0])(
        prompts, num_samples=2, sampling=Sampling(24, temperature=0), seed=0
    )
    assert ids_of(groups) == [[generate(model, prompt, 24, eos_ids)] * 2 for prompt in prompts]
    for prompt, (completion, _) in zip(prompts, groups, strict=True):
        expected = forward_logp(model, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logp), expected, atol=1e-4, rtol=0)
