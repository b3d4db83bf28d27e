"""One task in one engine: how it gets in, what it reports, and what leaves the worker."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

from engine.engine import Engine
from engine.errors import (
    CancelledError,
    DeadlineExceededError,
    ExecutionError,
    InvalidRequestError,
)
from engine.handle import Handle
from engine.png import encode_image, parameters_of
from engine.ports import Clock
from engine.types import GenerateRequest, Picture, Snapshot, StepEvent
from server.content_check import CheckedPicture, ContentCheck, release
from server.mailbox import Begun, Mailbox
from server.messages import Checkpointed, Drawn, PictureTask, Started, Stepped, Tick, WorkerEvent
from server.snapshot_codec import Standing, decode_standing, encode_standing

_log = logging.getLogger(__name__)
_SEED_BITS = 32  # what every other tool's seed field takes
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What the drawings of one worker share.

    Attributes:
        writers: encodes previews, snapshots and finished files.
        unix_s: the time that deadlines are given in.
        snapshot_every_s: compute between two snapshots of a task.
    """

    worker: str
    engine: Engine
    writers: Executor
    clock: Clock
    snapshot_every_s: float
    unix_s: Callable[[], float] = time.time
    check: ContentCheck | None = None


class Drawing:
    """A task from its arrival to its picture.

    Args:
        steps: that it costs, in UNet rows at native size.
        width: steps that it puts into each tick.

    Attributes:
        steps_left: falls with every step.
    """

    def __init__(
        self, task: PictureTask, shop: Workshop, *, steps: float, width: float, mailbox: Mailbox
    ) -> None:
        self.task = task
        self.width = width
        self.steps_left = steps
        self._steps = steps
        self._shop = shop
        self._mailbox = mailbox
        self._arrived_s = shop.clock.now_s()
        self._waited_s = 0.0
        self._since_snapshot_s = 0.0
        self._began_s = 0.0
        self._ticks: list[Tick] = []
        # Its own, so that a task which comes back is never taken for what was cancelled before.
        self._engine_id = f"{task.id}/{next(_numbers)}"
        self._seed = task.request.seed

    def enter(self) -> Handle:
        """Encode the request and put it into the step loop. Takes long: for a pool's thread.

        Raises:
            DarkroomError: the request is refused, or its deadline has passed.
        """
        self._waited_s = self._shop.clock.now_s() - self._arrived_s
        request = self._request()
        if (standing := self._standing()) is not None:
            self._seed = standing.seed
            try:
                return self._submit(replace(request, seed=self._seed), standing.snapshot)
            except InvalidRequestError as error:
                # It was drawn by another plan or table. The request itself may well be good.
                _log.warning("task %s starts over: %s", self.task.id, error)
        if self._seed is None:
            self._seed = secrets.randbits(_SEED_BITS)
        return self._submit(replace(request, seed=self._seed), None)

    async def next(self) -> WorkerEvent:
        """Wait for what is next to be told; ``Drawn`` is the last.

        Raises:
            DarkroomError: what ended the task instead.
        """
        news = await self._mailbox.get()
        if isinstance(news, Begun):
            return Started(self.task.index, self._shop.worker)
        if isinstance(news, Exception):
            raise news
        loop = asyncio.get_running_loop()
        if isinstance(news, StepEvent):
            if news.preview is None:
                return Stepped(self.task.index, news.step, news.steps)
            return await loop.run_in_executor(self._shop.writers, self._stepped, news)
        if isinstance(news, Snapshot):
            return await loop.run_in_executor(self._shop.writers, self._checkpointed, news)
        return await loop.run_in_executor(self._shop.writers, self._drawn, news)

    def cancel(self, handle: Handle, left: Callable[[float], None]) -> None:
        """Take the task out of the step loop; ``left`` is told how many seconds that took.

        It is not told where the picture was finished before.
        """
        asked_at_s = self._shop.clock.now_s()

        def ended(outcome: Future[Picture]) -> None:
            if isinstance(outcome.exception(), CancelledError):
                left(self._shop.clock.now_s() - asked_at_s)

        handle.add_done_callback(ended)
        handle.cancel()

    # ------------------------------------------------------------------ going in

    def _request(self) -> GenerateRequest:
        """The engine's request: the time that is left, and previews only where somebody looks."""
        task, request = self.task, self.task.request
        if task.deadline_at_s is not None:
            left_s = task.deadline_at_s - self._shop.unix_s()
            if left_s <= 0:
                raise DeadlineExceededError("the deadline passed before the first step")
            request = replace(request, deadline_s=left_s)
        if not task.listening or self._shop.check is not None:
            request = replace(request, preview_every=0)
        return request

    def _standing(self) -> Standing | None:
        if self.task.snapshot is None:
            return None
        try:
            return decode_standing(self.task.snapshot)
        except InvalidRequestError as error:
            _log.warning("task %s starts over: %s", self.task.id, error)
            return None

    def _submit(self, request: GenerateRequest, snapshot: Snapshot | None) -> Handle:
        handle = self._shop.engine.submit(
            request,
            model=self.task.model,
            request_id=self._engine_id,
            on_event=self._on_event,
            on_start=self._on_start,
            snapshot=snapshot,
            tenant=self.task.tenant,
        )
        handle.add_done_callback(self._on_end)
        return handle

    # ------------------------------------------------------------------ on the engine's threads

    def _on_start(self) -> None:
        self._began_s = self._shop.clock.now_s()
        self._mailbox.put(Begun())

    def _on_event(self, event: StepEvent) -> None:
        self.steps_left = self._steps * (event.steps - event.step) / event.steps
        if self.task.listening:
            self._mailbox.put(event)
        if self.task.traced:
            ended_s = self._shop.clock.now_s() - self._began_s
            self._ticks.append(Tick(event.step, event.batch_rows, ended_s, event.tick_s))
        self._since_snapshot_s += event.tick_s
        if self._since_snapshot_s >= self._shop.snapshot_every_s and event.step < event.steps:
            self._since_snapshot_s = 0.0
            self._shop.engine.snapshot(self._engine_id).add_done_callback(self._on_snapshot)

    def _on_snapshot(self, future: Future[Snapshot]) -> None:
        if future.exception() is None:  # else the task has ended meanwhile
            self._mailbox.put(future.result())

    def _on_end(self, future: Future[Picture]) -> None:
        error = future.exception()
        if error is None:
            self._mailbox.put(future.result())
        elif isinstance(error, Exception):
            self._mailbox.put(error)
        else:
            self._mailbox.put(ExecutionError(f"{type(error).__name__} ended the task"))

    # ------------------------------------------------------------------ on the writers' threads

    def _stepped(self, event: StepEvent) -> Stepped:
        assert event.preview is not None
        preview = encode_image(event.preview, None)
        return Stepped(self.task.index, event.step, event.steps, preview)

    def _checkpointed(self, snapshot: Snapshot) -> Checkpointed:
        assert snapshot.row is not None
        assert self._seed is not None
        data = encode_standing(Standing(self._seed, snapshot))
        return Checkpointed(self.task.index, snapshot.row, data)

    def _drawn(self, picture: Picture) -> Drawn:
        """Check and encode. The file's own time counts as decoding, the pool's as queueing."""
        task, request, output = self.task, self.task.request, self.task.output
        began_s = self._shop.clock.now_s()
        release(
            self._shop.check,
            CheckedPicture(
                image=picture.image,
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                tenant=task.tenant,
                model=task.model,
                request_id=task.request_id,
            ),
        )
        parameters = parameters_of(picture, request.prompt, request.negative_prompt)
        data = encode_image(
            picture.image,
            parameters if output.metadata else None,
            format=output.format,
            quality=output.quality,
        )
        timings = picture.timings
        return Drawn(
            index=task.index,
            data=data,
            format=output.format,
            width_px=picture.width_px,
            height_px=picture.height_px,
            seed=picture.seed,
            solver=picture.solver,
            schedule=picture.schedule,
            steps=picture.steps,
            guidance=picture.guidance,
            model=picture.model,
            plan_digest=picture.plan_digest,
            worker=self._shop.worker,
            approximations=dict(picture.approximations),
            timings=replace(
                timings,
                queue_s=timings.queue_s + self._waited_s,
                decode_s=timings.decode_s + self._shop.clock.now_s() - began_s,
            ),
            cache=picture.reuse,
            ticks=tuple(self._ticks),
        )
