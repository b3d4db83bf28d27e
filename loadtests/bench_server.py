"""The whole server beside its bare engine, and beside what a user would pick instead, in one run.

    python -m loadtests.bench_server [--turns 3] [--seconds 60] [--json F]

First: pictures a second over HTTP at saturation, divided by those of the engine loop alone with as
many requests in flight (both encode prompts and decode pictures; only the server also makes PNG
and base64). Then, for Darkroom and for Diffusers behind FastAPI and behind LitServe: capacity, and
random arrivals at parts of each one's own capacity and of Darkroom's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtests.bare_engine import Bare
from loadtests.common import conditions, model_folder, open_plan, settings_with_threads
from loadtests.server_load import Outcome, Work, closed_loop, open_loop
from loadtests.server_processes import (
    RunningServer,
    cpu_between,
    free_port,
    serving,
    serving_darkroom,
)

BASELINES = {"fastapi + lock": "fastapi_lock", "litserve, batches": "litserve_batch"}
DARKROOM = "darkroom"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One load on one server. CPU in cores: seconds of CPU per second of the run."""

    contender: str
    offered: str
    pictures_per_s: float
    p50_s: float
    p95_s: float
    failures: dict[str, int]
    cores: dict[str, float]
    client_cores: float
    memory_mb: float


