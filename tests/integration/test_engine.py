"""The whole engine on a real compiled plan: requests in, pictures out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.compile.plan import Plan
from engine.engine import Engine
from engine.errors import (
    CancelledError,
    InvalidRequestError,
    LimitExceededError,
    UnsupportedError,
)
from engine.model import Model
from engine.runtime.base import Runtime
from engine.saturation import StepTimeFile, device_fingerprint, lane_name
from engine.types import GenerateRequest, StepEvent


def request(seed: int | None = 1, **changes: object) -> GenerateRequest:
    values = {"prompt": "a red umbrella", "steps": 4, "seed": seed, **changes}
    return GenerateRequest(**values)  # type: ignore[arg-type]


def test_a_request_becomes_a_picture_that_says_how_it_was_drawn(tiny_engine: Engine) -> None:
    picture = tiny_engine.generate(request(solver="dpmpp_2m", width_px=48))
    assert picture.image.shape == (32, 48, 3)
    assert picture.image.dtype == np.uint8
    assert (picture.seed, picture.steps, picture.solver) == (1, 4, "dpmpp_2m")
    assert picture.guidance == 4.0  # this family's own
    assert picture.approximations == {}
    timings = picture.timings
    assert min(timings.encode_s, timings.denoise_s, timings.decode_s) > 0
    assert torch.isfinite(picture.latent).all()


def test_a_seed_means_a_picture_and_no_seed_means_another(tiny_engine: Engine) -> None:
    first, again = tiny_engine.generate(request(7)), tiny_engine.generate(request(7))
    assert np.array_equal(first.image, again.image)
    drawn = tiny_engine.generate(request(seed=None))
    assert not np.array_equal(first.image, drawn.image)
    assert np.array_equal(tiny_engine.generate(request(drawn.seed)).image, drawn.image)


def test_a_picture_does_not_depend_on_its_batch_mates(tiny_engine: Engine) -> None:
    """Other solvers, steps, guidance, sizes and modes beside it, in the same ticks."""
    photo = np.full((32, 32, 3), 90, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    requests = [
        request(1),
        request(2, solver="euler_ancestral", steps=7),
        request(3, solver="heun", schedule="karras", guidance=1.0),
        request(4, solver="unipc", guidance=12.0, negative_prompt="dog"),
        request(5, solver="dpmpp_2m_sde", width_px=64),
        request(6, image=photo, strength=0.5),
        request(7, image=photo, mask=mask, strength=1.0, solver="ddim"),
    ]
    alone = [tiny_engine.generate(item).latent for item in requests]
    together = [handle.result(60) for handle in map(tiny_engine.submit, requests)]
    for single, picture in zip(alone, together, strict=True):
        assert torch.linalg.norm(picture.latent - single) <= 1e-5 * torch.linalg.norm(single)


def test_events_come_in_order_with_previews(tiny_engine: Engine) -> None:
    heard: list[StepEvent] = []
    handle = tiny_engine.submit(request(steps=6, preview_every=2), on_event=heard.append)
    events = list(handle.events())
    handle.result(60)
    assert heard == events
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events if event.preview is not None] == [2, 4]
    levels = [event.log_snr for event in events]
    assert levels == sorted(levels)


def test_cancel_stops_at_a_step_boundary_and_frees_the_slot(tiny_engine: Engine) -> None:
    handle = tiny_engine.submit(request(steps=150))
    next(handle.events())
    handle.cancel()
    with pytest.raises(CancelledError):
        handle.result(60)
    assert tiny_engine.generate(request()).steps == 4


def test_inpainting_keeps_what_is_not_masked(tiny_engine: Engine) -> None:
    photo = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    kept = tiny_engine.generate(request(image=photo, mask=mask)).latent
    repainted = tiny_engine.generate(request(image=photo, mask=~mask, strength=1.0)).latent
    again = tiny_engine.generate(request(seed=1, image=photo, mask=mask, steps=9)).latent
    assert torch.allclose(kept, again, atol=1e-6)
    assert not torch.allclose(kept, repainted, atol=0.1)


@pytest.mark.parametrize(
    ("error", "said", "changes"),
    [
        (InvalidRequestError, "multiples of", {"width_px": 33}),
        (InvalidRequestError, "unknown solver", {"solver": "magic"}),
        (InvalidRequestError, "unknown schedule", {"schedule": "magic"}),
        (UnsupportedError, "does not support schedule", {"solver": "ddim", "schedule": "karras"}),
        (LimitExceededError, "150", {"steps": 10_000}),
        (LimitExceededError, "4000", {"prompt": "x" * 4001}),
        (InvalidRequestError, "must be equal", {"mask": np.zeros((16, 16), np.uint8)}),
        (InvalidRequestError, "leave it out", {"width_px": 64, "mask": None}),
    ],
)
def test_bad_requests_say_what_is_wrong_and_leave_nothing_behind(
    tiny_engine: Engine, error: type[Exception], said: str, changes: dict[str, object]
) -> None:
    if "mask" in changes:
        changes = {"image": np.zeros((32, 32, 3), np.uint8), **changes}
    with pytest.raises(error, match=said):
        tiny_engine.submit(request(**changes))  # type: ignore[arg-type]
    assert tiny_engine.generate(request()).steps == 4


def test_the_model_must_be_loaded(tiny_engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match=r"allowed: tiny-text"):
        tiny_engine.submit(request(), model="other")


def test_warm_up_measures_and_keeps_it_beside_the_plan(
    tiny_plan: Callable[[str], Plan], cpu_runtime: Runtime
) -> None:
    plan = tiny_plan("text")
    tables = []
    for _ in range(2):
        engine = Engine()
        model = Model.open(plan, cpu_runtime)
        lane = lane_name(model.native_lane())
        kept = StepTimeFile(plan.timings_folder, device_fingerprint(model.device, model.threads))
        engine.load(model)
        engine.start()
        engine.warm_up()
        assert engine.rows_per_s() > 0
        engine.close()
        tables.append(kept.read()[lane])
    first, second = tables
    assert all(second[rows] <= seconds for rows, seconds in first.items())
