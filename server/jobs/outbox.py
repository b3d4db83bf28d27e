"""What the owner of one job has to tell the store, kept here until the store has it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.errors import JobsUnavailableError
from server.jobs.records import Change, Job, JobEvent, JobPicture, JobPreview, JobState
from server.jobs.store import JobGoneError, JobStore

_log = logging.getLogger(__name__)
_MAX_WAITING = 1024
"""Events that wait while the store is away; of more, the oldest are dropped."""
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class Outbox:
    """Collects what happens to a job, and writes it in as few pieces as the store keeps up with.

    Drawing never waits for the store. While it is away, the latest state and all pictures wait
    here; a store that comes back empty gets the whole job again.

    Args:
        last_number: of the events that the store has already.
    """

    def __init__(self, store: JobStore, job: Job, *, last_number: int = 0) -> None:
        self._store = store
        self._job = job
        self._number = last_number
        self._state = job.state
        self._events: deque[JobEvent] = deque(maxlen=_MAX_WAITING)
        self._pictures: dict[int, JobPicture] = {}
        self._unsent: set[int] = set()
        self._previews: dict[int, JobPreview] = {}
        self._filled = asyncio.Event()
        self.cancelling = asyncio.Event()
        """Set when the store says that somebody asked to cancel the job."""

    @property
    def state(self) -> JobState:
        """How far the job is, written or not."""
        return self._state

    @property
    def last_number(self) -> int:
        """Of the events so far."""
        return self._number

    def tell(self, name: str, data: Mapping[str, Any]) -> None:
        """Add an event."""
        self._number += 1
        self._events.append(JobEvent(self._number, name, data))
        self._filled.set()

    def change(self, **fields: Any) -> None:
        """Change fields of the state."""
        self._state = replace(self._state, **fields)
        self._filled.set()

    def add_picture(self, picture: JobPicture) -> None:
        """Add a finished picture."""
        self._pictures[picture.index] = picture
        self._unsent.add(picture.index)
        self._previews.pop(picture.index, None)
        self._filled.set()

    def add_preview(self, preview: JobPreview) -> None:
        """Replace the preview of a picture."""
        self._previews[preview.index] = preview
        self._filled.set()

    async def send(self) -> None:
        """Write until a final state is written. However long the store is away, this goes on.

        Raises:
            JobLostError: the job is another gateway's by now.
        """
        failures = 0
        while True:
            await self._filled.wait()
            self._filled.clear()
            change = self._take()
            try:
                if await self._write(change):
                    self.cancelling.set()
                failures = 0
            except JobsUnavailableError:
                self._put_back(change)
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1
                continue
            if change.state.final:
                return

    async def _write(self, change: Change) -> bool:
        try:
            return await self._store.write(self._job, change)
        except JobGoneError:
            _log.warning("the store has lost a job that is being drawn; it gets it again")
            await self._store.restore(replace(self._job, state=replace(change.state, **_OPEN)))
            whole = replace(change, pictures=tuple(self._pictures.values()))
            return await self._store.write(self._job, whole)

    def _take(self) -> Change:
        change = Change(
            state=self._state,
            events=tuple(self._events),
            pictures=tuple(self._pictures[index] for index in sorted(self._unsent)),
            previews=tuple(self._previews.values()),
        )
        self._events.clear()
        self._unsent.clear()
        self._previews.clear()
        return change

    def _put_back(self, change: Change) -> None:
        waiting = deque(change.events, maxlen=_MAX_WAITING)
        waiting.extend(self._events)
        self._events = waiting
        self._unsent |= {picture.index for picture in change.pictures}
        self._previews = {preview.index: preview for preview in change.previews} | self._previews
        self._filled.set()


_OPEN: dict[str, Any] = {"status": "running", "finished_at_s": None}
