"""The k-diffusion family (arXiv 2206.00364), carried over to variance-preserving scale.

k-diffusion integrates y = x / alpha = x0 + s * eps over s = sigma / alpha. The derivative dy/ds is
eps itself, so one Euler step in y is one DDIM step in x, and only the visited levels differ.
Diffusers: scheduling_euler_discrete.py, scheduling_euler_ancestral_discrete.py,
scheduling_heun_discrete.py.
"""

from __future__ import annotations

import math

from engine.solvers.ddim import ddim_step
from engine.solvers.forms import H1, NOISE, E, Row, X, alpha_sigma, predictions
from engine.solvers.grid import Grid
from engine.solvers.noise_schedule import FloatArray, NoiseSchedule
from engine.solvers.options import SolverOptions


def euler(
    grid: Grid, prediction_type: str, _options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """Algorithm 2 without churn."""
    rows = []
    for step in range(grid.begin, grid.count):
        level, target = float(grid.levels[step]), float(grid.levels[step + 1])
        x0, eps = predictions(prediction_type, level)
        moved = ddim_step(x0, eps, level, target)
        rows.append(Row(float(grid.timesteps[step]), level, x0, moved))
    return rows


def euler_ancestral(
    grid: Grid, prediction_type: str, _options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """An Euler step to a lower sigma than wanted, then fresh noise up to it."""
    rows = []
    for step in range(grid.begin, grid.count):
        level, target = float(grid.levels[step]), float(grid.levels[step + 1])
        x0, eps = predictions(prediction_type, level)
        alpha, _ = alpha_sigma(target)
        down, up = _ancestral_split(level, target)
        # In y: x0 + down * eps + up * noise; alpha carries it back to x.
        moved = alpha * (x0 + down * eps + up * NOISE)
        rows.append(Row(float(grid.timesteps[step]), level, x0, moved, draws_noise=True))
    return rows


def _ancestral_split(level: float, target: float) -> tuple[float, float]:
    """(down, up) with down^2 + up^2 = sigma'^2 / alpha'^2 (k-diffusion: get_ancestral_step)."""
    to = math.exp(-target / 2)
    # (sigma_to / sigma_from)^2 as one exponential: defined for a start at zero SNR as well.
    ratio = math.exp(level - target)
    up = to * math.sqrt(max(1.0 - ratio, 0.0))
    return to * math.sqrt(min(ratio, 1.0)), up


def heun(
    grid: Grid, prediction_type: str, _options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """Algorithm 1 without churn: two evaluations a step, one in the last (to sigma = 0).

    The first row of a step moves x and keeps x before it in ``e`` and the derivative in ``h1``;
    the second repeats the move from ``e`` with the mean of both derivatives.
    """
    rows = []
    for step in range(grid.begin, grid.count):
        level, target = float(grid.levels[step]), float(grid.levels[step + 1])
        x0, eps = predictions(prediction_type, level)
        moved = ddim_step(x0, eps, level, target)
        rows.append(Row(float(grid.timesteps[step]), level, x0, moved, e=X, h1=eps))
        if grid.is_last(step):
            break
        x0_next, eps_next = predictions(prediction_type, target)
        corrected = _along(E, (H1 + eps_next) / 2, level, target)
        rows.append(Row(float(grid.timesteps[step + 1]), target, x0_next, corrected))
    return rows


def _along(start: FloatArray, derivative: FloatArray, level: float, target: float) -> FloatArray:
    """y + derivative * (s' - s), in x."""
    alpha, sigma = alpha_sigma(level)
    alpha_next, sigma_next = alpha_sigma(target)
    growth = alpha_next / alpha
    return growth * start + (sigma_next - growth * sigma) * derivative
