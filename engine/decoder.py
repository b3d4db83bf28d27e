"""Finished latents become pictures on a thread of their own, in small batches, beside the ticks."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import ClosedError, DarkroomError, ExecutionError
from engine.ports import Clock, SystemClock
from engine.threads import compute_alone
from engine.types import Image

_log = logging.getLogger(__name__)


class Decode(Protocol):
    """(batch, channels, h, w) latents to pictures: what :mod:`engine.vae` does."""

    def __call__(self, latents: torch.Tensor) -> list[Image]:
        """One picture for each latent, in order."""
        ...


@dataclass(frozen=True, slots=True)
class _Job:
    decode: Decode
    latent: torch.Tensor
    on_image: Callable[[Image, float], None]
    on_error: Callable[[Exception], None]


class DecodeThread:
    """Decodes what the loop retires. Bounded by the loop: every job was a live trajectory.

    Jobs of the same decoder and shape that wait together are decoded together, ``max_batch`` at
    most; a batch that fails is retried singly, so one bad latent fails alone.
    """

    def __init__(self, *, max_batch: int = 4, clock: Clock | None = None) -> None:
        self._max_batch = max_batch
        self._clock = clock or SystemClock()
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="darkroom-decode", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def submit(
        self,
        decode: Decode,
        latent: torch.Tensor,
        on_image: Callable[[Image, float], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Queue a latent (channels, h, w); one of the callbacks is called, on this thread.

        ``on_image`` gets the picture and the seconds from this call to its end.
        """
        began_s = self._clock.now_s()
        job = _Job(decode, latent, lambda image, at_s: on_image(image, at_s - began_s), on_error)
        with self._wake:
            if not self._closing:
                self._jobs.append(job)
                self._wake.notify()
                return
        on_error(ClosedError("the engine closed before the picture was decoded"))

    def close(self) -> None:
        """Finish what is queued, then stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        compute_alone()
        while True:
            with self._wake:
                while not (self._jobs or self._closing):
                    self._wake.wait()
                if not self._jobs:
                    return
                batch = self._take_batch()
            self._decode(batch)

    def _take_batch(self) -> list[_Job]:
        first = self._jobs.popleft()
        batch = [first]
        rest: deque[_Job] = deque()
        while self._jobs:
            job = self._jobs.popleft()
            fits = job.decode == first.decode and job.latent.shape == first.latent.shape
            (batch if fits and len(batch) < self._max_batch else rest).append(job)
        self._jobs = rest
        return batch

    def _decode(self, batch: list[_Job]) -> None:
        try:
            images = batch[0].decode(torch.stack([job.latent for job in batch]))
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    self._decode([job])
                return
            _log.exception("decoding a latent failed")
            known = isinstance(error, DarkroomError)
            _call(batch[0].on_error, error if known else ExecutionError("decoding failed"))
            return
        now_s = self._clock.now_s()
        for job, image in zip(batch, images, strict=True):
            _call(job.on_image, image, now_s)


def _call(callback: Callable[..., None], *args: object) -> None:
    try:
        callback(*args)
    except Exception:
        _log.exception("a picture's owner failed to take it")
