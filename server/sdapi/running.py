"""What this interface's clients ask about while they wait: progress, and an end before time.

The original serves one user and keeps all of it in globals. Here it is kept by tenant, in the
gateway that draws: a tenant sees and interrupts its own requests on that gateway.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from contextlib import aclosing

from server.dispatch import Dispatcher
from server.messages import Drawn, Failed, PictureEvent, Stepped
from server.orders import Order
from server.schemas.sdapi import ProgressReply, ProgressState


class Draw:
    """One request of this interface, while it runs."""

    def __init__(self, order: Order, *, now_s: Callable[[], float]) -> None:
        self.order = order
        self.pictures: list[Drawn] = []
        self.interrupted = False
        self.preview: bytes | None = None
        self._now_s = now_s
        self._began_s = now_s()
        self._steps = {
            task.index: (0, order.model.evaluations(task.request)) for task in order.tasks
        }
        self._work: asyncio.Task[None] | None = None

    async def run(self, dispatcher: Dispatcher) -> list[Drawn]:
        """Draw until all pictures are there, or :meth:`interrupt`: then those that are there.

        Raises:
            DarkroomError: a refusal, or the first failure.
        """
        self._work = asyncio.create_task(self._collect(dispatcher))
        try:
            await self._work
        except asyncio.CancelledError:
            if not self.interrupted:
                raise
        return sorted(self.pictures, key=lambda picture: picture.index)

    def interrupt(self) -> None:
        """End before the next step."""
        self.interrupted = True
        if self._work is not None:
            self._work.cancel()

    @property
    def progress(self) -> float:
        """The share of all steps that is done, 0 to 1."""
        done = sum(step for step, _ in self._steps.values())
        return done / sum(steps for _, steps in self._steps.values())

    def report(self, *, with_image: bool) -> ProgressReply:
        """How far it is."""
        progress = self.progress
        spent_s = self._now_s() - self._began_s
        current = next(
            (index for index, (step, steps) in sorted(self._steps.items()) if step < steps),
            len(self._steps) - 1,
        )
        step, steps = self._steps[current]
        image = base64.b64encode(self.preview).decode() if self.preview and with_image else None
        return ProgressReply(
            progress=progress,
            eta_relative=spent_s * (1.0 - progress) / progress if progress else 0.0,
            state=ProgressState(
                interrupted=self.interrupted,
                job=self.order.tasks[0].request_id,
                job_count=len(self.order.tasks),
                job_no=current,
                sampling_step=step,
                sampling_steps=steps,
            ),
            current_image=image,
            textinfo=None,
        )

    async def _collect(self, dispatcher: Dispatcher) -> None:
        async with aclosing(dispatcher.draw(self.order.tasks)) as events:
            async for event in events:
                self._note(event)

    def _note(self, event: PictureEvent) -> None:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Stepped):
            self._steps[event.index] = (event.step, event.steps)
            self.preview = event.preview or self.preview
        if isinstance(event, Drawn):
            self._steps[event.index] = (1, 1)
            self.pictures.append(event)


class Running:
    """The draws of every tenant on this gateway. Bounded by what admission lets in."""

    def __init__(self) -> None:
        self._draws: dict[str, list[Draw]] = {}

    async def draw(self, tenant: str, draw: Draw, dispatcher: Dispatcher) -> list[Drawn]:
        """Run ``draw`` where progress and interrupt can find it."""
        draws = self._draws.setdefault(tenant, [])
        draws.append(draw)
        try:
            return await draw.run(dispatcher)
        finally:
            draws.remove(draw)
            if not draws:
                del self._draws[tenant]

    def progress(self, tenant: str, *, with_image: bool) -> ProgressReply:
        """Of the tenant's oldest request; idle where there is none."""
        draws = self._draws.get(tenant)
        if draws:
            return draws[0].report(with_image=with_image)
        return ProgressReply(
            progress=0.0, eta_relative=0.0, state=ProgressState(), current_image=None, textinfo=None
        )

    def interrupt(self, tenant: str) -> None:
        """End all that the tenant has running here."""
        for draw in self._draws.get(tenant, ()):
            draw.interrupt()
