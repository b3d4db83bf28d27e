"""Token buckets on a clock that the test moves."""

from __future__ import annotations

import pytest

from server.errors import RateLimitedError
from server.rate_limit import RateLimiter
from tests.fake_clock import FakeClock


def test_a_minutes_worth_at_once_then_an_even_refill() -> None:
    clock = FakeClock()
    limiter = RateLimiter(clock)
    for _ in range(6):
        limiter.take("k", 6)
    with pytest.raises(RateLimitedError, match="6 requests a minute") as caught:
        limiter.take("k", 6)
    assert caught.value.retry_after_s == pytest.approx(10.0)
    clock.tick(9.0)
    with pytest.raises(RateLimitedError) as caught:
        limiter.take("k", 6)
    assert caught.value.retry_after_s == pytest.approx(1.0)  # a refused request costs nothing
    clock.tick(1.0)
    limiter.take("k", 6)


def test_idle_time_never_saves_up_more_than_a_minute() -> None:
    clock = FakeClock()
    limiter = RateLimiter(clock)
    limiter.take("k", 2)
    clock.tick(3600.0)
    limiter.take("k", 2)
    limiter.take("k", 2)
    with pytest.raises(RateLimitedError):
        limiter.take("k", 2)


def test_keys_do_not_share_and_no_limit_is_no_bucket() -> None:
    limiter = RateLimiter(FakeClock())
    limiter.take("a", 1)
    limiter.take("b", 1)
    for _ in range(1000):
        limiter.take("c", None)
    assert len(limiter) == 2


def test_a_rate_below_one_a_minute_lets_one_through() -> None:
    clock = FakeClock()
    limiter = RateLimiter(clock)
    limiter.take("k", 0.5)
    with pytest.raises(RateLimitedError) as caught:
        limiter.take("k", 0.5)
    assert caught.value.retry_after_s == pytest.approx(120.0)


def test_memory_is_bounded_and_the_idlest_key_is_forgotten() -> None:
    limiter = RateLimiter(FakeClock(), max_keys=2)
    for key in ("a", "b", "a", "c"):
        limiter.take(key, 2)
    assert len(limiter) == 2
    with pytest.raises(RateLimitedError):
        limiter.take("a", 2)  # still counted: "b" was the idlest
