"""Router, gateway and workers in one process: plain calls carry what Ray carries elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from engine.types import CacheShare
from server.config import ServeConfig
from server.messages import CacheOrder, ModelChange, ModelInfo, PictureTask, WorkerEvent
from server.ray_dispatch import RayDispatcher
from server.remote import ReplicaLostError
from server.router import Router
from server.routing import Grant, Pulse, Refused, RouterNews, Ticket
from server.settings import Settings
from server.switched import Switched
from server.worker_core import WorkerCore

REPORT_S = 0.05
_T = TypeVar("_T")


class Wire:
    """Streaming calls to one process, all of which break when it is killed."""

    def __init__(self) -> None:
        self.killed = False
        self.reaches = asyncio.Event()
        self.reaches.set()
        self._pumps: set[asyncio.Future[Any]] = set()

    def kill(self) -> None:
        self.killed = True
        self.cut()

    def cut(self) -> None:
        for pump in self._pumps:
            pump.cancel()

    async def send(self) -> None:
        """Return when a message has come through."""
        await self.reaches.wait()
        if self.killed:
            raise ReplicaLostError("it was killed")

    async def reply(self, call: Awaitable[_T]) -> _T:
        """What a call returns, unless the process goes first."""
        calling = asyncio.ensure_future(call)
        self._pumps.add(calling)
        try:
            await self.send()
            return await asyncio.shield(calling)
        except asyncio.CancelledError:
            if calling.cancelled():
                raise ReplicaLostError("it was killed") from None
            raise
        finally:
            self._pumps.discard(calling)

    async def stream(self, items: AsyncGenerator[_T, None]) -> AsyncGenerator[_T, None]:
        if self.killed:
            raise ReplicaLostError("it was killed")
        arrived: asyncio.Queue[_T | ReplicaLostError | None] = asyncio.Queue()

        async def pump() -> None:
            try:
                async with aclosing(items):
                    async for item in items:
                        arrived.put_nowait(item)
                arrived.put_nowait(None)
            except asyncio.CancelledError:
                arrived.put_nowait(ReplicaLostError("it was killed"))
                raise

        pumping = asyncio.create_task(pump())
        self._pumps.add(pumping)
        try:
            while (item := await arrived.get()) is not None:
                await self.reaches.wait()
                if isinstance(item, ReplicaLostError):
                    raise item
                yield item
        finally:
            pumping.cancel()
            await asyncio.gather(pumping, return_exceptions=True)
            self._pumps.discard(pumping)


class RouterProcess:
    """Implements :class:`server.remote.RouterClient`."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._wire = Wire()
        self.router = Router(config)
        self.router.start()

    async def restart(self) -> None:
        """Another one that knows nothing; every call to the old one breaks."""
        await self.router.close()
        self.router = Router(self._config)
        self.router.start()
        self._wire.cut()

    async def enter(
        self, tickets: Sequence[Ticket], ended: Sequence[str]
    ) -> Sequence[Grant | Refused]:
        return await self._wire.reply(self.router.enter(tickets, ended))

    def admit(self, tickets: Sequence[Ticket], watching: bool) -> AsyncGenerator[RouterNews, None]:
        return self._wire.stream(self.router.admit(tickets, watching))

    async def heartbeat(
        self, gateway: str, running: Sequence[Grant], ended: Sequence[str], switched: Switched
    ) -> Pulse:
        return await self.router.heartbeat(gateway, running, ended, switched)

    async def lose(self, worker: str) -> None:
        await self.router.lose(worker)

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        return [("router", self.router.metrics_text())]


class WorkerProcesses:
    """Implements :class:`server.remote.WorkersClient`."""

    def __init__(self, router: RouterProcess, workers: Sequence[WorkerCore]) -> None:
        self._router = router
        self.workers: dict[str, WorkerCore] = {}
        self._wires: dict[str, Wire] = {}
        self._reporting: list[asyncio.Task[None]] = []
        for worker in workers:
            self.join(worker)
        self.drawn: list[tuple[str, PictureTask]] = []
        """(worker, task) of every call."""

    def join(self, worker: WorkerCore) -> None:
        """One more, open, begins to report."""
        self.workers[worker.name] = worker
        self._wires[worker.name] = Wire()
        self._reporting.append(asyncio.create_task(self._report(worker)))

    def kill(self, name: str) -> None:
        """Nothing more comes from it: calls break, and it falls silent."""
        self._wires[name].kill()

    def cut_off(self, name: str) -> None:
        """Nothing more comes from it, and no call breaks; it works on."""
        self._wires[name].reaches.clear()

    def reconnect(self, name: str) -> None:
        """What it has sent since arrives."""
        self._wires[name].reaches.set()

    def draw(self, worker: str, task: PictureTask) -> AsyncGenerator[WorkerEvent, None]:
        self.drawn.append((worker, task))
        return self._wires[worker].stream(self.workers[worker].draw(task))

    async def change_model(self, worker: str, change: ModelChange) -> ModelInfo | None:
        await self._wires[worker].send()
        return await asyncio.to_thread(self.workers[worker].changes.apply, change)

    async def ask_cache(self, worker: str, order: CacheOrder) -> tuple[CacheShare, ...]:
        await self._wires[worker].send()
        return await asyncio.to_thread(self.workers[worker].ask_cache, order)

    async def ping(self, worker: str) -> None:
        await self._wires[worker].send()

    async def metrics(self, workers: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        return [(name, self.workers[name].metrics_text()) for name in workers]

    async def close(self) -> None:
        for reporting in self._reporting:
            reporting.cancel()
        await asyncio.gather(*self._reporting, return_exceptions=True)

    async def _report(self, worker: WorkerCore) -> None:
        while not self._wires[worker.name].killed:
            await self._wires[worker.name].reaches.wait()
            reply = await self._router.router.report(worker.report())
            if worker.changes.hear(reply.switched):
                await asyncio.to_thread(worker.changes.catch_up)
            await asyncio.sleep(REPORT_S)


@asynccontextmanager
async def routed(
    config: ServeConfig,
    settings: Settings,
    *,
    workers: int = 1,
    refused: Callable[[str], None] = lambda _reason: None,
) -> AsyncIterator[tuple[RayDispatcher, RouterProcess, WorkerProcesses]]:
    """A gateway's dispatcher over a router and open workers."""
    cores = [WorkerCore(config, settings, name=f"worker-{i}") for i in range(workers)]
    for core in cores:
        await asyncio.to_thread(core.open)
    router = RouterProcess(config)
    processes = WorkerProcesses(router, cores)
    dispatcher = RayDispatcher(config, router, processes, name="gateway-0", refused=refused)
    dispatcher.start()
    try:
        while not (await dispatcher.readiness()).ready:
            await asyncio.sleep(REPORT_S)
            await dispatcher.load()  # asks the router afresh
        yield dispatcher, router, processes
    finally:
        await dispatcher.close(0.0)
        await processes.close()
        await router.router.close()
        for core in processes.workers.values():
            await asyncio.to_thread(core.close, 0.0)
