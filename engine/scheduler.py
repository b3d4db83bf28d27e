"""Which trajectories go into the next tick: policy only. Imports no torch and touches no tensor.

Three rules, in this order:

1. *Within a lane*, earliest effective deadline first. A request without a deadline gets one far
   away (``patience_s`` after admission), so waiting makes it urgent and nothing starves. A
   trajectory that can no longer make its deadline goes behind those that can: serving it first
   would only make two of them late.
2. *Between lanes*, the lane that has had the least device time goes next, unless another holds a
   trajectory that must run now to be in time.
3. *A batch* holds at most the lane's saturation batch, in UNet rows: above it a larger batch adds
   latency and no throughput.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import InvalidRequestError

LaneId = Hashable


@dataclass(frozen=True, slots=True)
class Ready:
    """What the policy may know of a live trajectory."""

    id: str
    lane: LaneId
    rows: int
    """UNet rows that its next step costs."""
    steps_left: int
    admitted_at_s: float
    priority: int = 0
    deadline_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """The decision for one tick."""

    lane: LaneId
    ids: tuple[str, ...]
    rows: int


class StepTimes(Protocol):
    """Measured cost of a tick, by lane."""

    def saturation_rows(self, lane: LaneId) -> int:
        """B*: the smallest batch, in UNet rows, that is close to the best throughput."""
        ...

    def tick_s(self, lane: LaneId, rows: int) -> float:
        """Expected seconds of a tick of so many rows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Dials of :class:`TickPolicy`."""

    patience_s: float = 60.0
    """Effective deadline of a request that names none, counted from admission."""
    priority_s: float = 15.0
    """How much earlier one level of priority makes that effective deadline."""
    max_lag_s: float = 2.0
    """A lane that is behind the others by this much device time goes first, urgent or not."""

    def __post_init__(self) -> None:
        for name in ("patience_s", "priority_s", "max_lag_s"):
            if not getattr(self, name) >= 0:
                raise InvalidRequestError(f"{name} must be 0 or more", field=name)


@dataclass(slots=True)
class TickPolicy:
    """Picks the next batch; owns the lanes' device-time accounts and nothing else."""

    times: StepTimes
    config: PolicyConfig = field(default_factory=PolicyConfig)
    _used_s: dict[LaneId, float] = field(default_factory=dict)

    def pick(self, ready: Sequence[Ready], now_s: float) -> Batch | None:
        """Choose lane and members of the next tick, or None when nothing is ready."""
        if not ready:
            return None
        lanes: dict[LaneId, list[Ready]] = {}
        for item in ready:
            lanes.setdefault(item.lane, []).append(item)
        self._forget_lanes_except(lanes)
        lane = self._pick_lane(lanes, now_s)
        return self._fill(lane, lanes[lane], now_s)

    def charge(self, lane: LaneId, seconds: float) -> None:
        """Book the device time of a finished tick."""
        self._used_s[lane] = self._used_s.get(lane, 0.0) + seconds

    def _forget_lanes_except(self, lanes: Iterable[LaneId]) -> None:
        """Drop idle lanes; a lane that comes (back) starts level with the least served one.

        Otherwise it would either own the device until it caught up, or pay for an old burst.
        """
        active = set(lanes)
        self._used_s = {lane: used for lane, used in self._used_s.items() if lane in active}
        level = min(self._used_s.values(), default=0.0)
        for lane in active:
            self._used_s.setdefault(lane, level)

    def _pick_lane(self, lanes: dict[LaneId, list[Ready]], now_s: float) -> LaneId:
        least = min(lanes, key=lambda lane: self._used_s[lane])
        most_used = max(self._used_s[lane] for lane in lanes)
        if most_used - self._used_s[least] > self.config.max_lag_s:
            return least
        slacks = [
            (self._slack_s(item, now_s), lane) for lane, items in lanes.items() for item in items
        ]
        urgent = [
            (slack_s, lane)
            for slack_s, lane in slacks
            if 0.0 <= slack_s < 2.0 * self.times.tick_s(least, self.times.saturation_rows(least))
        ]
        return min(urgent, key=lambda pair: pair[0])[1] if urgent else least

    def _fill(self, lane: LaneId, items: Iterable[Ready], now_s: float) -> Batch:
        """Take members in order until the saturation batch is full; always at least one."""
        budget = self.times.saturation_rows(lane)
        chosen: list[str] = []
        rows = 0
        for item in sorted(items, key=lambda item: self._order(item, now_s)):
            if chosen and rows + item.rows > budget:
                continue  # a one-row trajectory further down may still fit
            chosen.append(item.id)
            rows += item.rows
            if rows >= budget:
                break
        return Batch(lane, tuple(chosen), rows)

    def _order(self, item: Ready, now_s: float) -> tuple[bool, float, float, str]:
        hopeless = item.deadline_at_s is not None and self._slack_s(item, now_s) < 0.0
        return hopeless, self._due_s(item), item.admitted_at_s, item.id

    def _due_s(self, item: Ready) -> float:
        patient_s = item.admitted_at_s + self.config.patience_s
        due_s = patient_s if item.deadline_at_s is None else min(item.deadline_at_s, patient_s)
        return due_s - item.priority * self.config.priority_s

    def _slack_s(self, item: Ready, now_s: float) -> float:
        """Seconds to spare if the trajectory runs in every tick from now on."""
        if item.deadline_at_s is None:
            return float("inf")
        return (
            item.deadline_at_s - now_s - item.steps_left * self.times.tick_s(item.lane, item.rows)
        )
