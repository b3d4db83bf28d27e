"""Router and workers over Ray Serve's handles: the one place where a gateway meets Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from engine.errors import DarkroomError
from engine.types import CacheShare
from server.messages import CacheOrder, ModelChange, ModelInfo, PictureTask, WorkerEvent
from server.remote import CALL_TIMEOUT_S, ReplicaLostError
from server.routing import Grant, Pulse, Refused, RouterNews, Ticket
from server.switched import Switched

_LOST = (
    ray_errors.RayActorError,
    ray_errors.ObjectLostError,
    ray_errors.NodeDiedError,
    ray_errors.WorkerCrashedError,
    # Not by us: whoever cancels a call here does not read it any more.
    ray_errors.TaskCancelledError,
    serve_errors.ReplicaUnavailableError,
    serve_errors.DeploymentUnavailableError,
)


class _NeverRefusing(RunningReplica):  # type: ignore[misc]  # Ray is not typed
    """A replica that is not asked whether it takes a call.

    Ours take every one: who comes in is the router's decision, or nobody's. Serve asks all but
    Java's, and makes a stream of each call to hear the answer. With that, a worker whose machine
    was cut off as it reported held up the router, and all requests, until Ray gave the machine up:
    by all signs because a process that ends a stream waits until its reader has all of it. The
    test with two nodes fails if another version of Serve asks again.
    """

    @property
    def is_cross_language(self) -> bool:
        """What Serve goes by here; how a call is sent is decided elsewhere."""
        return True


class PlainCalls(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Sends calls as they are, and not as streams that begin with whether they were taken."""

    def create_replica_wrapper(self, replica_info: Any) -> RunningReplica:
        """For each replica, once."""
        return _NeverRefusing(replica_info)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002
    ) -> list[list[RunningReplica]]:
        """Any."""
        return [candidate_replicas]


class NamedReplicaRouter(PlainCalls):
    """Sends a call to the replica that its keyword argument ``replica`` names, and to no other.

    A call without one goes to any. Every gateway runs two of these, for workers and for gateways;
    they are no part of the router's decision, which came before.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The named replica; without one that lives, the call fails instead of waiting for it."""
        if pending_request is None or "replica" not in pending_request.kwargs:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        name = pending_request.kwargs.get("replica")
        named = [r for r in candidate_replicas if r.replica_id.unique_id == name]
        if named:
            # At once. Serve would first ask for the length of its queue, which decides nothing
            # here; and while one worker cannot be reached, a few such questions hold up all calls.
            self._fulfill_next_pending_request(named[0], pending_request.metadata)
        elif not pending_request.future.done():
            pending_request.future.set_exception(ReplicaLostError(f"replica {name} is gone"))
        return [named or candidate_replicas]


class ServeRouterClient:
    """Implements :class:`server.remote.RouterClient`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._calls = handle
        self._streams = handle.options(stream=True)

    async def enter(
        self, tickets: Sequence[Ticket], ended: Sequence[str]
    ) -> Sequence[Grant | Refused]:
        """See :class:`server.remote.RouterClient`."""
        try:
            news: Sequence[Grant | Refused] = await self._calls.enter.remote(tickets, ended)
        except _LOST as error:
            raise ReplicaLostError("the router is gone") from error
        return news

    def admit(self, tickets: Sequence[Ticket], watching: bool) -> AsyncGenerator[RouterNews, None]:
        """See :class:`server.remote.RouterClient`."""
        return _read(self._streams.admit.remote(tickets, watching))

    async def heartbeat(
        self, gateway: str, running: Sequence[Grant], ended: Sequence[str], switched: Switched
    ) -> Pulse:
        """See :class:`server.remote.RouterClient`."""
        try:
            pulse = await self._calls.heartbeat.remote(gateway, running, ended, switched)
        except _LOST as error:
            raise ReplicaLostError("the router is gone") from error
        assert isinstance(pulse, Pulse)
        return pulse

    async def lose(self, worker: str) -> None:
        """See :class:`server.remote.RouterClient`."""
        try:
            await self._calls.lose.remote(worker)
        except _LOST as error:
            raise ReplicaLostError("the router is gone") from error

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        """See :class:`server.remote.RouterClient`."""
        return await _pages([self._calls.metrics.remote()])


class ServeGatewaysClient:
    """Implements :class:`server.remote.GatewaysClient`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._calls = handle

    async def metrics(self, gateways: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        """See :class:`server.remote.GatewaysClient`."""
        return await _pages([self._calls.metrics.remote(replica=name) for name in gateways])


class ServeWorkersClient:
    """Implements :class:`server.remote.WorkersClient`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._calls = handle
        self._streams = handle.options(stream=True)

    def draw(self, worker: str, task: PictureTask) -> AsyncGenerator[WorkerEvent, None]:
        """See :class:`server.remote.WorkersClient`."""
        return _read(self._streams.draw.remote(task, replica=worker))

    async def change_model(self, worker: str, change: ModelChange) -> ModelInfo | None:
        """See :class:`server.remote.WorkersClient`."""
        try:
            info: ModelInfo | None = await self._calls.change_model.remote(change, replica=worker)
        except _LOST as error:
            raise ReplicaLostError(f"worker {worker} is gone") from error
        except ray_errors.RayTaskError as error:
            if isinstance(error.cause, DarkroomError):
                raise error.cause from None
            raise
        return info

    async def ask_cache(self, worker: str, order: CacheOrder) -> tuple[CacheShare, ...]:
        """See :class:`server.remote.WorkersClient`."""
        try:
            shares: tuple[CacheShare, ...] = await self._calls.ask_cache.remote(
                order, replica=worker
            )
        except ray_errors.ActorUnavailableError as error:
            raise TimeoutError(f"worker {worker} cannot be reached") from error
        except _LOST as error:
            raise ReplicaLostError(f"worker {worker} is gone") from error
        return shares

    async def ping(self, worker: str) -> None:
        """See :class:`server.remote.WorkersClient`."""
        try:
            await self._calls.ping.remote(replica=worker)
        except _LOST as error:
            raise ReplicaLostError(f"worker {worker} is gone") from error

    async def metrics(self, workers: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        """See :class:`server.remote.WorkersClient`."""
        return await _pages([self._calls.metrics.remote(replica=worker) for worker in workers])


async def _read(response: DeploymentResponseGenerator[Any]) -> AsyncGenerator[Any, None]:
    """The items of a streaming call; left early, the call is cancelled at the other end."""
    ended = False
    try:
        async for item in response:
            yield item
        ended = True
    except _LOST as error:
        ended = True
        raise ReplicaLostError("the process at the other end is gone") from error
    finally:
        if not ended:
            response.cancel()


async def _pages(calls: Sequence[DeploymentResponse[Any]]) -> list[tuple[str, bytes]]:
    """What those say of themselves that answer in time; the others take nothing from it."""

    async def page(call: DeploymentResponse[Any]) -> tuple[str, bytes] | None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer: tuple[str, bytes] = await call
                return answer
        except (TimeoutError, ReplicaLostError, ray_errors.RayError, *_LOST):
            return None

    return [answer for answer in await asyncio.gather(*map(page, calls)) if answer is not None]
