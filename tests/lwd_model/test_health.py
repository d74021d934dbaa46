"""A learner's health: what is not finite or beyond a limit is named."""

from __future__ import annotations

import math

import pytest

from infra.errors import DivergedError
from lwd_model.health import Health, stop_unless_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["divl/critic_loss", "gradient/value", "qam/adjoint", "value/tau"])
def test_a_number_that_is_not_finite_is_named(name: str, value: float) -> None:
    assert name in str(Health().judge({"divl/q": 0.5, name: value}))
    with pytest.raises(DivergedError, match=f"{name} is .* at update 7"):
        stop_unless_finite({name: value}, 7, "look")


def test_limits_hold_and_health_is_quiet() -> None:
    health = Health()
    for _ in range(60):
        assert health.judge({"divl/critic_loss": 0.01, "divl/q": 0.5, "qam/loss": 12.5}) is None
    assert "5440" in str(health.judge({"divl/critic_loss": 5440.0}))
    assert "times its median" in str(health.judge({"divl/critic_loss": 2.0}))
    assert "divl/q" in str(health.judge({"divl/q": -11.0}))
    assert health.judge({"divl/critic_loss": 0.4}) is None
