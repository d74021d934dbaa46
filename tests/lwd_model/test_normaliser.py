import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, CorruptDataError
from lwd_model.normaliser import CLIP, STD_FLOOR, Normaliser


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.floats(-100, 100), st.floats(0.05, 20))
def test_fit_equals_numpy_on_everything_at_once(seed, mean, std):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(mean, std, (n, 3)).astype(np.float32) for n in (1, 7, 40)]
    fitted, data = Normaliser.fit(parts), np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(fitted.mean, data.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fitted.std, np.maximum(data.std(0), STD_FLOOR), rtol=1e-4)


def test_a_constant_entry_gets_the_floor_and_outliers_are_clipped():
    data = np.tile(np.array([[3.0, 0.0]], np.float32), (10, 1))
    fitted = Normaliser.fit([data])
    assert fitted.std.tolist() == pytest.approx([STD_FLOOR] * 2)
    assert fitted(np.array([[3.0, 1.0]], np.float32)).tolist() == [[0.0, CLIP]]


def test_no_data_and_bad_data_are_refused():
    with pytest.raises(ConfigError, match="no observations"):
        Normaliser.fit([])
    with pytest.raises(CorruptDataError, match="finite"):
        Normaliser.fit([np.array([[np.nan]], np.float32)])


def test_digest_follows_the_content():
    one = Normaliser(np.zeros(2, np.float32), np.ones(2, np.float32))
    assert one.digest == Normaliser(np.zeros(2, np.float32), np.ones(2, np.float32)).digest
    assert one.digest != Normaliser(np.zeros(2, np.float32), np.full(2, 2, np.float32)).digest
