"""Which solvers exist, and which schedules and predictions each of them takes.

The limits are those of the Diffusers scheduler class named: what it refuses is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.errors import InvalidRequestError, UnsupportedError
from engine.solvers import ddim, distilled, dpm, euler, plms, unipc
from engine.solvers.forms import PREDICTION_TYPES, Row
from engine.solvers.grid import (
    Grid,
    ancestral_grid,
    lcm_grid,
    multistep_grid,
    sigma_grid,
    tcd_grid,
    whole_grid,
)
from engine.solvers.noise_schedule import NoiseSchedule
from engine.solvers.options import SPACINGS, SolverOptions
from engine.solvers.spacing import ALIGN_YOUR_STEPS

GridBuilder = Callable[[str, int, NoiseSchedule, SolverOptions], Grid]
RowBuilder = Callable[[Grid, str, SolverOptions, NoiseSchedule], list[Row]]

_RAMPS = ("karras", "exponential")
_LISTED = (*ALIGN_YOUR_STEPS, "custom")
_NO_SAMPLE = ("epsilon", "v_prediction")

SCHEDULES = (*SPACINGS, *_RAMPS, *_LISTED, "distilled")


@dataclass(frozen=True, slots=True)
class Solver:
    """One entry of the registry; ``schedules[0]`` is what a bare solver name means."""

    name: str
    summary: str
    diffusers: str
    schedules: tuple[str, ...]
    grid: GridBuilder
    rows: RowBuilder
    predictions: tuple[str, ...] = PREDICTION_TYPES
    zero_snr: bool = True
    solver_types: tuple[str, ...] = ()


def _dpm_grid(schedule: str, steps: int, noise: NoiseSchedule, options: SolverOptions) -> Grid:
    # The class rounds Karras timesteps, except on the cosine schedule, where it truncates them.
    rounds = noise.beta_schedule != "squaredcos_cap_v2"
    return multistep_grid(schedule, steps, noise, options, rounds_karras=rounds, custom=True)


_unipc_grid = partial(multistep_grid, rounds_karras=True, custom=False)

SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver(
            "ddim",
            "DDIM; eta in 0..1 adds noise",
            "DDIMScheduler",
            SPACINGS,
            whole_grid,
            ddim.ddim,
        ),
        Solver(
            "ddpm",
            "DDPM ancestral sampling",
            "DDPMScheduler",
            (*SPACINGS, *_LISTED),
            ancestral_grid,
            ddim.ddpm,
        ),
        Solver(
            "euler",
            "Euler (k-diffusion)",
            "EulerDiscreteScheduler",
            (*SPACINGS, *_RAMPS, *_LISTED),
            sigma_grid,
            euler.euler,
        ),
        Solver(
            "euler_ancestral",
            "Euler with fresh noise every step",
            "EulerAncestralDiscreteScheduler",
            SPACINGS,
            sigma_grid,
            euler.euler_ancestral,
            predictions=_NO_SAMPLE,
        ),
        Solver(
            "heun",
            "Heun, two evaluations a step",
            "HeunDiscreteScheduler",
            (*SPACINGS, *_RAMPS, *_LISTED),
            sigma_grid,
            euler.heun,
            zero_snr=False,
        ),
        Solver(
            "dpmpp_2m",
            "DPM-Solver++ multistep",
            "DPMSolverMultistepScheduler",
            (*SPACINGS, *_RAMPS, *_LISTED),
            _dpm_grid,
            dpm.dpmpp_2m,
            solver_types=("midpoint", "heun"),
        ),
        Solver(
            "dpmpp_2m_sde",
            "DPM-Solver++ multistep, SDE",
            "DPMSolverMultistepScheduler",
            (*SPACINGS, *_RAMPS, *_LISTED),
            _dpm_grid,
            dpm.dpmpp_2m_sde,
            solver_types=("midpoint", "heun"),
        ),
        Solver(
            "unipc",
            "UniPC predictor-corrector",
            "UniPCMultistepScheduler",
            (*SPACINGS, *_RAMPS),
            _unipc_grid,
            unipc.unipc,
            solver_types=("bh2", "bh1"),
        ),
        Solver(
            "plms",
            "PLMS (PNDM without Runge-Kutta)",
            "PNDMScheduler",
            SPACINGS,
            whole_grid,
            plms.plms,
            predictions=_NO_SAMPLE,
            zero_snr=False,
        ),
        Solver(
            "lcm",
            "Latent consistency, 1 to 8 steps",
            "LCMScheduler",
            ("distilled", "custom"),
            lcm_grid,
            distilled.lcm,
        ),
        Solver(
            "tcd",
            "Trajectory consistency, 1 to 8 steps",
            "TCDScheduler",
            ("distilled", "custom"),
            tcd_grid,
            distilled.tcd,
        ),
    )
}


def solver_named(name: str) -> Solver:
    """The registry's entry, or an error that lists all names."""
    if name not in SOLVERS:
        raise InvalidRequestError(
            f"unknown solver {name!r}; allowed: {', '.join(SOLVERS)}", field="solver"
        )
    return SOLVERS[name]


