"""A dispatcher over a router and workers in other processes.

For each request one admission call for all of its tasks, or two where they wait, and for each task
that is granted one streaming call to the very worker that the grant names: see
:mod:`server.ray_drawing`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

from engine.errors import BackendUnavailableError, ClosedError
from engine.ports import Clock, SystemClock
from server.clock import UnixClock
from server.config import ServeConfig
from server.errors import ConflictError
from server.ledger import Ledger
from server.messages import (
    CacheAnswer,
    CacheOrder,
    Load,
    ModelChange,
    ModelInfo,
    PictureEvent,
    PictureTask,
    Readiness,
)
from server.model_rollout import change_everywhere
from server.ray_drawing import Drawing, Surroundings
from server.refusals import Refusals
from server.remote import CALL_TIMEOUT_S, GatewaysClient, RouterClient, WorkersClient
from server.request_log import Level
from server.watch import WorkerWatch
from server.worker_caches import ask_everywhere

_LAST_WORDS_S = 5.0
"""For telling clients what ended their requests, once the time to finish them is over."""
_LOOK_AGAIN_S = 0.1


class RayDispatcher:
    """Implements :class:`server.dispatch.Dispatcher`. Belongs to one event loop.

    Args:
        gateways: the others, whose metrics are then among :meth:`metrics`.
        name: of this gateway among others, for leases and logs.
        refused: told the reason of each refusal that is decided here and not by the router.
    """

    def __init__(
        self,
        config: ServeConfig,
        router: RouterClient,
        workers: WorkersClient,
        *,
        gateways: GatewaysClient | None = None,
        name: str | None = None,
        clock: Clock | None = None,
        refused: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        # Ages of what the router said are held against a clock that nobody sets back.
        steady = clock or SystemClock()
        clock = clock or UnixClock()
        name = name or f"gateway-{uuid.uuid4().hex[:8]}"
        self._configured = tuple(model.id for model in config.models)
        self._gateways = gateways
        refusals = Refusals(config.admission, steady, refused=refused)
        self._ledger = Ledger(name, router, clock, steady=steady, heard=refusals.heard)
        self._around = Surroundings(
            name=name,
            router=router,
            workers=workers,
            watch=WorkerWatch(workers),
            ledger=self._ledger,
            refusals=refusals,
            clock=clock,
            timeout_s=config.limits.request_timeout_s,
        )
        self._clock = clock
        self._changing = asyncio.Lock()
        self._drawings: set[Drawing] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    def start(self) -> None:
        """Begin to send heartbeats. Requests wait for the first answer."""
        self._ledger.start()

    # ------------------------------------------------------------------ Dispatcher

    async def draw(self, tasks: Sequence[PictureTask]) -> AsyncGenerator[PictureEvent, None]:
        """Draw the pictures of one request; see :meth:`Dispatcher.draw`."""
        if self._closing:
            raise ClosedError("the server is shutting down and takes no more work")
        drawing = Drawing(tasks, self._around)
        self._drawings.add(drawing)
        self._idle.clear()
        try:
            async with aclosing(drawing.events()) as events:
                async for event in events:
                    yield event
        finally:
            try:
                await drawing.close()
            finally:
                self._drawings.discard(drawing)
                if not self._drawings:
                    self._idle.set()

    async def models(self) -> Sequence[ModelInfo]:
        """The models that are configured or were added; the default first.

        Raises:
            BackendUnavailableError: no worker has come up yet, and none does in the next seconds.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return (await self._ledger.first_pulse()).models
        except TimeoutError:
            raise BackendUnavailableError("no worker is up yet; try again soon") from None

    async def change_model(self, change: ModelChange) -> ModelInfo | None:
        """Add, reload or remove a model on every worker; see :meth:`Dispatcher.change_model`."""
        name = change.model.id
        async with self._changing:
            served = {info.id for info in await self.models()}
            if change.action == "add" and (name in served or self._ledger.switched.added(name)):
                raise ConflictError(f"a model {name!r} is served already", field="id")
            change = self._ledger.switched.stamped(change, self._clock.now_s())
            names = self._ledger.pulse.workers if self._ledger.pulse is not None else ()
            info = await change_everywhere(self._around.workers, names, change)
            self._ledger.switch(self._ledger.switched.with_model(change))
            await self._until_published(name, info)
        return info

    async def ask_caches(self, order: CacheOrder) -> Sequence[CacheAnswer]:
        """Ask every worker that the router knows, or lately knew; see
        :meth:`Dispatcher.ask_caches`.

        A worker that only another gateway has ever heard of, and that is off the router's list now,
        is not asked.
        """
        before = self._ledger.pulse
        await self._ledger.beat()
        pulse = self._ledger.pulse
        if pulse is None or pulse is before:
            raise BackendUnavailableError(
                "the router, which knows the workers, does not answer; ask again"
            )
        if not pulse.workers:
            raise BackendUnavailableError("no worker has reported yet; ask again in some seconds")
        return await ask_everywhere(self._around.workers, self._ledger.workers(), order)

    async def set_log_level(self, level: Level) -> None:
        """Switch it here, and within seconds everywhere."""
        self._ledger.switch(self._ledger.switched.with_level(level, self._clock.now_s()))
        await self._ledger.beat()

    async def readiness(self) -> Readiness:
        """Whether every configured model is warm, and the router answers."""
        pulse = self._ledger.pulse
        workers = len(pulse.workers) if pulse is not None and self._ledger.fresh() else 0
        served = {model.id for model in pulse.models} if pulse is not None and workers else set()
        missing = tuple(name for name in self._configured if name not in served)
        return Readiness(
            ready=not missing and not self._closing,
            workers=workers,
            missing=missing,
            draining=self._closing,
        )

    async def load(self) -> Load:
        """How busy the whole application is now, or was when the router last answered."""
        await self._ledger.beat()
        pulse = self._ledger.pulse
        return Load() if pulse is None else pulse.load

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        """(replica, Prometheus text) of everybody else who answers in time: other gateways, the
        router, workers."""
        pulse = self._ledger.pulse
        of_router, of_workers, of_gateways = await asyncio.gather(
            self._around.router.metrics(),
            self._around.workers.metrics(pulse.workers if pulse is not None else ()),
            self._of_gateways(pulse.gateways if pulse is not None else ()),
        )
        return [*of_gateways, *of_router, *of_workers]

    async def _until_published(self, name: str, info: ModelInfo | None) -> None:
        """Return when requests that come here meet the model as it is now, or soon will."""
        digest = None if info is None else info.plan_digest
        with suppress(TimeoutError):
            async with asyncio.timeout(CALL_TIMEOUT_S):
                while True:
                    await self._ledger.beat()
                    digests = {model.id: model.plan_digest for model in await self.models()}
                    if digests.get(name) == digest:
                        return
                    await asyncio.sleep(_LOOK_AGAIN_S)

    async def _of_gateways(self, names: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        others = [name for name in names if name != self._around.name]
        if self._gateways is None or not others:
            return ()
        return await self._gateways.metrics(others)

    async def close(self, timeout_s: float) -> None:
        """Take nothing more, finish what runs, fail what is left after ``timeout_s`` seconds."""
        self._closing = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for drawing in self._drawings:
            drawing.abandon(ClosedError("the server is shutting down"))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _LAST_WORDS_S)
        await self._ledger.close()
