"""Mixed work: the step loop beside the same engine batching whole requests.

    python -m loadtests.bench_mixed [--model tintype] [--requests 64] [--load 0.8]

The same requests (4 to 50 steps, random solvers and guidance) arrive at the same random times at
both. Request batching is the generous kind: mixed step counts and solvers share a batch, members
leave when they are done; but nobody joins before the whole batch is finished, as in every server
that schedules requests.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from engine.engine import Engine
from engine.model import Model
from engine.runtime import open_runtime
from engine.scheduler import Batch, PolicyConfig, Ready, StepTimes, TickPolicy
from engine.types import GenerateRequest
from loadtests.common import conditions, open_plan, settings_with_threads


class WholeRequestPolicy(TickPolicy):
    """Request-level batching: a batch runs to its end before the next one is formed."""

    def __init__(self, times: StepTimes) -> None:
        super().__init__(times, PolicyConfig())
        self._batch: set[str] = set()

    def pick(self, ready: Sequence[Ready], now_s: float) -> Batch | None:
        """Go on with the batch while any of its members lives; else form the next."""
        members = [item for item in ready if item.id in self._batch]
        if members:
            return Batch(
                members[0].lane,
                tuple(item.id for item in members),
                sum(item.rows for item in members),
            )
        batch = super().pick(ready, now_s)
        self._batch = set() if batch is None else set(batch.ids)
        return batch


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes, in seconds from the start."""

    at_s: float
    request: GenerateRequest


def arrivals(count: int, rate_per_s: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of 4 to 50 steps."""
    chance = random.Random(seed)
    at_s = 0.0
    made = []
    for i in range(count):
        at_s += chance.expovariate(rate_per_s)
        request = GenerateRequest(
            prompt=chance.choice(["cat", "red apple", "a rocket on a blue background"]),
            steps=chance.randint(4, 50),
            solver=chance.choice(["ddim", "euler", "dpmpp_2m", "unipc"]),
            guidance=chance.choice([1.0, 4.0]),
            seed=i,
        )
        made.append(Arrival(at_s, request))
    return made


def run(model: Model, trace: Sequence[Arrival], policy: type[TickPolicy]) -> dict[str, float]:
    """Play the trace; latencies in seconds from arrival to picture."""
    engine = Engine(policy=policy)
    engine.load(model)
    engine.warm_up()
    engine.start()
    latencies: list[float] = []
    done = threading.Semaphore(0)
    began_s = time.monotonic()
    for arrival in trace:
        time.sleep(max(0.0, began_s + arrival.at_s - time.monotonic()))
        due_s = began_s + arrival.at_s

        def finished(_: object, due_s: float = due_s) -> None:
            latencies.append(time.monotonic() - due_s)
            done.release()

        engine.submit(arrival.request).add_done_callback(finished)
    for _ in trace:
        done.acquire()
    wall_s = time.monotonic() - began_s
    engine.close(close_models=False)
    ordered = sorted(latencies)
    return {
        "pictures_per_s": len(trace) / wall_s,
        "p50_s": statistics.median(ordered),
        "p95_s": ordered[int(0.95 * (len(ordered) - 1))],
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--load", type=float, default=0.8, help="of the measured capacity")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = settings_with_threads(options.threads)
    runtime = open_runtime("onnxruntime", threads=options.threads)
    model = Model.open(
        open_plan(settings, options.model, "onnxruntime", options.precision), runtime
    )

    engine = Engine()
    engine.load(model)
    engine.warm_up()
    rows_per_s = engine.rows_per_s(model.spec.name)
    engine.close(close_models=False)
    mean_rows = statistics.mean(range(4, 51)) * 1.5  # half of the requests are guided
    rate = options.load * rows_per_s / mean_rows
    trace = arrivals(options.requests, rate, options.seed)

    table = Table("scheduling", "pictures/s", "p50", "p95", title=conditions(options))
    results = {}
    for name, policy in (("steps", TickPolicy), ("whole requests", WholeRequestPolicy)):
        result = results[name] = run(model, trace, policy)
        table.add_row(
            name,
            f"{result['pictures_per_s']:.2f}",
            f"{result['p50_s']:.2f} s",
            f"{result['p95_s']:.2f} s",
        )
    Console().print(table)
    ratio = results["steps"]["p95_s"] / results["whole requests"]["p95_s"]
    Console().print(f"p95 of steps / whole requests: {ratio:.2f} (aim: at most 0.5)")
    model.close()
    runtime.close()


if __name__ == "__main__":
    main()
