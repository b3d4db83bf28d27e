"""Mixed work: the step loop beside the same engine batching whole requests.

    python -m loadtests.bench_mixed [--model tintype] [--requests 64] [--loads 0.5 0.8 0.95]

The same requests arrive at the same times at every policy of ``loadtests.mixed``, one policy after
the other, in this process. ``loadtests.simulate_mixed`` does the same on a virtual clock.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from engine.engine import Engine
from engine.model import Model
from engine.runtime import open_runtime
from engine.scheduler import StepTimes, TickPolicy
from engine.types import GenerateRequest
from loadtests.common import conditions, open_plan, settings_with_threads
from loadtests.mixed import COLUMNS, MEAN_ROWS, Arrival, Summary, arrivals, policies


def play(model: Model, trace: Sequence[Arrival], name: str) -> Summary:
    """Play the trace under the policy ``name``; latencies from arrival to picture."""

    def choose(times: StepTimes) -> TickPolicy:
        return policies(times, trace)[name]

    engine = Engine(policy=choose)
    engine.load(model)
    engine.warm_up()
    engine.start()
    engine.generate(GenerateRequest(prompt="cat", steps=2, seed=0))
    lane = model.native_lane()
    alone = {rows: engine.times.tick_s(lane, rows) for rows in (1, 2)}
    latency_s: dict[str, float] = {}
    done = threading.Semaphore(0)
    began_s = time.monotonic()
    for arrival in trace:
        time.sleep(max(0.0, began_s + arrival.at_s - time.monotonic()))

        def finished(_: object, arrival: Arrival = arrival) -> None:
            latency_s[arrival.id] = time.monotonic() - began_s - arrival.at_s
            done.release()

        engine.submit(arrival.request, request_id=arrival.id).add_done_callback(finished)
    for _ in trace:
        done.acquire()
    engine.close(close_models=False)
    return Summary.of(trace, latency_s, alone)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    settings = settings_with_threads(options.threads)
    runtime = open_runtime("onnxruntime", threads=options.threads)
    plan = open_plan(settings, options.model, "onnxruntime", options.precision)
    model = Model.open(plan, runtime)

    engine = Engine()
    engine.load(model)
    engine.warm_up()
    rows_per_s = engine.rows_per_s(model.spec.name)
    best = engine.times.saturation_rows(model.native_lane())
    engine.close(close_models=False)

    console = Console(width=120)
    table = Table(*COLUMNS, title=f"{conditions(options)}; B* {best} rows, {rows_per_s:.0f} rows/s")
    for load in options.loads:
        traces = [
            arrivals(options.requests, load * rows_per_s / MEAN_ROWS, seed)
            for seed in options.seeds
        ]
        # Policies take turns, so that a machine that gets busy is so for all of them.
        runs: dict[str, list[Summary]] = {name: [] for name in policies(engine.times, [])}
        for trace in traces:
            for name, summaries in runs.items():
                summaries.append(play(model, trace, name))
        results = {name: Summary.mean(summaries) for name, summaries in runs.items()}
        for name, summary in results.items():
            table.add_row(f"{load:g}", name, *summary.cells(results["whole requests"]))
        table.add_section()
    console.print(table)
    model.close()
    runtime.close()


if __name__ == "__main__":
    main()
