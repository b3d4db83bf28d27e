"""Admission and the fair queue: bounds, order, placement, leases. No Ray, no waiting."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import LimitExceededError, OverloadedError
from server.admission import Admission
from server.config import AdmissionConfig
from server.errors import DeadlineTooShortError, NoRoomError, retry_after_s, row_of
from server.fleet import AdmissionPolicy
from server.messages import ModelInfo
from server.routing import Grant, Live, Rate, Ticket, Wait, WorkerReport
from server.switched import NOTHING, Switched
from tests.fake_clock import FakeClock
from tests.unit.server.scripted import MODEL

RATE = Rate(steps_per_s=100.0, saturation_steps=8.0, tick_s=0.02)
_ids = itertools.count()


def ticket(
    steps: float = 40.0,
    *,
    tenant: str = "a",
    id: str | None = None,
    request_id: str | None = None,
    model: str = "m",
    width: float = 2.0,
    arrived_at_s: float = 100.0,
    priority: int = 0,
    deadline_at_s: float | None = None,
    resumed: bool = False,
    patient: bool = False,
    spared_steps: float = 0.0,
    gateway: str = "g",
) -> Ticket:
    id = id or f"t{next(_ids)}"
    return Ticket(
        id=id,
        request_id=request_id or id,
        gateway=gateway,
        tenant=tenant,
        model=model,
        steps=steps,
        width=width,
        arrived_at_s=arrived_at_s,
        priority=priority,
        deadline_at_s=deadline_at_s,
        resumed=resumed,
        patient=patient,
        spared_steps=spared_steps,
    )


def model(id: str) -> ModelInfo:
    return replace(MODEL, id=id)


def report(
    id: str = "w",
    *,
    live: tuple[Live, ...] = (),
    rates: Mapping[str, Rate] | None = None,
    models: tuple[ModelInfo, ...] = (model("m"), model("other")),
    switched: Switched = NOTHING,
) -> WorkerReport:
    return WorkerReport(
        id=id,
        rates={"m": RATE} if rates is None else rates,
        models=models,
        live=live,
        switched=switched,
    )


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make(clock: FakeClock) -> Callable[..., Admission]:
    def admission(
        *,
        weights: Mapping[str, float] | None = None,
        policy: AdmissionPolicy | None = None,
        **keys: float | None,
    ) -> Admission:
        config = AdmissionConfig.model_validate(keys)
        return Admission(config, weights=weights or {}, clock=clock, policy=policy)

    return admission


# ---------------------------------------------------------------- bounds


def test_the_queue_is_bounded_in_steps_and_says_when_to_come_back(
    make: Callable[..., Admission],
) -> None:
    admission = make(max_queued_steps=100)
    admission.report(report())
    admission.admit([ticket(60)])
    with pytest.raises(OverloadedError) as refused:
        admission.admit([ticket(60)])
    assert refused.value.retry_after_s == pytest.approx(20 / RATE.steps_per_s)
    assert admission.load().queued == 1


def test_a_tenant_is_bounded_where_another_is_not(make: Callable[..., Admission]) -> None:
    admission = make(max_queued_steps=1000, max_queued_steps_per_tenant=100)
    admission.admit([ticket(80, tenant="a")])
    with pytest.raises(OverloadedError):
        admission.admit([ticket(80, tenant="a")])
    admission.admit([ticket(80, tenant="b")])


def test_a_request_is_admitted_whole_or_not_at_all(make: Callable[..., Admission]) -> None:
    admission = make(max_queued_steps=100)
    admission.admit([ticket(40)])
    with pytest.raises(OverloadedError):
        admission.admit([ticket(40, request_id="r"), ticket(40, request_id="r")])
    assert admission.load().queued_steps == 40


def test_a_request_larger_than_the_queue_is_told_the_bound(make: Callable[..., Admission]) -> None:
    with pytest.raises(LimitExceededError) as refused:
        make(max_queued_steps=100).admit([ticket(60), ticket(60)])
    assert refused.value.limit == 100


def test_requests_are_bounded_in_number_too(make: Callable[..., Admission]) -> None:
    admission = make(max_queued_requests=2)
    admission.admit([ticket(1, request_id="r1"), ticket(1, request_id="r1")])
    admission.admit([ticket(1, request_id="r2")])
    with pytest.raises(OverloadedError):
        admission.admit([ticket(1, request_id="r3")])


def test_what_was_admitted_before_is_not_refused(make: Callable[..., Admission]) -> None:
    admission = make(max_queued_steps=100)
    admission.admit([ticket(100)])
    admission.admit([ticket(100, resumed=True)])
    assert admission.load().queued == 2


# ---------------------------------------------------------------- the wait


def crowded(admission: Admission, **keys: Any) -> None:
    """Two seconds of work at work, and two that wait: ``keys`` are of these."""
    admission.report(report())
    admission.admit([ticket(200)])
    assert len(admission.grants()) == 1
    admission.admit([ticket(200, **keys)])


def test_more_work_than_anybody_waits_for_is_refused_until_enough_of_it_is_done(
    make: Callable[..., Admission],
) -> None:
    admission = make(max_wait_s=3)
    crowded(admission)
    with pytest.raises(NoRoomError) as refused:
        admission.admit([ticket(1)])
    assert refused.value.bound == "wait"
    assert refused.value.retry_after_s == pytest.approx(2 + 2 - 3)
    assert admission.load().queued == 1
    crowd = make(max_wait_s=4)
    crowded(crowd)
    crowd.admit([ticket(1)])


def test_without_a_bound_on_the_wait_only_steps_count(make: Callable[..., Admission]) -> None:
    admission = make(max_wait_s=None)
    crowded(admission)
    admission.admit([ticket(10_000)])
    admission.admit([ticket(1)])
    assert admission.table().waits == {}


def test_by_default_it_is_half_a_minute(make: Callable[..., Admission]) -> None:
    admission = make()
    crowded(admission)
    admission.admit([ticket(2700)])
    with pytest.raises(NoRoomError):
        admission.admit([ticket(1)])


def test_the_next_in_line_is_taken_however_long_what_runs_takes(
    make: Callable[..., Admission],
) -> None:
    admission = make(max_wait_s=1)
    admission.report(report())
    admission.admit([ticket(1000, width=16)])
    admission.grants()
    admission.admit([ticket(40)])
    with pytest.raises(NoRoomError):
        admission.admit([ticket(40)])


def test_a_request_is_not_in_its_own_way(make: Callable[..., Admission]) -> None:
    admission = make(max_wait_s=3)
    admission.report(report())
    admission.admit([ticket(100)])
    admission.admit([ticket(300, request_id="large") for _ in range(5)])
    with pytest.raises(NoRoomError):
        admission.admit([ticket(1)])


@pytest.mark.parametrize(
    "other",
    [
        ticket(1, patient=True),
        ticket(1, patient=True, deadline_at_s=105),
        ticket(1, resumed=True),
        ticket(1, priority=1),
        ticket(1, tenant="b"),
        ticket(1, spared_steps=100),
    ],
    ids=["a job", "a deadline", "admitted before", "more urgent", "another tenant", "degraded"],
)
def test_who_waits_by_another_word_or_does_not_is_taken(
    make: Callable[..., Admission], other: Ticket
) -> None:
    admission = make(max_wait_s=3)
    crowded(admission)
    admission.admit([other])


def test_a_patient_request_is_held_to_its_deadline(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make(max_wait_s=1)
    crowded(admission)
    with pytest.raises(NoRoomError) as refused:
        admission.admit([ticket(100, patient=True, deadline_at_s=clock.now_s() + 4)])
    assert refused.value.bound == "deadline"


@pytest.mark.parametrize("reports", [(), (report(rates={}),)], ids=["no worker", "nothing open"])
def test_without_measured_rates_no_wait_is_judged(
    make: Callable[..., Admission], reports: tuple[WorkerReport, ...]
) -> None:
    admission = make(max_wait_s=1)
    for told in reports:
        admission.report(told)
    admission.admit([ticket(1000)])
    admission.admit([ticket(1000)])
    assert admission.load().queued == 2


def test_work_on_other_workers_is_in_nobodys_way(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make(max_wait_s=3)
    admission.report(report("w1", rates={"m": RATE}))
    admission.report(report("w2", rates={"other": RATE}))
    admission.admit([ticket(900, model="other"), ticket(10, model="m")])
    admission.admit([ticket(100, model="m", deadline_at_s=clock.now_s() + 2)])
    with pytest.raises(NoRoomError):
        admission.admit([ticket(10, model="other")])
    admission.admit([ticket(10, model="m")])
    admission.report(report("w3", rates={"m": RATE, "other": RATE}))  # may have to do both
    with pytest.raises(NoRoomError):
        admission.admit([ticket(10, model="m")])


def test_the_table_tells_the_wait_of_whoever_comes_next(make: Callable[..., Admission]) -> None:
    admission = make(max_wait_s=60)
    admission.report(report())
    admission.admit([ticket(200)])
    admission.grants()
    admission.admit([ticket(100, priority=1), ticket(300, priority=0)])
    admission.admit([ticket(100, priority=0, tenant="b")])
    table = admission.table()
    assert table.rates == {"m": 100.0}
    assert set(table.waits) == {("m", "a"), ("m", "b")}
    # b has had nothing so far and goes first.
    assert table.waits["m", "b"] == (Wait(0, seconds=3.0, queued_s=1.0),)
    assert table.waits["m", "a"] == (
        Wait(0, seconds=7.0, queued_s=5.0),
        Wait(1, seconds=4.0, queued_s=2.0),
    )


# ---------------------------------------------------------------- deadlines


def test_a_deadline_behind_too_much_work_is_refused_with_the_excess(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.report(report())
    admission.admit([ticket(400)])
    with pytest.raises(OverloadedError) as refused:
        admission.admit([ticket(100, deadline_at_s=clock.now_s() + 3)])
    assert refused.value.retry_after_s == pytest.approx((400 + 100) / 100 - 3)
    assert admission.load().queued == 1
    admission.admit([ticket(100, deadline_at_s=clock.now_s() + 5.5)])


def test_running_work_counts_against_a_deadline_as_far_as_it_is_left(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.report(report())
    admission.admit([ticket(400, id="first")])
    admission.grants()
    late = ticket(100, deadline_at_s=clock.now_s() + 3)
    with pytest.raises(OverloadedError):
        admission.admit([late])
    admission.report(report(live=(Live(id="first", model="m", steps_left=100, width=2),)))
    admission.admit([late])


def test_a_deadline_that_an_idle_machine_misses_is_not_worth_a_retry(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.report(report())
    soon = clock.now_s() + 0.3
    with pytest.raises(DeadlineTooShortError, match=r"takes 0\.40 s even alone") as refused:
        admission.admit([ticket(40, width=2, deadline_at_s=soon)])  # 20 ticks of 20 ms
    assert retry_after_s(refused.value) == 1  # nothing is in the way, and there is no less than 1
    assert admission.load().queued == 0


def test_an_impossible_deadline_is_told_when_the_queue_will_have_drained(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.report(report())  # 100 steps a second
    admission.admit([ticket(400, id="runs")])
    admission.grants()
    admission.admit([ticket(300, id="waits"), ticket(200, id="waits too")])
    late = [ticket(40, width=2, deadline_at_s=clock.now_s() + 0.3, id=f"late {i}") for i in (0, 1)]
    with pytest.raises(DeadlineTooShortError) as refused:
        admission.admit(late)
    assert refused.value.retry_after_s == pytest.approx(4 + 3 + 2)  # its own two not among them
    row = row_of(refused.value)
    assert (row.status, row.code) == (429, "deadline_too_short")
    assert admission.load().queued == 2


def test_a_deadline_that_passes_in_the_queue_is_swept_out(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.admit([ticket(id="late", deadline_at_s=clock.now_s() + 3), ticket(id="patient")])
    clock.tick(4)
    assert [swept.id for swept in admission.sweep()] == ["late"]
    assert admission.load().queued == 1


# ---------------------------------------------------------------- order


def granted_order(admission: Admission) -> list[Ticket]:
    """Everything that waits, in the order in which one worker gets it."""
    admission.report(report())
    order = []
    while batch := admission.grants():
        for grant in batch:
            order.append(grant.ticket)
            admission.end(grant.ticket.id)
    return order


def test_first_come_first_served_and_a_level_of_priority_is_so_many_seconds(
    make: Callable[..., Admission],
) -> None:
    admission = make(aging_s=30)
    admission.admit([ticket(id="old", arrived_at_s=0)])
    admission.admit([ticket(id="urgent", arrived_at_s=40, priority=1)])
    admission.admit([ticket(id="more urgent", arrived_at_s=50, priority=2)])
    admission.admit([ticket(id="new", arrived_at_s=60)])
    assert [t.id for t in granted_order(admission)] == ["more urgent", "old", "urgent", "new"]


def test_a_flood_does_not_delay_another_tenant(make: Callable[..., Admission]) -> None:
    admission = make()
    for _ in range(20):
        admission.admit([ticket(tenant="flood")])
    admission.admit([ticket(tenant="quiet", id="quiet")])
    assert [t.id for t in granted_order(admission)].index("quiet") <= 1


def test_a_tenant_that_paused_has_saved_nothing_up(make: Callable[..., Admission]) -> None:
    admission = make(policy=AdmissionPolicy(depth=0.1))
    admission.report(report())
    for _ in range(10):
        admission.admit([ticket(tenant="steady")])
    for _ in range(4):
        [grant] = admission.grants()
        admission.end(grant.ticket.id)
    for _ in range(6):
        admission.admit([ticket(tenant="back")])
    # Not six of its own first, for all that it has not had: they take turns from here on.
    assert Counter(t.tenant for t in granted_order(admission)[:7]) == {"steady": 3, "back": 4}


@given(
    costs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 200)), min_size=1, max_size=60),
    weights=st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 3.0]) for name in "abc"}),
)
def test_while_two_tenants_wait_their_shares_differ_by_a_ticket_at_most(
    costs: list[tuple[str, int]], weights: dict[str, float]
) -> None:
    """The bound of start-time fair queueing (Goyal et al., theorem 1)."""
    admission = Admission(AdmissionConfig(max_queued_steps=1e9), weights=weights, clock=FakeClock())
    left = Counter(tenant for tenant, _ in costs)
    for tenant, steps in costs:
        admission.admit([ticket(float(steps), tenant=tenant)])
    largest = {t: max((s for name, s in costs if name == t), default=0) for t in "abc"}
    served = dict.fromkeys("abc", 0.0)
    order = granted_order(admission)
    assert len(order) == len(costs)
    for started in order:
        served[started.tenant] += started.steps
        left[started.tenant] -= 1
        for one, other in itertools.combinations("abc", 2):
            if left[one] and left[other]:
                gap = abs(served[one] / weights[one] - served[other] / weights[other])
                bound = largest[one] / weights[one] + largest[other] / weights[other]
                assert gap <= bound + 1e-6


@given(st.data())
def test_nothing_is_lost_doubled_or_over_capacity(data: st.DataObject) -> None:
    """Whatever happens, each ticket is in one place, and no worker holds more than its depth."""
    clock = FakeClock()
    admission = Admission(AdmissionConfig(max_queued_steps=2000), weights={}, clock=clock)
    waiting: set[str] = set()
    running: dict[str, Grant] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(["admit", "end", "grant", "report", "lose", "tick"])):
            case "admit":
                new = [
                    ticket(data.draw(st.floats(1, 300)), width=data.draw(st.floats(1, 20)))
                    for _ in range(data.draw(st.integers(1, 3)))
                ]
                try:
                    admission.admit(new)
                    waiting |= {t.id for t in new}
                except OverloadedError:
                    pass
            case "end" if waiting or running:
                id_ = data.draw(st.sampled_from(sorted(waiting | running.keys())))
                admission.end(id_)
                waiting.discard(id_)
                running.pop(id_, None)
            case "grant":
                for grant in admission.grants():
                    waiting.remove(grant.ticket.id)
                    running[grant.ticket.id] = grant
            case "report":
                admission.report(report(data.draw(st.sampled_from(["w1", "w2"]))))
            case "lose":
                lost = data.draw(st.sampled_from(["w1", "w2"]))
                admission.lose(lost)
                clock.tick(0.001)
                running = {i: g for i, g in running.items() if g.worker != lost}
            case "tick":
                clock.tick(data.draw(st.floats(0, 4)))
                admission.heard("g", running.values())
                admission.sweep()
        load = admission.load()
        assert (load.queued, load.running) == (len(waiting), len(running))
        for worker in ("w1", "w2"):
            widths = [g.ticket.width for g in running.values() if g.worker == worker]
            without_the_last = sum(widths) - max(widths, default=0.0)
            assert without_the_last <= 2.0 * RATE.saturation_steps


# ---------------------------------------------------------------- placement


def test_a_worker_holds_two_batches_and_the_rest_waits(make: Callable[..., Admission]) -> None:
    admission = make()
    admission.report(report())
    admission.admit([ticket(width=2.0) for _ in range(12)])
    assert len(admission.grants()) == 8  # of 2 rows each: twice B* = 8
    assert admission.grants() == []
    assert admission.load().queued == 4


def test_a_worker_holds_no_more_tickets_than_it_takes(make: Callable[..., Admission]) -> None:
    admission = make(policy=AdmissionPolicy(max_live=3))
    admission.report(report())
    admission.admit([ticket(width=0.5) for _ in range(5)])
    assert len(admission.grants()) == 3


def test_a_ticket_wider_than_a_worker_runs_once_there_is_room(
    make: Callable[..., Admission],
) -> None:
    admission = make()
    admission.report(report())
    admission.admit([ticket(width=64.0)])
    assert len(admission.grants()) == 1


def test_the_worker_that_is_free_soonest_gets_it(make: Callable[..., Admission]) -> None:
    admission = make()
    admission.report(report("w1"))
    admission.admit([ticket(100)])
    admission.grants()
    admission.report(report("w2"))
    admission.admit([ticket(100), ticket(100)])
    assert Counter(grant.worker for grant in admission.grants()) == {"w1": 1, "w2": 1}


def test_the_model_decides_before_the_load(make: Callable[..., Admission]) -> None:
    admission = make()
    admission.report(report("w1", rates={"m": RATE}))
    admission.report(report("w2", rates={"other": RATE}))
    admission.admit([ticket(model="m") for _ in range(4)])
    assert {grant.worker for grant in admission.grants()} == {"w1"}


def test_a_worker_takes_another_model_only_when_idle_for_its_own(
    make: Callable[..., Admission],
) -> None:
    admission = make(policy=AdmissionPolicy(depth=0.1))
    admission.report(report("w1", rates={"m": RATE}))
    admission.report(report("w2", rates={"other": RATE}))
    admission.admit([ticket(model="m"), ticket(model="m"), ticket(model="other")])
    assert Counter(g.ticket.model for g in admission.grants()) == {"m": 1, "other": 1}
    helper = make(policy=AdmissionPolicy(depth=0.1))
    helper.report(report("w1", rates={"m": RATE}))
    helper.report(report("w2", rates={"other": RATE}))
    helper.admit([ticket(model="m"), ticket(model="m")])
    assert {grant.worker for grant in helper.grants()} == {"w1", "w2"}


def test_a_model_that_nobody_has_open_goes_to_any_worker(make: Callable[..., Admission]) -> None:
    admission = make()
    admission.report(report(rates={"other": RATE}))
    admission.admit([ticket(model="m")])
    assert len(admission.grants()) == 1


def test_a_worker_gets_nothing_of_a_model_that_it_does_not_serve(
    make: Callable[..., Admission],
) -> None:
    admission = make()
    admission.report(report("w1"))
    admission.admit([ticket(model="new")])
    assert admission.grants() == []
    admission.report(report("w2", models=(model("m"), model("new"))))
    assert [grant.worker for grant in admission.grants()] == ["w2"]


def test_what_waits_for_a_model_that_is_unwanted_is_dropped(make: Callable[..., Admission]) -> None:
    admission = make()
    gone, stays = ticket(model="gone"), ticket(model="m")
    admission.admit([gone, stays])
    assert admission.drop(lambda name: name == "gone") == [gone]
    assert admission.waiting() == {stays.id}


def test_a_silent_worker_gets_nothing(make: Callable[..., Admission], clock: FakeClock) -> None:
    admission = make()
    admission.report(report())
    clock.tick(6)
    admission.admit([ticket(arrived_at_s=clock.now_s())])
    assert admission.grants() == []


# ---------------------------------------------------------------- leases


def test_a_new_router_counts_what_runs_before_any_gateway_speaks(
    make: Callable[..., Admission],
) -> None:
    admission = make()
    live = tuple(Live(id=f"l{i}", model="m", steps_left=20, width=2) for i in range(8))
    assert admission.report(report(live=live)) == ()
    admission.admit([ticket()])
    assert admission.grants() == []
    for lease in live:
        admission.end(lease.id)
    assert len(admission.grants()) == 1


def test_work_for_a_dead_gateway_is_cancelled_and_its_queue_dropped(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.report(report())
    admission.admit([ticket(id="r", width=16.0), ticket(id="q")])
    assert [grant.ticket.id for grant in admission.grants()] == ["r"]
    live = (Live(id="r", model="m", steps_left=20, width=16),)
    clock.tick(16)
    admission.sweep()
    assert admission.load().queued == 0
    assert admission.report(report(live=live)) == ("r",)
    clock.tick(15)
    admission.sweep()
    assert admission.load().running == 0


def test_a_heartbeat_keeps_what_runs(make: Callable[..., Admission], clock: FakeClock) -> None:
    admission = make()
    admission.report(report())
    admission.admit([ticket(id="r")])
    grants = admission.grants()
    for _ in range(10):
        clock.tick(5)
        admission.heard("g", grants)
        admission.sweep()
    live = (Live(id="r", model="m", steps_left=20, width=2),)
    assert admission.report(report(live=live)) == ()


def test_a_report_that_crosses_the_end_frees_the_slot_all_the_same(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.report(report())
    admission.admit([ticket(id="r", width=16)])
    admission.grants()
    admission.end("r")
    live = (Live(id="r", model="m", steps_left=1, width=16),)
    assert admission.report(report(live=live)) == ()
    assert admission.load().running == 0
    clock.tick(6)  # still there: the worker missed the cancel
    assert admission.report(report(live=live)) == ("r",)


def test_a_lost_workers_ticket_goes_first_elsewhere(make: Callable[..., Admission]) -> None:
    admission = make(policy=AdmissionPolicy(depth=0.1))
    admission.report(report("w1"))
    admission.admit([ticket(id="first", arrived_at_s=1)])
    (grant,) = admission.grants()
    admission.admit([ticket(id="second", arrived_at_s=2)])
    admission.lose("w1")
    admission.report(report("w2"))
    admission.admit([replace(grant.ticket, resumed=True, steps=10.0)])
    assert [(g.ticket.id, g.worker) for g in admission.grants()] == [("first", "w2")]


def test_a_worker_that_cannot_be_reached_rests_though_it_reports(
    make: Callable[..., Admission], clock: FakeClock
) -> None:
    admission = make()
    admission.report(report())
    admission.lose("w")
    admission.report(report())
    admission.admit([ticket()])
    assert admission.grants() == []
    clock.tick(16)
    admission.report(report())
    assert len(admission.grants()) == 1


def test_places_count_the_steps_ahead(make: Callable[..., Admission]) -> None:
    admission = make()
    admission.admit([ticket(30, id="a"), ticket(50, id="b"), ticket(20, id="c")])
    assert admission.places() == {"a": (1, 0), "b": (2, 30), "c": (3, 80)}
