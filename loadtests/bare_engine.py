"""Pictures a second of the engine loop alone, with a fixed number of requests in flight.

    python -m loadtests.bare_engine [--at-once 16] [--pictures 96]

What ``bench_server`` divides by: the same requests, without HTTP, Ray, PNG and base64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from engine.engine import Engine
from engine.loop import Tick
from engine.model import Model
from engine.runtime import open_runtime
from engine.types import GenerateRequest
from loadtests.common import open_plan, settings_with_threads
from loadtests.server_load import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Bare:
    """What one measurement found. ``rows`` is the mean batch of the ticks, in UNet rows."""

    pictures_per_s: float
    cores: float
    rows: float


def measure(engine: Engine, work: Work, *, at_once: int, pictures: int) -> tuple[float, float]:
    """Draw; wall and CPU seconds taken."""
    requests = itertools.islice(_requests(work), pictures)
    done: queue.SimpleQueue[object] = queue.SimpleQueue()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for request in itertools.islice(requests, at_once):
        engine.submit(request).add_done_callback(done.put)
    for _ in range(pictures):
        done.get()
        for request in itertools.islice(requests, 1):
            engine.submit(request).add_done_callback(done.put)
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def _requests(work: Work) -> Iterator[GenerateRequest]:
    for body in work.bodies():
        yield GenerateRequest(
            prompt=body["prompt"],
            steps=body["steps"],
            guidance=body["guidance"],
            seed=body["seed"],
        )


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=96)
    options = parser.parse_args()
    settings = settings_with_threads(options.threads)
    runtime = open_runtime("onnxruntime", threads=options.threads)
    plan = open_plan(settings, options.model, "onnxruntime", "fp32")
    ticks: list[Tick] = []
    engine = Engine(device=runtime.device, on_tick=ticks.append)
    engine.load(Model.open(plan, runtime))
    engine.warm_up()
    engine.start()
    work = Work(steps=options.steps, guidance=options.guidance)
    measure(engine, work, at_once=options.at_once, pictures=2 * options.at_once)
    ticks.clear()
    wall_s, cpu_s = measure(engine, work, at_once=options.at_once, pictures=options.pictures)
    rows = sum(tick.rows for tick in ticks) / len(ticks)
    engine.close()
    runtime.close()
    found = Bare(pictures_per_s=options.pictures / wall_s, cores=cpu_s / wall_s, rows=rows)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
