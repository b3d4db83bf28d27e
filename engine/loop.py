"""The step loop: admit, pick, walk, advance, emit.

One thread owns every lane and trajectory. Other threads only leave commands in the inbox, which the
loop reads between two ticks: that is why submit, cancel, snapshot and close work at any time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import ParamSpec

import torch

from engine.errors import (
    CancelledError,
    ClosedError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
)
from engine.lane import Lane
from engine.ports import Clock, SystemClock
from engine.rows import Walk
from engine.scheduler import Batch, Ready, TickPolicy
from engine.threads import compute_alone
from engine.ticks import LoopConfig, Tick, execution_error, walk_members
from engine.trajectory import LaneKey, Trajectory
from engine.types import Image, Snapshot, SnapshotGrade, StepEvent

__all__ = ["LoopConfig", "StepLoop", "Tick"]

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


class StepLoop:
    """Advances live trajectories, one batch at a tick.

    Args:
        walks: the network of each plan, by digest.
        on_tick: told of every tick, on the loop's thread.
    """

    def __init__(
        self,
        walks: Mapping[str, Walk],
        policy: TickPolicy,
        *,
        device: torch.device | str = "cpu",
        config: LoopConfig | None = None,
        clock: Clock | None = None,
        on_tick: Callable[[Tick], None] | None = None,
    ) -> None:
        self._walks = walks
        self._policy = policy
        self._device = torch.device(device)
        self._config = config or LoopConfig()
        self._clock = clock or SystemClock()
        self._on_tick = on_tick
        self._lanes: dict[LaneKey, Lane] = {}
        self._live: dict[str, Trajectory] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._known: set[str] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._drain = True
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ from any thread

    def start(self) -> None:
        """Run on a thread of its own until :meth:`close`."""
        self._thread = threading.Thread(target=self._run, name="darkroom-loop", daemon=True)
        self._thread.start()

    def submit(self, trajectory: Trajectory) -> None:
        """Take a trajectory in; from now on its listener hears of it exactly once at the end.

        Raises:
            ClosedError: the loop is closing.
            OverloadedError: ``max_live`` trajectories are in already.
            InvalidRequestError: its id is live, or no network serves its lane.
        """
        if trajectory.lane.plan_digest not in self._walks:
            raise InvalidRequestError("no network is loaded for the trajectory's plan")
        with self._wake:
            if self._closing:
                raise ClosedError("the engine is closing and takes no more work")
            if trajectory.id in self._known:
                raise InvalidRequestError(f"trajectory {trajectory.id} is live already", field="id")
            if len(self._known) >= self._config.max_live:
                raise OverloadedError(f"{self._config.max_live} trajectories are live already")
            self._known.add(trajectory.id)
            trajectory.admitted_at_s = self._clock.now_s()
            self._inbox.append(lambda: self._join(trajectory))
            self._wake.notify()

    def cancel(self, trajectory_id: str) -> None:
        """Remove a trajectory before its next tick. Unknown and finished ids are ignored."""
        self._command(
            lambda: self._fail(trajectory_id, CancelledError("cancelled between two steps"))
        )

    def snapshot(
        self, trajectory_id: str, grade: SnapshotGrade = SnapshotGrade.FULL
    ) -> Future[Snapshot]:
        """Copy a trajectory's state between two ticks.

        The future fails with ``InvalidRequestError`` when the trajectory is not live.
        """
        future: Future[Snapshot] = Future()

        def take() -> None:
            if not future.set_running_or_notify_cancel():
                return
            trajectory = self._live.get(trajectory_id)
            if trajectory is None:
                future.set_exception(InvalidRequestError(f"{trajectory_id} is not live"))
            else:
                future.set_result(self._lanes[trajectory.lane].snapshot(trajectory, grade))

        self._command(take)
        return future

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Stop taking work; finish what is live (``drain``) or fail it with ``ClosedError``.

        What is still live after ``timeout_s`` seconds is failed too. Closing twice is harmless.
        """
        with self._wake:
            self._closing = True
            self._drain = self._drain and drain
            self._wake.notify()
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._wake:
                self._drain = False
                self._wake.notify()
            self._thread.join()

    @property
    def live(self) -> int:
        """Trajectories that are in and not finished."""
        return len(self._known)

    @property
    def lanes(self) -> int:
        """Lanes that have a live trajectory."""
        return len(self._lanes)

    # ------------------------------------------------------------------ the core

    def tick(self) -> bool:
        """Advance one batch by one row; False when there was nothing to do."""
        self._read_inbox()
        began_s = self._clock.now_s()
        self._expire(began_s)
        batch = self._policy.pick([_ready(item) for item in self._live.values()], began_s)
        if batch is None:
            return False
        members = [self._live[trajectory_id] for trajectory_id in batch.ids]
        lane = self._lanes[members[0].lane]
        self._note_first_tick(members, began_s)
        outcomes = self._walk(lane, members)
        walked_s = self._clock.now_s()
        moved = self._advance(lane, outcomes)
        self._emit(lane, moved, batch, began_s)
        ended_s = self._clock.now_s()
        self._policy.charge(lane.key, ended_s - began_s)
        if self._on_tick is not None:
            tick = Tick(lane.key, len(members), batch.rows, walked_s - began_s, ended_s - began_s)
            self._on_tick(tick)
        return True

    def _walk(
        self, lane: Lane, members: Sequence[Trajectory]
    ) -> list[tuple[Trajectory, torch.Tensor]]:
        """Run the network for ``members``, and fail those that it fails for."""
        network = self._walks[lane.key.plan_digest]
        outcome = walk_members(lane, members, network, self._policy.times)
        for member, error in outcome.failed:
            self._fail(member.id, error)
        return outcome.moved

    def _advance(
        self, lane: Lane, outcomes: Sequence[tuple[Trajectory, torch.Tensor]]
    ) -> list[Trajectory]:
        if not outcomes:
            return []
        moved = [member for member, _ in outcomes]
        lane.advance(moved, torch.stack([out for _, out in outcomes]))
        return moved

    def _emit(self, lane: Lane, moved: Sequence[Trajectory], batch: Batch, began_s: float) -> None:
        now_s = self._clock.now_s()
        # Before anybody is told: a decoder that has one takes a core from the copies of others.
        latents = {member.id: lane.latent(member) for member in moved if not member.steps_left}
        for member in moved:
            event = StepEvent(
                trajectory_id=member.id,
                step=member.row,
                steps=member.table.evaluations,
                log_snr=float(member.table.log_snr[member.row]),
                batch_rows=batch.rows,
                tick_s=now_s - began_s,
                preview=self._preview_of(lane, member),
            )
            if member.keep is not None and member.row in member.keep.rows:
                _tell(member.keep.take, lane.snapshot(member, SnapshotGrade.STATE))
            _tell(member.listener.on_step, event)
            if member.id in latents:
                self._leave(member)
                assert member.first_tick_at_s is not None
                denoised_s = now_s - member.first_tick_at_s
                _tell(member.listener.on_done, latents[member.id], denoised_s)

    # ------------------------------------------------------------------ on the loop's thread

    def _run(self) -> None:
        compute_alone()
        while True:
            with self._wake:
                while not (self._inbox or self._live or self._closing):
                    self._wake.wait()
                if self._closing and not (self._drain and (self._inbox or self._live)):
                    break
            try:
                self.tick()
            except Exception as error:  # a bug of ours: no client may wait for ever because of it
                _log.exception("a tick failed")
                for trajectory_id in list(self._live):
                    self._fail(trajectory_id, execution_error(error))
        self._read_inbox()
        for trajectory_id in list(self._live):
            self._fail(trajectory_id, ClosedError("the engine closed before the last step"))

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _join(self, trajectory: Trajectory) -> None:
        lane = self._lanes.get(trajectory.lane)
        if lane is None:
            lane = Lane(
                trajectory.lane,
                slots=self._config.solver_slots,
                max_slots=self._config.max_live,
                device=self._device,
            )
        others = sum(other.resident_bytes for other in self._lanes.values() if other is not lane)
        try:
            lane.join(trajectory, max_bytes=self._config.max_resident_bytes - others)
        except Exception as error:  # its tensors do not fit: only this trajectory is lost
            self._known.discard(trajectory.id)
            _tell(trajectory.listener.on_error, execution_error(error))
            return
        if trajectory.lane not in self._lanes:
            self._lanes[trajectory.lane] = lane
            most = self._walks[trajectory.lane.plan_digest].limits.most
            if most is not None:
                self._policy.times.bound(trajectory.lane, most)
        self._live[trajectory.id] = trajectory

    def _leave(self, trajectory: Trajectory) -> None:
        del self._live[trajectory.id]
        self._known.discard(trajectory.id)
        lane = self._lanes[trajectory.lane]
        lane.leave(trajectory.id)
        if not len(lane):
            del self._lanes[trajectory.lane]  # an idle lane keeps no memory

    def _fail(self, trajectory_id: str, error: Exception) -> None:
        trajectory = self._live.get(trajectory_id)
        if trajectory is not None:
            self._leave(trajectory)
            _tell(trajectory.listener.on_error, error)

    def _expire(self, now_s: float) -> None:
        for member in list(self._live.values()):
            if member.deadline_at_s is not None and now_s >= member.deadline_at_s:
                done, steps = member.row, member.table.evaluations
                message = f"the deadline passed after {done} of {steps} steps"
                self._fail(member.id, DeadlineExceededError(message))

    def _note_first_tick(self, members: Sequence[Trajectory], now_s: float) -> None:
        for member in members:
            if member.first_tick_at_s is None:
                member.first_tick_at_s = now_s
                _tell(member.listener.on_first_tick, now_s - member.admitted_at_s)

    def _preview_of(self, lane: Lane, member: Trajectory) -> Image | None:
        wanted = member.preview_every and member.row % member.preview_every == 0
        if member.preview is None or not wanted or member.steps_left == 0:
            return None
        return member.preview(lane.clean(member))


def _ready(trajectory: Trajectory) -> Ready:
    return Ready(
        id=trajectory.id,
        lane=trajectory.lane,
        rows=trajectory.rows_next,
        steps_left=trajectory.steps_left,
        admitted_at_s=trajectory.admitted_at_s,
        priority=trajectory.priority,
        deadline_at_s=trajectory.deadline_at_s,
    )


def _tell(callback: Callable[_P, None], *args: _P.args, **kwargs: _P.kwargs) -> None:
    """Call a listener; one that raises loses its news, and nobody else's."""
    try:
        callback(*args, **kwargs)
    except Exception:
        _log.exception("a trajectory's listener failed")
