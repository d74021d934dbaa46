"""The gate benchmark's own parts: its short cuts give the gate's answers, its nulls are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from bench.gate import raised
from bench.gate_canary import asked, harm_by_drift
from bench.gate_nulls import CHAMPION, best_of, promoted, stream_after, wins
from flows.canary_gate import load_canary
from flows.gate import Verdict, episodes_at, level_at, load_gate, trace, verdicts


@pytest.mark.parametrize("level", [0.05, 0.002])
def test_promoted_is_the_gates_answer(level: float) -> None:
    spec, rng = load_gate(), np.random.default_rng(0)
    most = episodes_at(spec, level).max
    differences = wins(CHAMPION + 0.06, 60, most, rng) - wins(CHAMPION, 60, most, rng)
    answers = verdicts(spec, trace(spec, differences, level), level)
    first = answers[np.arange(60), np.argmax(answers != Verdict.CONTINUE.value, axis=1)]
    found = promoted(spec, differences, level)
    assert 0 < found.sum() < 60
    assert (found == (first == Verdict.PASS.value)).all()


def test_the_best_of_many_is_judged_anew() -> None:
    spec, rng = load_gate(), np.random.default_rng(1)
    assert best_of(spec, 32, 300, rng, fresh=False).mean() > 0.2
    assert best_of(spec, 32, 300, rng, fresh=True).mean() <= spec.alpha


def test_a_promotion_raises_the_level_of_the_next_trial() -> None:
    spec, rng = load_gate(), np.random.default_rng(2)
    better = raised(CHAMPION, 0.2)
    assert better.mean() == pytest.approx(CHAMPION.mean() + 0.2) and better.max() <= 0.98
    assert stream_after(spec, np.ones((5, 3), dtype=bool), better, rng).all()
    assert level_at(spec, 3, 2) > level_at(spec, 3, 0)


def test_work_that_becomes_harder_is_not_the_candidates_harm() -> None:
    spec, rng = load_canary(), np.random.default_rng(3)
    alone = harm_by_drift(spec, 0.2, 60, rng, sudden=True, concurrent=False)
    together = harm_by_drift(spec, 0.2, 60, rng, sudden=True, concurrent=True)
    assert alone.mean() > 0.3 and together.mean() <= 0.1
    assert asked(10).tolist() == [4, 8, 10] and asked(8).tolist() == [4, 8]
