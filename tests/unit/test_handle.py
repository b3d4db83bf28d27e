"""The owner's end of a request, driven by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.errors import CancelledError, ExecutionError
from engine.handle import Finished, Handle
from engine.types import Image, Picture, StepEvent, Timings

LATENT = torch.zeros(4, 2, 2)


def picture(image: Image, latent: torch.Tensor, timings: Timings) -> Picture:
    return Picture(
        image=image,
        latent=latent,
        seed=1,
        solver="ddim",
        schedule="leading",
        steps=2,
        evaluations=2,
        guidance=1.0,
        width_px=16,
        height_px=16,
        model="m",
        plan_digest="d",
        timings=timings,
    )


def decode_at_once(
    latent: torch.Tensor,
    on_image: Callable[[Image, float], None],
    on_error: Callable[[Exception], None],
) -> None:
    on_image(np.zeros((16, 16, 3), np.uint8), 0.5)


def make(cancelled: list[str] | None = None) -> Handle:
    return Handle(
        "h",
        encode_s=0.125,
        finished=Finished(decode_at_once, picture),
        cancel=(cancelled if cancelled is not None else []).append,
    )


def step(number: int) -> StepEvent:
    return StepEvent("h", number, 2, 0.0, 1, 0.1)


def test_steps_then_a_picture_with_every_timing() -> None:
    handle = make()
    handle.on_first_tick(0.25)
    handle.on_step(step(1))
    handle.on_step(step(2))
    assert not handle.done
    handle.on_done(LATENT, 2.0)
    assert [event.step for event in handle.events()] == [1, 2]
    assert list(handle.events()) == []
    timings = handle.result(0).timings
    assert (timings.queue_s, timings.encode_s, timings.denoise_s, timings.decode_s) == (
        0.25,
        0.125,
        2.0,
        0.5,
    )
    assert timings.total_s == 2.875


def test_an_error_ends_the_wait_and_the_events() -> None:
    handle = make()
    handle.on_error(ExecutionError("broken"))
    assert list(handle.events()) == []
    with pytest.raises(ExecutionError, match="broken"):
        handle.result(0)


def test_only_the_first_ending_counts() -> None:
    handle = make()
    handle.on_error(CancelledError("first"))
    handle.on_error(ExecutionError("second"))
    handle.on_done(LATENT, 1.0)
    with pytest.raises(CancelledError, match="first"):
        handle.result(0)


def test_a_callback_may_call_back_into_the_handle() -> None:
    handle, heard = make(), threading.Event()

    def callback(_: object) -> None:
        handle.on_error(ExecutionError("late"))
        heard.set()

    handle.add_done_callback(callback)
    handle.on_done(LATENT, 1.0)
    assert heard.is_set()
    assert handle.result(0).seed == 1


def test_cancel_goes_to_the_loop_by_id() -> None:
    cancelled: list[str] = []
    make(cancelled).cancel()
    assert cancelled == ["h"]


def test_a_picture_that_nobody_wants_any_more_is_not_decoded() -> None:
    handle = make()
    handle.cancel()
    handle.on_done(LATENT, 1.0)
    with pytest.raises(CancelledError, match="after the last step"):
        handle.result(0)


def test_the_owner_hears_of_the_first_step() -> None:
    heard: list[str] = []
    handle = Handle(
        "h",
        finished=Finished(decode_at_once, picture),
        cancel=lambda _: None,
        on_start=lambda: heard.append("begun"),
    )
    assert heard == []
    handle.on_first_tick(0.0)
    assert heard == ["begun"]


def test_waiting_has_a_time_limit() -> None:
    with pytest.raises(TimeoutError):
        make().result(0.01)
