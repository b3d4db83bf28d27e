"""What may wait: the bounds of the queue, held against a request before it is taken.

The router holds them against what waits, and a gateway against what its load table and its own
sendings since say must be waiting: the same rules, so that both refuse alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import LimitExceededError
from server.config import AdmissionConfig
from server.errors import Bound, NoRoomError
from server.routing import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """What waits. Steps are UNet rows at native size.

    Attributes:
        steps: in all.
        tenant_steps: of the tenant that asks.
        requests: in all.
        steps_per_s: of all workers together; 0 while nothing is measured.
    """

    steps: float
    tenant_steps: float
    requests: float
    steps_per_s: float


def check_size(tickets: Sequence[Ticket], config: AdmissionConfig) -> None:
    """Hold a request against the bounds alone.

    Raises:
        LimitExceededError: it is larger than the whole queue.
    """
    asked = _steps(tickets)
    bound = min(config.max_queued_steps, _of_tenant(config))
    if asked > bound:
        raise LimitExceededError(
            f"the request costs {asked:.0f} steps; at most {bound:.0f} may wait", limit=bound
        )


def check_room(tickets: Sequence[Ticket], queued: Queued, config: AdmissionConfig) -> None:
    """Hold a request against what waits already.

    Raises:
        NoRoomError: it would pass a bound; with the seconds until it should not, where the workers'
            rate is known.
    """
    asked = _steps(tickets)
    over: dict[Bound, float] = {
        "queue": queued.steps + asked - config.max_queued_steps,
        "tenant": queued.tenant_steps + asked - _of_tenant(config),
    }
    if queued.requests >= config.max_queued_requests:
        over["requests"] = queued.steps / queued.requests
    bound = max(over, key=lambda name: over[name])
    if over[bound] > 0:
        raise NoRoomError(
            "too much is waiting already; try again later",
            bound=bound,
            retry_after_s=over[bound] / queued.steps_per_s if queued.steps_per_s > 0 else None,
        )


def check_wait(
    tickets: Sequence[Ticket], *, wait_s: float, spared_s: float, config: AdmissionConfig
) -> None:
    """Hold a request against the work before it; those who have said how long they wait pass.

    Args:
        wait_s: of work before the first of ``tickets``.
        spared_s: of work that they do without, of what was asked for. So much later they may begin:
            their pictures come no later than those that were asked for would have.

    Raises:
        NoRoomError: it would wait too long; with the seconds until it would not.
    """
    if config.max_wait_s is None or all(ticket.patient for ticket in tickets):
        return
    if wait_s > (bound_s := config.max_wait_s + spared_s):
        raise NoRoomError(
            f"there are {wait_s:.1f} s of work before it; without a deadline_s of its own a request"
            f" waits for at most {bound_s:g}",
            bound="wait",
            retry_after_s=wait_s - bound_s,
        )


def _steps(tickets: Sequence[Ticket]) -> float:
    return sum(ticket.steps for ticket in tickets)


def _of_tenant(config: AdmissionConfig) -> float:
    return config.max_queued_steps_per_tenant or config.max_queued_steps
