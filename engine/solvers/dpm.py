"""DPM-Solver++ multistep, deterministic and SDE (arXiv 2211.01095).

Diffusers: scheduling_dpmsolver_multistep.py. Both integrate x0 over lambda = log(alpha / sigma),
extrapolating it from the last one or two clean predictions (``h1``, ``h2``).
"""

from __future__ import annotations

import math

import numpy as np

from engine.solvers.forms import H1, H2, NOISE, Row, X, alpha_sigma, predictions
from engine.solvers.grid import Grid
from engine.solvers.noise_schedule import FloatArray, NoiseSchedule
from engine.solvers.options import SolverOptions

# Diffusers lowers the order of the last two steps when a schedule is shorter than this.
_FEW_STEPS = 15


def dpmpp_2m(
    grid: Grid, prediction_type: str, options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """Algorithm 2 (order 2), or its third-order sibling."""
    return _rows(grid, prediction_type, options, sde=False)


def dpmpp_2m_sde(
    grid: Grid, prediction_type: str, options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """The reverse SDE: twice the pull towards x0, and fresh noise every step."""
    return _rows(grid, prediction_type, options, sde=True)


def _rows(grid: Grid, prediction_type: str, options: SolverOptions, *, sde: bool) -> list[Row]:
    rows = []
    for step in range(grid.begin, grid.count):
        level = float(grid.levels[step])
        x0, _ = predictions(prediction_type, level)
        order = _order(grid, step, options)
        rows.append(
            Row(
                timestep=float(grid.timesteps[step]),
                log_snr=level,
                clean=x0,
                x=_step(grid, step, x0, order, options.solver_type == "heun", sde),
                h1=x0,
                h2=H1,
                draws_noise=sde,
            )
        )
    return rows


def _order(grid: Grid, step: int, options: SolverOptions) -> int:
    order = min(options.solver_order, 1 + grid.usable_history(step))
    careful = options.lower_order_final and grid.steps < _FEW_STEPS
    left = grid.count - step
    if left == 1 and (options.euler_at_final or careful or options.final_sigmas_type == "zero"):
        return 1
    return min(order, 2) if left == 2 and careful else order


def _step(grid: Grid, step: int, x0: FloatArray, order: int, heun: bool, sde: bool) -> FloatArray:
    level, target = float(grid.levels[step]), float(grid.levels[step + 1])
    _, sigma = alpha_sigma(level)
    alpha_next, sigma_next = alpha_sigma(target)
    h = (target - level) / 2
    if h == 0:  # karras and exponential end at sigma_min already
        return X
    # The SDE contracts twice as fast; everything else is the same expansion in h or 2h.
    rate = 2 * h if sde else h
    decay = math.exp(-rate)
    keep = sigma_next / sigma * (math.exp(-h) if sde else 1.0)
    pull = alpha_next * -math.expm1(-rate)
    moved = keep * X + pull * x0
    if order >= 2:
        first, second = _differences(grid, step, x0, order)
        # phi_2 and phi_3 of exponential integrators, in the sign convention of the papers.
        if order == 2 and not heun:
            moved = moved + 0.5 * pull * first
        elif sde:
            moved = moved + alpha_next * ((1 - decay) / -rate + 1) * first
            moved = moved + alpha_next * ((1 - decay - rate) / rate**2 - 0.5) * second
        else:
            moved = moved + alpha_next * ((decay - 1) / rate + 1) * first
            moved = moved - alpha_next * ((decay - 1 + rate) / rate**2 - 0.5) * second
    if sde:
        moved = moved + sigma_next * math.sqrt(-math.expm1(-2 * h)) * NOISE
    return np.asarray(moved)


def _differences(
    grid: Grid, step: int, x0: FloatArray, order: int
) -> tuple[FloatArray, FloatArray]:
    """First and second differences of x0 over lambda, in units of this step's h."""
    at = grid.half_log_snr
    h = at(step + 1) - at(step)
    r0 = (at(step) - at(step - 1)) / h
    newest = (x0 - H1) / r0
    if order == 2:
        return newest, np.zeros_like(newest)
    r1 = (at(step - 1) - at(step - 2)) / h
    older = (H1 - H2) / r1
    first = newest + r0 / (r0 + r1) * (newest - older)
    return first, (newest - older) / (r0 + r1)
