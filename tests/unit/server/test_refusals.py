"""Refusals that a gateway may decide by itself."""

from __future__ import annotations

import pytest

from engine.errors import OverloadedError
from server.refusals import Refusals
from server.routing import Ticket
from tests.fake_clock import FakeClock
from tests.unit.server.test_admission import ticket

FULL = OverloadedError("full", retry_after_s=5.0)


def test_the_like_of_what_was_refused_is_refused_for_a_second() -> None:
    clock = FakeClock()
    refusals = Refusals(clock)
    refusals.check([ticket(40)])
    refusals.note([ticket(40)], FULL)
    clock.tick(0.5)
    with pytest.raises(OverloadedError) as refused:
        refusals.check([ticket(40)])
    assert refused.value.retry_after_s == pytest.approx(4.5)
    clock.tick(0.5)
    refusals.check([ticket(40)])


@pytest.mark.parametrize(
    "other",
    [
        ticket(39, deadline_at_s=150),
        ticket(40, tenant="b", deadline_at_s=150),
        ticket(40, priority=1, deadline_at_s=150),
        ticket(40, deadline_at_s=151),
        ticket(40),
    ],
    ids=["smaller", "another tenant's", "more urgent", "more patient", "without a deadline"],
)
def test_what_might_be_admitted_is_asked_for(other: Ticket) -> None:
    refusals = Refusals(FakeClock())
    refusals.note([ticket(40, deadline_at_s=150)], FULL)
    refusals.check([other])


def test_deadlines_move_on_with_the_requests_that_name_them() -> None:
    """As those do that gateways set for requests that name none."""
    clock = FakeClock()
    refusals = Refusals(clock)
    now_s = clock.now_s()
    refusals.note([ticket(40, arrived_at_s=now_s, deadline_at_s=now_s + 600)], FULL)
    clock.tick(0.5)
    now_s = clock.now_s()
    with pytest.raises(OverloadedError):
        refusals.check([ticket(40, arrived_at_s=now_s, deadline_at_s=now_s + 600)])
    refusals.check([ticket(40, arrived_at_s=now_s, deadline_at_s=now_s + 601)])


def test_a_short_wait_is_believed_for_no_longer() -> None:
    clock = FakeClock()
    refusals = Refusals(clock)
    refusals.note([ticket()], OverloadedError("busy", retry_after_s=0.2))
    clock.tick(0.25)
    refusals.check([ticket()])
