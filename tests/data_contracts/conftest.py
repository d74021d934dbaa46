"""Episodes here are of the packaged contract's embodiment: 86 entries to an observation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from infra.episode import Episode


@pytest.fixture(scope="session")
def make_episode(make_episode: Callable[..., Episode]) -> Callable[..., Episode]:
    return functools.partial(make_episode, obs_dim=86)
