"""Small stand-ins for the two ends of the loop: a network in closed form, and an owner."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from engine.errors import OutOfMemoryError
from engine.rows import RowLimits
from engine.solvers import NoiseSchedule, SolverTable, table
from engine.trajectory import LaneKey, Trajectory, guided_rows
from engine.types import Conditioning, Image, StepEvent
from tests.fake_clock import FakeClock

SHAPE = (4, 6, 5)
NOISE = NoiseSchedule()


class FixedTimes:
    """Every lane saturates at ``rows`` and ticks in ``seconds``."""

    def __init__(self, rows: int = 8, seconds: float = 0.1) -> None:
        self.rows = rows
        self.seconds = seconds
        self.most: int | None = None

    def saturation_rows(self, lane: object) -> int:
        return self.rows if self.most is None else min(self.rows, self.most)

    def most_rows(self, lane: object) -> int | None:
        return self.most

    def bound(self, lane: object, rows: int) -> None:
        self.most = rows

    def out_of_memory(self, lane: object, rows: int) -> None:
        self.most = max(1, rows // 2)

    def tick_s(self, lane: object, rows: int) -> float:
        return self.seconds


class ClosedFormWalk:
    """An epsilon network that is nonlinear in x and depends on time and context.

    ``poison`` is a context value whose rows fail: ``raise`` or ``nan``, ``times`` times.
    ``memory_rows`` is the largest batch that fits into its memory.
    """

    def __init__(self, clock: FakeClock | None = None, limits: RowLimits | None = None) -> None:
        self.limits = limits or RowLimits()
        self.memory_rows = 10**9
        self.batches: list[int] = []
        self.poison: dict[float, str] = {}
        self.times = 10**9
        self.clock = clock
        self.gate: threading.Event | None = None

    def __call__(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        added: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        if self.gate is not None:
            assert self.gate.wait(10.0)
        self.batches.append(len(sample))
        if len(sample) > self.memory_rows:
            raise OutOfMemoryError("the device's memory is full")
        if self.clock is not None:
            self.clock.tick(0.1)
        tag = context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        out = torch.tanh(sample * (0.5 + 0.1 * tag)) + timesteps.view(-1, 1, 1, 1) / 2000.0
        out = out + 0.05 * tag * sample.roll(1, dims=-1)
        for value, kind in self.poison.items():
            rows = torch.isclose(tag.flatten(), torch.tensor(value))
            if rows.any() and self.times > 0:
                self.times -= 1
                if kind == "raise":
                    raise RuntimeError("the device fell over")
                out[rows] = float("nan")
        return out


class Owner:
    """Records what a trajectory's owner hears."""

    def __init__(self) -> None:
        self.events: list[StepEvent] = []
        self.latent: torch.Tensor | None = None
        self.error: Exception | None = None
        self.queued_s: float | None = None
        self.denoise_s: float | None = None
        self.endings = 0
        self.ended = threading.Event()

    def on_first_tick(self, queued_s: float) -> None:
        self.queued_s = queued_s

    def on_step(self, event: StepEvent) -> None:
        self.events.append(event)

    def on_done(self, latent: torch.Tensor, denoise_s: float) -> None:
        self.latent = latent
        self.denoise_s = denoise_s
        self._end()

    def on_error(self, error: Exception) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.endings += 1
        self.ended.set()


def solver_table(solver: str = "ddim", steps: int = 5, schedule: str = "leading") -> SolverTable:
    return table(solver, schedule, steps, noise_schedule=NOISE, prediction_type="epsilon")


def trajectory(
    id_: str,
    *,
    numbers: SolverTable | None = None,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    tag: float = 0.0,
    seed: int = 0,
    scale: float = 1.0,
    lane: LaneKey | None = None,
    preview_every: int = 0,
    preview: Callable[[torch.Tensor], Image] | None = None,
    deadline_at_s: float | None = None,
) -> Trajectory:
    numbers = numbers or solver_table()
    generator = torch.Generator("cpu").manual_seed(seed)
    lane = lane or LaneKey("plan", SHAPE, tokens=3)
    noise = torch.randn((1, *lane.latent_shape), generator=generator)[0]
    guided = guided_rows(numbers.evaluations, guidance, interval, can_guide=True)
    context = torch.full((2 if any(guided) else 1, 3, 2), tag)
    if any(guided):
        context[1] = 0.25
    return Trajectory(
        id=id_,
        lane=lane,
        table=numbers,
        conditioning=Conditioning(context),
        guidance=guidance,
        guided=guided,
        start=noise * numbers.initial_scale * scale,
        generator=generator,
        listener=Owner(),
        preview_every=preview_every,
        preview=preview,
        deadline_at_s=deadline_at_s,
    )


def owner_of(item: Trajectory) -> Owner:
    assert isinstance(item.listener, Owner)
    return item.listener
