"""What a gateway refuses by itself: by the router's load table, and by its last refusal."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import LimitExceededError, OverloadedError
from server.admission import Admission
from server.config import AdmissionConfig
from server.errors import NoRoomError
from server.refusals import BELIEVED_S, Refusals
from server.routing import Grant, LoadTable, Ticket, Wait
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import RATE, report, ticket

BOUNDED = AdmissionConfig(max_queued_steps=1000, max_queued_requests=10, max_wait_s=3)
FULL = NoRoomError("full", bound="queue", retry_after_s=5.0)
LATE = NoRoomError("late", bound="deadline", retry_after_s=5.0)


def table(
    queued_steps: float = 1000.0,
    *,
    tenants: dict[str, float] | None = None,
    requests: int = 5,
    steps_per_s: float = 100.0,
    wait: Wait | None = None,
) -> LoadTable:
    return LoadTable(
        queued=requests,
        queued_steps=queued_steps,
        steps_per_s=steps_per_s,
        requests=requests,
        tenants={"a": queued_steps} if tenants is None else tenants,
        waits={} if wait is None else {("m", "a"): (wait,)},
        rates={} if wait is None else {"m": steps_per_s},
    )


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def refusals(clock: FakeClock) -> Refusals:
    return Refusals(BOUNDED, clock)


# ---------------------------------------------------------------- by the table


def test_what_a_full_queue_has_no_room_for_is_refused_until_it_may_have_drained(
    refusals: Refusals, clock: FakeClock
) -> None:
    refusals.heard(table(1000), clock.now_s())
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(60)])
    assert refused.value.bound == "queue"
    assert refused.value.retry_after_s == pytest.approx(60 / 100)
    clock.tick(0.5)  # 50 of the steps may be done
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(60)])
    assert refused.value.retry_after_s == pytest.approx(10 / 100)
    clock.tick(0.25)
    refusals.pass_on([ticket(60)])


def test_what_this_gateway_sent_since_the_table_counts_until_it_leaves(
    refusals: Refusals, clock: FakeClock
) -> None:
    refusals.heard(table(900), clock.now_s())
    sent = ticket(100)
    refusals.pass_on([sent])
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(1)])
    refusals.gave_up([sent])
    refusals.gave_up([sent, ticket(500)])  # once, and only its own
    refusals.pass_on([ticket(100)])
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(1)])


@pytest.mark.parametrize(
    "leaves", [Refusals.granted, lambda refusals, ours: refusals.gave_up([ours])]
)
def test_what_left_the_queue_is_taken_off_the_table_that_holds_it(
    refusals: Refusals, clock: FakeClock, leaves: Callable[[Refusals, Ticket], None]
) -> None:
    refusals.heard(table(0), clock.now_s())
    ours = ticket(400)
    refusals.pass_on([ours])
    clock.tick(0.1)
    asked_at_s = clock.now_s()
    refusals.heard(table(1000), asked_at_s)
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(400)])
    leaves(refusals, ours)
    refusals.pass_on([ticket(400)])
    clock.tick(0.1)
    refusals.heard(table(1000), clock.now_s())  # taken after that: it counts what is there
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(400)])


def test_what_was_sent_or_left_while_the_table_was_on_its_way_is_not_counted_against_anyone(
    refusals: Refusals, clock: FakeClock
) -> None:
    """The router may have seen it or not: the request is the router's to decide."""
    refusals.heard(table(0), clock.now_s())
    leaves = ticket(500)
    refusals.pass_on([leaves])
    clock.tick(0.01)
    asked_at_s = clock.now_s()
    refusals.pass_on([ticket(300)])
    refusals.granted(leaves)
    refusals.heard(table(1000), asked_at_s)
    refusals.pass_on([ticket(500)])
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(1)])


def test_a_tenant_at_its_own_bound_is_refused_where_another_is_not(clock: FakeClock) -> None:
    config = AdmissionConfig(max_queued_steps=1000, max_queued_steps_per_tenant=200)
    refusals = Refusals(config, clock)
    refusals.heard(table(300, tenants={"a": 200, "b": 100}), clock.now_s())
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(50, tenant="a")])
    assert refused.value.bound == "tenant"
    assert refused.value.retry_after_s == pytest.approx(50 / 100)
    refusals.pass_on([ticket(50, tenant="b")])
    refusals.pass_on([ticket(50, tenant="new")])
    with pytest.raises(NoRoomError):  # its own of a moment ago
        refusals.pass_on([ticket(101, tenant="b")])


