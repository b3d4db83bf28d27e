"""The tick policy, as a pure function of what is ready."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.scheduler import Batch, PolicyConfig, Ready, TickPolicy
from tests.unit.fakes import FixedTimes


def ready(id_: str, **changes: object) -> Ready:
    base = Ready(id=id_, lane="a", rows=1, steps_left=10, admitted_at_s=0.0)
    return replace(base, **changes)  # type: ignore[arg-type]


def pick(policy: TickPolicy, items: list[Ready], now_s: float = 0.0) -> Batch:
    batch = policy.pick(items, now_s)
    assert batch is not None
    return batch


def test_nothing_ready_is_no_batch() -> None:
    assert TickPolicy(FixedTimes()).pick([], 0.0) is None


def test_a_batch_fills_up_to_the_saturation_batch_counting_guided_members_twice() -> None:
    items = [ready(f"t{i}", rows=2, admitted_at_s=i) for i in range(6)]
    batch = pick(TickPolicy(FixedTimes(rows=8)), items)
    assert batch.ids == ("t0", "t1", "t2", "t3")
    assert batch.rows == 8


def test_a_single_member_larger_than_the_saturation_batch_still_runs() -> None:
    assert pick(TickPolicy(FixedTimes(rows=1)), [ready("t", rows=2)]).ids == ("t",)


def test_one_row_fills_the_gap_that_two_rows_leave() -> None:
    items = [
        ready("one", rows=1, admitted_at_s=0),
        ready("two", rows=2, admitted_at_s=1),
        ready("three", rows=2, admitted_at_s=2),
        ready("four", rows=1, admitted_at_s=3),
    ]
    assert pick(TickPolicy(FixedTimes(rows=4)), items).ids == ("one", "two", "four")


def test_the_nearest_deadline_goes_before_the_oldest() -> None:
    items = [ready("old"), ready("due", admitted_at_s=5.0, deadline_at_s=6.5)]
    assert pick(TickPolicy(FixedTimes(rows=1)), items, now_s=5.0).ids == ("due",)


def test_a_deadline_that_is_far_away_is_no_reason_to_overtake() -> None:
    items = [ready("old"), ready("calm", admitted_at_s=5.0, deadline_at_s=50.0)]
    assert pick(TickPolicy(FixedTimes(rows=1)), items, now_s=5.0).ids == ("old",)


def test_short_and_nearly_finished_ones_overtake_until_the_long_one_is_due() -> None:
    """A step takes 0.1 s: 50 steps are due 10 s after admission, 5 steps after 1 s."""
    policy = TickPolicy(FixedTimes(rows=1, seconds=0.1), PolicyConfig(stretch=2.0))
    long = ready("long", steps_left=50, admitted_at_s=0.0)
    assert pick(policy, [long, ready("short", steps_left=5, admitted_at_s=8.9)]).ids == ("short",)
    assert pick(policy, [long, ready("late", steps_left=5, admitted_at_s=9.1)]).ids == ("long",)


def test_without_stretch_the_oldest_goes_first() -> None:
    policy = TickPolicy(FixedTimes(rows=1), PolicyConfig(stretch=0.0))
    items = [ready("old", steps_left=50), ready("new", steps_left=1, admitted_at_s=0.1)]
    assert pick(policy, items, now_s=1.0).ids == ("old",)


def test_no_request_is_due_later_than_patience() -> None:
    policy = TickPolicy(FixedTimes(rows=1, seconds=1.0), PolicyConfig(patience_s=10.0))
    long = ready("long", steps_left=1000)
    assert pick(policy, [long, ready("short", steps_left=1, admitted_at_s=9.0)]).ids == ("long",)


def test_a_flood_of_deadlines_cannot_hold_a_patient_request_back_for_ever() -> None:
    policy = TickPolicy(FixedTimes(rows=1, seconds=0.1), PolicyConfig(patience_s=5.0))
    served_at_s = []
    for tick in range(100):
        now_s = tick * 0.1
        urgent = ready(f"u{tick}", steps_left=1, admitted_at_s=now_s, deadline_at_s=now_s + 0.15)
        if pick(policy, [ready("plain", steps_left=100), urgent], now_s).ids == ("plain",):
            served_at_s.append(now_s)
    assert served_at_s
    assert served_at_s[0] == pytest.approx(5.0, abs=0.2)


def test_a_trajectory_that_cannot_be_in_time_goes_behind_those_that_can() -> None:
    late = ready("late", deadline_at_s=5.5, steps_left=100)
    assert pick(TickPolicy(FixedTimes(rows=1)), [late, ready("old")], now_s=5.0).ids == ("old",)


def test_priority_goes_first_and_waiting_overcomes_it() -> None:
    policy = TickPolicy(FixedTimes(rows=1), PolicyConfig(priority_s=15.0))
    vip, plain = ready("vip", priority=1, admitted_at_s=10.0), ready("plain", admitted_at_s=5.0)
    assert pick(policy, [vip, plain], now_s=10.0).ids == ("vip",)
    waited = replace(vip, admitted_at_s=21.0)
    assert pick(policy, [waited, plain], now_s=21.0).ids == ("plain",)


def test_lanes_share_the_device_by_time_and_not_by_ticks() -> None:
    policy = TickPolicy(FixedTimes())
    items = [ready("a", lane="small"), ready("b", lane="large")]
    used = {"small": 0.0, "large": 0.0}
    for _ in range(300):
        batch = pick(policy, items)
        seconds = 0.1 if batch.lane == "small" else 0.5
        policy.charge(batch.lane, seconds)
        used[str(batch.lane)] += seconds
    assert used["small"] == pytest.approx(used["large"], rel=0.05)


def test_a_lane_that_comes_late_starts_level_with_the_others() -> None:
    policy = TickPolicy(FixedTimes())
    for _ in range(50):
        policy.charge(pick(policy, [ready("a", lane="old")]).lane, 1.0)
    lanes = []
    for _ in range(10):
        batch = pick(policy, [ready("a", lane="old"), ready("b", lane="new")])
        policy.charge(batch.lane, 1.0)
        lanes.append(batch.lane)
    assert lanes.count("new") == 5


def test_an_urgent_trajectory_pulls_its_lane_forward() -> None:
    policy = TickPolicy(FixedTimes(seconds=0.1))
    urgent = ready("u", lane="b", steps_left=5, deadline_at_s=0.6)
    calm = ready("c", lane="a")
    pick(policy, [urgent, calm])
    policy.charge("b", 0.5)
    assert pick(policy, [urgent, calm]).lane == "b"


def test_a_flood_of_urgent_work_cannot_starve_another_lane() -> None:
    policy = TickPolicy(FixedTimes(seconds=0.1), PolicyConfig(max_lag_s=2.0))
    served = 0
    for tick in range(200):
        now_s = tick * 0.1
        urgent = ready(f"u{tick}", lane="b", steps_left=1, deadline_at_s=now_s + 0.15)
        batch = pick(policy, [urgent, ready("c", lane="a")], now_s)
        policy.charge(batch.lane, 0.1)
        served += batch.lane == "a"
    assert served > 50


@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 50), st.floats(0, 100), st.integers(-2, 2)),
        min_size=1,
        max_size=20,
    )
)
def test_everybody_finishes(items: list[tuple[int, int, float, int]]) -> None:
    """No mix of sizes, ages and priorities starves anybody."""
    left = {f"t{i}": item for i, item in enumerate(items)}
    policy = TickPolicy(FixedTimes(rows=4))
    steps = sum(item[1] for item in items)
    for tick in range(steps + 1):
        if not left:
            break
        waiting = [
            ready(k, rows=r, steps_left=s, admitted_at_s=a, priority=p, lane=f"lane{r}")
            for k, (r, s, a, p) in left.items()
        ]
        batch = pick(policy, waiting, now_s=100.0 + tick)
        policy.charge(batch.lane, 1.0)
        for id_ in batch.ids:
            rows, remaining, age, priority = left.pop(id_)
            if remaining > 1:
                left[id_] = (rows, remaining - 1, age, priority)
    assert not left


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=2, max_size=30),
    st.floats(0, 5),
    st.integers(1, 4),
)
def test_only_what_came_before_a_request_was_due_overtakes_it(
    gaps: list[tuple[float, int]], stretch: float, rows: int
) -> None:
    times = FixedTimes(rows=rows, seconds=0.1)
    policy = TickPolicy(times, PolicyConfig(stretch=stretch))
    waiting: dict[str, Ready] = {}
    coming, at_s = [], 0.0
    for i, (gap_s, steps) in enumerate(gaps):
        at_s += gap_s
        coming.append(ready(f"t{i:02}", steps_left=steps, admitted_at_s=at_s))
    due_s = {r.id: r.admitted_at_s + stretch * r.steps_left * times.seconds for r in coming}
    admitted_s = {r.id: r.admitted_at_s for r in coming}
    now_s = 0.0
    while coming or waiting:
        now_s = max(now_s, coming[0].admitted_at_s) if not waiting else now_s
        while coming and coming[0].admitted_at_s <= now_s:
            item = coming.pop(0)
            waiting[item.id] = item
        chosen = pick(policy, list(waiting.values()), now_s).ids
        for left_out in waiting.keys() - set(chosen):
            assert all(admitted_s[id_] <= due_s[left_out] + 1e-9 for id_ in chosen)
        for id_ in chosen:
            item = waiting.pop(id_)
            if item.steps_left > 1:
                waiting[id_] = replace(item, steps_left=item.steps_left - 1)
        now_s += times.seconds


def test_a_negative_dial_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="patience_s"):
        PolicyConfig(patience_s=-1.0)


def test_the_policy_imports_no_torch() -> None:
    code = "import sys, engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
