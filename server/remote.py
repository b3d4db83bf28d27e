"""The other processes as a gateway sees them: what can be asked of them, and that they may be gone.

Ray Serve's handles implement these in :mod:`server.serve_clients`; tests use plain objects.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from engine.types import CacheShare
from server.errors import WorkerLostError
from server.messages import CacheOrder, ModelChange, ModelInfo, PictureTask, WorkerEvent
from server.routing import Grant, Pulse, Refused, RouterNews, Ticket
from server.switched import Switched

CALL_TIMEOUT_S = 5.0
"""For calls that take milliseconds when all is well."""


class ReplicaLostError(WorkerLostError):
    """The process at the other end of a call is gone, or cannot be reached."""


class RouterClient(Protocol):
    """:class:`server.router.Router` in another process. Any call may raise ReplicaLostError."""

    async def enter(
        self, tickets: Sequence[Ticket], ended: Sequence[str]
    ) -> Sequence[Grant | Refused]:
        """See :meth:`server.router.Router.enter`."""
        ...

    def admit(self, tickets: Sequence[Ticket], watching: bool) -> AsyncGenerator[RouterNews, None]:
        """See :meth:`server.router.Router.admit`."""
        ...

    async def heartbeat(
        self, gateway: str, running: Sequence[Grant], ended: Sequence[str], switched: Switched
    ) -> Pulse:
        """See :meth:`server.router.Router.heartbeat`."""
        ...

    async def lose(self, worker: str) -> None:
        """See :meth:`server.router.Router.lose`."""
        ...

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        """(replica, Prometheus text) of the router, if it answers in time."""
        ...


class GatewaysClient(Protocol):
    """The gateways, each by its replica's name."""

    async def metrics(self, gateways: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        """(replica, its own Prometheus text) of those named that answer in time."""
        ...


class WorkersClient(Protocol):
    """The workers, each by its replica's name."""

    def draw(self, worker: str, task: PictureTask) -> AsyncGenerator[WorkerEvent, None]:
        """Draw ``task`` on that worker and no other.

        Raises:
            ReplicaLostError: it is gone, before the call or during it.
        """
        ...

    async def change_model(self, worker: str, change: ModelChange) -> ModelInfo | None:
        """Change a model on that worker; see :meth:`server.model_changes.ModelChanges.apply`.

        Raises:
            ReplicaLostError: it is gone.
            DarkroomError: it cannot do it.
        """
        ...

    async def ask_cache(self, worker: str, order: CacheOrder) -> tuple[CacheShare, ...]:
        """Look into that worker's own noise cache, or clear it.

        Raises:
            ReplicaLostError: it is gone.
            TimeoutError: it cannot be reached, and may live on.
        """
        ...

    async def ping(self, worker: str) -> None:
        """Return when that worker has answered.

        Raises:
            ReplicaLostError: it is gone, or takes no new calls.
        """
        ...

    async def metrics(self, workers: Sequence[str]) -> Sequence[tuple[str, bytes]]:
        """(replica, Prometheus text) of those named that answer in time."""
        ...
