"""The charts of a report, each as an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.traffic.client import PHASES
from loadtests.traffic.stats import quantile, windows

Line = Mapping[str, Any]
QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))

mpl.rcParams["svg.hashsalt"] = "darkroom"  # the same figures give the same file
mpl.rcParams["svg.fonttype"] = "none"  # text as text: a third of the size, and it can be searched


def latency_against_rate(
    levels: Mapping[float, Sequence[Line]], per_s: Mapping[float, float]
) -> str:
    """Latency quantiles of finished requests over the rate offered."""

    def draw(axes: Axes) -> None:
        rates = [per_s[level] for level in levels]
        for share, name in QUANTILES:
            values = [
                quantile([line["total_s"] for line in lines], share) for lines in levels.values()
            ]
            axes.plot(rates, values, marker="o", label=name)
        axes.set(xlabel="requests a second offered", ylabel="seconds", ylim=(0, None))
        axes.legend()

    return _svg(draw)


def percentiles_over_time(lines: Sequence[Line], width_s: float) -> str:
    """Latency quantiles in windows of the run."""

    def draw(axes: Axes) -> None:
        gathered = windows([(line["at_s"], line["total_s"]) for line in lines], width_s)
        for share, name in QUANTILES[:2]:
            axes.plot(
                [at for at, _ in gathered], [quantile(v, share) for _, v in gathered], label=name
            )
        axes.set(xlabel="seconds into the level", ylabel="seconds", ylim=(0, None))
        axes.legend()

    return _svg(draw)


def phases(levels: Mapping[float, Sequence[Line]]) -> str:
    """Where the time went, by the server's own timings: medians, stacked."""

    def draw(axes: Axes) -> None:
        bottoms = [0.0] * len(levels)
        names = [f"{level:g}" for level in levels]
        for phase in PHASES:
            heights = [
                _zero(
                    quantile(
                        [line["phases_s"].get(phase, 0.0) for line in lines if line["phases_s"]],
                        0.5,
                    )
                )
                for lines in levels.values()
            ]
            axes.bar(names, heights, bottom=bottoms, label=phase)
            bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
        axes.set(xlabel="times capacity", ylabel="seconds (median)")
        axes.legend()

    return _svg(draw)


def outcomes(levels: Mapping[float, Sequence[Line]]) -> str:
    """How requests ended, as shares."""

    def draw(axes: Axes) -> None:
        kinds = sorted({line["outcome"] for lines in levels.values() for line in lines})
        bottoms = [0.0] * len(levels)
        names = [f"{level:g}" for level in levels]
        for kind in kinds:
            heights = [
                sum(line["outcome"] == kind for line in lines) / max(1, len(lines))
                for lines in levels.values()
            ]
            axes.bar(names, heights, bottom=bottoms, label=kind)
            bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
        axes.set(xlabel="times capacity", ylabel="share of requests", ylim=(0, 1))
        axes.legend(fontsize="small")

    return _svg(draw)


def over_time(points: Mapping[str, Sequence[tuple[float, float]]], ylabel: str) -> str:
    """Series of the server's metrics over the whole run."""

    def draw(axes: Axes) -> None:
        for name, series in points.items():
            axes.plot([at for at, _ in series], [value for _, value in series], label=name)
        axes.set(xlabel="seconds into the run", ylabel=ylabel, ylim=(0, None))
        axes.legend()

    return _svg(draw)


def _svg(draw: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    draw(axes)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
