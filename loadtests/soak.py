"""Half an hour under load: does anything of the service grow that should not?

    python -m loadtests.soak --minutes 30 --rate 0.7 --out out/soak

Starts the server, measures its capacity (or is told with ``--capacity``), asks for the largest
batches of every size, so that what workers keep for them is there from the start, then sends the
mixed requests of the load tests at random times (open loop) at ``--rate`` times that capacity, and
looks every five seconds at the memory, open files and threads of each of its processes and at its
own gauges of tasks, jobs and slots. Prints growth an hour with its confidence interval, and what
is left over once the load has ended; writes ``samples.jsonl``, ``soak.md`` and ``soak.png``. The
exit status is 1 when a bound of ``--thresholds`` is missed. By default jobs are forgotten after two
minutes (``soak_config.yaml``): what is kept on purpose has stopped growing before the slopes begin.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402
from gevent.event import Event  # noqa: E402
from rich.progress import Progress  # noqa: E402

from loadtests import soak_report, soak_verdicts  # noqa: E402
from loadtests.server_processes import kind_of  # noqa: E402
from loadtests.soak_samples import Sample, Sampler  # noqa: E402
from loadtests.traffic.arrivals import Steady, arrival_times_s  # noqa: E402
from loadtests.traffic.client import Outcome  # noqa: E402
from loadtests.traffic.machine import describe_machine  # noqa: E402
from loadtests.traffic.plan import Mix, plan  # noqa: E402
from loadtests.traffic.run import measure_capacity, run_level  # noqa: E402
from loadtests.traffic.served import darkroom, describe_config  # noqa: E402
from server.listener import KEEP_ALIVE_S  # noqa: E402

SETTLE_S = KEEP_ALIVE_S + 15.0
"""For connections that idle to be closed by the server, before leftovers are counted."""
AT_ONCE = 24
CONFIG = Path(__file__).with_name("soak_config.yaml")
_FINE = ("ok", "given_up", "overloaded", "rate_limited")


def main() -> int:
    """Soak, print and judge."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    bounds = soak_verdicts.Bounds.read(options.thresholds)
    print("starting the server …", flush=True)
    with darkroom(options.config) as server:
        capacity_per_s = options.capacity
        if capacity_per_s is None:
            print(f"measuring the capacity for {options.capacity_s:g} s …", flush=True)
            capacity_per_s = measure_capacity(server.url, {}, options.capacity_s)
        per_s = options.rate * capacity_per_s
        print(f"capacity {capacity_per_s:.2f}/s; soaking at {per_s:.2f}/s", flush=True)
        _largest_batches(server.url, options)
        gevent.sleep(SETTLE_S)
        sampler = Sampler(server.root, server.url, kind_of)
        before = sampler.take()
        during, outcomes = _soak(options, sampler, server.url, per_s)
        gevent.sleep(SETTLE_S)
        after = sampler.take()
    found = soak_verdicts.findings(
        before,
        during,
        after,
        warm_up_s=options.warm_up_minutes * 60,
        error_share=_error_share(outcomes),
    )
    missed = list(soak_verdicts.failures(found, bounds))
    text = "\n\n".join(
        [
            _conditions(options, capacity_per_s),
            _ends(outcomes),
            soak_report.table(found),
            "\n".join(f"- MISS: {line}" for line in missed) or "Every bound holds.",
        ]
    )
    (options.out / "soak.md").write_text(text + "\n")
    soak_report.chart(during, options.warm_up_minutes * 60, options.out / "soak.png")
    print(text)
    return 1 if missed else 0


def _largest_batches(url: str, options: argparse.Namespace) -> None:
    """Ask for many pictures at once: of each size, drawn and edited, then of all sizes.

    A worker's memory holds the largest batch that it has run. Random arrivals break that record
    now and then for as long as anybody looks, by steps of 20 MB that no slope tells from a leak.
    """
    one_size = [
        replace(Mix(), kinds=kinds, steps=((20, 1.0),), sizes=((width, height, 1.0),), give_up=0.0)
        for width, height, _ in Mix().sizes
        for kinds in ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    ]
    with Progress() as progress:
        for mix in (*one_size, Mix()):
            planned = list(plan([0.0] * AT_ONCE, mix, options.seed))
            run_level(url, {}, planned, options.timeout_s, options.out, 0.0, progress)


def _soak(
    options: argparse.Namespace, sampler: Sampler, url: str, per_s: float
) -> tuple[list[Sample], list[Outcome]]:
    """Load and look, until the last request has ended."""
    duration_s = options.minutes * 60
    times_s = arrival_times_s(Steady(per_s), duration_s, options.seed)
    planned = list(plan(times_s, Mix(), options.seed))
    samples: list[Sample] = []
    over = Event()

    def watch() -> None:
        with (options.out / "samples.jsonl").open("w") as log:
            while not over.is_set():
                samples.append(sampler.take())
                log.write(samples[-1].line() + "\n")
                log.flush()
                over.wait(options.every_s)

    watching = gevent.spawn(watch)
    with Progress() as progress:
        outcomes = run_level(
            url, {}, planned, options.timeout_s, options.out, options.rate, progress
        )
    over.set()
    watching.join()
    return samples, outcomes


def _error_share(outcomes: Sequence[Outcome]) -> float:
    """Of all requests, those that ended neither with a picture nor with a refusal."""
    if not outcomes:
        return 1.0
    return sum(outcome.outcome not in _FINE for outcome in outcomes) / len(outcomes)


def _ends(outcomes: Sequence[Outcome]) -> str:
    counted = Counter(outcome.outcome for outcome in outcomes)
    return f"{len(outcomes)} requests: " + ", ".join(
        f"{n} {how}" for how, n in counted.most_common()
    )


def _conditions(options: argparse.Namespace, capacity_per_s: float) -> str:
    machine = describe_machine()
    return (
        f"    python -m loadtests.soak {shlex.join(sys.argv[1:])}\n\n"
        f"{options.minutes:g} minutes at {options.rate:g} of {capacity_per_s:.2f} pictures a"
        f" second; {describe_config(options.config)}. {machine['processor']}, {machine['cores']}"
        f" cores, commit {machine['commit']}."
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="under load")
    parser.add_argument("--rate", type=float, default=0.7, help="times capacity")
    parser.add_argument("--capacity", type=float, help="pictures a second; measured by default")
    parser.add_argument("--capacity-s", type=float, default=60.0, help="time for measuring it")
    parser.add_argument("--warm-up-minutes", type=float, default=5.0, help="not in the slopes")
    parser.add_argument("--every-s", type=float, default=5.0, help="between samples")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of a request")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the server")
    parser.add_argument("--thresholds", type=Path, default=soak_verdicts.DEFAULT)
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    options = parser.parse_args()
    if options.warm_up_minutes >= options.minutes:
        parser.error("--warm-up-minutes must be less than --minutes")
    return options


if __name__ == "__main__":
    sys.exit(main())
