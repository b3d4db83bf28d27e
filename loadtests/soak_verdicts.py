"""Pass or fail of a soak: bounds in a file, held against what was sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from loadtests.soak_samples import ProcessSample, Sample
from loadtests.soak_stats import Slope, slope

DEFAULT = Path(__file__).parent / "soak_thresholds.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """See ``soak_thresholds.yaml``."""

    slope_mb_per_hour: float
    uncertainty_mb_per_hour: float
    more_open_files: float
    more_threads: float
    more_of_a_gauge: float
    error_share: float

    @classmethod
    def read(cls, path: Path) -> Bounds:
        """Read a file that has exactly these keys.

        Raises:
            ValueError: a key is missing, unknown, or no number.
        """
        content = yaml.safe_load(path.read_text())
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"{path}: the keys are {', '.join(sorted(names))}")
        if wrong := [name for name, value in content.items() if not isinstance(value, int | float)]:
            raise ValueError(f"{path}: {wrong[0]} is no number")
        return cls(**content)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessReport:
    """One process over the soak.

    Attributes:
        growth: of its memory after the warm-up; None where it did not live long enough.
    """

    name: str
    before: ProcessSample
    after: ProcessSample
    growth: Slope | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a soak came to.

    Attributes:
        gone: processes that were there before the load and not after it.
        gauges: by name, before and after.
    """

    processes: Sequence[ProcessReport]
    gone: Sequence[str]
    gauges: Mapping[str, tuple[float, float]]
    error_share: float


def findings(
    before: Sample, during: Sequence[Sample], after: Sample, *, warm_up_s: float, error_share: float
) -> Findings:
    """Put together what was sampled; ``warm_up_s`` counts from the first sample of ``during``."""
    first = {process.name: process for process in before.processes}
    last = {process.name: process for process in after.processes}
    from_s = during[0].at_s + warm_up_s if during else 0.0
    series: dict[str, list[tuple[float, float]]] = {}
    for sample in during:
        if sample.at_s >= from_s:
            for process in sample.processes:
                series.setdefault(process.name, []).append((process.at_s, process.memory_mb))
    return Findings(
        processes=[
            ProcessReport(
                name=name,
                before=first.get(name, process),
                after=process,
                growth=slope(series.get(name, [])),
            )
            for name, process in last.items()
        ],
        gone=[name for name in first if name not in last],
        gauges={
            name: (before.gauges[name], after.gauges[name])
            for name in before.gauges
            if name in after.gauges
        },
        error_share=error_share,
    )


def failures(found: Findings, bounds: Bounds) -> Iterator[str]:
    """A line for each bound that is missed."""
    for process in found.processes:
        yield from _of_process(process, bounds)
    for name in found.gone:
        yield f"{name} has ended under load"
    if not found.gauges:
        yield "the service's gauges could not be read before or after the load"
    for name, (before, after) in found.gauges.items():
        if after - before > bounds.more_of_a_gauge:
            yield f"{name}: {before:g} before and {after:g} after the load"
    if not found.error_share <= bounds.error_share:
        yield f"{found.error_share:.2%} of the requests failed"


def _of_process(process: ProcessReport, bounds: Bounds) -> Iterator[str]:
    growth = process.growth
    if growth is None:
        yield f"{process.name}: too few samples after the warm-up for a slope"
    elif growth.low > bounds.slope_mb_per_hour:
        yield f"{process.name}: memory grows by {growth.per_hour:.1f} MB an hour"
    elif growth.uncertainty > bounds.uncertainty_mb_per_hour:
        yield f"{process.name}: memory moves too much for a slope; soak longer"
    for what, more, most in (
        (
            "open files",
            process.after.open_files - process.before.open_files,
            bounds.more_open_files,
        ),
        ("threads", process.after.threads - process.before.threads, bounds.more_threads),
    ):
        if more > most:
            yield f"{process.name}: {more} {what} more than before the load"