def check_combination(
    solver: Solver,
    schedule: str,
    prediction_type: str,
    noise: NoiseSchedule,
    options: SolverOptions,
) -> None:
    """Refuse by name what Diffusers' class of this solver does not do either."""
    if schedule not in SCHEDULES:
        raise InvalidRequestError(
            f"unknown schedule {schedule!r}; allowed: {', '.join(SCHEDULES)}", field="schedule"
        )
    if prediction_type not in PREDICTION_TYPES:
        raise UnsupportedError(
            f"prediction_type={prediction_type!r} is not supported;"
            f" allowed: {', '.join(PREDICTION_TYPES)}"
        )
    _refuse_unless(schedule in solver.schedules, solver, f"schedule {schedule!r}", solver.schedules)
    _refuse_unless(
        prediction_type in solver.predictions,
        solver,
        f"prediction_type {prediction_type!r}",
        solver.predictions,
    )
    if options.solver_type is not None and solver.solver_types:
        _refuse_unless(
            options.solver_type in solver.solver_types,
            solver,
            f"solver_type {options.solver_type!r}",
            solver.solver_types,
        )
    if noise.rescale_betas_zero_snr:
        _check_zero_snr(solver, prediction_type)
    _check_last_step(solver, schedule, options)


def _check_zero_snr(solver: Solver, prediction_type: str) -> None:
    if not solver.zero_snr:
        able = tuple(other.name for other in SOLVERS.values() if other.zero_snr)
        _refuse_unless(False, solver, "zero terminal SNR (rescale_betas_zero_snr)", able)
    if prediction_type == "epsilon":
        raise UnsupportedError(
            "prediction_type 'epsilon' cannot be combined with zero terminal SNR"
            " (rescale_betas_zero_snr): pure noise says nothing about the image;"
            " allowed: v_prediction, sample"
        )


def _check_last_step(solver: Solver, schedule: str, options: SolverOptions) -> None:
    """Refuse the last steps whose formula divides by zero or by infinity."""
    to_zero = options.final_sigmas_type == "zero"
    if solver.name == "unipc" and to_zero:
        for what, asked in (
            ("lower_order_final false", not options.lower_order_final),
            ("solver_type 'bh1'", options.solver_type == "bh1"),
        ):
            if asked:
                raise UnsupportedError(
                    f"solver 'unipc' does not support {what} with final_sigmas_type 'zero': its"
                    " last step would have no finite value; allowed: sigma_min"
                )
    multistep = solver.rows in (dpm.dpmpp_2m, dpm.dpmpp_2m_sde, unipc.unipc)
    simple = solver.name != "unipc" and options.solver_order < 3 and options.solver_type != "heun"
    if multistep and not simple and not to_zero and schedule in _RAMPS:
        raise UnsupportedError(
            f"solver {solver.name!r} with schedule {schedule!r} ends at sigma_min already;"
            " final_sigmas_type 'sigma_min' would add an empty step, which only 'midpoint' of"
            " order 1 or 2 can take; allowed: zero"
        )


def _refuse_unless(served: bool, solver: Solver, what: str, allowed: tuple[str, ...]) -> None:
    if not served:
        raise UnsupportedError(
            f"solver {solver.name!r} does not support {what}; allowed: {', '.join(allowed)}"
        )
