"""Learning rates at every turn of a run."""

import numpy as np
import pytest

from train.schedules import learning_rate
from zaya_jax import ConfigError

PEAK = 0.5


def rates(kind: str, *steps: int, **settings) -> list[float]:
    schedule = learning_rate(kind, PEAK, 100, **settings)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_warm_up_rises_by_equal_steps_from_the_first_share_to_the_peak(kind):
    got = rates(kind, *range(11), warmup_steps=10)
    np.testing.assert_allclose(got, PEAK * np.arange(1, 12) / 11, rtol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_without_warm_up_the_first_rate_is_the_peak(kind):
    assert rates(kind, 0) == [PEAK]


def test_cosine_falls_from_the_peak_through_the_mean_to_the_end_and_stays():
    got = rates("cosine", 20, 40, 60, 80, 100, 101, 1000, warmup_steps=20, final_ratio=0.2)
    half = np.cos(np.pi / 4)
    shares = [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0, 0, 0]
    np.testing.assert_allclose(got, [PEAK * (0.2 + 0.8 * s) for s in shares], rtol=1e-5)


def test_wsd_stays_at_the_peak_and_falls_linearly_at_the_end():
    settings = {"warmup_steps": 20, "final_ratio": 0.2, "decay_fraction": 0.4}
    got = rates("wsd", 20, 40, 60, 80, 100, 101, 1000, **settings)
    np.testing.assert_allclose(got, [PEAK * s for s in (1, 1, 1, 0.6, 0.2, 0.2, 0.2)], rtol=1e-5)


def test_constant_stays():
    assert rates("constant", 10, 50, 100, 1000, warmup_steps=10, final_ratio=0.1) == [PEAK] * 4


def test_phases_that_do_not_fit_into_the_run_are_refused():
    with pytest.raises(ConfigError, match="warmup_steps 101 exceeds the run's 100 steps"):
        learning_rate("cosine", PEAK, 100, warmup_steps=101)
    with pytest.raises(ConfigError, match=r"warmup_steps 80 and decay_fraction 0\.5"):
        learning_rate("wsd", PEAK, 100, warmup_steps=80, decay_fraction=0.5)
    with pytest.raises(ConfigError, match="schedule 'linear' is unknown: one of constant, cosine"):
        learning_rate("linear", PEAK, 100)
    assert float(learning_rate("cosine", PEAK, 100, warmup_steps=100)(100)) == PEAK
