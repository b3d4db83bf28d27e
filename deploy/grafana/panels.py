"""The dashboards as data: what each panel asks Prometheus, and what a person reads off it.

Everything else is made from this: the JSON that Grafana loads (:mod:`deploy.grafana.build`), the
check against a real Prometheus, and the PNGs (:mod:`deploy.grafana.check`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["s", "reqps", "percentunit", "bytes", "short", "none"]
RATE = "1m"
"""Window of rates: four scrapes of 15 s at least."""
WITH_EXEMPLARS = frozenset(
    {
        "darkroom_first_preview_seconds",
        "darkroom_http_request_seconds",
        "darkroom_phase_seconds",
        "darkroom_picture_phase_seconds",
    }
)
"""Histograms whose buckets name a request."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression, and the name of its series.

    Attributes:
        exemplars: whether single requests are drawn as points over the lines.
    """

    expr: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        why: what it tells, and what to do when it looks bad; shown behind the panel's (i).
        may_be_empty: why there may be no series under ordinary load; None where there must be some.
    """

    title: str
    why: str
    queries: tuple[Query, ...]
    unit: Unit = "short"
    stacked: bool = False
    may_be_empty: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    about: str
    rows: tuple[Row, ...]


def quantiles(
    metric: str, by: str = "", of: tuple[float, ...] = (0.5, 0.95, 0.99)
) -> tuple[Query, ...]:
    """Quantiles of a histogram, over all replicas, optionally by a label.

    Exemplars are asked for once, beside the highest: they are the same for all.
    """
    group = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    return tuple(
        Query(
            f"histogram_quantile({share}, sum by ({group}) (rate({metric}_bucket[{RATE}])))",
            f"{name}p{share * 100:g}",
            exemplars=metric in WITH_EXEMPLARS and share == max(of),
        )
        for share in of
    )


def rate(metric: str, by: str, legend: str | None = None) -> Query:
    """A counter's increase a second, summed over replicas."""
    return Query(f"sum by ({by}) (rate({metric}[{RATE}]))", legend or f"{{{{{by}}}}}")


def mean(metric: str, legend: str) -> Query:
    """Mean of a histogram's observations."""
    return Query(f"sum(rate({metric}_sum[{RATE}])) / sum(rate({metric}_count[{RATE}]))", legend)


DRAWING = 'route=~"/v1/images/.*|/v1/jobs|/sdapi/v1/(txt2img|img2img)"'
"""Routes that draw: others are quick and would hide them."""
