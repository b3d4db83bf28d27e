"""One worker: an engine with the configured models, behind asyncio. Knows neither Ray nor HTTP.

Three kinds of threads meet here. The event loop only passes news on; prompts and picture files are
encoded in small pools; the step loop has a thread of its own and never waits for either.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from engine.engine import Engine, EngineConfig
from engine.errors import (
    ClosedError,
    DarkroomError,
    ExecutionError,
    InvalidRequestError,
    OverloadedError,
)
from engine.handle import Handle
from engine.loop import LoopConfig, Tick
from engine.ports import Clock, SystemClock
from engine.scheduler import LaneId
from engine.trajectory import LaneKey
from engine.types import CacheShare
from server.cache_metrics import CacheCollector
from server.clock import UnixClock
from server.config import ServeConfig
from server.content_check import load_check
from server.drawing import Drawing, Workshop
from server.loaded_models import LoadedModels
from server.mailbox import Mailbox
from server.messages import (
    CacheOrder,
    Checkpointed,
    Drawn,
    Failed,
    Load,
    PictureTask,
    WorkerEvent,
)
from server.model_changes import ModelChanges
from server.noise_cache import noise_cache, reuse_config
from server.rates import rates_of
from server.routing import Live, WorkerReport
from server.settings import Settings
from server.tickets import steps_of, width_of
from server.worker_caches import carry_out
from server.worker_metrics import WorkerMetrics
from server.worker_models import Progress

_log = logging.getLogger(__name__)

_MAX_HELD = 4
"""Tasks that a worker holds at most, in units of those that it draws at once; the rest wait."""


class WorkerCore:
    """Draws pictures for whoever is in the same process.

    :meth:`open` and :meth:`close` take seconds and are to be called off the event loop;
    :meth:`draw` belongs to one event loop.

    Args:
        name: in events, logs and metrics.
        unix_s: the time that deadlines are given in.

    Raises:
        InvalidRequestError: the configured content check cannot be imported.
    """

    def __init__(
        self,
        config: ServeConfig,
        settings: Settings,
        *,
        name: str = "worker-0",
        clock: Clock | None = None,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self._config = config
        self._metrics = WorkerMetrics()
        self._drawings: dict[str, Drawing] = {}
        self._idle = threading.Event()
        self._idle.set()
        self._places = asyncio.Semaphore(config.workers.max_live)
        self._warm = False
        self._closing = False
        self._cache = noise_cache(config)
        clock = clock or SystemClock()
        self._engine = Engine(
            device=config.workers.device,
            config=EngineConfig(
                limits=config.limits.engine_limits(),
                noise_reuse=reuse_config(config, settings.models),
                # Twice, since what is cancelled leaves only before the next tick, and whoever
                # takes its place must not be refused until then.
                loop=LoopConfig(max_live=2 * config.workers.max_live),
            ),
            clock=clock,
            on_tick=self._on_tick,
            on_out_of_memory=self._on_out_of_memory,
            noise_cache=self._cache,
        )
        if self._cache is not None:
            self._metrics.collect(
                CacheCollector(self._engine.reuse_statistics, self._cache.statistics)
            )
        self.models = LoadedModels(config, settings, self._engine, self._metrics, clock)
        configured = [model.id for model in config.models]
        self.changes = ModelChanges(self.models, configured, UnixClock())
        self._watch()
        # Two, so that a slow picture to encode does not hold up a prompt behind it.
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="darkroom-encode")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="darkroom-write")
        self._shop = Workshop(
            worker=name,
            engine=self._engine,
            writers=self._writers,
            clock=clock,
            snapshot_every_s=config.workers.snapshot_every_s,
            unix_s=unix_s,
            check=load_check(config.content.check),
        )

    # ------------------------------------------------------------------ life

    def open(self, progress: Progress | None = None) -> None:
        """Compile or open every configured model, load and warm it up. Blocks, maybe for minutes.

        Raises:
            DarkroomError: a model cannot be served; nothing is left open.
        """
        try:
            self._engine.start()
            self.models.open_all(progress)
        except BaseException:
            self.close(0.0)
            raise
        self._warm = True

    def stop_admitting(self) -> None:
        """Refuse new tasks from now on; what runs goes on."""
        self._closing = True

    def close(self, timeout_s: float) -> None:
        """Take nothing more, finish what runs, fail what is left after ``timeout_s`` seconds.

        The event loop of :meth:`draw` must go on meanwhile: it is what takes finished pictures.
        """
        self.stop_admitting()
        self._idle.wait(timeout_s)
        self.models.close()
        self._engine.close(drain=False)
        self._encoders.shutdown(cancel_futures=True)
        self._writers.shutdown()
        self.models.close_runtimes()
        if self._cache is not None:
            self._cache.close()

    # ------------------------------------------------------------------ what it has and does

    @property
    def missing(self) -> tuple[str, ...]:
        """Configured models that are not warm."""
        return () if self._warm else tuple(model.id for model in self._config.models)

    def report(self) -> WorkerReport:
        """What the router needs to know of it."""
        return WorkerReport(
            id=self.name,
            rates=rates_of(self._engine),
            models=tuple(self.models.infos),
            live=tuple(
                Live(
                    id=drawing.task.id,
                    model=drawing.task.model,
                    steps_left=drawing.steps_left,
                    width=drawing.width,
                )
                for drawing in tuple(self._drawings.values())
            ),
            switched=self.changes.switched,
        )

    def load(self) -> Load:
        """How busy this worker is."""
        report = self.report()
        return Load(
            running=len(report.live),
            running_steps=sum(live.steps_left for live in report.live),
            steps_per_s=max((rate.steps_per_s for rate in report.rates.values()), default=0.0),
        )

    def ask_cache(self, order: CacheOrder) -> tuple[CacheShare, ...]:
        """Look into the noise cache here, or clear it."""
        return carry_out(order, self._cache)

    def metrics_text(self) -> bytes:
        """Everything measured here, in Prometheus' text format."""
        return self._metrics.text()

    # ------------------------------------------------------------------ drawing

    async def draw(self, task: PictureTask) -> AsyncGenerator[WorkerEvent, None]:
        """Draw one picture; ends with ``Drawn`` or ``Failed``.

        Closing the generator, or cancelling whoever waits for it, cancels the task before its next
        step and frees its slot.
        """
        drawing: Drawing | None = None
        handle: Handle | None = None
        placed = False
        lease: Future[None] | None = None
        try:
            drawing = self._admit(task)
            placed = await self._places.acquire()
            lease = self.models.acquire(task.model)
            await asyncio.wrap_future(lease)
            handle = await self._enter(drawing)
            event: WorkerEvent | None = None
            while not isinstance(event, Drawn):
                event = await drawing.next()
                if isinstance(event, Checkpointed):
                    self._metrics.snapshot(len(event.snapshot))
                elif isinstance(event, Drawn):
                    self._metrics.drawn(task.model, event, request_id=task.request_id)
                yield event
        except DarkroomError as error:
            yield self._failed(task, error)
        except Exception:
            _log.exception("task %s failed unforeseen", task.id)
            yield self._failed(task, ExecutionError("the worker failed; its log says why"))
        finally:
            if placed:
                self._places.release()
            if drawing is not None:
                self._forget(drawing)
                if handle is not None and not handle.done:
                    drawing.cancel(handle, self._metrics.cancelled)
            if lease is not None and not lease.cancel() and lease.exception() is None:
                self.models.release(task.model)

    def _watch(self) -> None:
        """Show in the metrics what is known here anyway."""
        watch = self._metrics.watch
        watch("darkroom_live_tasks", "Tasks in this worker.", lambda: len(self._drawings))
        watch("darkroom_live_lanes", "Lanes with a live task.", lambda: self._engine.lanes)
        watch(
            "darkroom_steps_left",
            "Steps left of all tasks here, in UNet rows at native size.",
            lambda: sum(live.steps_left for live in self.report().live),
        )

    def _failed(self, task: PictureTask, error: DarkroomError) -> Failed:
        # A model that is not configured is no label: anybody could make up any number of them.
        known = any(task.model == info.id for info in self.models.infos)
        self._metrics.failed(task.model if known else "unknown", error)
        return Failed(task.index, error)

    def _on_tick(self, tick: Tick) -> None:
        name = self.models.name_of(tick.lane.plan_digest)
        if name is None:
            return  # being warmed up, or removed
        self._metrics.ticked(
            name,
            members=tick.members,
            rows=tick.rows,
            seconds=tick.total_s,
            most=self._engine.times.saturation_rows(tick.lane),
        )

    def _on_out_of_memory(self, lane: LaneId, _rows: int) -> None:
        assert isinstance(lane, LaneKey)
        self._metrics.split(self.models.name_of(lane.plan_digest) or "unknown")

    def _admit(self, task: PictureTask) -> Drawing:
        """Note a task as running.

        Raises:
            ClosedError, OverloadedError, InvalidRequestError: it is not for this worker now.
        """
        if self._closing:
            raise ClosedError(f"{self.name} is closing and takes no more work")
        if len(self._drawings) >= _MAX_HELD * self._config.workers.max_live:
            raise OverloadedError(f"{self.name} holds {len(self._drawings)} tasks already")
        if task.id in self._drawings:
            raise InvalidRequestError(f"task {task.id} is running already", field="id")
        info = self.models.info(task.model)
        drawing = Drawing(
            task,
            self._shop,
            steps=steps_of(task, info),
            width=width_of(task, info),
            mailbox=Mailbox(asyncio.get_running_loop()),
        )
        self._drawings[task.id] = drawing
        self._idle.clear()
        return drawing

    def _forget(self, drawing: Drawing) -> None:
        del self._drawings[drawing.task.id]
        if not self._drawings:
            self._idle.set()

    async def _enter(self, drawing: Drawing) -> Handle:
        """Encode the request off the event loop, and put it into the step loop.

        Cancelled while it encodes, the request leaves the step loop as soon as it is in it.
        """
        entering = self._encoders.submit(drawing.enter)
        try:
            return await asyncio.wrap_future(entering)
        except asyncio.CancelledError:
            entering.add_done_callback(_cancel_entered)
            raise


def _cancel_entered(entering: Future[Handle]) -> None:
    if not entering.cancelled() and entering.exception() is None:
        entering.result().cancel()
