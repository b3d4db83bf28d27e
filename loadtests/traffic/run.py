"""Open loop: sends requests at their planned times, whatever the server does.

    python -m loadtests.traffic.run --serve --levels 0.3,0.7,1.1 --duration-s 200 --out out/load

With ``--serve`` it starts a server of its own (with ``--config`` that one's configuration), else it
asks the one at ``--base``. Measures the server's capacity first (closed loop, uniform requests),
then runs each level at that multiple of it and writes ``requests.jsonl``, ``metrics.jsonl``,
``run.json``, a few pictures, and ``report.html``, which needs no other file. The exit status is 1
when a threshold of ``--thresholds`` is missed. Two runs side by side:
``python -m loadtests.traffic.report A B``.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402
import gevent.pool  # noqa: E402
import requests  # noqa: E402
from rich.progress import Progress  # noqa: E402

from loadtests.traffic import report, thresholds  # noqa: E402
from loadtests.traffic.arrivals import SHAPES, Steady, arrival_times_s  # noqa: E402
from loadtests.traffic.client import Outcome, send  # noqa: E402
from loadtests.traffic.machine import describe_machine  # noqa: E402
from loadtests.traffic.plan import UNIFORM, Mix, Planned, plan  # noqa: E402
from loadtests.traffic.scrape import Scraper  # noqa: E402
from loadtests.traffic.served import darkroom, describe_config  # noqa: E402

MAX_OPEN = 2000
"""Requests in flight at once; one more is not sent and counted as ``driver:full``."""


def main() -> int:
    """Run, report, and judge."""
    options = _options()
    with contextlib.ExitStack() as stack:
        about = {"configuration": "that of a server which was there already"}
        if options.serve:
            options.base = stack.enter_context(darkroom(options.config)).url
            about = {"configuration": describe_config(options.config)}
        return _run(options, about)


def _run(options: argparse.Namespace, about_server: dict[str, str]) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("picture-*.png"):  # of a run before, in the same folder
        old.unlink()
    headers = {"Authorization": f"Bearer {options.key}"} if options.key else {}
    if not options.capacity:
        print(f"measuring the capacity for {options.warm_s:g} s …", flush=True)
    capacity_per_s = options.capacity or measure_capacity(options.base, headers, options.warm_s)
    print(f"capacity: {capacity_per_s:.2f} pictures a second", flush=True)
    scraper = Scraper(options.base, headers, options.out / "metrics.jsonl", every_s=5.0)
    watching = gevent.spawn(scraper.run)
    cpu_before_s = _own_cpu_s()
    began_s = time.time()
    with (options.out / "requests.jsonl").open("w") as log, Progress() as progress:
        for level in options.levels:
            rate = SHAPES[options.arrivals](level * capacity_per_s, options.duration_s)
            times_s = arrival_times_s(rate, options.duration_s, options.seed)
            planned = list(plan(times_s, Mix(), options.seed))
            task = progress.add_task(f"{level:g} x capacity", total=len(planned))
            for outcome in run_level(
                options.base, headers, planned, options.timeout_s, options.out, level, progress
            ):
                log.write(json.dumps(_line(outcome, level)) + "\n")
            progress.update(task, completed=len(planned))
    scraper.stop()
    watching.join()
    about = {
        "base": options.base,
        "capacity_per_s": capacity_per_s,
        "levels": options.levels,
        "arrivals": options.arrivals,
        "duration_s": options.duration_s,
        "seed": options.seed,
        "began_s": began_s,
        "driver_cpu_share": (_own_cpu_s() - cpu_before_s) / (time.time() - began_s),
        "machine": describe_machine() | about_server,
        "command": "python -m loadtests.traffic.run " + " ".join(sys.argv[1:]),
    }
    (options.out / "run.json").write_text(json.dumps(about, indent=1))
    verdicts = thresholds.judge(options.thresholds, options.out)
    report.write(options.out, verdicts)
    for verdict in verdicts:
        print(verdict)
    print(f"{options.out / 'report.html'}")
    return 0 if all(verdict.held for verdict in verdicts) else 1


def run_level(
    base: str,
    headers: dict[str, str],
    planned: Sequence[Planned],
    timeout_s: float,
    out: Path,
    level: float,
    progress: Progress,
) -> list[Outcome]:
    """Send every request at its time; return when all have ended."""
    session = _session(headers)
    pool = gevent.pool.Pool(MAX_OPEN)
    outcomes: list[Outcome] = []
    task = progress.add_task(f"  answered at {level:g}", total=len(planned))
    began_s = time.perf_counter()
    pictures = {int(len(planned) * share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)}

    def one(number: int, item: Planned) -> None:
        late_s = time.perf_counter() - began_s - item.at_s
        outcome = send(session, base, item, timeout_s=timeout_s, keep_picture=number in pictures)
        outcome.late_s = late_s
        if outcome.picture is not None:
            (out / f"picture-{level:g}-{number}.png").write_bytes(outcome.picture)
        outcomes.append(outcome)
        progress.advance(task)

    for number, item in enumerate(planned):
        gevent.sleep(max(0.0, began_s + item.at_s - time.perf_counter()))
        if pool.full():
            outcomes.append(_not_sent(item))
        else:
            pool.spawn(one, number, item)
    pool.join()
    return outcomes


def measure_capacity(
    base: str, headers: dict[str, str], seconds: float, clients: int = 24
) -> float:
    """Pictures a second with ``clients`` always waiting, over the last two thirds of the time."""
    session = _session(headers)
    ends_s = time.perf_counter() + seconds
    finished_s: list[float] = []
    source = plan(arrival_times_s(Steady(1000.0), 1e9, seed=1), UNIFORM, seed=1)

    def work() -> None:
        while time.perf_counter() < ends_s:
            if send(session, base, next(source), timeout_s=120).outcome == "ok":
                finished_s.append(time.perf_counter())

    gevent.joinall([gevent.spawn(work) for _ in range(clients)])
    from_s = ends_s - seconds * 2 / 3
    counted = sum(from_s <= at_s < ends_s for at_s in finished_s)
    if not counted:
        raise SystemExit(f"{base} drew no picture in {seconds:g} s; is it up?")
    return counted / (seconds * 2 / 3)


def _session(headers: dict[str, str]) -> requests.Session:
    session = requests.Session()
    session.headers.update(headers)
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=MAX_OPEN)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _not_sent(item: Planned) -> Outcome:
    return Outcome(
        kind=item.kind,
        at_s=item.at_s,
        prompt=item.prompt,
        steps=item.steps,
        width_px=item.width_px,
        height_px=item.height_px,
        outcome="driver:full",
    )


def _line(outcome: Outcome, level: float) -> dict[str, object]:
    line = asdict(outcome)
    del line["picture"]
    return line | {"level": level, "sent_late_s": outcome.late_s}


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--base", default="http://127.0.0.1:8000")
    where.add_argument("--serve", action="store_true", help="start a server for the run")
    parser.add_argument("--config", type=Path, help="of the server that is started")
    parser.add_argument("--key", help="an API key, where the server wants one")
    parser.add_argument("--levels", type=_floats, default=[0.3, 0.7, 1.1], help="times capacity")
    parser.add_argument("--capacity", type=float, help="pictures a second; measured by default")
    parser.add_argument("--warm-s", type=float, default=30.0, help="time for measuring capacity")
    parser.add_argument("--duration-s", type=float, default=200.0, help="of each level")
    parser.add_argument("--arrivals", choices=sorted(SHAPES), default="poisson")
    parser.add_argument("--timeout-s", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--thresholds", type=Path, default=thresholds.DEFAULT)
    parser.add_argument("--out", type=Path, default=Path("out/load"))
    return parser.parse_args()


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