def test_requests_are_bounded_in_number(refusals: Refusals, clock: FakeClock) -> None:
    refusals.heard(table(90, requests=9), clock.now_s())
    refusals.pass_on([ticket(1, request_id="r"), ticket(1, request_id="r")])
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(1)])
    assert refused.value.bound == "requests"
    assert refused.value.retry_after_s == pytest.approx(92 / 10 / 100)


def test_more_work_than_anybody_waits_for_is_refused_until_it_may_be_done(
    refusals: Refusals, clock: FakeClock
) -> None:
    refusals.heard(table(400, wait=Wait(0, seconds=5.0, queued_s=4.0)), clock.now_s())
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(1)])
    assert refused.value.bound == "wait"
    assert refused.value.retry_after_s == pytest.approx(2.0)
    clock.tick(1.5)
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(1)])
    assert refused.value.retry_after_s == pytest.approx(0.5)
    clock.tick(0.5)
    refusals.pass_on([ticket(1)])


@pytest.mark.parametrize(
    "other",
    [
        ticket(1, patient=True),
        ticket(1, priority=1),
        ticket(1, tenant="b"),
        ticket(1, model="other"),
        ticket(1, spared_steps=200),
    ],
    ids=["patient", "more urgent", "another tenant's", "another model", "degraded"],
)
def test_whose_wait_the_table_does_not_tell_or_bound_is_asked_for(
    refusals: Refusals, clock: FakeClock, other: Ticket
) -> None:
    refusals.heard(table(400, wait=Wait(0, seconds=5.0, queued_s=4.0)), clock.now_s())
    refusals.pass_on([other])
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(1, priority=-1)])


def test_what_this_gateway_sent_since_is_waited_for_too(
    refusals: Refusals, clock: FakeClock
) -> None:
    refusals.heard(table(200, wait=Wait(0, seconds=2.5, queued_s=2.0)), clock.now_s())
    refusals.pass_on([ticket(100, tenant="b")])
    refusals.pass_on([ticket(100)])
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(1)])
    assert refused.value.retry_after_s == pytest.approx(0.5)


def test_the_next_in_line_is_asked_for_however_long_what_runs_takes(
    refusals: Refusals, clock: FakeClock
) -> None:
    ours = ticket(100)
    refusals.pass_on([ours])
    clock.tick(0.1)
    refusals.heard(table(100, wait=Wait(0, seconds=10.0, queued_s=1.0)), clock.now_s())
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(1)])
    refusals.granted(ours)
    refusals.pass_on([ticket(1)])


def test_who_gives_up_lets_his_tenant_move_ahead_and_its_wait_is_asked_for(
    refusals: Refusals, clock: FakeClock
) -> None:
    ours = ticket(1)
    refusals.pass_on([ours])
    clock.tick(0.1)
    refusals.heard(table(900, wait=Wait(0, seconds=9.0, queued_s=9.0)), clock.now_s())
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(1)])
    refusals.gave_up([ours])
    refusals.pass_on([ticket(1)])


def test_a_patient_request_does_not_share_the_refusal_of_an_impatient_one(
    refusals: Refusals,
) -> None:
    refusals.note([ticket(40, deadline_at_s=700)], NoRoomError("w", bound="wait", retry_after_s=9))
    refusals.pass_on([ticket(40, deadline_at_s=200, patient=True)])
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(40, deadline_at_s=700)])


def test_a_rung_that_spares_steps_does_not_share_the_refusal_of_one_that_spares_none(
    refusals: Refusals,
) -> None:
    refusals.note([ticket(10)], NoRoomError("w", bound="wait", retry_after_s=9))
    refusals.pass_on([ticket(20, spared_steps=60)])
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(20)])


def test_a_request_larger_than_the_queue_is_told_the_bound_without_any_table(
    refusals: Refusals,
) -> None:
    with pytest.raises(LimitExceededError):
        refusals.pass_on([ticket(600), ticket(600)])


