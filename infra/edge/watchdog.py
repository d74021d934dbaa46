"""Inference in a thread of its own: one that is late, or hangs, cannot stop control.

Control asks with the newest observation, waits until its deadline, and holds if there is no answer. One question is
under way at a time. A thread that hangs is abandoned with its policy; it ends with the process.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from infra.edge.shield import PolicyFaultError
from infra.errors import summary

Floats = npt.NDArray[np.float32]


class ActionPolicy(Protocol):
    """What acts: `horizon` H actions a plan, and the version that the episodes are labelled with."""

    @property
    def horizon(self) -> int: ...

    @property
    def version(self) -> int | None: ...

    def act(self, observations: Floats, instructions: Sequence[str], noise: Floats) -> Floats:
        """Chunks (B, H, A) for observations (B, D), one instruction a row and standard normal noise (B, H, A)."""


class Inference:
    """One policy's inferences, one at a time.

    Args:
        policy: what is asked.
    """

    def __init__(self, policy: ActionPolicy) -> None:
        self.policy = policy
        self._questions: queue.SimpleQueue[tuple[Floats, str, Floats] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.pending = False  # a question without its answer
        self._thread = threading.Thread(target=self._run, name=f"policy-{policy.version}", daemon=True)
        self._thread.start()

    def ask(self, observation: Floats, instruction: str, noise: Floats) -> None:
        """Begin an inference: (D,) observation, noise (H, A). The policy gets copies, which it may write into."""
        assert not self.pending, "one inference at a time"
        self.pending = True
        self._questions.put((observation.copy(), instruction, noise.copy()))

    def answer(self, timeout_s: float) -> tuple[Any] | None:
        """The chunk, whatever array the policy made of it, as the one entry; None if it is not there in `timeout_s`
        seconds.

        Raises:
            PolicyFaultError: the inference raised.
        """
        try:
            found = self._answers.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        self.pending = False
        if isinstance(found, BaseException):
            raise PolicyFaultError(f"inference raised {summary(found)}", "look at the policy's bundle") from found
        return (found,)

    def forget(self) -> bool:
        """Drop the answer to a question of an attempt that is over; whether the thread is free for the next one."""
        with contextlib.suppress(PolicyFaultError):
            self.answer(0.0)
        return not self.pending

    def close(self) -> None:
        """End the thread, once it is free."""
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            observation, instruction, noise = question
            try:
                with np.errstate(all="ignore"):  # what is not finite is found in the result
                    chunks = self.policy.act(observation[None], [instruction], noise[None])
                    chunk = np.asanyarray(
                        chunks[0]
                    )  # here: of an answer that is computed only now, control has a deadline
                self._answers.put(chunk)
            except BaseException as error:
                self._answers.put(error)
