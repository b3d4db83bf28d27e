"""One tick of the loop: its bounds and record, and the network's run with its retries."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.errors import DarkroomError, ExecutionError, InvalidRequestError
from engine.lane import Lane, combine_guidance
from engine.rows import Walk, run_rows
from engine.scheduler import StepTimes
from engine.trajectory import LaneKey, Trajectory

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tick:
    """What one tick did, for metrics and for the step-time table."""

    lane: LaneKey
    members: int
    rows: int
    walk_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """Bounds of the loop."""

    max_live: int = 256
    """Live trajectories over all lanes; one more is refused."""
    max_resident_bytes: int = 2 * 2**30
    """Memory of the live trajectories' state over all lanes; one that does not fit is refused."""
    solver_slots: int = 5

    def __post_init__(self) -> None:
        for name in ("max_live", "max_resident_bytes"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} must be at least 1", field=name)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the network gave for each member, or why it gave nothing."""

    moved: list[tuple[Trajectory, torch.Tensor]] = field(default_factory=list)
    failed: list[tuple[Trajectory, Exception]] = field(default_factory=list)


def walk_members(
    lane: Lane, members: Sequence[Trajectory], network: Walk, times: StepTimes
) -> Outcome:
    """Run the network for ``members``; those it fails for run alone once more before they fail.

    ``Outcome.moved`` holds (channels, height, width) of each, after guidance.
    """
    outcome = Outcome()
    try:
        out = _denoise(lane, members, network, times)
    except Exception as error:
        if len(members) == 1:
            outcome.failed.append((members[0], execution_error(error)))
            return outcome
        _log.warning("a batch of %d failed; retrying its members singly", len(members))
        for member in members:
            _add(outcome, walk_members(lane, [member], network, times))
        return outcome
    finite = finite_rows(out)
    outcome.moved.extend((member, out[i]) for i, member in enumerate(members) if finite[i])
    for member in (member for i, member in enumerate(members) if not finite[i]):
        if len(members) == 1:
            message = f"the network gave a non-finite value at step {member.row + 1}"
            outcome.failed.append((member, ExecutionError(message)))
        else:
            _add(outcome, walk_members(lane, [member], network, times))
    return outcome


def finite_rows(out: torch.Tensor) -> list[bool]:
    """Whether each row of (members, …) holds finite values only."""
    rows = out.flatten(1)
    # A sum is one pass, and tells in nearly every tick that there is nothing to look for.
    if all(map(math.isfinite, rows.sum(dim=1).tolist())):
        return [True] * len(out)
    return torch.isfinite(rows).all(dim=1).tolist()


def _add(outcome: Outcome, more: Outcome) -> None:
    outcome.moved.extend(more.moved)
    outcome.failed.extend(more.failed)


def _denoise(
    lane: Lane, members: Sequence[Trajectory], network: Walk, times: StepTimes
) -> torch.Tensor:
    rows = lane.rows(members)
    out = run_rows(
        network,
        rows,
        most=times.most_rows(lane.key),
        on_out_of_memory=lambda rows: times.out_of_memory(lane.key, rows),
    )
    guided = [member for member in members if member.guided[member.row]]
    scales = torch.tensor([member.guidance for member in guided], device=out.device)
    rescale = [member.guidance_rescale for member in guided]
    given = torch.tensor(rescale, device=out.device) if any(rescale) else None
    return combine_guidance(out, rows.guided, scales, given)


def execution_error(error: Exception) -> DarkroomError:
    """``error``, or one of our own that names its kind and no more: it may hold a prompt."""
    if isinstance(error, DarkroomError):
        return error
    wrapped = ExecutionError(f"{type(error).__name__} while running a step")
    wrapped.__cause__ = error
    return wrapped
