"""Admission, leases, and placement on workers: all policy of the router, and nothing else.

No Ray, no I/O, no clock of its own: the router feeds it and carries out what it says. Everything is
counted in *steps*, UNet rows at the model's native size, because a request may cost five or five
hundred. What a ticket meets, in this order:

1. *Admission* is all or nothing for the tickets of a request, bounded in steps in all and per
   tenant, and in the seconds of work before it, by the measured rates. A deadline that these cannot
   meet is refused at once, with the time after which it could have been met; one that not even an
   idle application meets, with that said. Whoever named a deadline, or made a job, has said how
   long he waits, and no other bound in seconds applies.
2. *The fair queue* (:mod:`server.fair_queue`).
3. *Placement* (:mod:`server.fleet`): workers hold just enough to be busy, and the rest waits here,
   where it can still be put in order.
4. *A lease*, renewed by its gateway's heartbeat. Silence frees what a dead gateway held, and the
   worker hears at its next report what it need not go on with.

A new instance knows nothing. Reports and heartbeats say within seconds what is running.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.ports import Clock
from server.bounds import Queued, check_room, check_size, check_wait
from server.config import AdmissionConfig
from server.errors import DeadlineTooShortError, NoRoomError
from server.fair_queue import FairQueue
from server.fleet import AdmissionPolicy, Fleet, Held
from server.forecast import Forecast
from server.messages import Load
from server.routing import Grant, LoadTable, Ticket, WorkerReport


@dataclass(slots=True)
class _Lease:
    grant: Grant
    steps_left: float
    renewed_at_s: float


class Admission:
    """Tickets that wait, leases at work, and the workers. Belongs to one event loop.

    ``clock`` gives Unix time, because arrivals and deadlines come from other processes.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        *,
        weights: Mapping[str, float],
        clock: Clock,
        policy: AdmissionPolicy | None = None,
    ) -> None:
        self._config = config
        self._policy = policy or AdmissionPolicy()
        self._clock = clock
        self._queue = FairQueue(weights, config.aging_s)
        self._leases: dict[str, _Lease] = {}
        self._fleet = Fleet(self._policy, clock)
        self._gateways: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        """When gateways ended leases, kept while a worker's report may still name them."""

    # ------------------------------------------------------------------ what gateways say

    def admit(self, tickets: Sequence[Ticket]) -> None:
        """Take the tickets of one request, all of them or none.

        Neither bounds nor deadlines are held against resumed ones: they were admitted before.

        Raises:
            NoRoomError: the queue is full, or busy beyond the bound on the wait or the deadline;
                with the seconds until that should have changed.
            DeadlineTooShortError: an idle application could not meet the deadline either.
            LimitExceededError: the request alone is larger than the whole queue.
        """
        fresh = [ticket for ticket in tickets if not ticket.resumed]
        if fresh:
            check_size(fresh, self._config)
            check_room(fresh, self._queued(fresh[0].tenant), self._config)
        for ticket in tickets:
            self._gateways[ticket.gateway] = self._clock.now_s()
            self._leases.pop(ticket.id, None)
            self._ended.pop(ticket.id, None)
            self._queue.push(ticket)
        try:
            self._check_times(fresh)
        except (NoRoomError, DeadlineTooShortError):
            for ticket in tickets:
                self._queue.remove(ticket.id)
            raise

    def end(self, ticket_id: str) -> None:
        """Forget a ticket, waiting or running: it is done, cancelled or given up."""
        self._queue.remove(ticket_id)
        if self._leases.pop(ticket_id, None) is not None:
            self._ended[ticket_id] = self._clock.now_s()

    def give_back(self, grant: Grant) -> None:
        """End a lease that nobody has heard of, unless its ticket has come again since."""
        lease = self._leases.get(grant.ticket.id)
        if lease is not None and lease.grant is grant:
            self.end(grant.ticket.id)

    def heard(self, gateway: str, running: Iterable[Grant]) -> None:
        """A gateway lives, and this is what runs for it: renew its leases, or learn of them."""
        self._gateways[gateway] = self._clock.now_s()
        for grant in running:
            id_ = grant.ticket.id
            if id_ not in self._ended and id_ not in self._queue:
                known = self._leases.get(id_)
                self._lease(grant, known.steps_left if known else grant.ticket.steps)

    def lose(self, worker: str) -> bool:
        """A gateway cannot reach a worker: its leases are void, and for a while it gets no more.

        It may still report, when it is being stopped or the gateway is mistaken. Returns whether
        this is news.
        """
        self._leases = {i: held for i, held in self._leases.items() if held.grant.worker != worker}
        return self._fleet.lose(worker)

    # ------------------------------------------------------------------ what workers say

    def report(self, report: WorkerReport) -> tuple[str, ...]:
        """Note what a worker has and does; returns the ids that run on it for nobody any more.

        A task that nobody is known to wait for holds a lease for a while, so that an instance that
        has just started counts what it did not grant until the gateways claim it.
        """
        now_s = self._clock.now_s()
        self._fleet.heard(report)
        orphans = []
        for live in report.live:
            if (lease := self._leases.get(live.id)) is not None:
                lease.steps_left = live.steps_left
                if now_s - lease.renewed_at_s > self._policy.lease_s:
                    orphans.append(live.id)
            elif (ended_at_s := self._ended.get(live.id)) is not None:
                # The report crossed the gateway's word on its way, or a cancel was lost.
                if now_s - ended_at_s > self._policy.report_s:
                    orphans.append(live.id)
            elif live.id not in self._queue:
                unclaimed = Ticket(
                    id=live.id,
                    request_id="",
                    gateway="",
                    tenant="",
                    model=live.model,
                    steps=live.steps_left,
                    width=live.width,
                    arrived_at_s=now_s,
                )
                self._lease(Grant(unclaimed, report.id), live.steps_left)
        return tuple(orphans)

    # ------------------------------------------------------------------ what the router does

    def grants(self) -> list[Grant]:
        """Start what can start now, in fair order."""
        granted: list[Grant] = []
        wanted = {ticket.model for ticket in self._queue}
        blocked: set[str] = set()
        holdings = self._fleet.open_to(self._held()) if wanted else []
        for ticket in self._queue.in_order():
            if blocked == wanted:
                break
            if ticket.model in blocked:
                continue
            worker = self._fleet.place(ticket.model, holdings, wanted)
            if worker is None:
                blocked.add(ticket.model)
                continue
            self._queue.start(ticket)
            worker.add(ticket, ticket.steps)
            granted.append(Grant(ticket, worker.report.id))
            self._lease(granted[-1], ticket.steps)
        return granted

    def sweep(self) -> list[Ticket]:
        """Drop what nobody speaks for any more; returns tickets whose deadline passed waiting."""
        now_s = self._clock.now_s()
        silent_s = now_s - self._policy.lease_s
        void_s = silent_s - self._policy.lease_s
        self._gateways = {i: at_s for i, at_s in self._gateways.items() if at_s >= silent_s}
        self._fleet.sweep()
        # A void lease stays for as long again: meanwhile the worker's reports earn it a cancel.
        self._leases = {i: held for i, held in self._leases.items() if held.renewed_at_s >= void_s}
        self._ended = {i: at_s for i, at_s in self._ended.items() if at_s >= void_s}
        late = []
        for ticket in self._queue:
            passed = ticket.deadline_at_s is not None and now_s >= ticket.deadline_at_s
            if passed:
                late.append(ticket)
            if passed or ticket.gateway not in self._gateways:
                self._queue.remove(ticket.id)
        if not self._leases:
            self._queue.forgive()
        return late

    def drop(self, unwanted: Callable[[str], bool]) -> list[Ticket]:
        """Drop what waits for a model that is ``unwanted``; returns it."""
        dropped = [ticket for ticket in self._queue if unwanted(ticket.model)]
        for ticket in dropped:
            self._queue.remove(ticket.id)
        return dropped

    def places(self) -> dict[str, tuple[int, int]]:
        """(position from 1, steps ahead of it in the queue) of every ticket that waits."""
        places = {}
        ahead = 0.0
        for position, ticket in enumerate(self._queue.in_order(), start=1):
            places[ticket.id] = (position, round(ahead))
            ahead += ticket.steps
        return places

    def waiting(self) -> set[str]:
        """Ids of the tickets that wait."""
        return {ticket.id for ticket in self._queue}

    def load(self) -> Load:
        """How busy the application is."""
        return Load(
            queued=len(self._queue),
            queued_steps=self._queue.steps(),
            running=len(self._leases),
            running_steps=sum(lease.steps_left for lease in self._leases.values()),
            steps_per_s=self._fleet.steps_per_s(),
        )

    def table(self) -> LoadTable:
        """The same in detail."""
        load = self.load()
        forecast = self._forecast()
        waits = {} if self._config.max_wait_s is None else forecast.waits()
        return LoadTable(
            queued=load.queued,
            queued_steps=load.queued_steps,
            running=load.running,
            running_steps=load.running_steps,
            steps_per_s=load.steps_per_s,
            requests=self._queue.requests(),
            tenants=self._queue.tenants(),
            waits=waits,
            rates=forecast.rates(),
        )

    def gateways(self) -> tuple[str, ...]:
        """Every gateway that was heard lately."""
        return tuple(self._gateways)

    def workers(self) -> tuple[WorkerReport, ...]:
        """The last report of every worker that is heard of."""
        return self._fleet.reports()

    # ------------------------------------------------------------------ bounds and deadlines

    def _queued(self, tenant: str) -> Queued:
        return Queued(
            steps=self._queue.steps(),
            tenant_steps=self._queue.steps(tenant),
            requests=self._queue.requests(),
            steps_per_s=self._fleet.steps_per_s(),
        )

    def _check_times(self, tickets: Sequence[Ticket]) -> None:
        """Hold wait and deadlines against the work before the tickets, which are in the queue."""
        if not tickets or not len(self._fleet):
            return  # without a measurement there is nothing to judge by
        now_s = self._clock.now_s()
        forecast = self._forecast()
        for number, (ticket, outlook) in enumerate(forecast.of(tickets)):
            left_s = math.inf if ticket.deadline_at_s is None else ticket.deadline_at_s - now_s
            alone_s = ticket.steps / ticket.width * self._fleet.tick_s(ticket.model)
            if alone_s > left_s:
                raise DeadlineTooShortError(
                    f"the picture takes {alone_s:.2f} s even alone; the deadline leaves"
                    f" {max(0.0, left_s):.2f}: waiting does not help, more time or fewer steps do",
                    retry_after_s=forecast.all_s(without={it.id for it in tickets}),
                )
            if number == 0 and outlook.queued:
                check_wait(
                    tickets,
                    wait_s=outlook.wait_s,
                    spared_s=sum(forecast.seconds(it.model, it.spared_steps) for it in tickets),
                    config=self._config,
                )
            if outlook.done_s > left_s:
                raise NoRoomError(
                    f"the picture would take {outlook.done_s:.1f} s with the work before it; the"
                    f" deadline leaves {left_s:.1f}",
                    bound="deadline",
                    retry_after_s=outlook.done_s - left_s,
                )

    def _forecast(self) -> Forecast:
        return Forecast(self._fleet, self._held(), self._queue.in_order)

    def _held(self) -> Iterator[Held]:
        """Everything at work."""
        for lease in self._leases.values():
            yield lease.grant.worker, lease.grant.ticket, lease.steps_left

    def _lease(self, grant: Grant, steps_left: float) -> None:
        self._leases[grant.ticket.id] = _Lease(grant, steps_left, self._clock.now_s())
