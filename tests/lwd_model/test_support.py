"""The categorical support: projection, quantiles and entropy against brute force (acceptance test 8)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from lwd_model.divl import adaptive_tau
from lwd_model.support import Support

SUPPORT = Support()


def random_probs(seed: int, sharpness: float, rows: int = 5) -> torch.Tensor:
    logits = sharpness * torch.randn(rows, SUPPORT.size, generator=torch.Generator().manual_seed(seed))
    return SUPPORT.probs(logits)


def test_the_papers_support() -> None:
    assert SUPPORT.size == 201
    assert SUPPORT.spacing == pytest.approx(0.006)
    assert SUPPORT.atoms[[0, -1]].tolist() == pytest.approx([-0.1, 1.1])
    assert not SUPPORT.state_dict()


@given(st.lists(st.floats(-0.1, 1.1), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_08_projection_keeps_the_mean_and_touches_two_neighbours(values: list[float]) -> None:
    target = torch.tensor(values)
    probs = SUPPORT.project(target)
    assert torch.allclose(SUPPORT.mean(probs), target, rtol=0, atol=1e-6)
    assert torch.allclose(probs.sum(-1), torch.ones(len(values)))
    assert probs.min() >= 0
    for row in probs:
        hot = row.nonzero().flatten()
        assert len(hot) <= 2 and (hot.diff() == 1).all()


@pytest.mark.parametrize(("value", "atom"), [(-5.0, 0), (-0.1, 0), (1.1, 200), (7.0, 200)])
def test_08_projection_clips_to_the_support(value: float, atom: int) -> None:
    assert SUPPORT.project(torch.tensor([value]))[0, atom] == pytest.approx(1.0)


@given(st.integers(0, 10_000), st.floats(0.0, 8.0), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_08_quantile_equals_brute_force(seed: int, sharpness: float, tau: float) -> None:
    probs = random_probs(seed, sharpness)
    found = SUPPORT.quantile(probs, torch.tensor(tau))
    smooth = SUPPORT.quantile(probs, torch.tensor(tau), interpolate=True)
    for row, value, interpolated in zip(probs.tolist(), found.tolist(), smooth.tolist(), strict=True):
        total, below, atom, mass = 0.0, 0.0, 0.0, 0.0
        pairs = iter(zip(SUPPORT.atoms.tolist(), row, strict=True))
        while total < tau - 1e-6:
            atom, mass = next(pairs)
            below, total = total, total + mass
        assert value == pytest.approx(atom, abs=1.01 * SUPPORT.spacing if abs(total - tau) < 1e-5 else 1e-7)
        # The same CDF, linear within the atom's cell.
        expected = atom + ((tau - below) / mass - 0.5) * SUPPORT.spacing
        assert interpolated == pytest.approx(min(max(expected, -0.1), 1.1), abs=2e-2 * SUPPORT.spacing + 1e-4)


def test_08_quantile_tolerates_a_cdf_that_falls_short_of_tau_by_rounding() -> None:
    probs = torch.zeros(1, SUPPORT.size)
    probs[0, 50] = 0.6 - 5e-7
    probs[0, 150] = 0.4 + 5e-7
    assert SUPPORT.quantile(probs, torch.tensor([0.6])).item() == pytest.approx(SUPPORT.atoms[50].item())


def test_quantile_takes_a_level_per_row() -> None:
    probs = SUPPORT.project(torch.tensor([0.0, 1.0])).mean(0).expand(3, -1)
    found = SUPPORT.quantile(probs, torch.tensor([0.2, 0.5, 0.9]))
    assert found[0] < 0.01 and found[1] < 0.01 and found[2] > 0.99


def test_interpolated_median_of_a_point_mass_has_no_drift() -> None:
    values = SUPPORT.atoms[5:-5]
    found = SUPPORT.quantile(SUPPORT.project(values), torch.tensor(0.5), interpolate=True)
    assert torch.allclose(found, values, atol=1e-4)


@given(st.integers(0, 10_000), st.floats(0.0, 50.0))
@settings(max_examples=50, deadline=None)
def test_08_entropy_is_normalised(seed: int, sharpness: float) -> None:
    entropy = SUPPORT.entropy(random_probs(seed, sharpness))
    assert ((entropy >= 0) & (entropy <= 1)).all()


def test_08_entropy_of_known_distributions() -> None:
    uniform = torch.full((1, SUPPORT.size), 1.0 / SUPPORT.size)
    point = SUPPORT.project(SUPPORT.atoms[[0]])
    pair = torch.zeros(1, SUPPORT.size)
    pair[0, :2] = 0.5
    assert SUPPORT.entropy(uniform).item() == pytest.approx(1.0)
    assert SUPPORT.entropy(point).item() == pytest.approx(0.0)
    assert SUPPORT.entropy(pair).item() == pytest.approx(math.log(2) / math.log(201))


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 2.0))
@settings(max_examples=100, deadline=None)
def test_08_tau_is_clipped(entropy: float, base: float, alpha: float) -> None:
    tau = adaptive_tau(torch.tensor([entropy]), base, alpha).item()
    assert 0.05 - 1e-6 <= tau <= 0.95 + 1e-6
    assert tau == pytest.approx(min(max(base - alpha * entropy, 0.05), 0.95), abs=1e-6)


def test_probabilities_of_half_precision_logits_are_float32() -> None:
    assert SUPPORT.probs(torch.randn(2, 201).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("arguments", [(1.0, 0.0, 201), (0.0, 1.0, 1)])
def test_an_empty_support_is_refused(arguments: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError, match="empty"):
        Support(*arguments)