def main() -> None:
    """Print both tables, and write them as JSON where asked."""
    options = _options()
    console = Console(width=200)
    open_plan(settings_with_threads(options.threads), options.model, "onnxruntime", "fp32")
    bare, whole = _efficiency(options)
    console.print(_efficiency_table(options, bare, whole))
    rows = [] if options.skip_rivals else list(_rivals(options))
    if rows:
        console.print(_rival_table(options, rows))
    if options.json is not None:
        found = {"bare": bare, "server": whole, "loads": rows}
        options.json.write_text(json.dumps(found, default=asdict, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--few-steps", type=int, default=4, help="the other column")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--at-once", type=int, default=16, help="requests in flight, saturated")
    parser.add_argument("--pictures", type=int, default=96, help="of one saturated measurement")
    parser.add_argument("--turns", type=int, default=3, help="of bare engine and server")
    parser.add_argument("--seconds", type=float, default=60.0, help="of random arrivals")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.2])
    parser.add_argument("--max-batch", type=int, default=8, help="of LitServe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-rivals", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# ---------------------------------------------------------------------- server and bare engine


def _efficiency(
    options: argparse.Namespace,
) -> tuple[dict[int, list[Bare]], dict[int, list[Measured]]]:
    """Engine and server in turn, so that a noisy machine is noisy for both; by steps."""
    counts = (options.steps, options.few_steps)
    bare: dict[int, list[Bare]] = {steps: [] for steps in counts}
    whole: dict[int, list[Measured]] = {steps: [] for steps in counts}
    for turn in range(options.turns):
        for steps in counts:
            _say(f"turn {turn + 1}: bare engine, {steps} steps")
            bare[steps].append(_bare(options, steps))
        with _start(DARKROOM, options) as server:
            for steps in counts:
                _say(f"turn {turn + 1}: server, {steps} steps")
                whole[steps].append(_saturate(server, options, DARKROOM, steps))
    return bare, whole


def _bare(options: argparse.Namespace, steps: int) -> Bare:
    command = [sys.executable, "-m", "loadtests.bare_engine", "--model", options.model]
    for name in ("threads", "guidance", "at_once", "pictures"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Bare(**json.loads(done.stdout.splitlines()[-1]))


def _saturate(
    server: RunningServer, options: argparse.Namespace, contender: str, steps: int
) -> Measured:
    work = Work(steps=steps, guidance=options.guidance)
    closed_loop(server.url, work, at_once=options.at_once, pictures=2 * options.at_once)
    before = server.cpu_s()
    outcome = closed_loop(server.url, work, at_once=options.at_once, pictures=options.pictures)
    return _measured(server, before, outcome, contender, f"{options.at_once} at once")


# ---------------------------------------------------------------------- random arrivals


def _rivals(options: argparse.Namespace) -> Iterator[Measured]:
    """Capacity, then every load, of each contender; then Darkroom's loads on the others."""
    darkroom_per_s = 0.0
    for contender in (DARKROOM, *BASELINES):
        with _start(contender, options) as server:
            _say(f"{contender}: capacity")
            full = _saturate(server, options, contender, options.steps)
            yield full
            if contender == DARKROOM:
                darkroom_per_s = full.pictures_per_s
            for load in options.loads:
                yield _at(server, options, contender, f"{load:g} of its own", load, full)
            if contender != DARKROOM:
                part = darkroom_per_s / full.pictures_per_s
                middle = sorted(options.loads)[len(options.loads) // 2]
                offered = f"{middle:g} of darkroom's"
                yield _at(server, options, contender, offered, middle * part, full)


def _at(
    server: RunningServer,
    options: argparse.Namespace,
    contender: str,
    offered: str,
    load: float,
    full: Measured,
) -> Measured:
    per_s = load * full.pictures_per_s
    _say(f"{contender}: {offered}, {per_s:.2f} a second for {options.seconds:g} s")
    before = server.cpu_s()
    work = Work(steps=options.steps, guidance=options.guidance, first_seed=10_000)
    outcome = open_loop(server.url, work, per_s=per_s, for_s=options.seconds, seed=options.seed)
    return _measured(server, before, outcome, contender, f"{offered} ({per_s:.2f}/s)")


@contextlib.contextmanager
def _start(contender: str, options: argparse.Namespace) -> Iterator[RunningServer]:
    folder = model_folder(settings_with_threads(options.threads), options.model)
    if contender == DARKROOM:
        with serving_darkroom(folder, threads=options.threads) as server:
            yield server
        return
    port = free_port()
    command = [sys.executable, "-m", f"loadtests.baselines.{BASELINES[contender]}"]
    command += ["--model", str(folder), "--port", str(port)]
    command += ["--threads", str(options.threads), "--max-batch", str(options.max_batch)]
    url = f"http://127.0.0.1:{port}"
    with serving(command, url, ready="/health", environment={"HF_HUB_OFFLINE": "1"}) as server:
        yield server


def _measured(
    server: RunningServer,
    before: dict[str, float],
    outcome: Outcome,
    contender: str,
    offered: str,
) -> Measured:
    spent = cpu_between(before, server.cpu_s())
    return Measured(
        contender=contender,
        offered=offered,
        pictures_per_s=outcome.pictures_per_s,
        p50_s=outcome.quantile_s(0.5),
        p95_s=outcome.quantile_s(0.95),
        failures=dict(outcome.failures),
        cores={kind: seconds / outcome.wall_s for kind, seconds in spent.items()},
        client_cores=outcome.client_cpu_s / outcome.wall_s,
        memory_mb=server.memory_mb(),
    )


# ---------------------------------------------------------------------- what is printed


def _efficiency_table(
    options: argparse.Namespace, bare: dict[int, list[Bare]], whole: dict[int, list[Measured]]
) -> Table:
    shown = ("json", "skip_rivals", "seconds", "loads", "max_batch", "seed")
    table = Table(title=conditions(options, hide=shown))
    for heading in (
        "steps",
        "bare engine",
        "server",
        "server / engine",
        "CPU of the server, cores",
    ):
        table.add_column(heading)
    table.add_column("of the load generator")
    for steps, engines in bare.items():
        servers = whole[steps]
        # Turn by turn: what slowed one of a pair down probably slowed the other.
        ratios = [
            s.pictures_per_s / b.pictures_per_s for s, b in zip(servers, engines, strict=True)
        ]
        table.add_row(
            str(steps),
            f"{statistics.median(b.pictures_per_s for b in engines):.2f}/s"
            f" ({statistics.median(b.cores for b in engines):.2f} cores)",
            f"{statistics.median(s.pictures_per_s for s in servers):.2f}/s",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            _cores(servers[-1]),
            f"{servers[-1].client_cores:.2f}",
        )
    return table


def _rival_table(options: argparse.Namespace, rows: list[Measured]) -> Table:
    table = Table(title=conditions(options, hide=("json", "skip_rivals", "turns", "few_steps")))
    for heading in ("server", "offered", "pictures/s", "p50", "p95", "failed"):
        table.add_column(heading)
    for heading in ("CPU, cores", "load generator", "memory"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row.contender,
            row.offered,
            f"{row.pictures_per_s:.2f}",
            f"{row.p50_s:.2f} s",
            f"{row.p95_s:.2f} s",
            ", ".join(f"{count} × {name}" for name, count in row.failures.items()) or "0",
            _cores(row),
            f"{row.client_cores:.2f}",
            f"{row.memory_mb:.0f} MB",
        )
    return table


def _cores(row: Measured) -> str:
    return ", ".join(f"{kind} {cores:.2f}" for kind, cores in row.cores.items() if cores >= 0.005)


def _say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
