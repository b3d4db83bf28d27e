from __future__ import annotations

import itertools
import statistics

import pytest

from loadtests.traffic.arrivals import SHAPES, Bursts, Day, Steady, arrival_times_s

DURATION_S = 4000.0


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_mean_rate_asked_for(shape: str) -> None:
    times_s = list(arrival_times_s(SHAPES[shape](2.0, DURATION_S), DURATION_S, seed=3))

    assert len(times_s) / DURATION_S == pytest.approx(2.0, rel=0.05)
    assert times_s == sorted(times_s)
    assert times_s[0] >= 0
    assert times_s[-1] < DURATION_S


def test_steady_arrivals_are_a_poisson_process() -> None:
    times_s = list(arrival_times_s(Steady(5.0), DURATION_S, seed=1))
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]

    # Exponential gaps: the standard deviation equals the mean.
    assert statistics.stdev(gaps_s) == pytest.approx(statistics.mean(gaps_s), rel=0.05)


def test_a_seed_gives_the_same_arrivals_again() -> None:
    first = list(arrival_times_s(Steady(1.0), 100, seed=7))

    assert first == list(arrival_times_s(Steady(1.0), 100, seed=7))
    assert first != list(arrival_times_s(Steady(1.0), 100, seed=8))


def test_bursts_are_as_much_denser_as_they_say() -> None:
    rate = Bursts(2.0, factor=5.0, burst_s=10.0, every_s=60.0)
    times_s = list(arrival_times_s(rate, 60_000, seed=2))
    inside = sum(at_s % 60 >= 50 for at_s in times_s)

    assert (inside / 10) / ((len(times_s) - inside) / 50) == pytest.approx(5.0, rel=0.1)


def test_a_day_is_quiet_at_night_and_busy_at_noon() -> None:
    day = Day(mean_per_s=1.0, duration_s=240.0, swing=0.5)

    assert day.per_s(0) == pytest.approx(0.5)
    assert day.per_s(120) == pytest.approx(1.5)


def test_no_rate_means_no_arrivals() -> None:
    assert list(arrival_times_s(Steady(0.0), 10, seed=1)) == []
