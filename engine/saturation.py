"""How long a tick takes, by lane and batch, and where larger batches stop paying.

Measured at warm-up, kept beside the plan for each device, corrected by every tick that runs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from engine.ports import Clock
from engine.scheduler import LaneId
from engine.trajectory import LaneKey

CLOSE_TO_BEST = 0.95
"""B* is the smallest batch whose median throughput is at least this part of the best."""

_MEMORY = 0.1
"""Weight of the newest tick in the running mean of a batch's time."""


class StepTimeTable:
    """Seconds of a tick by UNet rows, for every lane that was measured or has run.

    Between measured batches times are interpolated, beyond them extrapolated by rows; a lane
    that was never seen costs ``default_tick_s``, and saturates at ``default_rows``.
    """

    def __init__(self, *, default_tick_s: float = 0.1, default_rows: int = 8) -> None:
        self._tables: dict[LaneId, dict[int, float]] = {}
        self._saturation: dict[LaneId, int] = {}
        self._default_tick_s = default_tick_s
        self._default_rows = default_rows

    def set(self, lane: LaneId, seconds_by_rows: Mapping[int, float]) -> None:
        """Install a measured table."""
        self._tables[lane] = dict(seconds_by_rows)
        self._saturation[lane] = saturation_rows(seconds_by_rows)

    def get(self, lane: LaneId) -> dict[int, float]:
        """The table of a lane; empty when it was never seen."""
        return dict(self._tables.get(lane, {}))

    def saturation_rows(self, lane: LaneId) -> int:
        """B* in UNet rows."""
        return self._saturation.get(lane, self._default_rows)

    def tick_s(self, lane: LaneId, rows: int) -> float:
        """Expected seconds of a tick of ``rows`` rows."""
        table = self._tables.get(lane)
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
        table = self._tables.setdefault(lane, {})
        known = table.get(rows)
        table[rows] = seconds if known is None else known + _MEMORY * (seconds - known)


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
    repeats: int = 5,
    budget_s: float = 20.0,
) -> dict[int, float]:
    """Median seconds of ``tick(rows)`` for growing batches.

    Stops when a doubled batch brought less than 3 % of throughput, or the budget is spent: past
    saturation there is nothing left to learn.
    """
    began_s = clock.now_s()
    table: dict[int, float] = {}
    best = 0.0
    for count in rows:
        tick(count)  # warm-up: memory plans, kernels, caches
        samples = []
        for _ in range(repeats):
            start_s = clock.now_s()
            tick(count)
            samples.append(clock.now_s() - start_s)
        table[count] = statistics.median(samples)
        rate = count / table[count]
        if rate < 1.03 * best or clock.now_s() - began_s > budget_s:
            break
        best = rate
    return table


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
