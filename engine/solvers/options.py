"""Everything about a solver that is not its name, its schedule or its step count."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import InvalidRequestError, UnsupportedError

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, slots=True)
class Top:
    """Start from pure noise."""


@dataclass(frozen=True, slots=True)
class Strength:
    """Image to image: skip the timesteps that Diffusers' ``get_timesteps`` skips."""

    value: float

    def __post_init__(self) -> None:
        if not 0.0 < self.value <= 1.0:
            raise InvalidRequestError(
                f"strength={self.value} is outside 0 < strength <= 1", field="strength"
            )


@dataclass(frozen=True, slots=True)
class Level:
    """Start from a stored state: exactly at this log-SNR, wherever the schedule's levels are."""

    log_snr: float

    def __post_init__(self) -> None:
        if math.isnan(self.log_snr):
            raise InvalidRequestError("the log-SNR to start at is not a number", field="start")


Start = Top | Strength | Level
TOP = Top()


@dataclass(frozen=True, slots=True)
class SolverOptions:
    """Options under the names of Diffusers' scheduler configs; each solver reads its own.

    ``spacing`` (Diffusers: ``timestep_spacing``) matters to Karras, exponential and custom
    schedules only, where it sets the range of sigmas and Euler's initial scale; for ``leading``,
    ``trailing`` and ``linspace`` the schedule's name decides.
    ``eta`` is the share of fresh noise; None is the solver's own default (DDIM 0, TCD 0.3).
    ``solver_type`` is DPM-Solver++'s ``midpoint`` or ``heun``, UniPC's ``bh1`` or ``bh2``;
    None is the first choice of each (``midpoint``, ``bh2``).
    ``timesteps`` are those of the ``custom`` schedule, descending.
    """

    spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    final_sigmas_type: str = "zero"
    eta: float | None = None
    solver_order: int = 2
    solver_type: str | None = None
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -math.inf
    disable_corrector: tuple[int, ...] = ()
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    timesteps: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _one_of("spacing", self.spacing, SPACINGS)
        _one_of("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min"))
        if self.solver_order not in (1, 2, 3):
            raise UnsupportedError(
                f"solver_order={self.solver_order} is not supported; allowed: 1, 2, 3"
            )
        if self.eta is not None and not 0.0 <= self.eta <= 1.0:
            raise InvalidRequestError(f"eta={self.eta} is outside 0..1", field="eta")
        if self.steps_offset < 0:
            raise InvalidRequestError(
                f"steps_offset={self.steps_offset} is negative", field="steps_offset"
            )
        if self.original_inference_steps < 1:
            raise InvalidRequestError(
                f"original_inference_steps={self.original_inference_steps} is not positive",
                field="original_inference_steps",
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnsupportedError(f"{name}={value!r} is not supported; allowed: {', '.join(allowed)}")
