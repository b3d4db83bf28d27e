"""The decode thread: batches by shape, isolates failures, finishes before it closes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from engine.decoder import DecodeThread
from engine.errors import ClosedError, ExecutionError
from engine.types import Image


class Recorder:
    """Waits for a number of outcomes."""

    def __init__(self, count: int) -> None:
        self.images: dict[int, Image] = {}
        self.errors: dict[int, Exception] = {}
        self._left = threading.Semaphore(0)
        self._count = count

    def callbacks(
        self, key: int
    ) -> tuple[Callable[[Image, float], None], Callable[[Exception], None]]:
        def on_image(image: Image, _: float) -> None:
            self.images[key] = image
            self._left.release()

        def on_error(error: Exception) -> None:
            self.errors[key] = error
            self._left.release()

        return on_image, on_error

    def wait(self) -> None:
        for _ in range(self._count):
            assert self._left.acquire(timeout=10.0)


class Decoder:
    """Paints a picture with the latent's first value; fails for values above 100."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()

    def __call__(self, latents: torch.Tensor) -> list[Image]:
        assert self.gate.wait(10.0)
        self.batches.append(len(latents))
        values = latents[:, 0, 0, 0].int().tolist()
        if any(value > 100 for value in values):
            raise RuntimeError("bad latent")
        return [np.full((2, 2, 3), value, np.uint8) for value in values]


@pytest.fixture
def thread() -> Iterator[DecodeThread]:
    made = DecodeThread(max_batch=3)
    made.start()
    yield made
    made.close()


def latent(value: int, side: int = 2) -> torch.Tensor:
    return torch.full((4, side, side), float(value))


def test_what_waits_together_is_decoded_together_by_shape(thread: DecodeThread) -> None:
    decoder, recorder = Decoder(), Recorder(7)
    for key in range(5):
        thread.submit(decoder, latent(key), *recorder.callbacks(key))
    for key in (5, 6):
        thread.submit(decoder, latent(key, side=3), *recorder.callbacks(key))
    decoder.gate.set()
    recorder.wait()
    assert {key: int(image[0, 0, 0]) for key, image in recorder.images.items()} == {
        key: key for key in range(7)
    }
    # The first may have been taken alone before the rest came.
    assert sum(decoder.batches) == 7
    assert max(decoder.batches) <= 3
    assert len(decoder.batches) <= 4


def test_one_bad_latent_fails_alone(thread: DecodeThread, caplog: pytest.LogCaptureFixture) -> None:
    decoder, recorder = Decoder(), Recorder(3)
    for key, value in enumerate((1, 200, 2)):
        thread.submit(decoder, latent(value), *recorder.callbacks(key))
    decoder.gate.set()
    recorder.wait()
    assert sorted(recorder.images) == [0, 2]
    assert isinstance(recorder.errors[1], ExecutionError)
    assert "decoding a latent failed" in caplog.text


def test_close_finishes_what_is_queued_and_refuses_what_comes_after() -> None:
    made, decoder, recorder = DecodeThread(), Decoder(), Recorder(2)
    made.start()
    made.submit(decoder, latent(1), *recorder.callbacks(0))
    decoder.gate.set()
    made.close()
    assert 0 in recorder.images
    made.submit(decoder, latent(1), *recorder.callbacks(1))
    recorder.wait()
    assert isinstance(recorder.errors[1], ClosedError)


def test_an_owner_that_raises_does_not_stop_the_thread(
    thread: DecodeThread, caplog: pytest.LogCaptureFixture
) -> None:
    decoder, recorder = Decoder(), Recorder(1)
    decoder.gate.set()

    def broken(image: Image, seconds: float) -> None:
        raise RuntimeError("full")

    thread.submit(decoder, latent(1), broken, lambda error: None)
    thread.submit(decoder, latent(2), *recorder.callbacks(0))
    recorder.wait()
    assert "owner failed" in caplog.text
