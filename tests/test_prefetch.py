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

    def __init__(self, lag, make=None):
        self.version, self.events, self.busy, self.stop_at = 0, [], threading.Lock(), None
        self.prefetch = Prefetch(make or self.make, lag, CPU, lambda verb, step: contextlib.nullcontext())

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
        return step == self.stop_at

    def batches(self, steps, accept=lambda made: False, **kwargs):
        return contextlib.closing(self.prefetch.batches(steps, accept, self.publish, **kwargs))


@pytest.mark.parametrize("lag", [0, 1])
def test_batch_k_is_made_from_version_k_minus_lag(lag):
    scene = Scene(lag)
    with scene.batches(range(5)) as batches:
        seen = list(batches)
    assert seen == [(k, (k, max(k - lag, 0))) for k in range(5)]
    assert [aside for kind, step, *aside in scene.events if kind == "made"] == [[bool(lag and k)] for k in range(5)]
    assert scene.prefetch.flight is None


@pytest.mark.parametrize("lag", [0, 1])
def test_threads_take_short_turns_only_while_two_of_them_launch(lag):
    before, scene, turns = sys.getswitchinterval(), Scene(lag), []
    with scene.batches(range(3)) as batches:
        for _ in batches:
            turns.append(sys.getswitchinterval())
    assert turns == pytest.approx([TURN_SECONDS if lag else before] * 3) and TURN_SECONDS < before
    assert sys.getswitchinterval() == before


def test_at_lag_1_the_next_rollout_runs_beside_the_update_and_has_landed_before_publish():
    scene, inside = Scene(1), threading.Event()
    released = threading.Event()

    def make(step):
        if step == 1:
            inside.set()
            assert released.wait(5)
        return scene.make(step)

    scene.prefetch.make = make
    with scene.batches(range(2)) as batches:
        assert next(batches) == (0, (0, 0))
        assert inside.wait(5) and not scene.prefetch.flight.done(), "the rollout is not beside the update"
        released.set()
        assert next(batches) == (1, (1, 0))
    assert [event[:2] for event in scene.events] == [("made", 0), ("made", 1), ("published", 0)]


def test_what_an_earlier_process_made_comes_first():
    scene = Scene(1)
    with scene.batches(range(3, 5), ready=(3, -1)) as batches:
        assert list(batches) == [(3, (3, -1)), (4, (4, 0))]


@pytest.mark.parametrize("lag", [0, 1])
def test_the_walk_ends_where_accept_or_publish_says_so(lag):
    scene = Scene(lag)
    scene.stop_at = 1
    with scene.batches(range(9)) as batches:
        assert [step for step, _ in batches] == [0, 1]
    scene = Scene(lag)
    with scene.batches(range(9), accept=lambda made: made[0] == 2) as batches:
        assert [step for step, _ in batches] == [0, 1]
    assert ("made", 3) not in [event[:2] for event in scene.events], "a rollout was begun for nothing"


def test_a_failing_rollout_is_raised_with_its_own_traceback_by_check_and_at_the_wait():
    def make_that_fails(step):
        if step:
            raise KeyError("lost")
        return step

    for look in (True, False):
        scene = Scene(1, make_that_fails)
        with pytest.raises(KeyError, match="lost") as caught, scene.batches(range(3)) as batches:
            next(batches)
            deadline = time.monotonic() + 5
            while look and time.monotonic() < deadline:
                scene.prefetch.check()  # as the update does between micro-batches
                time.sleep(0.001)
            next(batches)
        assert "make_that_fails" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert not scene.events, "weights were published after a failure"


def test_a_failing_update_stops_the_rollout_beside_it():
    ended = threading.Event()

    def make(step):
        while step and not scene.prefetch.cancelled.is_set():
            time.sleep(0.001)
        ended.set()
        return step

    scene = Scene(1, make)
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError), scene.batches(range(3)) as batches:
        next(batches)
        ended.clear()
        raise ZeroDivisionError
    assert ended.is_set() and time.monotonic() - begun < 30
    assert scene.prefetch.flight is None


def test_a_reward_that_hangs_does_not_hold_up_the_failure_of_the_update(monkeypatch):
    monkeypatch.setattr("engine.prefetch.LAST_SECONDS", 0.05)
    hung = threading.Event()
    scene = Scene(1, lambda step: step and hung.wait(60))
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError), scene.batches(range(3)) as batches:
        next(batches)
        raise ZeroDivisionError
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

    scene = Scene(1, make)
    scene.prefetch.span = span
    with scene.batches(range(6)) as batches:
        assert [made for _, made in batches] == list(range(6))


def test_the_thread_keeps_the_number_of_torch_threads():
    scene = Scene(1, lambda step: torch.get_num_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with scene.batches(range(3)) as batches:
            assert [made for _, made in batches] == [1, 1, 1]
    finally:
        torch.set_num_threads(before)
