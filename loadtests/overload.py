"""Ten times the capacity, offered to a whole server: what those who get in notice of it.

    python -m loadtests.overload [--factor 10] [--seconds 60] [--queued-steps 500] [--json F]
    python -m loadtests.overload --max-wait-s 2

The first bounds what waits in steps, the second in seconds (``admission.max_wait_s``).

First the capacity, as pictures a second with many clients that ask again and again, and name a
deadline, so that no bound on the wait applies to them; then random arrivals at the capacity, and at
``--factor`` times that. Arrivals are an open loop: nobody waits for an answer, and who is refused
does not come back. Load generator and server share the machine, so the generator's own CPU is a
column of its own. Exits with 1 where a request failed other than by a 429 that says when to come
back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests.common import conditions, model_folder, open_plan, settings_with_threads
from loadtests.server_load import REQUEST_TIMEOUT_S, Outcome, Work, closed_loop, open_loop
from loadtests.server_processes import RunningServer, cpu_between, serving_darkroom
from loadtests.traffic.stats import quantile
from server.metrics_page import families_of

_SHOWN = ("worker", "gateway", "router")
_QUEUED_STEPS = 500
_REFUSALS = {"darkroom_gateway_refusals": "gateway", "darkroom_router_refusals": "router"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One load, and what came of it.

    Attributes:
        goodput_per_s: pictures a second, from the first request to the last reply.
        by_router: refusals that the router decided; gateways decided the others themselves.
        reasons: refusals by the bound that they would have passed.
        cores: seconds of CPU per second, by what the process is.
        client_cores: the load generator's own.
    """

    name: str
    offered_per_s: float
    requests: int
    pictures: int
    goodput_per_s: float
    p50_s: float
    p95_s: float
    refused: int
    by_router: int
    reasons: dict[str, int]
    refused_p95_s: float
    retry_after_s: float
    failed: dict[str, int]
    cores: dict[str, float]
    client_cores: float


def admission(options: argparse.Namespace) -> dict[str, Any]:
    """The server's ``admission`` section."""
    bounds = {"max_wait_s": options.max_wait_s}
    if options.queued_steps is not None:
        bounds["max_queued_steps"] = options.queued_steps
    elif options.max_wait_s is None:
        bounds["max_queued_steps"] = _QUEUED_STEPS
    return bounds


def measure(server: RunningServer, options: argparse.Namespace) -> list[Phase]:
    """At capacity, and beyond it."""
    work = Work(steps=options.steps, guidance=options.guidance, deadline_s=REQUEST_TIMEOUT_S)
    closed_loop(server.url, work, at_once=options.at_once, pictures=2 * options.at_once)
    full = closed_loop(server.url, work, at_once=options.at_once, pictures=options.pictures)
    capacity_per_s = full.pictures_per_s
    _say(f"capacity: {capacity_per_s:.2f} pictures a second")
    return [_offered(server, options, load, capacity_per_s) for load in (1.0, options.factor)]


def _offered(
    server: RunningServer, options: argparse.Namespace, load: float, capacity_per_s: float
) -> Phase:
    per_s = load * capacity_per_s
    _say(f"{load:g} times that, for {options.seconds:g} s")
    work = Work(steps=options.steps, guidance=options.guidance, first_seed=10_000)
    refusals_before, cpu_before = _refusals(server), server.cpu_s()
    outcome = open_loop(server.url, work, per_s=per_s, for_s=options.seconds, seed=options.seed)
    spent = cpu_between(cpu_before, server.cpu_s())
    return _phase(
        f"{load:g} × capacity",
        per_s,
        outcome,
        _refusals(server) - refusals_before,
        cores={kind: seconds / outcome.wall_s for kind, seconds in spent.items()},
    )


