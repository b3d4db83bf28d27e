"""Mixed work on a virtual clock: the engine's own policy beside request batching, no model run.

    python -m loadtests.simulate_mixed --table 1:6.0 2:10.0 4:15.0 8:26.7 16:49.3 32:98
    python -m loadtests.simulate_mixed --plan PLAN_FOLDER.timings/DEVICE.json

The only thing taken from a device is its measured table of tick times (milliseconds by UNet rows).
Every policy gets the same arrivals; a tick costs what the table says for its rows, whoever picked
it; loads are parts of the throughput at B*. It answers in seconds what ``bench_mixed`` answers in
minutes, and for devices that are not here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.saturation import StepTimeTable
from engine.scheduler import Ready, TickPolicy
from loadtests.mixed import COLUMNS, MEAN_ROWS, Arrival, Summary, arrivals, policies

LANE = "lane"


def play(
    trace: Sequence[Arrival], policy: TickPolicy, times: StepTimeTable
) -> tuple[dict[str, float], int]:
    """Run a trace to its end.

    Returns:
        Seconds from arrival to the last step by id, and the number of ticks.
    """
    coming = list(reversed(trace))
    live: dict[str, Ready] = {}
    latency_s: dict[str, float] = {}
    now_s, ticks = 0.0, 0
    while coming or live:
        if not live:
            now_s = max(now_s, coming[-1].at_s)
        while coming and coming[-1].at_s <= now_s:
            arrival = coming.pop()
            live[arrival.id] = Ready(
                id=arrival.id,
                lane=LANE,
                rows=arrival.rows,
                steps_left=arrival.request.steps,
                admitted_at_s=arrival.at_s,
            )
        batch = policy.pick(list(live.values()), now_s)
        assert batch is not None
        seconds = times.tick_s(LANE, batch.rows)
        policy.charge(LANE, seconds)
        now_s, ticks = now_s + seconds, ticks + 1
        for id_ in batch.ids:
            item = live.pop(id_)
            if item.steps_left > 1:
                live[id_] = replace(item, steps_left=item.steps_left - 1)
            else:
                latency_s[id_] = now_s - item.admitted_at_s
    return latency_s, ticks


def compare(
    seconds_by_rows: dict[int, float], *, load: float, requests: int, seeds: Sequence[int]
) -> dict[str, Summary]:
    """Every policy on the same traces, one for each seed; figures are means over them."""
    times = StepTimeTable()
    times.set(LANE, seconds_by_rows)
    best = times.saturation_rows(LANE)
    rate_per_s = load * best / times.tick_s(LANE, best) / MEAN_ROWS
    found: dict[str, list[Summary]] = {}
    for seed in seeds:
        trace = arrivals(requests, rate_per_s, seed)
        for name, policy in policies(times, trace).items():
            latency_s, _ = play(trace, policy, times)
            alone = {rows: times.tick_s(LANE, rows) for rows in (1, 2)}
            found.setdefault(name, []).append(Summary.of(trace, latency_s, alone))
    return {name: Summary.mean(summaries) for name, summaries in found.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--table", nargs="+", metavar="ROWS:MS", help="milliseconds of a tick")
    given.add_argument("--plan", type=Path, help="a file of measured step times beside a plan")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 1.0, 1.1])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--traces", type=int, default=20)
    options = parser.parse_args()
    if options.table is not None:
        pairs = (cell.partition(":") for cell in options.table)
        seconds = {int(rows): float(ms) / 1000 for rows, _, ms in pairs}
    else:
        measured = next(iter(json.loads(options.plan.read_text()).values()))
        seconds = {int(rows): float(s) for rows, s in measured.items()}
    times = StepTimeTable()
    times.set(LANE, seconds)
    shown = ", ".join(f"{rows} rows {1000 * s:.1f} ms" for rows, s in sorted(seconds.items()))
    title = (
        f"B* {times.saturation_rows(LANE)} rows ({shown}); {options.traces} traces"
        f" of {options.requests} requests"
    )
    table = Table(*COLUMNS, title=title)
    for load in options.loads:
        results = compare(
            seconds, load=load, requests=options.requests, seeds=range(options.traces)
        )
        for name, summary in results.items():
            table.add_row(f"{load:g}", name, *summary.cells(results["whole requests"]))
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
