"""Real trajectories for int8's calibration: the engine's own step loop draws a few pictures.

Every input of the network is noted on the way. Those moments are small, so that any number of
passes can run the network over them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.compile.manifest import PlanManifest
from engine.compile.plan import Plan
from engine.rows import RowLimits

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Told (done, total) as a pass goes on."""
Moment = Mapping[str, Array]
"""Inputs of the network at one step, by source name, each (rows, …)."""


def untold(*_: object) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture to draw for calibration."""

    prompt: str
    seed: int
    steps: int
    guided: bool
    """At the checkpoint's own scale; else without guidance."""


DRAWINGS = tuple(
    Drawing(prompt, seed=7000 + i, steps=steps, guided=i % 3 != 2)
    for i, (prompt, steps) in enumerate(
        (
            ("a red umbrella", 20),
            ("a happy face", 8),
            ("a pizza on a blue background", 20),
            ("a small dog beside a house", 30),
            ("", 20),
            ("a photo of a mountain at night", 12),
            ("three yellow flowers", 50),
            ("a guitar on a white background", 4),
            ("a portrait of an old astronaut, oil painting, intricate details", 20),
            ("a rocket", 28),
        )
    )
)
"""With and without guidance, and step counts that between them visit every part of the schedule.
Other prompts and seeds than any table of ours is measured on."""


def record(
    folder: Path,
    manifest: PlanManifest,
    *,
    rows: int,
    drawings: Sequence[Drawing] = DRAWINGS,
    progress: Progress = untold,
) -> list[Moment]:
    """Draw ``drawings`` on a float plan with its own solver; ``rows`` inputs of the network.

    The rows kept are a fixed random choice over all steps of all drawings, one row each.
    """
    from engine.model import Model
    from engine.runtime.onnxruntime import OnnxRuntime

    # A plan for another backend holds the same float graphs, which this CPU runs.
    plan = Plan(folder, manifest.model_copy(update={"backend": "onnxruntime"}))
    seen: list[Moment] = []
    runtime = OnnxRuntime()
    model = Model.open(plan, runtime)
    try:
        for done, drawing in enumerate(drawings):
            progress(done, len(drawings))
            _draw(model, drawing, seen)
    finally:
        model.close()
        runtime.close()
    chosen = np.random.default_rng(0).permutation(len(seen))[:rows]
    return [seen[i] for i in sorted(chosen)]


def _draw(model: Any, drawing: Drawing, seen: list[Moment]) -> None:
    """Run one trajectory alone on this thread; note every row of every step in ``seen``."""
    from engine.loop import StepLoop
    from engine.prepare import build, encode, resolve
    from engine.saturation import StepTimeTable
    from engine.scheduler import TickPolicy
    from engine.types import GenerateRequest

    image, mask = _picture(model.spec.latent.native_px) if model.takes_mask else (None, None)
    request = GenerateRequest(
        prompt=drawing.prompt,
        seed=drawing.seed,
        steps=drawing.steps,
        guidance=None if drawing.guided else 1.0,
        image=image,
        mask=mask,
        strength=1.0,
    )
    resolved = resolve(request, model)
    loop = StepLoop({model.digest: _Recorder(model, seen)}, TickPolicy(StepTimeTable()))
    listener = _Listener()
    loop.submit(
        build(resolved, encode(resolved, model), model, request_id="drawing", listener=listener)
    )
    while loop.tick():
        pass
    if listener.error is not None:
        raise listener.error


class _Recorder:
    """A model's network that notes every row that it is given."""

    def __init__(self, model: Any, seen: list[Moment]) -> None:
        self._denoiser = model.denoiser
        self._seen = seen
        self.limits: RowLimits = model.denoiser.limits

    def __call__(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        added: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        given = self._denoiser.inputs(sample, timesteps, context, added)
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in given.items()}
        self._seen.extend({n: a[i : i + 1] for n, a in arrays.items()} for i in range(len(sample)))
        out: torch.Tensor = self._denoiser(sample, timesteps, context, added)
        return out


class _Listener:
    error: Exception | None = None

    def on_first_tick(self, queued_s: float) -> None:
        pass

    def on_step(self, event: object) -> None:
        pass

    def on_done(self, latent: torch.Tensor, denoise_s: float) -> None:
        pass

    def on_error(self, error: Exception) -> None:
        self.error = error


def _picture(side_px: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """For models that need one: a colour ramp, and a mask over its right half."""
    ramp = np.linspace(0, 255, side_px).astype(np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    mask = np.where(across < 128, 0, 255).astype(np.uint8)
    return np.stack([across, down, 255 - across], axis=-1), mask
