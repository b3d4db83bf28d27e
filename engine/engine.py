"""The engine: models in, requests in, pictures out. What the server's worker and the CLI hold.

A request's life: resolve (defaults, table), encode, first latent, the step loop, decode, picture.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.decoder import DecodeThread
from engine.errors import InvalidRequestError
from engine.handle import Finished, Handle
from engine.loop import LoopConfig, StepLoop, Tick, Walk
from engine.model import Model
from engine.ports import Clock, SystemClock
from engine.prepare import Resolved, build, encode, resolve
from engine.saturation import (
    StepTimeFile,
    StepTimeTable,
    device_fingerprint,
    lane_name,
    measure,
)
from engine.scheduler import PolicyConfig, StepTimes, TickPolicy
from engine.types import GenerateRequest, Image, Limits, Picture, StepEvent, Timings


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds and dials of an engine."""

    limits: Limits = field(default_factory=Limits)
    loop: LoopConfig = field(default_factory=LoopConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    decode_batch: int = 4


class Engine:
    """Runs requests for one or more models on one device.

    Open models are given to :meth:`load`, before or during traffic; :meth:`close` closes them.
    Requests may come from any thread.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        config: EngineConfig | None = None,
        clock: Clock | None = None,
        policy: Callable[[StepTimes], TickPolicy] | None = None,
        on_tick: Callable[[Tick], None] | None = None,
    ) -> None:
        self._config = config or EngineConfig()
        self._clock = clock or SystemClock()
        self._models: dict[str, Model] = {}
        self._walks: dict[str, Walk] = {}
        self.times = StepTimeTable()
        self._told = on_tick
        self._decoder = DecodeThread(max_batch=self._config.decode_batch, clock=self._clock)
        self._loop = StepLoop(
            self._walks,
            policy(self.times) if policy else TickPolicy(self.times, self._config.policy),
            device=device,
            config=self._config.loop,
            clock=self._clock,
            on_tick=self._on_tick,
        )

    def start(self) -> None:
        """Start the loop and the decoder on threads of their own."""
        self._decoder.start()
        self._loop.start()

    def load(self, model: Model) -> None:
        """Serve ``model`` under its name.

        Raises:
            InvalidRequestError: a model of that name is loaded.
        """
        if model.spec.name in self._models:
            raise InvalidRequestError(f"{model.spec.name} is loaded already", field="model")
        self._walks[model.digest] = model.denoiser
        self._models[model.spec.name] = model

    def warm_up(self, name: str | None = None) -> None:
        """Measure tick times and B* of a model's native size, or read what was measured here.

        Call before traffic: without it B* is a guess until the process ends.
        """
        model = self._model(name)
        lane = model.native_lane()
        fingerprint = device_fingerprint(model.device, model.threads)
        kept = StepTimeFile(model.plan.timings_folder, fingerprint)
        tables = kept.read()
        if lane_name(lane) not in tables:
            tables[lane_name(lane)] = measure(model.blank_walk(lane), self._clock)
            kept.write(tables)
        self.times.set(lane, tables[lane_name(lane)])

    def rows_per_s(self, name: str | None = None) -> float:
        """UNet rows a second of a model's native lane at B*, as measured."""
        lane = self._model(name).native_lane()
        rows = self.times.saturation_rows(lane)
        return rows / self.times.tick_s(lane, rows)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the loaded models."""
        return tuple(self._models)

    def submit(
        self,
        request: GenerateRequest,
        *,
        model: str | None = None,
        request_id: str | None = None,
        on_event: Callable[[StepEvent], None] | None = None,
    ) -> Handle:
        """Check and encode a request, and put it into the step loop.

        Args:
            model: a loaded model's name; the only one when left out.
            on_event: called with every step, on the loop's thread: must return at once.

        Raises:
            DarkroomError: the request is refused; nothing of it is left behind.
        """
        began_s = self._clock.now_s()
        request.check(self._config.limits)
        chosen = self._model(model)
        resolved = resolve(request, chosen)
        text = encode(resolved, chosen)
        handle = Handle(
            request_id or uuid.uuid4().hex,
            encode_s=self._clock.now_s() - began_s,
            finished=self._finished(resolved, chosen),
            cancel=self._loop.cancel,
            on_event=on_event,
        )
        deadline_at_s = None if request.deadline_s is None else began_s + request.deadline_s
        self._loop.submit(
            build(
                resolved,
                text,
                chosen,
                request_id=handle.id,
                listener=handle,
                deadline_at_s=deadline_at_s,
            )
        )
        return handle

    def generate(self, request: GenerateRequest, *, model: str | None = None) -> Picture:
        """Submit and wait."""
        return self.submit(request, model=model).result()

    def close(
        self, *, drain: bool = True, timeout_s: float | None = None, close_models: bool = True
    ) -> None:
        """Stop the loop (finishing what is live when ``drain``), then decoder and models."""
        self._loop.close(drain=drain, timeout_s=timeout_s)
        self._decoder.close()
        for model in self._models.values() if close_models else ():
            model.close()
        self._models.clear()
        self._walks.clear()

    def _model(self, name: str | None) -> Model:
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name is None or name not in self._models:
            allowed = ", ".join(sorted(self._models)) or "none is loaded"
            raise InvalidRequestError(f"unknown model {name!r}; allowed: {allowed}", field="model")
        return self._models[name]

    def _finished(self, resolved: Resolved, model: Model) -> Finished:
        def decode(
            latent: torch.Tensor,
            on_image: Callable[[Image, float], None],
            on_error: Callable[[Exception], None],
        ) -> None:
            self._decoder.submit(model.vae.decode, latent, on_image, on_error)

        def describe(image: Image, latent: torch.Tensor, timings: Timings) -> Picture:
            return Picture(
                image=image,
                latent=latent,
                seed=resolved.seed,
                solver=resolved.table.solver,
                schedule=resolved.table.schedule,
                steps=resolved.table.steps,
                evaluations=resolved.table.evaluations,
                guidance=resolved.guidance,
                width_px=resolved.width_px,
                height_px=resolved.height_px,
                model=model.spec.name,
                plan_digest=model.digest,
                approximations=model.approximations,
                timings=timings,
            )

        return Finished(decode, describe)

    def _on_tick(self, tick: Tick) -> None:
        self.times.observe(tick.lane, tick.rows, tick.total_s)
        if self._told is not None:
            self._told(tick)
