"""The engine: models in, requests in, pictures out. What the server's worker and the CLI hold.

A request's life: resolve (defaults, table), encode, first latent, the step loop, decode, picture.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from engine.decoder import DecodeThread
from engine.errors import OverloadedError
from engine.handle import Finished, Handle
from engine.loop import LoopConfig, StepLoop, Tick
from engine.model import Model
from engine.models import ModelTable, Served
from engine.noise_statistics import ReuseStatistics
from engine.picture import describe
from engine.ports import Clock, NoiseCache, SystemClock
from engine.prepare import build, encode, resolve
from engine.reuse_noise import NoiseReuse, NoiseReuseConfig, Visit, continued
from engine.saturation import (
    StepTimeFile,
    StepTimeTable,
    brought_up_to_date,
    device_fingerprint,
    lane_name,
    measure,
)
from engine.scheduler import LaneId, PolicyConfig, StepTimes, TickPolicy
from engine.trajectory import LaneKey, resume
from engine.types import GenerateRequest, Image, Limits, Picture, Snapshot, StepEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds and dials of an engine."""

    limits: Limits = field(default_factory=Limits)
    loop: LoopConfig = field(default_factory=LoopConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    decode_batch: int = 4
    noise_reuse: NoiseReuseConfig = field(default_factory=NoiseReuseConfig)


class Engine:
    """Runs requests for one or more models on one device.

    Open models are given to :meth:`load`, taken out by :meth:`unload` and changed for others by
    :meth:`swap`, before or during traffic; :meth:`close` closes those it still has.
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
        on_out_of_memory: Callable[[LaneId, int], None] | None = None,
        noise_cache: NoiseCache | None = None,
    ) -> None:
        self._config = config or EngineConfig()
        self._clock = clock or SystemClock()
        self._noise: NoiseReuse | None = None
        if noise_cache is not None:
            self._noise = NoiseReuse(noise_cache, self._config.noise_reuse, clock=self._clock)
        self._models = ModelTable()
        self.times = StepTimeTable(on_out_of_memory=on_out_of_memory)
        self._told = on_tick
        self._left_over: list[Model] = []
        self._at_once = threading.BoundedSemaphore(self._config.loop.max_live)
        self._decoder = DecodeThread(max_batch=self._config.decode_batch, clock=self._clock)
        self._loop = StepLoop(
            self._models.walks,
            policy(self.times) if policy else TickPolicy(self.times, self._config.policy),
            device=device,
            config=self._config.loop,
            clock=self._clock,
            on_tick=self._on_tick,
        )

    def start(self) -> None:
        """Start the loop and the decoder on threads of their own."""
        self._decoder.start()
        if self._noise is not None:
            self._noise.start()
        self._loop.start()

    def load(self, model: Model, *, name: str | None = None) -> None:
        """Serve ``model``, by default under the checkpoint's own name.

        Raises:
            InvalidRequestError: the name is taken, or the same plan is loaded already.
        """
        self._models.add(name or model.spec.name, model)

    def unload(self, name: str, *, timeout_s: float | None = None) -> Model:
        """Take no new requests for a model, let those it has finish, and hand it back open.

        Other models go on meanwhile. The caller closes what it gets.

        Raises:
            InvalidRequestError: no model of that name is loaded.
            OverloadedError: it still draws after ``timeout_s`` seconds, and is served as before.
        """
        model = self._models.retire(name, timeout_s)
        self.times.forget(model.digest)
        return model

    def swap(self, name: str, model: Model, *, timeout_s: float | None = None) -> Model:
        """Warm ``model`` up, give it ``name``, and hand the old one back when it is finished.

        No request is dropped: what the old model has begun, it ends.

        Raises:
            InvalidRequestError: no model of that name is loaded, or the new plan is already.
            OverloadedError: the old one still draws after ``timeout_s`` seconds; the new one is
                served, and the old one stays open until :meth:`close`.
        """
        self._warm_up(model)
        old = self._models.replace(name, model)
        try:
            finished = self._models.finish(old, timeout_s)
        except OverloadedError:
            self._left_over.append(old.model)
            raise
        self.times.forget(finished.digest)
        return finished

    def warm_up(self, name: str | None = None) -> None:
        """Measure tick times and B* of a model's native size, or read what was measured here.

        Call before traffic: without it B* is a guess until the process ends.
        """
        self._warm_up(self._models.get(name))

    def native_lane(self, name: str | None = None) -> LaneKey:
        """The lane of an unadorned request at a model's native size; a key of ``times``."""
        return self._models.get(name).native_lane()

    def rows_per_s(self, name: str | None = None) -> float:
        """UNet rows a second of a model's native lane at B*, as measured."""
        lane = self.native_lane(name)
        rows = self.times.saturation_rows(lane)
        return rows / self.times.tick_s(lane, rows)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the loaded models."""
        return self._models.names

    def submit(
        self,
        request: GenerateRequest,
        *,
        model: str | None = None,
        request_id: str | None = None,
        on_event: Callable[[StepEvent], None] | None = None,
        on_start: Callable[[], None] | None = None,
        snapshot: Snapshot | None = None,
        tenant: str = "",
    ) -> Handle:
        """Check and encode a request, and put it into the step loop.

        Args:
            model: a loaded model's name; the only one when left out.
            on_event: called with every step, on the loop's thread: must return at once.
            on_start: called when the first step begins, likewise.
            snapshot: a full one of the same request and seed, to go on from.
            tenant: who asks; the noise cache keeps tenants apart.

        Raises:
            DarkroomError: the request is refused; nothing of it is left behind.
        """
        served = self._models.acquire(model)
        try:
            handle = self._submit(served, request, request_id, on_event, on_start, snapshot, tenant)
        except BaseException:
            self._models.release(served)
            raise
        handle.add_done_callback(lambda _: self._models.release(served))
        return handle

    def snapshot(self, request_id: str) -> Future[Snapshot]:
        """Copy a running request's whole state between two ticks.

        The future fails with ``InvalidRequestError`` when the request is not in the loop.
        """
        return self._loop.snapshot(request_id)

    def reuse_statistics(self) -> ReuseStatistics | None:
        """What the noise cache was worth so far; None without one."""
        return None if self._noise is None else self._noise.statistics()

    @property
    def live(self) -> int:
        """Requests in the step loop."""
        return self._loop.live

    @property
    def lanes(self) -> int:
        """Lanes in the step loop: kinds of requests that cannot share a tick."""
        return self._loop.lanes

    def generate(self, request: GenerateRequest, *, model: str | None = None) -> Picture:
        """Submit and wait."""
        return self.submit(request, model=model).result()

    def close(
        self, *, drain: bool = True, timeout_s: float | None = None, close_models: bool = True
    ) -> None:
        """Stop the loop (finishing what is live when ``drain``), then decoder and models."""
        self._loop.close(drain=drain, timeout_s=timeout_s)
        self._decoder.close()
        if self._noise is not None:
            self._noise.close()
        models = (*self._models.clear(), *self._left_over)
        self._left_over.clear()
        for model in models if close_models else ():
            model.close()

    def _warm_up(self, model: Model) -> None:
        lane = model.native_lane()
        fingerprint = device_fingerprint(model.device, model.threads)
        kept = StepTimeFile(model.plan.timings_folder, fingerprint)
        tables = kept.read()
        known = tables.get(lane_name(lane))
        walk, most = model.blank_walk(lane), model.denoiser.limits.most
        if known:
            found = brought_up_to_date(known, walk, self._clock, most=most)
        else:
            found = measure(walk, self._clock, most=most)
        model.denoiser.forget()  # the zeros that it was measured with
        if found != known:
            kept.write(tables | {lane_name(lane): found})
        self.times.set(lane, found)

    def _submit(
        self,
        served: Served,
        request: GenerateRequest,
        request_id: str | None,
        on_event: Callable[[StepEvent], None] | None,
        on_start: Callable[[], None] | None,
        snapshot: Snapshot | None,
        tenant: str,
    ) -> Handle:
        began_s = self._clock.now_s()
        request.check(self._config.limits)
        resolved = resolve(request, served.model)
        text = encode(resolved, served.model)
        encoded_s = self._clock.now_s()
        context = text.conditioning.context[0]
        if snapshot is not None:
            visit = continued(snapshot, resolved, served.model)
        elif self._noise is not None:
            visit = self._noise.visit(resolved, context, served.model, tenant)
        else:
            visit = Visit(resolved)
        cache_s = self._clock.now_s() - encoded_s
        handle = Handle(
            request_id or uuid.uuid4().hex,
            finished=self._finished(visit, served),
            cancel=self._loop.cancel,
            on_event=on_event,
            on_start=on_start,
        )
        deadline_at_s = None if request.deadline_s is None else began_s + request.deadline_s
        handle.cache_s = cache_s
        if visit.final is not None:
            handle.encode_s = encoded_s - began_s
            self._finish_at_once(handle, visit.final)
            return handle
        trajectory = build(
            visit.resolved,
            text,
            served.model,
            request_id=handle.id,
            listener=handle,
            deadline_at_s=deadline_at_s,
            reentry=visit.reentry,
            keep=visit.keep,
        )
        if snapshot is not None:
            resume(trajectory, snapshot)
        handle.encode_s = self._clock.now_s() - began_s - cache_s
        self._loop.submit(trajectory)
        return handle

    def _finish_at_once(self, handle: Handle, latent: torch.Tensor) -> None:
        """Decode a stored picture; as many may wait for it as there may be trajectories."""
        if not self._at_once.acquire(blocking=False):
            raise OverloadedError(f"{self._config.loop.max_live} stored pictures wait for decoding")
        handle.add_done_callback(lambda _: self._at_once.release())
        handle.on_first_tick(0.0)
        handle.on_done(latent, 0.0)

    def _finished(self, visit: Visit, served: Served) -> Finished:
        vae = served.model.vae

        def decode(
            latent: torch.Tensor,
            on_image: Callable[[Image, float], None],
            on_error: Callable[[Exception], None],
        ) -> None:
            self._decoder.submit(vae.decode, latent, on_image, on_error)

        return Finished(decode, partial(describe, visit, served))

    def _on_tick(self, tick: Tick) -> None:
        self.times.observe(tick.lane, tick.rows, tick.total_s)
        if self._told is not None:
            self._told(tick)
