"""What a soak makes of its samples."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from loadtests import soak_report
from loadtests.soak_samples import ProcessSample, Sample, read_samples
from loadtests.soak_stats import slope, student_t
from loadtests.soak_verdicts import DEFAULT, Bounds, failures, findings

BOUNDS = Bounds.read(DEFAULT)


def noisy(
    per_hour: float, *, minutes: float = 25, noise: float = 3.0, seed: int = 1
) -> list[tuple[float, float]]:
    """A memory that grows by so much, read every five seconds, each reading like the one before."""
    random_ = random.Random(seed)
    points, drift = [], 0.0
    for number in range(int(minutes * 12)):
        drift = 0.9 * drift + random_.gauss(0, noise * 0.4)
        points.append((number * 5.0, 500 + per_hour * number * 5 / 3600 + drift))
    return points


@pytest.mark.parametrize(
    ("degrees", "expected"), [(4, 2.776), (8, 2.306), (18, 2.101), (28, 2.048), (100, 1.984)]
)
def test_students_t_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, abs=2e-3)


def test_a_straight_line_has_its_slope_and_no_doubt() -> None:
    found = slope([(at_s, 100 + 36 * at_s / 3600) for at_s in range(0, 1500, 5)])

    assert found is not None
    assert found.per_hour == pytest.approx(36)
    assert found.uncertainty == pytest.approx(0, abs=1e-6)


def test_the_interval_holds_the_truth_about_as_often_as_it_claims() -> None:
    held = 0
    for seed in range(200):
        found = slope(noisy(30.0, seed=seed))
        assert found is not None
        held += found.low <= 30.0 <= found.high

    assert held >= 170  # 95 % of 200, less what is left of the readings' likeness


def test_too_few_points_have_no_slope() -> None:
    assert slope([]) is None
    assert slope([(0.0, 1.0), (5.0, 2.0), (10.0, 3.0)]) is None
    assert slope([(1.0, 1.0)] * 10) is None


# ------------------------------------------------------------------------------------ verdicts


def process(at_s: float, memory_mb: float, name: str = "worker 7") -> ProcessSample:
    return ProcessSample(at_s=at_s, name=name, memory_mb=memory_mb, open_files=40, threads=12)


def sample(at_s: float, *processes: ProcessSample, jobs: float = 0.0) -> Sample:
    return Sample(at_s=at_s, processes=processes, gauges={"darkroom_jobs": jobs})


def missed(
    per_hour: float = 0.0,
    *,
    after: ProcessSample | None = None,
    jobs: float = 0.0,
    error_share: float = 0.0,
) -> list[str]:
    """The bounds that a soak misses, whose worker's memory grows by ``per_hour``."""
    during = [sample(at_s, process(at_s, mb)) for at_s, mb in noisy(per_hour)]
    end = sample(1600.0, *([process(1600.0, 500.0)] if after is None else [after]), jobs=jobs)
    found = findings(
        sample(-20.0, process(-20.0, 500.0)),
        during,
        end,
        warm_up_s=60.0,
        error_share=error_share,
    )
    return list(failures(found, BOUNDS))


def test_flat_memory_and_nothing_left_over_passes() -> None:
    assert missed() == []


def test_a_leak_is_found_and_named() -> None:
    (line,) = missed(200.0)
    assert "worker 7" in line
    assert "grows" in line


def test_memory_that_moves_too_much_is_not_called_flat() -> None:
    waves = [
        sample(at_s, process(at_s, 500.0 + 400.0 * math.sin(at_s / 60)))
        for at_s in range(0, 1500, 5)
    ]
    found = findings(waves[0], waves, waves[-1], warm_up_s=0.0, error_share=0.0)

    (line,) = failures(found, BOUNDS)

    assert "soak longer" in line


def test_what_is_left_over_is_named() -> None:
    after = replace(process(1600.0, 500.0), open_files=60, threads=30)

    lines = missed(after=after, jobs=5.0, error_share=0.25)

    assert lines == [
        "worker 7: 20 open files more than before the load",
        "worker 7: 18 threads more than before the load",
        "darkroom_jobs: 0 before and 5 after the load",
        "25.00% of the requests failed",
    ]


def test_a_process_that_was_replaced_does_not_pass() -> None:
    lines = missed(after=process(1600.0, 500.0, name="worker 8"))

    assert "worker 7 has ended under load" in lines
    assert any(line.startswith("worker 8: too few samples") for line in lines)


def test_the_warm_up_is_not_in_the_slope() -> None:
    growing = [(5.0 * i, 100.0 + 2 * i) for i in range(60)]  # five minutes, 1.4 GB an hour
    flat = [(300.0 + 5 * i, 220.0) for i in range(240)]
    during = [sample(at_s, process(at_s, mb)) for at_s, mb in growing + flat]

    found = findings(during[0], during, during[-1], warm_up_s=300.0, error_share=0.0)

    growth = found.processes[0].growth
    assert growth is not None
    assert growth.per_hour == pytest.approx(0)


def test_gauges_that_nobody_answered_for_do_not_pass() -> None:
    silent = replace(sample(0.0, process(0.0, 1.0)), gauges={})
    found = findings(silent, [silent], silent, warm_up_s=0.0, error_share=0.0)

    assert "the service's gauges could not be read before or after the load" in list(
        failures(found, BOUNDS)
    )


@pytest.mark.parametrize("text", ["", "slope_mb_per_hour: 1", "unknown: 2"])
def test_a_file_of_bounds_has_exactly_its_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bounds.yaml"
    path.write_text(text)

    with pytest.raises(ValueError, match="the keys are"):
        Bounds.read(path)


def test_the_report_has_every_process_and_a_chart(tmp_path: Path) -> None:
    during = [
        sample(at_s, process(at_s, mb), process(at_s, mb / 2, name="gateway 3"))
        for at_s, mb in noisy(10.0)
    ]
    lines = tmp_path / "samples.jsonl"
    lines.write_text("\n".join(item.line() for item in during))
    assert read_samples(lines) == [replace(item, processes=list(item.processes)) for item in during]
    found = findings(during[0], during, during[-1], warm_up_s=60.0, error_share=0.0)

    table = soak_report.table(found)
    soak_report.chart(during, 60.0, tmp_path / "soak.png")

    assert table.index("| gateway 3 |") < table.index("| worker 7 |")
    assert "| `darkroom_jobs` | 0 | 0 |" in table
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
