"""Order, staleness and failure of rollouts beside updates, with plain functions in place of both."""

import contextlib
import sys
import threading
import time
import traceback

import pytest
import torch

from engine.prefetch import TURN_SECONDS, Prefetch

CPU = torch.device("cpu")


class Scene:
    """Counts versions as a run does: `make` notes the version it sees, `publish` makes a new one."""

    def __init__(self, lag, make=None, end=9, span=lambda verb, step: contextlib.nullcontext()):
        self.version, self.events, self.busy = 0, [], threading.Lock()
        self.ahead = Prefetch(make or self.make, lag, end, CPU, span)

    def make(self, step):
        with self.busy:
            seen = self.version
            time.sleep(0.01)
            self.events.append(("made", step, threading.current_thread().name.startswith("rollout")))
            assert seen == self.version
        return step, seen

    def publish(self, step):
        assert self.busy.acquire(blocking=False), "published beside a rollout"
        self.version += 1
        self.events.append(("published", step))
        self.busy.release()

    def walk(self, steps, learn=lambda step, made: None):
        """The loop of train.py; what was made for each step."""
        seen = []
        with self.ahead as ahead:
            for step in steps:
                seen.append(ahead.next(step))
                ahead.begin(step + 1)
                learn(step, seen[-1])
                ahead.land()
                self.publish(step)
        return seen


@pytest.mark.parametrize("lag", [0, 1])
def test_batch_k_is_made_from_version_k_minus_lag(lag):
    scene = Scene(lag, end=5)
    assert scene.walk(range(5)) == [(k, max(k - lag, 0)) for k in range(5)]
    assert [aside for kind, step, *aside in scene.events if kind == "made"] == [[bool(lag and k)] for k in range(5)]
    assert not scene.ahead.flying() and scene.ahead.ready is None


@pytest.mark.parametrize("lag", [0, 1])
def test_threads_take_short_turns_only_while_two_of_them_launch(lag):
    before, turns = sys.getswitchinterval(), []
    Scene(lag, end=3).walk(range(3), lambda step, made: turns.append(sys.getswitchinterval()))
    assert turns == pytest.approx([TURN_SECONDS if lag else before] * 3) and TURN_SECONDS < before
    assert sys.getswitchinterval() == before


def test_at_lag_1_the_next_rollout_runs_beside_the_update_and_has_landed_before_publish():
    inside, released, flying = threading.Event(), threading.Event(), []

    def make(step):
        if step == 1:
            inside.set()
            assert released.wait(5)
        return scene.make(step)

    def learn(step, made):
        if step == 0:
            assert inside.wait(5), "the rollout is not beside the update"
            flying.append(scene.ahead.flying())
            released.set()

    scene = Scene(1, make, end=2)
    assert scene.walk(range(2), learn) == [(0, 0), (1, 0)] and flying == [True]
    assert [event[:2] for event in scene.events] == [("made", 0), ("made", 1), ("published", 0), ("published", 1)]


def test_what_an_earlier_process_made_comes_first():
    scene = Scene(1, end=5)
    scene.ahead.ready = (3, -1)
    assert scene.walk(range(3, 5)) == [(3, -1), (4, 0)]


@pytest.mark.parametrize("lag", [0, 1])
def test_no_rollout_is_begun_for_nothing(lag):
    """Where a run ends, by its last step or by a stop between `next` and `begin`."""
    scene = Scene(lag, end=3)
    scene.walk(range(3))
    with Scene(lag).ahead as ahead:
        ahead.next(0)
        assert not ahead.flying()
    assert [event[1] for event in scene.events if event[0] == "made"] == [0, 1, 2]


def test_a_failing_rollout_is_raised_with_its_own_traceback_by_check_and_at_the_wait():
    def make_that_fails(step):
        if step:
            raise KeyError("lost")
        return step

    def look(step, made):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            scene.ahead.check()  # as the update does between micro-batches
            time.sleep(0.001)

    for learn in (look, lambda step, made: None):
        scene = Scene(1, make_that_fails)
        with pytest.raises(KeyError, match="lost") as caught:
            scene.walk(range(3), learn)
        assert "make_that_fails" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert not scene.events, "weights were published after a failure"


def fail(step, made):
    raise ZeroDivisionError


def test_a_failing_update_stops_the_rollout_beside_it():
    ended = threading.Event()

    def make(step):
        while step and not scene.ahead.cancelled.is_set():
            time.sleep(0.001)
        if step:
            ended.set()
        return step

    scene = Scene(1, make)
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        scene.walk(range(3), fail)
    assert ended.is_set() and time.monotonic() - begun < 30
    assert not scene.ahead.flying()


def test_a_reward_that_hangs_does_not_hold_up_the_failure_of_the_update(monkeypatch):
    monkeypatch.setattr("engine.prefetch.LAST_SECONDS", 0.05)
    hung, begun = threading.Event(), time.monotonic()
    with pytest.raises(ZeroDivisionError):
        Scene(1, lambda step: step and hung.wait(60)).walk(range(3), fail)
    assert time.monotonic() - begun < 30
    hung.set()


def test_a_slow_reward_delays_its_own_batch_only():
    """Batch 3 stays away until its own update is all that is left to do."""
    waiting = threading.Event()

    @contextlib.contextmanager
    def span(verb, step):
        if (verb, step) == ("wait", 2):  # after the update of step 2
            waiting.set()
        yield

    def make(step):
        assert step != 3 or waiting.wait(10), "something before batch 3 waited for it"
        return step

    assert Scene(1, make, span=span).walk(range(6)) == list(range(6))


def test_the_thread_keeps_the_number_of_torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert Scene(1, lambda step: torch.get_num_threads()).walk(range(3)) == [1, 1, 1]
    finally:
        torch.set_num_threads(before)
