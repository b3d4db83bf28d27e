"""The seam between the HTTP interfaces and whatever draws: one protocol, two implementations.

:class:`server.local.LocalDispatcher` runs an engine in this process; the Ray one asks the router
for a worker and streams from it. One contract test runs against both.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

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
from server.request_log import Level


class Dispatcher(Protocol):
    """Admits tasks, finds a worker for each, and passes on what it says."""

    def draw(self, tasks: Sequence[PictureTask]) -> AsyncGenerator[PictureEvent, None]:
        """Draw the pictures of one request and yield the events of all, as they happen.

        Every task ends in exactly one ``Drawn`` or ``Failed``; then the generator ends. Closing it
        (``aclose``, or cancelling the task that iterates) cancels what is unfinished before its
        next step and frees its slot.

        Raises:
            OverloadedError: refused at admission, all tasks together, before the first event.
            DeadlineTooShortError: no idle worker could meet the deadline either; refused likewise.
            DeadlineExceededError: it passed before there was a worker to ask.
            InvalidRequestError: an unknown model.
            ClosedError: the application drains.
        """
        ...

    async def models(self) -> Sequence[ModelInfo]:
        """The models that are configured or were added; the default first."""
        ...

    async def change_model(self, change: ModelChange) -> ModelInfo | None:
        """Add, reload or remove a model on every worker; requests go on meanwhile.

        Takes as long as compiling takes. A worker that starts later does the same by itself.

        Returns:
            The model as it is served now; None after a removal.

        Raises:
            ConflictError: a model of that id, or the same plan, is served already.
            InvalidRequestError: no such model, or the default one is to be removed.
            BackendUnavailableError: one worker cannot do it; an addition is undone on the others.
            DarkroomError: no worker can.
        """
        ...

    async def ask_caches(self, order: CacheOrder) -> Sequence[CacheAnswer]:
        """Look into the noise cache of every worker that is up, or clear it there.

        For caches in the workers' memory: one on Redis is asked once, and by whoever wants to know.

        Raises:
            BackendUnavailableError: nobody can say which workers are up. To ask again does no harm.
        """
        ...

    async def set_log_level(self, level: Level) -> None:
        """Switch the log level of every process, those included that start later."""
        ...

    async def readiness(self) -> Readiness:
        """Whether every configured model is warm."""
        ...

    async def load(self) -> Load:
        """How busy the application is."""
        ...

    async def metrics(self) -> Sequence[tuple[str, bytes]]:
        """(replica name, Prometheus text) of every other process that answers in time.

        Those that do not answer are left out; the gateway marks them as missing.
        """
        ...

    async def close(self, timeout_s: float) -> None:
        """Take nothing more, finish what runs, and give up after ``timeout_s`` seconds."""
        ...
