"""The models of one worker: configured ones at the start, others added, changed and removed later.

Requests never notice: a model that is closed to make room is opened again for the next request,
one that is reloaded finishes what it began while the new plan draws what is new.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch

from engine.compile.plan import Plan
from engine.engine import Engine
from engine.errors import InvalidRequestError
from engine.ports import Clock
from engine.types import CacheDirective, CacheMode, GenerateRequest
from server.config import ModelConfig, ServeConfig
from server.errors import ConflictError
from server.memory import DEFAULT_SHARE, give_back, total_bytes, used_bytes
from server.messages import ModelInfo
from server.settings import Settings
from server.shelf import ModelShelf
from server.worker_metrics import WorkerMetrics
from server.worker_models import ModelHost, Progress, describe, weights_bytes

_log = logging.getLogger(__name__)


def memory_budget_bytes(config: ServeConfig) -> int:
    """Bytes of open models in one worker: as configured, or its share of the device."""
    if config.workers.memory_budget_bytes is not None:
        return config.workers.memory_budget_bytes
    device = torch.device(config.workers.device)
    sharing = config.workers.replicas if device.type == "cpu" else 1
    return int(DEFAULT_SHARE * total_bytes(device) / sharing)


class LoadedModels:
    """Plans, open models and their memory. Every method may be called from any thread."""

    def __init__(
        self,
        config: ServeConfig,
        settings: Settings,
        engine: Engine,
        metrics: WorkerMetrics,
        clock: Clock,
    ) -> None:
        self._config = config
        self._device = torch.device(config.workers.device)
        self._host = ModelHost(config, settings)
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        self._changing = threading.Lock()
        self._rehearsing: str | None = None
        # Replaced as a whole and never changed, so that readers need no lock.
        self._configured: dict[str, ModelConfig] = {}
        self._plans: dict[str, Plan] = {}
        self._infos: dict[str, ModelInfo] = {}
        self._names: dict[str, str] = {}
        self._shelf = ModelShelf(
            memory_budget_bytes(config),
            open_model=self._open,
            close_model=self._close,
            clock=clock,
        )
        metrics.watch(
            "darkroom_memory_budget_bytes",
            "Memory that open models may take.",
            lambda: self._shelf.budget_bytes,
        )

    # ------------------------------------------------------------------ reading

    @property
    def infos(self) -> Sequence[ModelInfo]:
        """What is served; the default first."""
        return tuple(self._infos.values())

    def info(self, name: str) -> ModelInfo:
        """What is known of one model.

        Raises:
            InvalidRequestError: there is no such model; says which there are.
        """
        if name not in self._infos:
            allowed = ", ".join(self._infos) or "none"
            raise InvalidRequestError(f"unknown model {name!r}; allowed: {allowed}", field="model")
        return self._infos[name]

    def name_of(self, plan_digest: str) -> str | None:
        """The model that a plan belongs to; None for one that clients do not draw with (yet)."""
        name = self._names.get(plan_digest)
        return None if name == self._rehearsing else name

    def acquire(self, name: str) -> Future[None]:
        """Ask for a model to be open; see :meth:`ModelShelf.acquire`."""
        return self._shelf.acquire(name)

    def release(self, name: str) -> None:
        """End a use."""
        self._shelf.release(name)

    # ------------------------------------------------------------------ life

    def open_all(self, progress: Progress | None = None) -> None:
        """Compile, open and warm up every configured model. Blocks, maybe for minutes.

        All are tried, also when not all fit at once: then those stay open that come first.

        Raises:
            DarkroomError: one of them cannot be served.
        """
        self._shelf.start()
        for configured in self._config.models:
            plan = self._host.plan(configured, progress)
            self._note(configured, plan)
            self._shelf.add(configured.id, weights_bytes(plan))
        for configured in reversed(self._config.models):
            self._warm(configured.id)

    def close(self) -> None:
        """Stop opening and closing. To be called before the engine, which closes what is open."""
        self._shelf.close()

    def close_runtimes(self) -> None:
        """Close what the models ran on. To be called after the engine."""
        self._host.close()

    # ------------------------------------------------------------------ changing

    def add(self, configured: ModelConfig, progress: Progress | None = None) -> ModelInfo:
        """Serve one more model. Blocks until it is warm; everything else goes on.

        Raises:
            ConflictError: the id is taken.
            DarkroomError: it cannot be served; nothing of it is left.
        """
        with self._changing:
            if configured.id in self._infos:
                raise ConflictError(f"a model {configured.id!r} is served already", field="id")
            plan = self._host.plan(configured, progress)
            if plan.digest in self._names:
                raise ConflictError(
                    f"the same plan is served as {self._names[plan.digest]!r}", field="path"
                )
            self._shelf.add(configured.id, weights_bytes(plan))
            self._configured = {**self._configured, configured.id: configured}
            self._plans = {**self._plans, configured.id: plan}
            try:
                self._warm(configured.id)
            except BaseException:
                self._shelf.remove(configured.id).result()
                self._plans = {i: kept for i, kept in self._plans.items() if i != configured.id}
                self._configured = {
                    i: kept for i, kept in self._configured.items() if i != configured.id
                }
                raise
            self._note(configured, plan)
            return self._infos[configured.id]

    def reload(self, name: str, progress: Progress | None = None) -> ModelInfo:
        """Compile a model's folder as it is now, and draw what is new with that.

        Blocks until the old plan has finished what it began. While both are open they may
        exceed the budget together.

        Raises:
            InvalidRequestError: there is no such model.
            DarkroomError: the folder cannot be served as it is now; the old plan goes on.
        """
        with self._changing:
            self.info(name)
            configured, old = self._configured[name], self._plans[name]
            plan = self._host.plan(configured, progress)
            if plan.digest != old.digest:
                self._shelf.between_moves(lambda: self._swap(configured, plan)).result()
                self._names = {d: n for d, n in self._names.items() if d != old.digest}
            return self._infos[name]

    def remove(self, name: str) -> None:
        """Stop serving a model. Blocks until it has finished what it began.

        Raises:
            InvalidRequestError: there is no such model, or it is the default one.
        """
        with self._changing:
            digest = self.info(name).plan_digest
            if name == next(iter(self._infos)):
                raise InvalidRequestError(f"{name} is the default model", field="model")
            self._infos = {i: info for i, info in self._infos.items() if i != name}
            self._shelf.remove(name).result()
            self._configured = {i: kept for i, kept in self._configured.items() if i != name}
            self._plans = {i: plan for i, plan in self._plans.items() if i != name}
            self._names = {d: n for d, n in self._names.items() if d != digest}

    def _note(self, configured: ModelConfig, plan: Plan) -> None:
        name = configured.id
        self._configured = {**self._configured, name: configured}
        self._plans = {**self._plans, name: plan}
        self._names = {**self._names, plan.digest: name}
        self._infos = {**self._infos, name: describe(configured, plan)}

    def _warm(self, name: str) -> None:
        self._shelf.acquire(name).result()
        self._shelf.release(name)

    # ------------------------------------------------------------------ on the shelf's thread

    def _open(self, name: str) -> int:
        began_s = self._clock.now_s()
        plan = self._plans[name]
        quiet = self._engine.live == 0
        before_bytes = used_bytes(self._device)
        model = self._host.open(plan, self._configured[name])
        try:
            self._engine.load(model, name=name)
        except BaseException:
            model.close()
            raise
        try:
            self._engine.warm_up(name)
            if quiet:
                self._rehearsing = name
                self._engine.generate(self._rehearsal(name), model=name)
        except BaseException:
            self._engine.unload(name).close()
            raise
        finally:
            self._rehearsing = None
        # What others take meanwhile would be counted too, so only a quiet moment is measured.
        grown_bytes = used_bytes(self._device) - before_bytes if quiet else 0
        size_bytes = max(weights_bytes(plan), grown_bytes)
        seconds = self._clock.now_s() - began_s
        self._metrics.loaded(name, size_bytes=size_bytes, seconds=seconds)
        _log.info("model %s is open: %.1f s, %d bytes", name, seconds, size_bytes)
        return size_bytes

    def _close(self, name: str) -> None:
        self._engine.unload(name).close()
        give_back(self._device)
        self._metrics.unloaded(name)
        _log.info("model %s is closed", name)

    def _swap(self, configured: ModelConfig, plan: Plan) -> None:
        name = configured.id
        if not self._shelf.is_open(name):
            self._note(configured, plan)
            return
        model = self._host.open(plan, configured)
        # Its ticks are told from the moment on in which it takes over.
        self._names = {**self._names, plan.digest: name}
        try:
            old = self._engine.swap(name, model)
        except BaseException:
            model.close()
            raise
        self._note(configured, plan)
        old.close()
        give_back(self._device)
        self._shelf.resize(name, weights_bytes(plan))

    def _rehearsal(self, name: str) -> GenerateRequest:
        """The smallest request that runs every graph: what fails here would fail for a client."""
        spec = self._plans[name].manifest.model
        side_px = spec.latent.native_px
        blank = np.zeros((side_px, side_px, 3), np.uint8)
        paints = spec.in_channels == 2 * spec.latent.channels + 1
        return GenerateRequest(
            prompt="",
            steps=1,
            seed=0,
            image=blank if paints else None,
            mask=blank[..., 0] + 255 if paints else None,
            cache=CacheDirective(mode=CacheMode.OFF),
        )
