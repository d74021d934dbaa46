"""Checks that harm the process which runs them, for the tests of it; little is imported, so that one starts soon."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infra.episode import Episode


@dataclass(frozen=True)
class Violation:
    rule: str
    severity: str
    message: str


def check(episode: Episode) -> Sequence[Violation]:
    """The last digit of an episode's id says what its examination does to the process."""
    what = int(episode.episode_id, 16) % 8
    if what == 1:
        while True:
            time.sleep(1)
    if what == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == 3:
        np.ones(2**33)
    if what == 4:
        (marker := Path(episode.task)).exists() or (marker.touch(), os._exit(7))
    if what == 5:
        return [Violation("odd", "warn", str(os.getpid()))]
    if what == 6:
        raise ZeroDivisionError("in the check" + "x" * 2**20)
    return []


_kept: list[np.ndarray] = []


def forgetful(episode: Episode) -> Sequence[Violation]:
    """Gives no memory back."""
    _kept.append(np.ones(2**23))
    return []


def batch_check(episodes: Sequence[Episode]) -> dict[str, list[Violation]]:
    """Ends the process where episode 7 is among them."""
    if any(int(episode.episode_id, 16) == 7 for episode in episodes):
        os._exit(9)
    return {episodes[0].episode_id: [Violation("first", "block", "of them")]}
