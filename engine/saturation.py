"""How long a tick takes, by lane and batch, and where larger batches stop paying.

Measured at warm-up, kept beside the plan for each device, corrected by every tick that runs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.errors import OutOfMemoryError
from engine.ports import Clock
from engine.scheduler import LaneId
from engine.trajectory import LaneKey

CLOSE_TO_BEST = 0.95
"""B* is the smallest batch whose median throughput is at least this part of the best."""

MUCH_FASTER = 0.8
"""A kept time is doubted when a tick takes less than this part of it."""

_MEMORY = 0.1
"""Weight of the newest tick in the running mean of a batch's time."""

_RETRY_TICKS = 1000
"""Ticks of a lane after which a batch that was out of memory is tried again."""


class StepTimeTable:
    """Seconds of a tick by UNet rows, for every lane that was measured or has run.

    Between measured batches times are interpolated, beyond them extrapolated by rows; a lane
    that was never seen costs ``default_tick_s``, and saturates at ``default_rows``.
    """

    def __init__(
        self,
        *,
        default_tick_s: float = 0.1,
        default_rows: int = 8,
        max_lanes: int = 1024,
        on_out_of_memory: Callable[[LaneId, int], None] | None = None,
    ) -> None:
        self._lanes: OrderedDict[LaneId, _Times] = OrderedDict()
        self._default_tick_s = default_tick_s
        self._default_rows = default_rows
        self._max_lanes = max_lanes
        self._on_out_of_memory = on_out_of_memory

    def set(self, lane: LaneId, seconds_by_rows: Mapping[int, float]) -> None:
        """Install a measured table."""
        times = self._known(lane)
        times.seconds = dict(seconds_by_rows)
        times.saturation = saturation_rows(seconds_by_rows)

    def get(self, lane: LaneId) -> dict[int, float]:
        """The table of a lane; empty when it was never seen."""
        times = self._lanes.get(lane)
        return {} if times is None else dict(times.seconds)

    def bound(self, lane: LaneId, rows: int) -> None:
        """Learn that the lane's graphs take no more than ``rows`` (1 or more) at once."""
        self._known(lane).bound = max(1, rows)

    def out_of_memory(self, lane: LaneId, rows: int) -> None:
        """Learn that ``rows`` did not fit into memory: half as many from now on.

        What filled the memory may go away, so after ``_RETRY_TICKS`` ticks twice as many are
        tried again.
        """
        times = self._known(lane)
        if self._on_out_of_memory is not None:
            self._on_out_of_memory(lane, rows)
        times.fitting = max(1, rows // 2)
        times.ticks_to_retry = _RETRY_TICKS

    def most_rows(self, lane: LaneId) -> int | None:
        """What the lane's graphs and memory bear at once, as far as is known."""
        times = self._lanes.get(lane)
        known = () if times is None else (times.bound, times.fitting)
        return min((rows for rows in known if rows is not None), default=None)

    def saturation_rows(self, lane: LaneId) -> int:
        """B* in UNet rows, never above :meth:`most_rows`."""
        times = self._lanes.get(lane)
        measured = None if times is None else times.saturation
        rows = self._default_rows if measured is None else measured
        most = self.most_rows(lane)
        return rows if most is None else min(rows, most)

    def tick_s(self, lane: LaneId, rows: int) -> float:
        """Expected seconds of a tick of ``rows`` rows."""
        times = self._lanes.get(lane)
        table = None if times is None else times.seconds
        if not table:
            return self._default_tick_s
        if rows in table:
            return table[rows]
        below = max((known for known in table if known < rows), default=None)
        above = min((known for known in table if known > rows), default=None)
        if below is None:
            assert above is not None
            return table[above]
        if above is None:
            return table[below] * rows / below
        share = (rows - below) / (above - below)
        return table[below] + share * (table[above] - table[below])

    def observe(self, lane: LaneId, rows: int, seconds: float) -> None:
        """Fold a finished tick in, so that the table follows a machine that slows down.

        B* stays as measured: live ticks see too few batch sizes to move it honestly.
        """
        times = self._known(lane)
        known = times.seconds.get(rows)
        times.seconds[rows] = seconds if known is None else known + _MEMORY * (seconds - known)
        if times.fitting is not None:
            times.ticks_to_retry -= 1
            if times.ticks_to_retry <= 0:
                times.fitting *= 2
                times.ticks_to_retry = _RETRY_TICKS

    def forget(self, plan_digest: str) -> None:
        """Drop every lane of a plan that is not loaded any more."""
        for lane in [lane for lane in self._lanes if _plan_of(lane) == plan_digest]:
            del self._lanes[lane]

    def _known(self, lane: LaneId) -> _Times:
        """What is known of a lane; the one longest untouched is forgotten when there are many."""
        if lane not in self._lanes and len(self._lanes) >= self._max_lanes:
            self._lanes.popitem(last=False)
        times = self._lanes.setdefault(lane, _Times())
        self._lanes.move_to_end(lane)
        return times


@dataclass(slots=True)
class _Times:
    seconds: dict[int, float] = field(default_factory=dict)
    saturation: int | None = None
    bound: int | None = None
    """Of the graphs."""
    fitting: int | None = None
    """Learned from running out of memory."""
    ticks_to_retry: int = 0


def _plan_of(lane: LaneId) -> str | None:
    return lane.plan_digest if isinstance(lane, LaneKey) else None


def saturation_rows(seconds_by_rows: Mapping[int, float]) -> int:
    """B*: the smallest batch within 5 % of the best throughput."""
    throughput = {rows: rows / seconds for rows, seconds in seconds_by_rows.items()}
    enough = CLOSE_TO_BEST * max(throughput.values())
    return min(rows for rows, rate in throughput.items() if rate >= enough)


def measure(
    tick: Callable[[int], None],
    clock: Clock,
    *,
    rows: Iterable[int] = (1, 2, 4, 8, 16, 32),
    most: int | None = None,
    repeats: int = 5,
    budget_s: float = 20.0,
) -> dict[int, float]:
    """Median seconds of ``tick(rows)`` for growing batches.

    Stops when two doubled batches in a row brought less than 3 % of throughput (one may have met
    other work on the machine), or the budget is spent: past saturation there is nothing left to
    learn. Also above ``most``, and at a batch that does not fit into memory.

    Raises:
        OutOfMemoryError: not even the smallest batch fits.
    """
    began_s = clock.now_s()
    table: dict[int, float] = {}
    best, in_vain = 0.0, 0
    for count in rows:
        if most is not None and count > most:
            break
        try:
            tick(count)  # warm-up: memory plans, kernels, caches
            samples = []
            for _ in range(repeats):
                start_s = clock.now_s()
                tick(count)
                samples.append(clock.now_s() - start_s)
        except OutOfMemoryError:
            if not table:
                raise
            break
        table[count] = statistics.median(samples)
        rate = count / table[count]
        in_vain = in_vain + 1 if rate < 1.03 * best else 0
        if in_vain == 2 or clock.now_s() - began_s > budget_s:
            break
        best = max(best, rate)
    return table


def brought_up_to_date(
    kept: Mapping[int, float], tick: Callable[[int], None], clock: Clock, *, most: int | None = None
) -> dict[int, float]:
    """A kept table, or a new one where the machine proves to be faster than the kept one says.

    What was measured beside other work would hold every later start back: with too small a B*,
    and with deadlines refused that can be met. Other work only ever adds time, so a table is
    measured anew when a few ticks take much less than it says, or when a batch of twice its B* is
    clearly better than one of B*; and the lower times count.
    """
    star = saturation_rows(kept)
    probe = measure(tick, clock, rows=sorted({1, star, 2 * star}), most=most, repeats=3)
    faster = any(seconds < MUCH_FASTER * kept.get(rows, 0.0) for rows, seconds in probe.items())
    if not faster and saturation_rows(probe) <= star:
        return dict(kept)
    fresh = measure(tick, clock, most=most)
    lower = {rows: min(seconds, kept.get(rows, seconds)) for rows, seconds in fresh.items()}
    return {**kept, **lower}


def device_fingerprint(device: torch.device, threads: int) -> str:
    """Name of the hardware that a measurement holds for."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_name(device)}".replace(" ", "-").lower()
    return f"cpu-{_cpu_name()}-{threads}-threads"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = [line.partition(":") for line in info.read_text().splitlines()]
        identity = [
            v.strip() for k, _, v in fields if k.strip() in ("model name", "model", "stepping")
        ]
        if identity:
            return "-".join(identity[:3]).replace(" ", "-").replace("/", "-").lower()
    return (platform.processor() or platform.machine()).replace(" ", "-").lower()


class StepTimeFile:
    """Measured tables of one plan on one device, kept beside the plan and outside its digest."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path = folder / f"{fingerprint}.json"

    def read(self) -> dict[str, dict[int, float]]:
        """Tables by lane name. A missing or unreadable file is no measurement, not an error."""
        try:
            raw = json.loads(self._path.read_text())
            return {lane: {int(r): float(s) for r, s in t.items()} for lane, t in raw.items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def write(self, tables: Mapping[str, Mapping[int, float]]) -> None:
        """Replace the file; failing to is harmless: the next start measures again."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self._path.with_suffix(f".{os.getpid()}.tmp")
            scratch.write_text(json.dumps(tables, indent=1))
            scratch.replace(self._path)
        except OSError:
            return


def lane_name(lane: LaneKey) -> str:
    """Key of a lane in a :class:`StepTimeFile`: everything of it but the plan."""
    shape = "x".join(map(str, lane.latent_shape))
    return f"{shape}-{lane.tokens}-{lane.variant}"
