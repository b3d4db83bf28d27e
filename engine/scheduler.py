"""Which trajectories go into the next tick: policy only. Imports no torch and touches no tensor.

Three rules, in this order:

1. *Within a lane*, earliest due time first. A request is due ``stretch`` times its own remaining
   time after admission, ``patience_s`` at most: short and nearly finished ones overtake long ones,
   but only until these have waited out their own stretch. So a request can be overtaken only by
   what was admitted before it was due, and nothing starves. One whose deadline is near, and one
   that has waited for ``patience_s``, goes before all that. One that can no longer make its
   deadline goes behind those that can: serving it first would only make two of them late.
2. *Between lanes*, the lane that has had the least device time goes next, unless another holds a
   trajectory that must run now to be in time.
3. *A batch* holds at most the lane's saturation batch, in UNet rows: above it a larger batch adds
   latency and no throughput.

``loadtests/simulate_mixed.py`` plays traces against this policy on a virtual clock and prints what
the dials do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import InvalidRequestError

LaneId = Hashable

_URGENT, _NORMAL, _HOPELESS = range(3)


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
    """Measured cost of a tick, and how large one may be, by lane."""

    def saturation_rows(self, lane: LaneId) -> int:
        """B*: the smallest batch, in UNet rows, that is close to the best throughput.

        Never above :meth:`most_rows`.
        """
        ...

    def most_rows(self, lane: LaneId) -> int | None:
        """What the lane's graphs and memory bear at once; None where no bound is known."""
        ...

    def bound(self, lane: LaneId, rows: int) -> None:
        """Learn that the lane's graphs take no more than ``rows`` at once."""
        ...

    def out_of_memory(self, lane: LaneId, rows: int) -> None:
        """Learn that ``rows`` did not fit into memory."""
        ...

    def tick_s(self, lane: LaneId, rows: int) -> float:
        """Expected seconds of a tick of so many rows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Dials of :class:`TickPolicy`."""

    stretch: float = 2.0
    """When a request is due: so many times its own remaining time after admission.

    0 is oldest first: the best p99. Larger values give a lower median for a longer tail; around 2
    the median gains and the p95 is that of 0 (``loadtests/RESULTS.md``)."""
    patience_s: float = 60.0
    """Waiting longer than this makes any request urgent."""
    priority_s: float = 15.0
    """How much earlier one level of priority makes a request due, and urgent."""
    max_lag_s: float = 2.0
    """A lane that is behind the others by this much device time goes first, urgent or not."""

    def __post_init__(self) -> None:
        for name in ("stretch", "patience_s", "priority_s", "max_lag_s"):
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

    def _order(self, item: Ready, now_s: float) -> tuple[int, float, float, str]:
        earlier_s = item.priority * self.config.priority_s
        urgent_s = item.admitted_at_s + self.config.patience_s
        tier = _NORMAL if now_s < urgent_s - earlier_s else _URGENT
        own_s = item.steps_left * self.times.tick_s(item.lane, item.rows)
        due_s = min(item.admitted_at_s + self.config.stretch * own_s, urgent_s)
        if item.deadline_at_s is not None:
            slack_s = item.deadline_at_s - now_s - own_s
            # Less slack than work: from now on it must be in every other tick at least.
            tier = _HOPELESS if slack_s < 0.0 else _URGENT if slack_s < own_s else tier
            urgent_s = min(urgent_s, item.deadline_at_s)
        first_s = (urgent_s if tier == _URGENT else due_s) - earlier_s
        return tier, first_s, item.admitted_at_s, item.id

    def _slack_s(self, item: Ready, now_s: float) -> float:
        """Seconds to spare if the trajectory runs in every tick from now on."""
        if item.deadline_at_s is None:
            return float("inf")
        return (
            item.deadline_at_s - now_s - item.steps_left * self.times.tick_s(item.lane, item.rows)
        )
