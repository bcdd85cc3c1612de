"""The contract of rollout back-ends, kept by the native one and by a stranger, and all that the engine asks of them."""

import inspect
import random
import threading
from types import SimpleNamespace

import pytest
import torch

from engine import dist, model
from engine.algos.advantage import group_zscore
from engine.asking import Asker, make_rollout
from engine.config import load_config
from engine.data.stream import Stream
from engine.dist import World
from engine.evaluate import evaluate
from engine.inputs import load_items
from engine.replica import Replica
from engine.rewards import load_rewards
from engine.rollouts import ROLLOUTS
from engine.rollouts.native import NativeRollout
from engine.rollouts.protocol import BackEnd, Completion, Rollout
from engine.rollouts.sampling import Sampling
from engine.sources import Prompts
from engine.sources.answers import Explorer

WORLD = World(0, 1, 0, torch.device("cpu"), None)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


class Parrot:
    """Says what was asked, in an order that the request and the seed decide, and ends with an EOS if there is room."""

    def __init__(self, replica, *, eos_ids, should_stop, **sizes):
        self.replica, self.eos, self.should_stop = replica, eos_ids[0], should_stop

    def prepare(self, sampling):
        pass

    def __call__(self, prompts, *, num_samples, sampling, seed, requests=None, on_group=None, on_answer=None):
        first, groups = requests or range(0, len(prompts) * num_samples, num_samples), []
        with self.replica.reading() as version:
            for p, prompt in enumerate(prompts):
                groups.append(
                    [self.say(prompt, sampling, f"{seed} {first[p] + g}", version) for g in range(num_samples)]
                )
                for _ in groups[p] if on_answer is not None else ():
                    on_answer()
                if on_group is not None:
                    on_group(p, groups[p])
        return groups

    def say(self, prompt, sampling, noise, version):
        if self.should_stop():
            raise InterruptedError
        said = [*random.Random(noise).sample(prompt, len(prompt)), self.eos][: sampling.max_new_tokens]
        return Completion(said, [-1.0] * len(said), "eos" if said[-1] == self.eos else "length", version)


@pytest.fixture(params=["native", "parrot"])
def parts(request, monkeypatch):
    """A back-end as the engine makes it, its tokenizer and configuration, and the flag that stops it."""
    monkeypatch.setitem(ROLLOUTS, "parrot", Parrot)
    monkeypatch.setattr(dist, "world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_sum", lambda values: values)
    fixed = ["--algo", "grpo", "--rollout", request.param, "--prompts_per_step", "3", "--group_size", "4"]
    config, tokenizer = load_config([*fixed, "--max_new_tokens", "12"]), model.load_tokenizer("tiny")
    lm = model.load_model("tiny", 0, torch.float32).eval().requires_grad_(False)
    stop = threading.Event()
    rollout = make_rollout(Replica(lm, version=3), tokenizer, config, stop.is_set)
    return SimpleNamespace(rollout=rollout, tokenizer=tokenizer, config=config, stop=stop)


@pytest.mark.parametrize(
    "contract, own",
    [
        (BackEnd.__call__, NativeRollout.__init__),
        (Rollout.__call__, NativeRollout.__call__),
        (Rollout.prepare, NativeRollout.prepare),
    ],
)
def test_the_native_back_end_takes_what_the_contract_passes(contract, own):
    asked, taken = inspect.signature(contract).parameters, inspect.signature(own).parameters
    assert {name: p.kind for name, p in asked.items()} == {name: taken[name].kind for name in asked}
    assert all(taken[name].default == p.default for name, p in asked.items() if p.default is not p.empty)
    assert all(taken[name].default is not inspect.Parameter.empty for name in taken.keys() - asked.keys())


def test_every_prompt_is_answered_once_within_the_limit_by_weights_of_one_version(parts):
    seen = []
    sampling = Sampling(4)
    parts.rollout.prepare(sampling)

    def on_group(p, completions):
        seen.append((p, completions, threading.current_thread()))

    ended = []
    run = {"num_samples": 5, "sampling": sampling, "seed": 1}
    groups = parts.rollout(PROMPTS, **run, on_group=on_group, on_answer=lambda: ended.append(len(seen)))
    assert [len(group) for group in groups] == [5] * 3
    assert sorted(p for p, _, _ in seen) == [0, 1, 2] and all(groups[p] == group for p, group, _ in seen)
    assert len(ended) == 15 and ended[-1] < 3, "the last answer ends before its group is handed over"
    assert {thread for _, _, thread in seen} == {threading.current_thread()}
    for c in (c for group in groups for c in group):
        assert 1 <= len(c.ids) <= 4 and len(c.ids) == len(c.logp)
        assert c.finish in ("eos", "length") and c.version == 3
        assert (c.finish == "eos") == (c.ids[-1] == parts.tokenizer.eos_token_id)


def test_an_answer_depends_on_its_request_and_on_nothing_beside_it(parts):
    run = {"num_samples": 2, "sampling": Sampling(6)}

    def ids(prompts, seed=1, **more):
        return [[c.ids for c in group] for group in parts.rollout(prompts, seed=seed, **run, **more)]

    together = ids(PROMPTS)
    assert together == ids(PROMPTS, requests=[0, 2, 4]) == [ids([PROMPTS[p]], requests=[2 * p])[0] for p in range(3)]
    assert together[::-1] == ids(PROMPTS[::-1], requests=[4, 2, 0])
    assert together != ids(PROMPTS, seed=2) and together != ids(PROMPTS, requests=[6, 8, 10])


def test_a_stop_and_a_failing_listener_end_a_call_and_spoil_no_other(parts):
    run = {"num_samples": 2, "sampling": Sampling(6), "seed": 1}
    expected = parts.rollout(PROMPTS, **run)
    parts.stop.set()
    with pytest.raises(InterruptedError):
        parts.rollout(PROMPTS, **run)
    parts.stop.clear()
    with pytest.raises(ZeroDivisionError):
        parts.rollout(PROMPTS, **run, on_group=lambda *_: 1 / 0)
    assert parts.rollout(PROMPTS, **run) == expected


def test_it_serves_evaluation(parts):
    items = load_items(parts.config, "test")[:5]
    given = parts.rollout, parts.tokenizer, items, load_rewards(["answer"]), parts.config, WORLD
    counts = []
    result = evaluate(*given, samples=2, progress=lambda *pair: counts.append(pair))
    assert result["problems"] == 5 and 0 < result["length"] <= 12 and counts == [(n, 10) for n in range(1, 11)]
    parts.stop.set()
    assert evaluate(*given) == {}


def test_it_serves_training(parts):
    config, items = parts.config, load_items(parts.config, "train")
    prompts = Prompts(items, parts.tokenizer, config, Stream(len(items), 0))
    asker = Asker(parts.rollout, parts.tokenizer, load_rewards(["answer"]), config)
    batch = Explorer(config, group_zscore, prompts, asker, WORLD)(3)
    assert len(batch.samples) == batch.tally.sums["sequences"] == 12 and {s.version for s in batch.samples} == {3}
    assert {"rollout", "reward", "advantage"} == set(batch.tally.seconds)
