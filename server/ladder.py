"""Less work instead of a refusal, for requests that allow it.

A request with ``degrade`` that admission refuses, for load or for its deadline, is offered again:

1. By a checkpoint that is distilled for few steps (its own solver is ``lcm`` or ``tcd``), where the
   request names another solver: with its own, in a fifth of the steps, at its own guidance.
2. With three quarters, a half and a quarter of the steps.

What was drawn then says so in its ``approximations``. Where the wait is bounded, a rung may begin
later by what it spares: its picture comes no later than one with all steps would have.

Not on the ladder, because they would be no way down: a consistency LoRA, while adapters are not
served; step reuse, which the engine does not have; the noise cache, of which only the worker
learns, after admission, whether it spares a picture anything.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from engine.errors import OverloadedError
from engine.types import GenerateRequest
from server.dispatch import Dispatcher
from server.errors import DeadlineTooShortError
from server.events import OpenedEvents, opened
from server.messages import Drawn, Failed, ModelInfo, PictureTask
from server.orders import FEW_STEP_PART, FEW_STEP_SOLVERS, Order
from server.tickets import steps_of

SHARES = (0.75, 0.5, 0.25)
MIN_STEPS = 4
"""Below, pictures are of no use to anybody, except with solvers that need no more anyway."""
APPROXIMATION = "degraded"


@dataclass(frozen=True, slots=True)
class Admitted:
    """An order as it was admitted, and its events. Whoever has it closes it."""

    order: Order
    events: OpenedEvents
    dial: str | None = None
    """What it was degraded to, if it was."""

    def named(self, picture: Drawn) -> Drawn:
        """``picture``, which names the ladder where it was drawn otherwise than asked for."""
        if self.dial is None:
            return picture
        approximations = {**picture.approximations, APPROXIMATION: self.dial}
        return replace(picture, approximations=approximations)

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
    for rung in _rungs(order) if degrade else (_Rung(order),):
        offered = rung.order if previews is None else rung.order.with_previews(previews)
        try:
            events = await opened(dispatcher.draw(offered.tasks))
        except (OverloadedError, DeadlineTooShortError) as error:
            refusal = refusal or error
            continue
        return Admitted(offered, events, rung.dial)
    assert refusal is not None
    raise refusal


@dataclass(frozen=True, slots=True)
class _Rung:
    order: Order
    dial: str | None = None


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


def _rungs(order: Order) -> Iterator[_Rung]:
    """From the dearest, the order itself, to the cheapest."""
    yield _Rung(order)
    asked = order.tasks[0].request
    if asked.timesteps is not None:
        return  # every step was chosen; there is none to leave out
    few = _in_few_steps(asked, order.model)
    if few is not None:
        yield _rung(order, few)
    best = few or asked
    last = best.steps
    for share in SHARES:
        steps = max(min(MIN_STEPS, best.steps), round(best.steps * share))
        if steps < last:
            last = steps
            yield _rung(order, replace(best, steps=steps))


def _in_few_steps(asked: GenerateRequest, model: ModelInfo) -> GenerateRequest | None:
    """The same by the few-step solver that the checkpoint was distilled for; None without one.

    What belongs to the other solver goes with it: its schedule, its eta, and the guidance, which
    distilled checkpoints bear only about as it was distilled into them.
    """
    steps = max(MIN_STEPS, asked.steps // FEW_STEP_PART)
    solver = model.solver_default
    distilled = solver in FEW_STEP_SOLVERS and asked.solver not in (None, *FEW_STEP_SOLVERS)
    if not distilled or steps >= asked.steps:
        return None
    return replace(asked, solver=solver, schedule=None, eta=None, guidance=None, steps=steps)


def _rung(order: Order, request: GenerateRequest) -> _Rung:
    """``order`` as ``request`` has it, in tasks that nobody has refused yet."""
    tasks = tuple(_cheaper(task, request, order.model) for task in order.tasks)
    return _Rung(replace(order, tasks=tasks), _dial(order.tasks[0].request, request))


def _cheaper(task: PictureTask, request: GenerateRequest, model: ModelInfo) -> PictureTask:
    found = replace(
        task,
        id=f"{task.id}.{request.steps}",
        request=replace(request, seed=task.request.seed),
    )
    return replace(found, spared_steps=steps_of(task, model) - steps_of(found, model))


def _dial(asked: GenerateRequest, request: GenerateRequest) -> str:
    if request.solver == asked.solver:
        return f"{request.steps} of {asked.steps} steps"
    return f"{request.steps} {request.solver} steps instead of {asked.steps} {asked.solver} steps"
