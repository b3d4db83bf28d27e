"""A live request: a latent, a position in its solver table, its conditioning, its owner."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import InvalidRequestError
from engine.solvers.table import SolverTable
from engine.types import Conditioning, Image, Snapshot, SnapshotGrade, StepEvent


@dataclass(frozen=True, slots=True)
class LaneKey:
    """What must match for two trajectories to share a tick, and nothing else."""

    plan_digest: str
    latent_shape: tuple[int, int, int]
    """(channels, height, width) of the latent."""
    tokens: int
    """Context length."""
    variant: str = "plain"
    """Graph variant: which walk, rank bucket and taps."""


class Listener(Protocol):
    """Who owns a trajectory. Called on the loop's thread: must return at once."""

    def on_first_tick(self, queued_s: float) -> None:
        """Its first tick begins, ``queued_s`` seconds after admission."""
        ...

    def on_step(self, event: StepEvent) -> None:
        """It has advanced by one row."""
        ...

    def on_done(self, latent: torch.Tensor, denoise_s: float) -> None:
        """It is finished; ``latent`` is (channels, height, width) float32 and the listener's."""
        ...

    def on_error(self, error: Exception) -> None:
        """It failed, was cancelled, or missed its deadline; it has left the loop."""
        ...


@dataclass(frozen=True, slots=True)
class Blend:
    """Inpainting by blending: after each row, the kept part returns to the picture's own level.

    Attributes:
        mask: (1, height, width) float32, 1 where the picture is repainted.
        clean: (channels, height, width) latent of the picture to keep.
        noise: same shape; the noise that the trajectory started from.
    """

    mask: torch.Tensor
    clean: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True, slots=True)
class Keep:
    """States to copy out of a trajectory in passing, for the noise cache.

    Attributes:
        rows: numbers of rows done after which to copy.
        take: gets a snapshot of grade ``STATE``, on the loop's thread: must return at once.
    """

    rows: frozenset[int]
    take: Callable[[Snapshot], None]


@dataclass(slots=True, eq=False, kw_only=True)
class Trajectory:
    """What the loop advances. The loop is the only writer once it is submitted.

    Attributes:
        start: (channels, height, width) latent at row 0, or a whole (slots, …) solver state when
            it goes on from a full snapshot. Variance-preserving scale, float32.
        guided: per row of the table, whether guidance acts there.
        preview: turns a clean prediction (channels, height, width) into a small picture.
        extra: further input channels (9-channel inpainting UNets), (k, height, width).
        keep: states to copy in passing.
        entered_at: log-SNR at which it enters from the noise cache; its table begins there.
    """

    id: str
    lane: LaneKey
    table: SolverTable
    conditioning: Conditioning
    guidance: float
    guided: Sequence[bool]
    start: torch.Tensor
    generator: torch.Generator
    listener: Listener
    guidance_rescale: float = 0.0
    row: int = 0
    extra: torch.Tensor | None = None
    blend: Blend | None = None
    keep: Keep | None = None
    entered_at: float | None = None
    preview_every: int = 0
    preview: Callable[[torch.Tensor], Image] | None = None
    priority: int = 0
    admitted_at_s: float = 0.0
    deadline_at_s: float | None = None
    first_tick_at_s: float | None = None

    def __post_init__(self) -> None:
        if len(self.guided) != self.table.evaluations:
            raise InvalidRequestError("guided must say yes or no for every row of the table")
        if any(self.guided) and self.conditioning.rows != 2:
            raise InvalidRequestError("guidance needs a negative prompt's conditioning row")

    @property
    def steps_left(self) -> int:
        """Rows of the table still to run."""
        return self.table.evaluations - self.row

    @property
    def rows_next(self) -> int:
        """UNet rows of the next step: two when guided, else one."""
        return 2 if self.row < self.table.evaluations and self.guided[self.row] else 1


def guided_rows(
    steps: int, guidance: float, interval: tuple[float, float], *, can_guide: bool
) -> tuple[bool, ...]:
    """Say for each of ``steps`` rows whether guidance acts: scale above 1, and inside ``interval``.

    Row i of n stands at fraction i / n; the interval's upper end is exclusive, except at 1.
    """
    low, high = interval
    inside = (low <= i / steps and (i / steps < high or high >= 1.0) for i in range(steps))
    return tuple(can_guide and guidance > 1.0 and here for here in inside)


def table_digest(table: SolverTable) -> str:
    """Digest of a table's numbers: a full snapshot goes on only with the very same table."""
    digest = hashlib.sha256(table.transition.tobytes())
    digest.update(table.timesteps.tobytes())
    return digest.hexdigest()


def resume(trajectory: Trajectory, snapshot: Snapshot) -> Trajectory:
    """Put ``trajectory`` (built anew from the same request) where a full snapshot stands.

    Raises:
        InvalidRequestError: the snapshot is of another grade, plan, table or size.
    """
    if snapshot.grade is not SnapshotGrade.FULL or snapshot.state is None:
        raise InvalidRequestError("only a full snapshot can be continued bit-equal")
    if snapshot.plan_digest != trajectory.lane.plan_digest:
        raise InvalidRequestError("the snapshot was taken on another plan")
    if snapshot.table_digest != table_digest(trajectory.table):
        raise InvalidRequestError("the snapshot was taken under another solver table")
    if tuple(snapshot.state.shape[1:]) != trajectory.lane.latent_shape:
        raise InvalidRequestError("the snapshot is of another size")
    assert snapshot.row is not None
    assert snapshot.generator_state is not None
    trajectory.start = snapshot.state
    trajectory.row = snapshot.row
    state = torch.frombuffer(bytearray(snapshot.generator_state), dtype=torch.uint8)
    trajectory.generator.set_state(state)
    return trajectory
