"""Inference beside control: answers in time, late ones, faults; and the clock that timestamps are read from."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from infra.edge.clock import Clock
from infra.edge.shield import PolicyFaultError
from infra.edge.watchdog import Inference


class Policy:
    horizon, version = 2, 7

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> Any:
        return self.answer()


def asked(answer: Callable[[], Any]) -> Inference:
    inference = Inference(Policy(answer))
    inference.ask(np.zeros(3, np.float32), "go", np.zeros((2, 3), np.float32))
    return inference


def test_an_answer_comes_once() -> None:
    inference = asked(lambda: np.ones((1, 2, 3)))
    found = inference.answer(60)
    assert found is not None and found[0].shape == (2, 3) and not inference.pending
    inference.close()


def test_a_hanging_inference_does_not_keep_control_waiting() -> None:
    go = threading.Event()
    inference = asked(lambda: go.wait() and np.ones((1, 2, 3)))
    assert inference.answer(0.01) is None and inference.pending and not inference.forget()
    go.set()
    assert inference.answer(60) is not None
    inference.close()


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError(), FloatingPointError(), MemoryError(), SystemExit(3),
                                   RecursionError(), Unspeakable()], ids=lambda e: type(e).__name__)  # fmt: skip
def test_whatever_an_inference_raises_is_the_policys_fault(error: BaseException) -> None:
    def fail() -> None:
        raise error

    inference = asked(fail)
    with pytest.raises(PolicyFaultError, match=type(error).__name__):
        inference.answer(60)
    inference.ask(np.zeros(3, np.float32), "go", np.zeros((2, 3), np.float32))  # the thread lives
    with pytest.raises(PolicyFaultError):
        inference.answer(60)
    inference.close()


def test_an_answer_that_is_computed_when_it_is_looked_at_has_the_deadline_too() -> None:
    """As arrays of libraries that compute asynchronously."""
    go, threads = threading.Event(), []

    class Lazy:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            threads.append(threading.current_thread())
            go.wait()
            return np.ones((2, 3))

    inference = asked(lambda: [Lazy()])
    assert inference.answer(0.01) is None and inference.pending
    go.set()
    found = inference.answer(60)
    assert found is not None and found[0].shape == (2, 3) and threading.current_thread() not in threads
    inference.close()


def test_a_policy_that_writes_into_what_it_is_given_changes_nothing_of_the_robots() -> None:
    class Writing(Policy):
        def act(self, observations: np.ndarray, instructions: Sequence[str], noise: np.ndarray) -> Any:
            observations -= 1
            noise *= 0
            return np.ones((1, 2, 3))

    observation, noise = np.full(3, 5, np.float32), np.ones((2, 3), np.float32)
    inference = Inference(Writing(lambda: None))
    inference.ask(observation, "go", noise)
    assert inference.answer(60) is not None and (observation == 5).all() and (noise == 1).all()
    inference.close()


@pytest.mark.parametrize("answer", [None, 3, [], {}])
def test_an_answer_that_is_no_batch_is_a_fault_or_for_the_shield(answer: Any) -> None:
    inference = asked(lambda: answer)
    with pytest.raises(PolicyFaultError):
        inference.answer(60)
    inference.close()


def test_stamps_begin_at_nothing_and_go_strictly_forward() -> None:
    times = iter([100.0, 100.0, 100.2, 100.2, 100.1, 100.5])
    clock = Clock(lambda: next(times), pace=2.0)
    clock.start()
    stamps = [clock.stamp() for _ in range(5)]
    assert stamps[0] == 0 and stamps[1] == pytest.approx(0.4) and stamps[4] == pytest.approx(1.0)
    assert all(later > earlier for earlier, later in itertools.pairwise(stamps))
