"""Ask a real Prometheus every panel of every dashboard, and draw them.

    python -m deploy.grafana.check --prometheus http://127.0.0.1:9090 --minutes 10 --out out/panels

Needs a Prometheus that has scraped a server under load. The exit status is 1 when an expression is
refused, or gives nothing without a stated reason. PNGs are for people, one for each panel and
``dashboards.png`` with all of them; what counts is the list.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.grafana.boards import BOARDS
from deploy.grafana.panels import Board, Panel, Query

STEP_S = 5
PANELS_A_ROW = 3


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel."""

    name: str
    points: Sequence[tuple[float, float]]


def main() -> int:
    """Check and draw; say what is empty."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    empty = 0
    shown: list[tuple[Board, Panel, Sequence[Series]]] = []
    for board in BOARDS:
        for panel in (panel for row in board.rows for panel in row.panels):
            series = ask(options.prometheus, panel, options.minutes * 60)
            shown.append((board, panel, series))
            if not series:
                reason = panel.may_be_empty
                empty += reason is None
                print(f"{'empty' if reason else 'EMPTY'}  {board.title} / {panel.title}: {reason}")
                continue
            draw(panel, series, options.out / f"{_slug(board, panel)}.png")
            print(f"ok     {board.title} / {panel.title}: {len(series)} series")
    sheet(shown, options.out / "dashboards.png")
    print(f"{empty} panels are empty without a reason")
    return 1 if empty else 0


def ask(prometheus: str, panel: Panel, seconds: float) -> list[Series]:
    """Every series of a panel that has a number in it.

    Raises:
        RuntimeError: Prometheus refuses an expression; the message has both.
    """
    return [series for query in panel.queries for series in _ask(prometheus, query, seconds)]


def _ask(prometheus: str, query: Query, seconds: float) -> list[Series]:
    ends_s = time.time()
    asked = {"query": query.expr, "start": ends_s - seconds, "end": ends_s, "step": STEP_S}
    url = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            result = json.load(reply)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{query.expr}: {error.read().decode()}") from error
    found = [Series(_name(query, item["metric"]), _points(item["values"])) for item in result]
    return [series for series in found if series.points]


def draw(panel: Panel, series: Sequence[Series], path: Path) -> None:
    """One panel as a PNG."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    _draw(panel, series, figure.subplots())
    figure.savefig(path, dpi=90)


def sheet(shown: Sequence[tuple[Board, Panel, Sequence[Series]]], path: Path) -> None:
    """All panels on one PNG, as the dashboards have them: three in a row."""
    rows = -(-len(shown) // PANELS_A_ROW)
    figure = Figure(figsize=(5 * PANELS_A_ROW, 2.6 * rows), layout="constrained")
    places = figure.subplots(rows, PANELS_A_ROW, squeeze=False).flat
    for (board, panel, series), axes in zip(shown, places, strict=False):
        if series:
            _draw(panel, series, axes)
        else:
            axes.text(0.5, 0.5, f"empty: {panel.may_be_empty}", ha="center", va="center")
            axes.set_axis_off()
        axes.set_title(f"{board.title.removeprefix('Darkroom: ')} / {panel.title}", fontsize=9)
    for axes in places:  # what is left of the last row
        axes.set_axis_off()
    figure.savefig(path, dpi=60)


def _draw(panel: Panel, series: Sequence[Series], axes: Axes) -> None:
    start_s = min(line.points[0][0] for line in series)
    for line in series:
        axes.plot(
            [at_s - start_s for at_s, _ in line.points],
            [value for _, value in line.points],
            label=line.name,
            linewidth=1.2,
        )
    axes.set(title=panel.title, xlabel="seconds", ylabel=panel.unit)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if len(series) <= 12:
        axes.legend(fontsize="x-small")


def _points(values: Sequence[Any]) -> list[tuple[float, float]]:
    points = [(float(at_s), float(value)) for at_s, value in values]
    return [(at_s, value) for at_s, value in points if math.isfinite(value)]


def _name(query: Query, labels: dict[str, str]) -> str:
    name = query.legend
    for label, value in labels.items():
        name = name.replace(f"{{{{{label}}}}}", value)
    return name


def _slug(board: Board, panel: Panel) -> str:
    return f"{board.uid}-{panel.title}".lower().replace(" ", "-").replace("/", "-")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/panels"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
