"""Mixed work on a virtual clock: the comparison is fair, and request batching is what it says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.saturation import StepTimeTable
from engine.scheduler import Batch, Ready, TickPolicy
from loadtests.mixed import MEAN_ROWS, PipelineCalls, Summary, WholeRequests, arrivals
from loadtests.simulate_mixed import LANE, compare, play

FLAT = {1: 0.010, 2: 0.010, 4: 0.011, 8: 0.012, 16: 0.016, 32: 0.030}
"""A device that batching pays on: B* is 16 rows."""


def times_of(seconds: dict[int, float]) -> StepTimeTable:
    times = StepTimeTable()
    times.set(LANE, seconds)
    return times


class Watched:
    """Notes what a policy picked."""

    def __init__(self, policy: TickPolicy) -> None:
        self.batches: list[Batch] = []
        pick = policy.pick

        def watched(ready: Sequence[Ready], now_s: float) -> Batch | None:
            batch = pick(ready, now_s)
            assert batch is not None
            self.batches.append(batch)
            return batch

        policy.pick = watched  # type: ignore[method-assign]


class Open(TickPolicy):
    """One without slots, so that a test can watch it."""


def test_every_request_takes_its_steps_and_no_time_is_lost() -> None:
    times = times_of(FLAT)
    trace = arrivals(40, 5.0, seed=1)
    policy = Open(times)
    watched = Watched(policy)
    latency_s, ticks = play(trace, policy, times)
    taken = [id_ for batch in watched.batches for id_ in batch.ids]
    assert {a.id: taken.count(a.id) for a in trace} == {a.id: a.request.steps for a in trace}
    assert ticks == len(watched.batches)
    for arrival in trace:
        assert latency_s[arrival.id] >= arrival.request.steps * FLAT[1] - 1e-9


def test_a_lone_request_takes_its_own_time_under_every_policy() -> None:
    times = times_of(FLAT)
    trace = arrivals(1, 1.0, seed=3)
    alone_s = trace[0].request.steps * FLAT[trace[0].rows]
    for policy in (TickPolicy(times), WholeRequests(times)):
        latency_s, _ = play(trace, policy, times)
        assert latency_s[trace[0].id] == pytest.approx(alone_s)


def test_nobody_joins_a_batch_of_whole_requests() -> None:
    times = times_of(FLAT)
    trace = arrivals(40, 30.0, seed=2)
    policy = WholeRequests(times)
    watched = Watched(policy)
    play(trace, policy, times)
    members: set[str] = set()
    for batch in watched.batches:
        if members & set(batch.ids):
            assert set(batch.ids) <= members
        members = set(batch.ids)
    assert max(batch.rows for batch in watched.batches) > 8


def test_a_pipeline_call_holds_one_kind() -> None:
    times = times_of(FLAT)
    trace = arrivals(300, 1000.0, seed=2)
    kinds = {arrival.id: arrival.kind for arrival in trace}
    policy = PipelineCalls(times, kinds)
    watched = Watched(policy)
    play(trace, policy, times)
    assert all(len({kinds[id_] for id_ in batch.ids}) == 1 for batch in watched.batches)
    assert max(len(batch.ids) for batch in watched.batches) > 1


def test_a_warm_up_request_that_is_not_of_the_trace_is_served_too() -> None:
    times = times_of(FLAT)
    trace = arrivals(1, 1.0, seed=3)
    latency_s, _ = play(trace, PipelineCalls(times, {}), times)
    assert set(latency_s) == {trace[0].id}


def test_the_mean_work_is_that_of_the_traces() -> None:
    trace = arrivals(4000, 1.0, seed=0)
    rows = sum(arrival.rows * arrival.request.steps for arrival in trace) / len(trace)
    assert rows == pytest.approx(MEAN_ROWS, rel=0.03)
    assert trace[-1].at_s == pytest.approx(4000, rel=0.05)


def test_where_batching_pays_steps_beat_whole_requests() -> None:
    results = compare(FLAT, load=0.8, requests=150, seeds=range(3))
    assert results["steps"].p95_s < 0.75 * results["whole requests"].p95_s
    assert results["steps"].p95_s < 0.25 * results["pipeline calls"].p95_s
    assert results["steps"].p50_s <= results["steps, oldest first"].p50_s


def test_a_summary_counts_slowdown_against_running_alone() -> None:
    trace = arrivals(20, 1.0, seed=0)
    seconds = {1: 0.01, 2: 0.02}
    latency_s = {a.id: 3.0 * a.request.steps * seconds[a.rows] for a in trace}
    summary = Summary.of(trace, latency_s, seconds)
    assert summary.long_slowdown == pytest.approx(3.0)
    assert summary.worst_slowdown == pytest.approx(3.0)
    assert Summary.mean([summary, summary]) == summary
