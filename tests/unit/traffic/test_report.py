from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loadtests.traffic import report, thresholds
from loadtests.traffic.scrape import sum_samples
from loadtests.traffic.stats import quantile, windows


def line(level: float, at_s: float, total_s: float, outcome: str = "ok") -> dict[str, Any]:
    return {
        "kind": "generation",
        "at_s": at_s,
        "prompt": "a <b>cat</b>",
        "steps": 20,
        "outcome": outcome,
        "late_s": 0.001,
        "total_s": total_s,
        "first_preview_s": None,
        "phases_s": {"queue": 0.1, "denoise": total_s - 0.1} if outcome == "ok" else {},
        "level": level,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [line(0.3, i, 0.5) for i in range(19)] + [line(0.3, 19, 3.0)]
    lines += [line(1.1, i, 1.0) for i in range(10)]
    lines += [line(1.1, i, 0.01, "overloaded") for i in range(8)]
    lines += [line(1.1, i, 0.01, "internal_error") for i in range(2)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = [
        {"darkroom_tick_rows_sum": 10.0 * i * i, "darkroom_tick_rows_count": 10.0 * i}
        for i in range(4)
    ]
    scrapes = [{"at_s": 5.0 * i, "samples": sample} for i, sample in enumerate(samples)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, scrapes)))
    about = {
        "command": "python -m loadtests.traffic.run",
        "capacity_per_s": 5.0,
        "arrivals": "poisson",
        "duration_s": 20.0,
        "seed": 1,
        "driver_cpu_share": 0.1,
        "machine": {"processor": "a <fast> one"},
    }
    (tmp_path / "run.json").write_text(json.dumps(about))
    Image.new("RGB", (128, 128), (200, 10, 10)).save(tmp_path / "picture-0.3-4.png")
    return tmp_path


def test_bounds_are_held_against_their_own_level(run: Path, tmp_path: Path) -> None:
    bounds = tmp_path / "bounds.yaml"
    bounds.write_text("levels: {0.3: {p95_s: 0.6, error_share: 0.0}, 1.1: {error_share: 0.0}}")
    verdicts = thresholds.judge(bounds, run)

    assert [v.held for v in verdicts] == [True, True, False]
    assert verdicts[2].measured == pytest.approx(0.1)  # refusals are answers, two failures are not


def test_an_unknown_measure_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    bounds = tmp_path / "bounds.yaml"
    bounds.write_text("levels: {0.3: {p95: 0.6}}")

    with pytest.raises(ValueError, match="'p95' is no measure; known: p50_s"):
        thresholds.judge(bounds, run)


def test_the_shipped_bounds_can_be_read(run: Path) -> None:
    assert {v.level for v in thresholds.judge(thresholds.DEFAULT, run)} == {0.3, 1.1}


def test_the_report_is_one_page_with_charts_and_pictures(run: Path) -> None:
    page = report.write(run, thresholds.judge(thresholds.DEFAULT, run)).read_text()

    assert page.count("<svg") >= 5
    assert "data:image/webp;base64," in page
    assert "a &lt;fast&gt; one" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert "class=miss" in page


def test_two_runs_stand_side_by_side(run: Path) -> None:
    page = report.compare(run, run).read_text()

    assert page.count("<h2>" + run.name) == 2


def test_quantiles_are_of_the_sample_itself() -> None:
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2, 3, 4], 0.95) == 4
    assert math.isnan(quantile([], 0.5))


def test_windows_gather_what_falls_into_them() -> None:
    assert windows([(0, 1), (9.9, 2), (10, 3)], 10) == [(5.0, [1, 2]), (15.0, [3])]


def test_samples_are_summed_over_labels_but_kept_by_bucket() -> None:
    text = """# TYPE darkroom_tick_rows histogram
darkroom_tick_rows_bucket{replica="a",le="2.0"} 1
darkroom_tick_rows_bucket{replica="b",le="2.0"} 2
darkroom_tick_rows_sum{replica="a"} 3
darkroom_tick_rows_count{replica="a"} 2
# TYPE python_info gauge
python_info 1
"""
    assert sum_samples(text) == {
        "darkroom_tick_rows_bucket|2.0": 3.0,
        "darkroom_tick_rows_sum": 3.0,
        "darkroom_tick_rows_count": 2.0,
    }