def test_without_measured_rates_nothing_drains_and_no_time_is_named(
    refusals: Refusals, clock: FakeClock
) -> None:
    refusals.heard(table(1000, steps_per_s=0.0), clock.now_s())
    clock.tick(1)
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(40)])
    assert refused.value.retry_after_s is None


def test_an_old_table_is_believed_no_longer(refusals: Refusals, clock: FakeClock) -> None:
    refusals.heard(table(1000, steps_per_s=0.0), clock.now_s())
    clock.tick(BELIEVED_S)
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket()])
    clock.tick(0.1)
    refusals.pass_on([ticket()])


def test_a_table_that_was_overtaken_is_not_believed(refusals: Refusals, clock: FakeClock) -> None:
    first_s = clock.now_s()
    clock.tick(0.1)
    refusals.heard(table(0), clock.now_s())
    refusals.heard(table(1000), first_s)
    refusals.pass_on([ticket(500)])


@pytest.mark.parametrize("known", ["table", "refusal"])
def test_what_was_admitted_before_is_never_refused(
    refusals: Refusals, clock: FakeClock, known: str
) -> None:
    if known == "table":
        refusals.heard(table(1000), clock.now_s())
    else:
        refusals.note([ticket(40)], FULL)
    refusals.pass_on([ticket(40, resumed=True)])


def test_refusals_that_are_decided_here_are_counted_by_reason(clock: FakeClock) -> None:
    counted: Counter[str] = Counter()
    refusals = Refusals(BOUNDED, clock, refused=lambda reason: counted.update([reason]))
    refusals.heard(table(1000), clock.now_s())
    for steps in (40, 40, 2000):
        with pytest.raises((NoRoomError, LimitExceededError)):
            refusals.pass_on([ticket(steps)])
    refusals.note([ticket(40, tenant="b")], LATE)
    assert counted == {"queue": 2, "limit_exceeded": 1}


@given(st.data())
def test_what_the_router_would_take_is_not_refused_by_its_only_gateway(data: st.DataObject) -> None:
    """Whatever is sent, granted, given up and told, and however late the tables come.

    A router that refuses remembers nothing, so that last refusals are left out here.
    """
    clock, names = FakeClock(), itertools.count()
    config = AdmissionConfig(
        max_queued_steps=500,
        max_queued_steps_per_tenant=300,
        max_queued_requests=6,
        max_wait_s=data.draw(st.sampled_from([0.5, 2.0, None])),
    )
    router = Admission(config, weights={}, clock=clock)
    refusals = Refusals(config, clock)
    router.report(report())
    waiting: dict[str, Ticket] = {}
    running: dict[str, Grant] = {}
    on_the_way: list[tuple[LoadTable, float]] = []
    for _ in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["ask", "ask", "grant", "end", "leave", "look", "tick"])):
            case "ask":
                costs = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
                tenant, name = data.draw(st.sampled_from("ab")), f"r{next(names)}"
                priority, patient = data.draw(st.integers(0, 1)), data.draw(st.booleans())
                new = [
                    ticket(
                        cost,
                        # Its own names: one example must draw the same whatever ran before it.
                        id=f"{name}-{number}",
                        tenant=tenant,
                        request_id=name,
                        arrived_at_s=clock.now_s(),
                        priority=priority,
                        patient=patient,
                        spared_steps=data.draw(st.integers(0, 90)),
                    )
                    for number, cost in enumerate(costs)
                ]
                try:
                    refusals.pass_on(new)
                except NoRoomError:
                    with pytest.raises(OverloadedError):
                        router.admit(new)
                    continue
                try:
                    router.admit(new)
                    waiting |= {it.id: it for it in new}
                except OverloadedError:
                    refusals.gave_up(new)
            case "grant":
                for grant in router.grants():
                    refusals.granted(waiting.pop(grant.ticket.id))
                    running[grant.ticket.id] = grant
            case "end" if running:
                router.end(running.pop(data.draw(st.sampled_from(sorted(running)))).ticket.id)
                on_the_way.clear()  # a gateway asks at once when a lease ends
                refusals.heard(router.table(), clock.now_s())
            case "leave" if waiting:
                gone = waiting.pop(data.draw(st.sampled_from(sorted(waiting))))
                router.end(gone.id)
                refusals.gave_up([gone])
            case "look":
                on_the_way.append((router.table(), clock.now_s()))
            case "tick":
                clock.tick(data.draw(st.floats(0, 0.5)))
        if data.draw(st.booleans()) and on_the_way:
            refusals.heard(*on_the_way.pop(0))


