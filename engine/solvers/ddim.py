"""DDIM (arXiv 2010.02502; Diffusers: scheduling_ddim.py) and DDPM (scheduling_ddpm.py)."""

from __future__ import annotations

import math

from engine.solvers.forms import NOISE, Row, alpha_sigma, predictions
from engine.solvers.grid import Grid
from engine.solvers.noise_schedule import FloatArray, NoiseSchedule
from engine.solvers.options import SolverOptions


def ddim(
    grid: Grid, prediction_type: str, options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """Eq. 12: towards x0 and back along eps; ``eta`` replaces part of eps by fresh noise."""
    return _rows(grid, prediction_type, options.eta or 0.0)


def ddpm(
    grid: Grid, prediction_type: str, _options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """Ancestral sampling with the posterior (``fixed_small``) variance: DDIM at eta = 1."""
    return _rows(grid, prediction_type, 1.0)


def _rows(grid: Grid, prediction_type: str, eta: float) -> list[Row]:
    rows = []
    for step in range(grid.begin, grid.count):
        level = float(grid.levels[step])
        x0, eps = predictions(prediction_type, level)
        rows.append(
            Row(
                timestep=float(grid.timesteps[step]),
                log_snr=level,
                clean=x0,
                x=ddim_step(x0, eps, level, float(grid.targets[step]), eta),
                draws_noise=eta > 0,
            )
        )
    return rows


def ddim_step(
    x0: FloatArray, eps: FloatArray, level: float, target: float, eta: float = 0.0
) -> FloatArray:
    """x at the target level, as a form of the x0 and eps predicted at this one."""
    alpha, sigma = alpha_sigma(level)
    alpha_next, sigma_next = alpha_sigma(target)
    if eta == 0:
        return alpha_next * x0 + sigma_next * eps
    # Eq. 16; clamped because at alpha = 0 and eta = 1 noise replaces all of eps, up to rounding.
    std = eta * (sigma_next / sigma) * math.sqrt(max(1.0 - (alpha / alpha_next) ** 2, 0.0))
    direction = math.sqrt(max(sigma_next**2 - std**2, 0.0))
    return alpha_next * x0 + direction * eps + std * NOISE
