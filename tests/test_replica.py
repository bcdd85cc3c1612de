"""The rollout's weights: refreshed in place, never read half written, never refreshed under a reader."""

import copy
import threading
from pathlib import Path

import pytest
import torch

from engine.config import Config
from engine.linears import convert
from engine.model import load_model
from engine.policy import Policy
from engine.replica import Replica, make_replica
from engine.rollouts.native import NativeRollout
from engine.rollouts.sampling import Sampling
from kernels import chunked


@pytest.fixture
def lm():
    return convert(load_model("tiny", 0, torch.float32), Config()).eval().requires_grad_(False)


@pytest.fixture
def policy(lm):
    other = copy.deepcopy(lm)
    for p in other.parameters():
        p.mul_(-1.5)
    return Policy(other, torch.device("cpu"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_refresh_writes_into_the_same_memory_and_sets_the_version(lm, policy):
    replica = make_replica(lm, torch.device("cpu"))
    before = {name: p.data_ptr() for name, p in replica.lm.named_parameters()}
    replica.refresh(policy, 7)
    assert {name: p.data_ptr() for name, p in replica.lm.named_parameters()} == before and replica.version == 7
    for (name, p), q in zip(replica.lm.named_parameters(), policy.lm.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert replica.lm.lm_head.weight is replica.lm.model.embed_tokens.weight


def test_a_refresh_beside_a_rollout_is_caught_and_changes_nothing(lm, policy):
    """A planted race: another thread refreshes in the middle of a rollout."""
    replica = Replica(lm)
    caught = []

    def race():
        try:
            replica.refresh(policy, 1)
        except RuntimeError as error:
            caught.append(str(error))

    def on_group(p, group):
        thread = threading.Thread(target=race)
        thread.start()
        thread.join()

    rollout = NativeRollout(replica, eos_ids=[], pad_id=0, ops=chunked)
    run = dict(num_samples=2, sampling=Sampling(6), seed=0)
    expected = rollout([[5, 6], [7]], **run)
    assert rollout([[5, 6], [7]], **run, on_group=on_group) == expected
    assert len(caught) == 2 and "in use by another thread" in caught[0] and replica.version == 0
    replica.refresh(policy, 1)
    assert [c.version for group in rollout([[5, 6], [7]], **run) for c in group] == [1] * 4


class Recorder:
    def __init__(self, name, events):
        self.wait, self.mark = (lambda: events.append(f"wait {name}")), (lambda: events.append(f"mark {name}"))


def test_readers_and_writers_wait_for_each_other_and_a_reader_for_the_one_before(lm, policy):
    """The order that holds on a GPU, where an interrupted reader leaves steps behind on its stream."""
    replica, events = Replica(lm), []
    replica.written, replica.read = Recorder("written", events), Recorder("read", events)
    with pytest.raises(InterruptedError), replica.reading():
        assert events == ["wait written", "wait read"]
        raise InterruptedError
    replica.refresh(policy, 1)
    assert events[2:] == ["mark read", "wait read", "mark written"]


def test_two_rollouts_at_once_on_one_replica_are_refused(lm):
    replica = Replica(lm)
    with replica.reading(), pytest.raises(RuntimeError, match="in use by another thread"):
        NativeRollout(replica, eos_ids=[], pad_id=0, ops=chunked)([[5]], num_samples=1, sampling=Sampling(2), seed=0)


def test_a_failed_rollout_gives_the_weights_back(lm, policy):
    replica = Replica(lm)
    rollout = NativeRollout(replica, eos_ids=[], pad_id=0, ops=chunked, should_stop=lambda: True)
    with pytest.raises(InterruptedError):
        rollout([[5]], num_samples=1, sampling=Sampling(4), seed=0)
    replica.refresh(policy, 1)


def test_memory_does_not_creep_over_500_refreshes_and_rollouts(lm, policy):
    replica = Replica(lm)
    rollout = NativeRollout(replica, eos_ids=[], pad_id=0, ops=chunked, max_batch=4, max_prompt=4, max_new=4)

    def turn(version):
        replica.refresh(policy, version)
        rollout([[5, 6], [7]], num_samples=2, sampling=Sampling(2), seed=version)

    sizes = []
    for version in range(601):
        turn(version)
        if version in (100, 350, 600):
            sizes.append(resident())
    creep = min(sizes[1] - sizes[0], sizes[2] - sizes[1])  # what leaks shows in both halves, what happens once in one
    assert creep < 0.005 * sizes[0], sizes
