"""The owner's end of a submitted request: its news, its picture, its cancel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from engine.errors import CancelledError
from engine.types import Image, Picture, StepEvent, Timings


@dataclass(frozen=True, slots=True)
class Finished:
    """What :class:`Handle` needs to turn a latent into a :class:`Picture`."""

    decode: Callable[
        [torch.Tensor, Callable[[Image, float], None], Callable[[Exception], None]], None
    ]
    describe: Callable[[Image, torch.Tensor, Timings], Picture]


class Handle:
    """One request in flight. Also the :class:`~engine.trajectory.Listener` of its trajectory.

    Safe from any thread. News is bounded by the steps of the table.

    Attributes:
        encode_s: seconds that its prompt and pictures took to encode; final before the first step.
        cache_s: seconds that it looked for a state in the noise cache; likewise.
    """

    def __init__(
        self,
        request_id: str,
        *,
        encode_s: float = 0.0,
        finished: Finished,
        cancel: Callable[[str], None],
        on_event: Callable[[StepEvent], None] | None = None,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        self.id = request_id
        self._finished = finished
        self._cancel = cancel
        self._on_event = on_event
        self._on_start = on_start
        self._future: Future[Picture] = Future()
        self._news: queue.SimpleQueue[StepEvent | None] = queue.SimpleQueue()
        self.encode_s = encode_s
        self.cache_s = 0.0
        self._queue_s = 0.0
        self._settling = threading.Lock()
        self._settled = False
        self._cancelled = False

    # ------------------------------------------------------------------ for the owner

    def result(self, timeout_s: float | None = None) -> Picture:
        """Wait for the picture.

        Raises:
            DarkroomError: what ended the request instead (see :mod:`engine.errors`).
            TimeoutError: it is not finished after ``timeout_s`` seconds; it goes on.
        """
        return self._future.result(timeout_s)

    def events(self) -> Iterator[StepEvent]:
        """The steps as they happen; ends with the last one, or with the request."""
        while (event := self._news.get()) is not None:
            yield event
        self._news.put(None)  # a second reader ends too

    def cancel(self) -> None:
        """Stop before the next step; ``result`` then raises ``CancelledError``."""
        self._cancelled = True
        self._cancel(self.id)

    @property
    def done(self) -> bool:
        """Whether a picture or an error is there."""
        return self._future.done()

    def add_done_callback(self, callback: Callable[[Future[Picture]], None]) -> None:
        """Call back when there is a picture or an error, on the thread that made it."""
        self._future.add_done_callback(callback)

    # ------------------------------------------------------------------ for the loop

    def on_first_tick(self, queued_s: float) -> None:
        """Note the time in the queue."""
        self._queue_s = queued_s
        if self._on_start is not None:
            self._on_start()

    def on_step(self, event: StepEvent) -> None:
        """Pass a step on."""
        self._news.put(event)
        if self._on_event is not None:
            self._on_event(event)

    def on_done(self, latent: torch.Tensor, denoise_s: float) -> None:
        """Hand the latent to the decoder, if anybody still wants the picture."""
        if self._cancelled:
            self.on_error(CancelledError("cancelled after the last step"))
            return

        def on_image(image: Image, decode_s: float) -> None:
            timings = Timings(
                queue_s=self._queue_s,
                encode_s=self.encode_s,
                cache_s=self.cache_s,
                denoise_s=denoise_s,
                decode_s=decode_s,
            )
            self._settle(self._finished.describe(image, latent, timings))

        self._finished.decode(latent, on_image, self.on_error)

    def on_error(self, error: Exception) -> None:
        """End without a picture."""
        self._settle(error)

    def _settle(self, outcome: Picture | Exception) -> None:
        with self._settling:
            if self._settled:
                return
            self._settled = True
        # Outside the lock: the owner's callbacks run here and may call back into this handle.
        if isinstance(outcome, Exception):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
        self._news.put(None)