# ---------------------------------------------------------------- by the last refusal


def test_the_like_of_what_was_refused_is_refused_for_a_second(
    refusals: Refusals, clock: FakeClock
) -> None:
    refusals.pass_on([ticket(40)])
    refusals.note([ticket(40)], FULL)
    clock.tick(0.5)
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(40)])
    assert refused.value.bound == "queue"
    assert refused.value.retry_after_s == pytest.approx(4.5)
    clock.tick(0.5)
    refusals.pass_on([ticket(40)])


@pytest.mark.parametrize(
    "other",
    [
        ticket(39, deadline_at_s=150),
        ticket(40, tenant="b", deadline_at_s=150),
        ticket(40, model="other", deadline_at_s=150),
        ticket(40, priority=1, deadline_at_s=150),
        ticket(40, deadline_at_s=151),
        ticket(40),
    ],
    ids=[
        "smaller",
        "another tenant's",
        "another model",
        "more urgent",
        "more patient",
        "without a deadline",
    ],
)
def test_what_might_be_admitted_is_asked_for(refusals: Refusals, other: Ticket) -> None:
    refusals.note([ticket(40, deadline_at_s=150)], FULL)
    refusals.pass_on([other])


def test_deadlines_move_on_with_the_requests_that_name_them(
    refusals: Refusals, clock: FakeClock
) -> None:
    """As those do that gateways set for requests that name none."""
    now_s = clock.now_s()
    refusals.note([ticket(40, arrived_at_s=now_s, deadline_at_s=now_s + 600)], FULL)
    clock.tick(0.5)
    now_s = clock.now_s()
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(40, arrived_at_s=now_s, deadline_at_s=now_s + 600)])
    refusals.pass_on([ticket(40, arrived_at_s=now_s, deadline_at_s=now_s + 601)])


def test_a_short_wait_is_believed_for_no_longer(refusals: Refusals, clock: FakeClock) -> None:
    refusals.note([ticket()], NoRoomError("busy", bound="queue", retry_after_s=0.2))
    clock.tick(0.25)
    refusals.pass_on([ticket()])


def test_a_table_that_is_newer_than_a_refusal_counts_instead_but_tells_no_deadlines(
    refusals: Refusals, clock: FakeClock
) -> None:
    refusals.note([ticket(40)], FULL)
    refusals.note([ticket(40, tenant="b")], LATE)
    refusals.heard(table(0), clock.now_s())  # asked for no later than that
    with pytest.raises(NoRoomError):
        refusals.pass_on([ticket(40)])
    clock.tick(0.1)
    refusals.heard(table(0), clock.now_s())
    refusals.pass_on([ticket(40)])
    with pytest.raises(NoRoomError) as refused:
        refusals.pass_on([ticket(40, tenant="b")])
    assert refused.value.bound == "deadline"


def test_what_was_refused_does_not_count_as_sent(refusals: Refusals, clock: FakeClock) -> None:
    refusals.heard(table(500), clock.now_s())
    asked = [ticket(500, tenant="b")]
    refusals.pass_on(asked)
    refusals.note(asked, FULL)
    refusals.pass_on([ticket(500)])


def test_the_rate_of_the_tests_is_the_one_that_workers_report() -> None:
    admission = Admission(BOUNDED, weights={}, clock=FakeClock())
    admission.report(report())
    admission.admit([ticket(60, request_id="r"), ticket(40, request_id="r", tenant="a")])
    assert admission.table() == LoadTable(
        queued=2,
        queued_steps=100,
        steps_per_s=RATE.steps_per_s,
        requests=1,
        tenants={"a": 100},
        waits={("m", "a"): (Wait(0, seconds=1.0, queued_s=1.0),)},
        rates={"m": RATE.steps_per_s},
    )
