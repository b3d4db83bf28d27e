"""One HTML page about a run, or about two side by side.

python -m loadtests.traffic.report out/load                  # writes out/load/report.html
python -m loadtests.traffic.report out/before out/after      # writes out/after/compare.html
"""

from __future__ import annotations

import argparse
import base64
import html
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from loadtests.traffic import charts
from loadtests.traffic.stats import quantile
from loadtests.traffic.thresholds import Verdict

PICTURE_PX = 96
COLUMNS = (
    "times capacity",
    "offered/s",
    "pictures/s",
    "p50 s",
    "p95 s",
    "p99 s",
    "first preview p50 s",
    "refused",
    "errors",
    "sent late p99 ms",
)

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.2rem .8rem;text-align:right}
th{border-bottom:1px solid #999}td:first-child,th:first-child{text-align:left}
.row{display:flex;flex-wrap:wrap;gap:1rem}.miss{color:#b00020;font-weight:600}
figure{margin:0}figcaption{font-size:.85rem;color:#555;max-width:30rem}svg{max-width:100%;height:auto}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run, read back from its folder."""

    folder: Path
    about: Mapping[str, Any]
    levels: Mapping[float, Sequence[Mapping[str, Any]]]
    metrics: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read what :mod:`loadtests.traffic.run` wrote."""
        lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
        levels: dict[float, list[Mapping[str, Any]]] = {}
        for line in lines:
            levels.setdefault(line["level"], []).append(line)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return cls(folder, json.loads((folder / "run.json").read_text()), levels, metrics)

    def good(self) -> dict[float, list[Mapping[str, Any]]]:
        """By level, the requests that ended with a picture."""
        return {
            level: [line for line in lines if line["outcome"] == "ok"]
            for level, lines in self.levels.items()
        }


def write(folder: Path, verdicts: Sequence[Verdict]) -> Path:
    """Write ``report.html`` into a run's folder."""
    run = Run.read(folder)
    path = folder / "report.html"
    path.write_text(_page("Load test", _head(run), _verdicts(verdicts), *_body(run)))
    return path


def compare(before: Path, after: Path) -> Path:
    """Write ``compare.html`` into the second folder: both runs beside each other."""
    columns = []
    for folder in (before, after):
        run = Run.read(folder)
        columns.append(
            f"<div><h2>{html.escape(folder.name)}</h2>{_head(run)}{''.join(_body(run))}</div>"
        )
    path = after / "compare.html"
    side_by_side = (
        f'<div style="display:grid;grid-template-columns:1fr 1fr;gap:2rem">{"".join(columns)}</div>'
    )
    path.write_text(_page("Two load tests", side_by_side, wide=True))
    return path


def _body(run: Run) -> list[str]:
    good = run.good()
    rates = {level: len(lines) / run.about["duration_s"] for level, lines in run.levels.items()}
    return [
        _table(run, rates),
        '<div class="row">',
        _figure(
            charts.latency_against_rate(good, rates), "Latency of finished requests, client side."
        ),
        _figure(
            charts.phases(good), "Where the time went, by the timings in the server's replies."
        ),
        _figure(charts.outcomes(run.levels), "How requests ended. 429 is a refusal at admission."),
        *(
            _figure(
                charts.percentiles_over_time(lines, 10.0), f"Over time at {level:g} x capacity."
            )
            for level, lines in good.items()
            if lines
        ),
        *_metric_figures(run),
        "</div>",
        _pictures(run.folder),
    ]


def _head(run: Run) -> str:
    about = run.about
    facts = {
        "command": about["command"],
        "capacity": f"{about['capacity_per_s']:.2f} pictures a second",
        "arrivals": f"{about['arrivals']}, {about['duration_s']:g} s a level, seed {about['seed']}",
        "load generator": f"{about['driver_cpu_share']:.0%} of a core",
        **about["machine"],
    }
    rows = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    return f"<table>{rows}</table>"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    items = "".join(
        f"<li{'' if v.held else ' class=miss'}>{html.escape(str(v))}</li>" for v in verdicts
    )
    return f"<ul>{items}</ul>"


def _table(run: Run, rates: Mapping[float, float]) -> str:
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr>"
    rows = []
    for level, lines in run.levels.items():
        good = [line for line in lines if line["outcome"] == "ok"]
        totals = [line["total_s"] for line in good]
        previews = [
            line["first_preview_s"] for line in lines if line["first_preview_s"] is not None
        ]
        refused = sum(line["outcome"] in ("overloaded", "rate_limited") for line in lines)
        given_up = sum(line["outcome"] == "given_up" for line in lines)
        errors = len(lines) - len(good) - refused - given_up
        late_ms = quantile([line["late_s"] for line in lines], 0.99) * 1000
        cells = [
            f"{level:g}",
            f"{rates[level]:.2f}",
            f"{len(good) / run.about['duration_s']:.2f}",
            *(f"{quantile(totals, share):.2f}" for share in (0.5, 0.95, 0.99)),
            f"{quantile(previews, 0.5):.2f}",
            str(refused),
            str(errors),
            f"{late_ms:.0f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{head}{''.join(rows)}</table>"


def _metric_figures(run: Run) -> list[str]:
    figures = []
    rows = _mean(run, "darkroom_tick_rows")
    if rows:
        figures.append(
            _figure(charts.over_time({"rows a tick": rows}, "UNet rows"), "Mean batch of a tick.")
        )
    saved = _rate(run, "darkroom_cache_steps_saved_total")
    done = _rate(run, "darkroom_steps_total")
    if done:
        series = {"steps run": done} | ({"steps saved by the cache": saved} if saved else {})
        figures.append(_figure(charts.over_time(series, "steps a second"), "Work done and saved."))
    return figures


def _rate(run: Run, name: str) -> list[tuple[float, float]]:
    """Increase a second of a counter between scrapes."""
    points = [(m["at_s"], m["samples"][name]) for m in run.metrics if name in m["samples"]]
    pairs = itertools.pairwise(points)
    return [(b[0], max(0.0, b[1] - a[1]) / (b[0] - a[0])) for a, b in pairs]


def _mean(run: Run, name: str) -> list[tuple[float, float]]:
    """Mean of a histogram's observations between scrapes."""
    sums, counts = _rate(run, f"{name}_sum"), _rate(run, f"{name}_count")
    pairs = zip(sums, counts, strict=False)
    return [(at, total / count) for (at, total), (_, count) in pairs if count > 0]


def _pictures(folder: Path) -> str:
    cells = []
    for path in sorted(folder.glob("picture-*.png")):
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((PICTURE_PX, PICTURE_PX))
        buffer = BytesIO()
        small.save(buffer, "WEBP", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        cells.append(f'<img alt="{path.stem}" src="data:image/webp;base64,{data}">')
    return f'<h2>Some of the pictures</h2><div class="row">{"".join(cells)}</div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _page(title: str, *parts: str, wide: bool = False) -> str:
    width = "body{max-width:2000px}" if wide else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}{width}</style><h1>{title}</h1>{''.join(parts)}</html>"
    )


def main() -> None:
    """Write a report, or a comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="what loadtests.traffic.run has written")
    parser.add_argument("other", type=Path, nargs="?", help="a second run, to stand beside it")
    options = parser.parse_args()
    for folder in filter(None, (options.run, options.other)):
        if not (folder / "run.json").is_file():
            parser.error(f"{folder} holds no run: it has no run.json")
    if options.other is None:
        print(write(options.run, []))
    else:
        print(compare(options.run, options.other))


if __name__ == "__main__":
    main()
