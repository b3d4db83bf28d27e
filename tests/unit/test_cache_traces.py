"""Traces have the structure that they claim."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cache.traces import TraceConfig, Vocabulary, make_trace, reuse_within
from engine.errors import InvalidRequestError

WORDS = Vocabulary(tuple(f"a thing{i}" for i in range(300)), ("red", "blue"), ("flat", "glossy"))


def test_the_same_config_gives_the_same_trace_in_order() -> None:
    config = TraceConfig(requests=200)
    trace = make_trace(WORDS, config)
    assert trace == make_trace(WORDS, config)
    assert trace != make_trace(WORDS, TraceConfig(requests=200, seed=1))
    assert len(trace) == 200
    assert all(before.at_s <= after.at_s for before, after in pairwise(trace))


def test_popularity_follows_the_exponent() -> None:
    """The slope of log frequency over log rank, among the popular ones."""
    for exponent in (0.6, 1.0):
        config = TraceConfig(requests=40_000, zipf=exponent, drift_per_hour=0.0)
        subjects = Counter(
            {
                a.session: a.prompt.split(" on ")[0] for a in reversed(make_trace(WORDS, config))
            }.values()
        )
        counts = np.sort(np.asarray(list(subjects.values())))[::-1][:30]
        slope = np.polyfit(np.log(np.arange(1, 31)), np.log(counts), 1)[0]
        assert slope == pytest.approx(-exponent, abs=0.15)


def test_sessions_edit_one_part_at_a_time() -> None:
    trace = make_trace(WORDS, TraceConfig(requests=5000, prompts_per_session=4.0))
    sessions: dict[int, list[str]] = {}
    for arrival in trace:
        sessions.setdefault(arrival.session, []).append(arrival.prompt)
    edits = [(a, b) for prompts in sessions.values() for a, b in pairwise(prompts) if a != b]
    assert len(edits) > 500
    for before, after in edits:
        changed = sum(_parts(before)[i] != _parts(after)[i] for i in range(4))
        assert changed == 1
    assert np.mean([len(prompts) for prompts in sessions.values()]) == pytest.approx(8.0, rel=0.15)


def _parts(prompt: str) -> tuple[str, str, str, str]:
    rest, _, style = prompt.partition(", ")
    rest, _, background = rest.partition(" on a ")
    subject, _, companion = rest.partition(" next to ")
    return subject, companion, background, style


def test_reuse_is_mostly_recent() -> None:
    trace = make_trace(WORDS, TraceConfig(requests=5000))
    assert 0.5 < reuse_within(trace, 3600.0) <= 1.0
    assert reuse_within(trace, 1e9) == 1.0


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"drift_per_hour": 2.0}, {"zipf": -1.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError):
        TraceConfig(**{"requests": 1, **wrong})  # type: ignore[arg-type]
