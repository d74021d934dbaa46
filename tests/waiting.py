"""How tests wait for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], why: object = "it did not come about", seconds: float = 180.0) -> None:
    """Ask until `condition` holds.

    Args:
        why: what AssertionError says if it does not hold in time; a function is called then.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, why() if callable(why) else why
        time.sleep(0.02)