def _phase(
    name: str,
    per_s: float,
    outcome: Outcome,
    decided: Counter[tuple[str, str]],
    *,
    cores: dict[str, float],
) -> Phase:
    reasons: Counter[str] = Counter()
    for (_, reason), count in decided.items():
        reasons[reason] += count
    refused = len(outcome.refusals)
    failures = dict(outcome.failures)
    failures["HTTP 429"] = failures.get("HTTP 429", 0) - refused  # left: without Retry-After
    took_s = [refusal[0] for refusal in outcome.refusals]
    retry_s = [refusal[1] for refusal in outcome.refusals]
    return Phase(
        name=name,
        offered_per_s=per_s,
        requests=len(outcome.latencies_s) + sum(outcome.failures.values()),
        pictures=len(outcome.latencies_s),
        goodput_per_s=outcome.pictures_per_s,
        p50_s=outcome.quantile_s(0.5),
        p95_s=outcome.quantile_s(0.95),
        refused=refused,
        by_router=sum(count for (who, _), count in decided.items() if who == "router"),
        reasons=dict(reasons.most_common()),
        refused_p95_s=quantile(took_s, 0.95),
        retry_after_s=statistics.median(retry_s) if retry_s else 0.0,
        failed={kind: count for kind, count in failures.items() if count},
        cores=cores,
        client_cores=outcome.client_cpu_s / outcome.wall_s,
    )


def _refusals(server: RunningServer) -> Counter[tuple[str, str]]:
    """(who decided, why) of all refusals so far."""
    page = httpx.get(f"{server.url}/metrics", timeout=60.0, trust_env=False).content
    found: Counter[tuple[str, str]] = Counter()
    for family in families_of(page):
        for sample in family.samples if family.name in _REFUSALS else ():
            if sample.name.endswith("_total"):
                found[_REFUSALS[family.name], sample.labels["reason"]] += int(sample.value)
    return found


def table(phases: Sequence[Phase]) -> str:
    """Markdown: a row for each load."""
    lines = [
        "| offered | requests | pictures | pictures/s | p50 | p95 | refused | for | by the router"
        " | p95 of a refusal | Retry-After (median) | failed |",
        "|---" * 12 + "|",
    ]
    lines += [
        f"| {it.name} ({it.offered_per_s:.1f}/s) | {it.requests} | {it.pictures}"
        f" | {it.goodput_per_s:.2f} | {it.p50_s:.2f} s | {it.p95_s:.2f} s | {it.refused}"
        f" | {_reasons(it)} | {it.by_router} | {_refusal(it)}"
        f" | {sum(it.failed.values())} |"
        for it in phases
    ]
    lines += ["", "| CPU, in cores | " + " | ".join(_SHOWN) + " | other | load generator |"]
    lines.append("|---" * (len(_SHOWN) + 3) + "|")
    for it in phases:
        shown = [it.cores.get(kind, 0.0) for kind in _SHOWN]
        shown += [sum(it.cores.values()) - sum(shown), it.client_cores]
        lines.append(f"| {it.name} | " + " | ".join(f"{cores:.2f}" for cores in shown) + " |")
    return "\n".join(lines)


def _reasons(phase: Phase) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in phase.reasons.items()) or "–"


def _refusal(phase: Phase) -> str:
    if not phase.refused:
        return "– | –"
    return f"{1000 * phase.refused_p95_s:.0f} ms | {phase.retry_after_s:.0f} s"


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    """Print Markdown tables, and write every figure as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--at-once", type=int, default=16, help="clients, to find the capacity")
    parser.add_argument("--pictures", type=int, default=96, help="that they draw")
    parser.add_argument("--factor", type=float, default=10.0, help="of the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of random arrivals")
    parser.add_argument(
        "--queued-steps",
        type=int,
        help=f"that may wait: {_QUEUED_STEPS}, or with --max-wait-s the server's own default",
    )
    parser.add_argument(
        "--max-wait-s", type=float, help="of work before a request; without it only steps count"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = settings_with_threads(options.threads)
    open_plan(settings, options.model, "onnxruntime", "fp32")
    model = model_folder(settings, options.model)
    with serving_darkroom(model, threads=options.threads, admission=admission(options)) as server:
        phases = measure(server, options)
    print(conditions(options, hide=("json",)), end="\n\n")
    print(table(phases))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(phase) for phase in phases], indent=1))
    if failed := {it.name: it.failed for it in phases if it.failed}:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
