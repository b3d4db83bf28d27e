"""Write the dashboards' JSON from :mod:`deploy.grafana.boards`.

python -m deploy.grafana.build            # writes deploy/grafana/dashboards/*.json
python -m deploy.grafana.build --check    # fails when the files are out of step
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

from deploy.grafana.boards import BOARDS
from deploy.grafana.panels import Board, Panel

FOLDER = Path(__file__).parent / "dashboards"
PANELS_A_ROW = 3
GRID_COLUMNS = 24
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")


def main() -> None:
    """Write, or with ``--check`` compare."""
    stale = []
    for board in BOARDS:
        path = FOLDER / f"{board.uid}.json"
        text = render(board)
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                stale.append(path.name)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    if stale:
        sys.exit(f"out of step: {', '.join(stale)}; run python -m deploy.grafana.build")


def render(board: Board) -> str:
    """The JSON of one dashboard."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["darkroom"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
    )
    for row in board.rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.why)
        .datasource(SOURCE)
        .unit(panel.unit)
        .min(0)
        .span(GRID_COLUMNS // PANELS_A_ROW)
        .height(8)
        .fill_opacity(20 if panel.stacked else 5)
        .line_width(1)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if panel.stacked:
        made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for index, query in enumerate(panel.queries):
        made.with_target(
            prometheus.Dataquery()
            .expr(query.expr)
            .legend_format(query.legend)
            .exemplar(query.exemplars)
            .ref_id(chr(ord("A") + index))
        )
    return made


if __name__ == "__main__":
    main()
