"""The worker as a Ray Serve deployment: one process, one device, one engine."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from engine.types import CacheShare
from server.config import AdmissionConfig, ServeConfig
from server.log_pipe import log_to
from server.messages import CacheOrder, ModelChange, ModelInfo, PictureTask, WorkerEvent
from server.remote import CALL_TIMEOUT_S
from server.routing import ReportReply
from server.settings import Settings

if TYPE_CHECKING:
    from server.worker_core import WorkerCore

_log = logging.getLogger(__name__)

REPORT_S = 1.0
_SWITCH_S = 5e-4
"""How long a thread may keep the interpreter while another waits for it. The step loop asks for it
after every segment, and Python's own 5 ms are a fifth of a tick. What it gains is not established:
see ``loadtests/RESULTS.md``, the server beside its engine."""
SCALE_AHEAD_S = 10.0
"""Workers are added while what is outstanding would take those that are there longer than this."""


def scale_ahead_s(admission: AdmissionConfig) -> float:
    """Seconds of outstanding work from which on workers are added.

    Admission keeps what is outstanding near ``max_wait_s``: only a threshold well below that can be
    passed, however great the overload.
    """
    if admission.max_wait_s is None:
        return SCALE_AHEAD_S
    return min(SCALE_AHEAD_S, admission.max_wait_s / 2)


class Worker:
    """Draws what gateways send, and tells the router every second what it has and does.

    Its constructor returns when every configured model is warm; until then Serve sends nothing,
    and what it raises is a failed start.
    """

    def __init__(
        self, config: ServeConfig, router: DeploymentHandle[Any], log: Path | None = None
    ) -> None:
        log_to(log, config.logging)
        sys.setswitchinterval(_SWITCH_S)
        from server.worker_core import WorkerCore  # torch: not in whoever deploys this

        self._router = router
        self._core: WorkerCore = WorkerCore(
            config, Settings.from_environment(), name=serve.get_replica_context().replica_tag
        )
        self._core.open()
        self._calls: dict[str, asyncio.Task[Any]] = {}
        self._catching_up: asyncio.Task[None] | None = None
        self._outstanding_steps = 0.0
        self._scale_ahead_s = scale_ahead_s(config.admission)
        self._reporting = asyncio.get_running_loop().create_task(self._report_forever())

    async def draw(
        self,
        task: PictureTask,
        *,
        replica: str,  # noqa: ARG002
    ) -> AsyncGenerator[WorkerEvent, None]:
        """See ``WorkerCore.draw``; ``replica`` has done its part in Serve's routing."""
        call = asyncio.current_task()
        assert call is not None
        self._calls[task.id] = call
        try:
            async with aclosing(self._core.draw(task)) as events:
                async for event in events:
                    yield event
        finally:
            del self._calls[task.id]

    async def change_model(
        self,
        change: ModelChange,
        *,
        replica: str,  # noqa: ARG002
    ) -> ModelInfo | None:
        """Add, reload or remove a model while pictures are drawn."""
        return await asyncio.to_thread(self._core.changes.apply, change)

    async def ask_cache(
        self,
        order: CacheOrder,
        *,
        replica: str,  # noqa: ARG002
    ) -> tuple[CacheShare, ...]:
        """Look into the noise cache of this process, or clear it."""
        return await asyncio.to_thread(self._core.ask_cache, order)

    async def ping(self, *, replica: str) -> None:
        """Asked by gateways that it draws for: whether it can be reached."""

    async def metrics(
        self,
        *,
        replica: str,  # noqa: ARG002
    ) -> tuple[str, bytes]:
        """(this replica, its Prometheus text)."""
        return f"worker/{self._core.name}", self._core.metrics_text()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve where workers scale: see :func:`server.app.workers_wanted`."""
        return {
            "outstanding_steps": self._outstanding_steps,
            "steps_per_s": self._core.load().steps_per_s,
            "scale_ahead_s": self._scale_ahead_s,
        }

    async def check_health(self) -> None:
        """Asked by Serve: a worker that no longer reports is replaced."""
        if self._reporting.done():
            raise RuntimeError("the worker has stopped reporting")

    def __del__(self) -> None:
        # Serve calls this once what runs has ended, or its grace period is over.
        self._core.close(0.0)

    async def _report_forever(self) -> None:
        while True:
            try:
                reply = await asyncio.wait_for(
                    self._router.report.remote(self._core.report()), CALL_TIMEOUT_S
                )
            except Exception:
                _log.warning("the router does not answer; what runs goes on")
            else:
                self._heed(reply)
            await asyncio.sleep(REPORT_S)

    def _heed(self, reply: ReportReply) -> None:
        self._outstanding_steps = reply.outstanding_steps
        if self._core.changes.hear(reply.switched) and (
            self._catching_up is None or self._catching_up.done()
        ):
            self._catching_up = asyncio.create_task(asyncio.to_thread(self._core.changes.catch_up))
        for task_id in reply.cancel:
            if (call := self._calls.get(task_id)) is not None:
                _log.warning("nobody waits for task %s any more", task_id)
                call.cancel()
