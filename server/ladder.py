"""Fewer steps instead of a refusal, for requests that allow it.

A request with ``degrade`` that admission refuses, for load or for its deadline, is offered again
with three quarters, a half and a quarter of its steps. What was drawn then says so in its
``approximations``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from engine.errors import OverloadedError
from server.dispatch import Dispatcher
from server.errors import DeadlineTooShortError
from server.events import OpenedEvents, opened
from server.messages import Drawn, Failed
from server.orders import Order

SHARES = (0.75, 0.5, 0.25)
MIN_STEPS = 4
"""Below, pictures are of no use to anybody, except with solvers that need no more anyway."""
APPROXIMATION = "degraded"


@dataclass(frozen=True, slots=True)
class Admitted:
    """An order as it was admitted, and its events. Whoever has it closes it."""

    order: Order
    events: OpenedEvents
    asked_steps: int

    def named(self, picture: Drawn) -> Drawn:
        """``picture``, which names the ladder where it was drawn with fewer steps than asked."""
        steps = self.order.tasks[0].request.steps
        if steps == self.asked_steps:
            return picture
        dial = f"{steps} of {self.asked_steps} steps"
        return replace(picture, approximations={**picture.approximations, APPROXIMATION: dial})

    async def pictures(self) -> list[Drawn]:
        """All pictures, in order of their index.

        Raises:
            DarkroomError: the first task's failure.
        """
        found: list[Drawn] = []
        async for event in self.events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Drawn):
                found.append(self.named(event))
        return sorted(found, key=lambda picture: picture.index)

    async def aclose(self) -> None:
        """Cancel what is unfinished."""
        await self.events.aclose()


async def admitted(
    dispatcher: Dispatcher, order: Order, *, degrade: bool, previews: int | None = None
) -> Admitted:
    """Offer ``order``, and where it may degrade its rungs, until one is admitted.

    Args:
        previews: how many of each picture a listener wants at most; None without a listener.

    Raises:
        DarkroomError: the refusal of the order as it was asked for.
    """
    refusal: Exception | None = None
    for rung in _rungs(order) if degrade else (order,):
        offered = rung if previews is None else rung.with_previews(previews)
        try:
            events = await opened(dispatcher.draw(offered.tasks))
        except (OverloadedError, DeadlineTooShortError) as error:
            refusal = refusal or error
            continue
        return Admitted(offered, events, order.tasks[0].request.steps)
    assert refusal is not None
    raise refusal


@asynccontextmanager
async def drawing(
    dispatcher: Dispatcher, order: Order, *, degrade: bool
) -> AsyncIterator[Admitted]:
    """:func:`admitted`, closed at the end of the block."""
    found = await admitted(dispatcher, order, degrade=degrade)
    try:
        yield found
    finally:
        await found.aclose()


def _rungs(order: Order) -> Iterator[Order]:
    yield order
    request = order.tasks[0].request
    if request.timesteps is not None:
        return  # every step was chosen; there is none to leave out
    last = request.steps
    for share in SHARES:
        steps = max(min(MIN_STEPS, request.steps), round(request.steps * share))
        if steps < last:
            last = steps
            yield _with_steps(order, steps)


def _with_steps(order: Order, steps: int) -> Order:
    """The same order in so many steps, as tasks that nobody has refused yet."""
    tasks = tuple(
        replace(task, id=f"{task.id}.{steps}", request=replace(task.request, steps=steps))
        for task in order.tasks
    )
    return replace(order, tasks=tasks)
