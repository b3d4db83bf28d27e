"""The noise cache together with batching: the same trace through the running server, on and off.

    python -m loadtests.cache_load [--loads 0.8 1.2] [--seconds 60] [--json F]

Prompts are those of :mod:`cache.traces`, in its order; they arrive at random at parts of the
capacity that the server has without the cache, which is measured first. Every run has a server of
its own, so that none finds what another has stored.

Rows a second are UNet rows over the time spent in ticks: what batching gives for the work that is
left, however little that is. Predicted is the rate that the phase times without the cache give for
the steps saved: a picture takes the time of its rows and a rest (encoding, decoding, HTTP), both
measured at capacity; with the cache its rows are fewer by the share saved and a look comes on top.
Where fewer pictures are asked for than that, all of them are drawn, and that is the prediction.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from itertools import count  # noqa: E402
from pathlib import Path  # noqa: E402

import requests  # noqa: E402
import yaml  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from cache.traces import ZIPF_EXPONENTS, TraceConfig, make_trace  # noqa: E402
from loadtests.common import (  # noqa: E402
    conditions,
    model_folder,
    open_plan,
    settings_with_threads,
)
from loadtests.server_processes import free_port, serving  # noqa: E402
from loadtests.traffic.arrivals import Steady, arrival_times_s  # noqa: E402
from loadtests.traffic.client import Outcome  # noqa: E402
from loadtests.traffic.plan import Planned  # noqa: E402
from loadtests.traffic.run import measure_capacity, run_level  # noqa: E402
from loadtests.traffic.scrape import sum_samples  # noqa: E402
from loadtests.traffic.stats import quantile  # noqa: E402
from server.cache_wiring import vocabulary  # noqa: E402
from server.settings import Settings  # noqa: E402

REQUEST_TIMEOUT_S = 600.0
SIDE_PX = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the server does without the cache when there is always work.

    Attributes:
        rows: UNet rows of a picture.
        row_s: time of a row in ticks.
        rest_s: of a picture's share of the server's time, what its rows do not take.
    """

    pictures_per_s: float
    rows: float
    row_s: float

    @property
    def rest_s(self) -> float:
        return max(0.0, 1.0 / self.pictures_per_s - self.rows * self.row_s)

    def predicted_per_s(self, saved: float, look_s: float, offered_per_s: float) -> float:
        """Pictures a second with a share of the steps saved, of those that are asked for."""
        picture_s = self.rest_s + look_s + (1.0 - saved) * self.rows * self.row_s
        return min(offered_per_s, 1.0 / picture_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The trace at one load, with the cache or without.

    Attributes:
        rows_per_s: over the time spent in ticks.
        saved: share of all steps.
    """

    cache: bool
    load: float
    offered_per_s: float
    pictures_per_s: float
    predicted_per_s: float
    p50_s: float
    p95_s: float
    failed: int
    rows_per_s: float
    rows_per_tick: float
    saved: float
    look_s: float


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    options = _options()
    settings = settings_with_threads(options.threads)
    open_plan(settings, options.model, "onnxruntime", "fp32")
    with _server(settings, options, cache=False) as url:
        _say("capacity")
        capacity = _capacity(url, options.capacity_s)
    runs = [
        _run(settings, options, capacity, load, cache=cache)
        for load in options.loads
        for cache in (False, True)
    ]
    Console(width=180).print(_table(options, capacity, runs))
    if options.json is not None:
        found = {"capacity": asdict(capacity), "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(found, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8, 1.2])
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for every run")
    parser.add_argument("--capacity-s", type=float, default=30.0, help="of measuring it")
    parser.add_argument("--zipf", type=float, default=ZIPF_EXPONENTS[1])
    parser.add_argument("--seed", type=int, default=0, help="of the arrival times")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# ---------------------------------------------------------------------- measuring


def _capacity(url: str, seconds: float) -> Capacity:
    measure_capacity(url, {}, 3.0)  # what is slow only once
    before = _samples(url)
    pictures_per_s = measure_capacity(url, {}, seconds)
    spent = _between(before, _samples(url))
    rows = spent["darkroom_tick_rows_sum"]
    return Capacity(
        pictures_per_s=pictures_per_s,
        rows=rows / spent["darkroom_pictures_total"],
        row_s=spent["darkroom_tick_seconds_sum"] / rows,
    )


def _run(
    settings: Settings, options: argparse.Namespace, capacity: Capacity, load: float, *, cache: bool
) -> Run:
    _say(f"{load:g} x capacity, cache {'on' if cache else 'off'}")
    planned = _planned(settings, options, load * capacity.pictures_per_s)
    with (
        _server(settings, options, cache=cache) as url,
        tempfile.TemporaryDirectory() as pictures,
        Progress(disable=True) as progress,
    ):
        before = _samples(url)
        outcomes = run_level(url, {}, planned, REQUEST_TIMEOUT_S, Path(pictures), load, progress)
        spent = _between(before, _samples(url))
    return _summary(options, capacity, outcomes, spent, load=load, cache=cache)


def _planned(settings: Settings, options: argparse.Namespace, per_s: float) -> list[Planned]:
    times_s = list(arrival_times_s(Steady(per_s), options.seconds, options.seed))
    config = TraceConfig(requests=max(1, len(times_s)), zipf=options.zipf)
    trace = make_trace(vocabulary(settings), config)
    return [
        Planned(
            at_s=at_s,
            kind="generation",
            prompt=arrival.prompt,
            steps=options.steps,
            width_px=SIDE_PX,
            height_px=SIDE_PX,
        )
        for at_s, arrival in zip(times_s, trace, strict=True)
    ]


def _summary(
    options: argparse.Namespace,
    capacity: Capacity,
    outcomes: Sequence[Outcome],
    spent: dict[str, float],
    *,
    load: float,
    cache: bool,
) -> Run:
    drawn = [one for one in outcomes if one.outcome == "ok"]
    latencies_s = [one.late_s + one.total_s for one in drawn]
    # Until the last picture, or at least until the last arrival could have come.
    wall_s = max([options.seconds, *(one.at_s + one.late_s + one.total_s for one in drawn)])
    looks_s = [one.phases_s.get("cache", 0.0) for one in drawn]
    asked = options.steps * len(outcomes)
    saved = spent.get("darkroom_cache_steps_saved_total", 0.0) / asked
    look_s = sum(looks_s) / len(looks_s) if cache and looks_s else 0.0
    offered_per_s = len(outcomes) / options.seconds
    return Run(
        cache=cache,
        load=load,
        offered_per_s=offered_per_s,
        pictures_per_s=len(drawn) / wall_s,
        predicted_per_s=capacity.predicted_per_s(saved, look_s, len(outcomes) / wall_s),
        p50_s=quantile(latencies_s, 0.5),
        p95_s=quantile(latencies_s, 0.95),
        failed=len(outcomes) - len(drawn),
        rows_per_s=spent["darkroom_tick_rows_sum"] / spent["darkroom_tick_seconds_sum"],
        rows_per_tick=spent["darkroom_tick_rows_sum"] / spent["darkroom_tick_rows_count"],
        saved=saved,
        look_s=look_s,
    )


@contextlib.contextmanager
def _server(settings: Settings, options: argparse.Namespace, *, cache: bool) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    folder = model_folder(settings, options.model)
    content = {
        "models": [{"id": folder.name, "path": str(folder)}],
        "http": {"port": port},
        "workers": {"threads": options.threads},
        "cache": {"enabled": cache, "default": "approximate" if cache else "off"},
    }
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "darkroom.yaml"
        config.write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "server", "serve", "--config", str(config)]
        with serving(command, url, ready="/readyz", environment={"HF_HUB_OFFLINE": "1"}):
            yield url


def _samples(url: str) -> dict[str, float]:
    reply = requests.get(f"{url}/metrics", timeout=30.0)
    reply.raise_for_status()
    return sum_samples(reply.text)


def _between(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


# ---------------------------------------------------------------------- what is printed


def _table(options: argparse.Namespace, capacity: Capacity, runs: Sequence[Run]) -> Table:
    table = Table(title=conditions(options, hide=("json",)))
    for heading in ("times capacity", "cache", "offered/s", "pictures/s", "predicted", "p50"):
        table.add_column(heading)
    for heading in ("p95", "failed", "rows/s in ticks", "rows a tick", "saved", "look"):
        table.add_column(heading)
    offs = {run.load: run for run in runs if not run.cache}
    for number, run in zip(count(), runs, strict=False):
        off = offs[run.load]
        table.add_row(
            f"{run.load:g}",
            "on" if run.cache else "off",
            f"{run.offered_per_s:.2f}",
            f"{run.pictures_per_s:.2f}",
            f"{run.predicted_per_s:.2f} ({run.pictures_per_s / run.predicted_per_s:.2f})",
            f"{run.p50_s:.2f} s",
            f"{run.p95_s:.2f} s",
            str(run.failed),
            f"{run.rows_per_s:.1f} ({run.rows_per_s / off.rows_per_s:.2f})",
            f"{run.rows_per_tick:.1f}",
            f"{run.saved:.1%}",
            f"{run.look_s * 1e3:.2f} ms",
            end_section=number % 2 == 1,
        )
    table.caption = (
        f"capacity without the cache {capacity.pictures_per_s:.2f} pictures/s: of a picture's"
        f" {1e3 / capacity.pictures_per_s:.0f} ms, {capacity.rows:.1f} rows take"
        f" {capacity.row_s * 1e3:.2f} ms each and the rest {capacity.rest_s * 1e3:.0f} ms"
    )
    return table


def _say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
