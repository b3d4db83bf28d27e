"""Step times and B*."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import OutOfMemoryError
from engine.saturation import (
    StepTimeFile,
    StepTimeTable,
    brought_up_to_date,
    lane_name,
    measure,
    saturation_rows,
)
from engine.trajectory import LaneKey
from tests.fake_clock import FakeClock


def test_saturation_is_the_smallest_batch_close_to_the_best_throughput() -> None:
    # 100, 160, 192, 200 rows a second: 4 is within 5 % of the best, 2 is not
    assert saturation_rows({1: 0.01, 2: 0.0125, 4: 4 / 192, 8: 0.04}) == 4


def test_a_device_that_gains_nothing_from_batching_saturates_at_one() -> None:
    assert saturation_rows({1: 0.1, 2: 0.2, 4: 0.4}) == 1


def test_times_between_and_beyond_what_was_measured() -> None:
    times = StepTimeTable(default_tick_s=0.7, default_rows=3)
    assert times.tick_s("lane", 5) == 0.7
    assert times.saturation_rows("lane") == 3
    times.set("lane", {2: 0.2, 4: 0.3})
    assert times.tick_s("lane", 1) == 0.2
    assert times.tick_s("lane", 3) == pytest.approx(0.25)
    assert times.tick_s("lane", 8) == pytest.approx(0.6)


def test_ticks_correct_the_table_and_leave_the_saturation_batch() -> None:
    times = StepTimeTable()
    times.set("lane", {1: 0.1, 2: 0.11})
    for _ in range(100):
        times.observe("lane", 1, 0.3)
    assert times.tick_s("lane", 1) == pytest.approx(0.3, rel=0.01)
    assert times.saturation_rows("lane") == 2
    times.observe("new", 4, 0.5)
    assert times.tick_s("new", 4) == 0.5


def test_measuring_takes_medians_and_stops_past_saturation() -> None:
    clock = FakeClock()
    runs: list[int] = []

    def tick(rows: int) -> None:
        runs.append(rows)
        clock.tick(0.01 * max(rows, 4) * (5.0 if len(runs) == 3 else 1.0))  # one outlier

    table = measure(tick, clock, rows=(1, 2, 4, 8, 16, 32), repeats=3)
    assert table == {rows: pytest.approx(0.01 * max(rows, 4)) for rows in (1, 2, 4, 8, 16)}
    assert saturation_rows(table) == 4


def test_one_batch_that_met_other_work_does_not_end_the_measuring() -> None:
    clock = FakeClock()
    table = measure(lambda rows: clock.tick(0.1 if rows == 4 else 0.01), clock)
    assert set(table) == {1, 2, 4, 8, 16, 32}
    assert saturation_rows(table) == 32


@pytest.mark.parametrize(
    ("kept", "star"),
    [
        pytest.param({1: 0.01, 2: 0.0101, 4: 0.02, 8: 0.04}, 2, id="as measured"),
        pytest.param({1: 0.005, 2: 0.005, 4: 0.01, 8: 0.02}, 2, id="busy now: the old one counts"),
        pytest.param({1: 0.05, 2: 0.3, 4: 0.4}, 2, id="busy then"),
        pytest.param({1: 0.01, 2: 0.03}, 2, id="busy then, at one batch"),
    ],
)
def test_a_kept_table_is_measured_anew_where_the_machine_is_faster(
    kept: dict[int, float], star: int
) -> None:
    clock = FakeClock()
    real = {1: 0.01, 2: 0.0101, 4: 0.02, 8: 0.04, 16: 0.08, 32: 0.16}
    found = brought_up_to_date(kept, lambda rows: clock.tick(real[rows]), clock)
    assert saturation_rows(found) == star
    assert all(found[rows] <= seconds + 1e-9 for rows, seconds in kept.items())


def test_a_batch_never_passes_what_the_graphs_take() -> None:
    times = StepTimeTable(default_rows=8)
    assert times.most_rows("lane") is None
    times.bound("lane", 4)
    assert times.most_rows("lane") == times.saturation_rows("lane") == 4
    times.set("lane", {1: 0.1, 8: 0.1})
    assert times.saturation_rows("lane") == 4
    times.set("lane", {1: 0.1, 2: 0.2})
    assert times.saturation_rows("lane") == 1


def test_running_out_of_memory_halves_the_batch_for_a_while() -> None:
    times = StepTimeTable()
    times.set("lane", {1: 0.1, 8: 0.2, 16: 0.3})
    times.out_of_memory("lane", 16)
    times.out_of_memory("lane", 8)
    assert times.saturation_rows("lane") == times.most_rows("lane") == 4
    for _ in range(1000):
        times.observe("lane", 4, 0.15)
    assert times.most_rows("lane") == 8
    times.out_of_memory("lane", 1)
    assert times.most_rows("lane") == 1


def test_the_lane_longest_unused_is_forgotten() -> None:
    times = StepTimeTable(max_lanes=2)
    for lane in ("a", "b"):
        times.observe(lane, 1, 0.5)
    times.observe("a", 1, 0.5)
    times.observe("c", 1, 0.5)
    assert times.get("b") == {}
    assert times.get("a") == times.get("c") == {1: 0.5}


def test_measuring_stops_at_the_graphs_bound_and_at_the_end_of_memory() -> None:
    clock = FakeClock()

    def tick(rows: int) -> None:
        if rows > 4:
            raise OutOfMemoryError("full")
        clock.tick(0.01)

    assert set(measure(tick, clock, most=2)) == {1, 2}
    assert set(measure(tick, clock)) == {1, 2, 4}
    with pytest.raises(OutOfMemoryError):
        measure(tick, clock, rows=(8,))


def test_measurements_are_kept_per_device_and_a_broken_file_is_none(tmp_path: Path) -> None:
    kept = StepTimeFile(tmp_path / "timings", "cpu-a")
    assert kept.read() == {}
    lane = lane_name(LaneKey("plan", (4, 16, 16), tokens=32))
    kept.write({lane: {1: 0.1, 2: 0.15}})
    assert StepTimeFile(tmp_path / "timings", "cpu-a").read() == {lane: {1: 0.1, 2: 0.15}}
    assert StepTimeFile(tmp_path / "timings", "cpu-b").read() == {}
    (tmp_path / "timings" / "cpu-a.json").write_text("[]")
    assert kept.read() == {}
