"""Few-step samplers of consistency-distilled models: LCM and TCD."""

from __future__ import annotations

import math

import numpy as np

from engine.solvers.ddim import ddim_step
from engine.solvers.forms import NOISE, Row, X, alpha_sigma, predictions
from engine.solvers.grid import Grid
from engine.solvers.noise_schedule import NoiseSchedule
from engine.solvers.options import SolverOptions

_SIGMA_DATA = 0.5
TCD_ETA = 0.3


def lcm(
    grid: Grid, prediction_type: str, options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """Latent consistency (arXiv 2310.04378): jump to x0, then add fresh noise for the next level.

    c_skip and c_out enforce f(x, 0) = x (Diffusers: scheduling_lcm.py).
    """
    rows = []
    for step in range(grid.begin, grid.count):
        timestep, level = float(grid.timesteps[step]), float(grid.levels[step])
        x0, _ = predictions(prediction_type, level)
        scaled = timestep * options.timestep_scaling
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + _SIGMA_DATA**2)
        denoised = c_out * x0 + c_skip * X
        last = grid.is_last(step)
        alpha, sigma = alpha_sigma(math.inf if last else float(grid.levels[step + 1]))
        moved = alpha * denoised + sigma * NOISE
        rows.append(Row(timestep, level, denoised, moved, draws_noise=not last))
    return rows


def tcd(
    grid: Grid, prediction_type: str, options: SolverOptions, noise: NoiseSchedule
) -> list[Row]:
    """Trajectory consistency (arXiv 2402.19159), Algorithm 4 (Diffusers: scheduling_tcd.py).

    Jump below the next timestep t' to s = (1 - eta) t', then renoise from s up to t'.
    """
    eta = TCD_ETA if options.eta is None else options.eta
    rows = []
    for step in range(grid.begin, grid.count):
        level, last = float(grid.levels[step]), grid.is_last(step)
        x0, eps = predictions(prediction_type, level)
        after = 0.0 if last else float(grid.timesteps[step + 1])
        # In float32, as Diffusers multiplies: the product decides a whole timestep.
        below = int(np.floor(np.float32(1 - eta) * np.float32(after)))
        landing = float(noise.log_snr[below])
        moved = ddim_step(x0, eps, level, landing)
        draws = eta > 0 and not last
        if draws:
            ratio = noise.alphas_cumprod[int(after)] / noise.alphas_cumprod[below]
            moved = math.sqrt(ratio) * moved + math.sqrt(max(1.0 - ratio, 0.0)) * NOISE
        rows.append(
            Row(float(grid.timesteps[step]), level, x0, np.asarray(moved), draws_noise=draws)
        )
    return rows
