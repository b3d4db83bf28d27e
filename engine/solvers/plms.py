"""PLMS: pseudo linear multistep (arXiv 2202.09778; Diffusers: scheduling_pndm.py).

What Stable Diffusion 1.x ships, with ``skip_prk_steps``: Adams-Bashforth over the raw network
outputs (``h1``..``h3``). The second evaluation repeats the first step with the mean of the outputs
at both ends, from the x kept in ``e``; so n steps are n + 1 rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import InvalidRequestError
from engine.solvers.ddim import ddim_step
from engine.solvers.forms import H1, H2, H3, OUT, E, Row, X, alpha_sigma, predictions
from engine.solvers.grid import Grid
from engine.solvers.noise_schedule import FloatArray, NoiseSchedule
from engine.solvers.options import SolverOptions

_ADAMS_BASHFORTH = (
    OUT,
    (3 * OUT - H1) / 2,
    (23 * OUT - 16 * H1 + 5 * H2) / 12,
    (55 * OUT - 59 * H1 + 37 * H2 - 9 * H3) / 24,
)


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """The network is asked at (timestep, level); the update goes from ``start`` to ``target``."""

    timestep: float
    level: float
    start: float
    target: float


def plms(
    grid: Grid, prediction_type: str, options: SolverOptions, noise: NoiseSchedule
) -> list[Row]:
    """Linear multistep of up to fourth order over the raw outputs."""
    evaluations = _between_levels(grid) if grid.from_level else _by_stride(grid, noise, options)
    rows = []
    for index, at in enumerate(evaluations):
        clean, _ = predictions(prediction_type, at.level)
        if index == 1:
            moved = _move((OUT + H1) / 2, E, prediction_type, at)
            rows.append(Row(at.timestep, at.level, clean, moved, h1=H1))
            continue
        # The repeated step adds no record, so the order lags the row by one.
        order = min(max(index, 1), len(_ADAMS_BASHFORTH))
        moved = _move(_ADAMS_BASHFORTH[order - 1], X, prediction_type, at)
        kept = X if index == 0 else 0 * X
        rows.append(Row(at.timestep, at.level, clean, moved, e=kept, h1=OUT, h2=H1, h3=H2))
    return rows


def _move(mean: FloatArray, x: FloatArray, prediction_type: str, at: _Evaluation) -> FloatArray:
    """The DDIM step of ``x`` with a combined output; converted to eps only after combining."""
    alpha, sigma = alpha_sigma(at.start)
    eps = alpha * mean + sigma * x if prediction_type == "v_prediction" else mean
    return ddim_step((x - sigma * eps) / alpha, eps, at.start, at.target)


def _between_levels(grid: Grid) -> list[_Evaluation]:
    """From a stored state: the same scheme, along the grid's own levels."""
    levels = [float(level) for level in grid.levels]
    found = []
    for step in range(grid.begin, grid.count):
        timestep, level = float(grid.timesteps[step]), levels[step]
        if step == grid.begin + 1:
            found.append(_Evaluation(timestep, level, levels[step - 1], level))
        found.append(_Evaluation(timestep, level, level, float(grid.targets[step])))
    return found


def _by_stride(grid: Grid, noise: NoiseSchedule, options: SolverOptions) -> list[_Evaluation]:
    """Diffusers' own bookkeeping: always one fixed stride down from the timestep asked.

    With ``strength`` it cuts the list that already repeats the second timestep, so that most
    starts repeat another one and end a stride early; kept, for equal pictures.
    """
    final = math.inf if options.set_alpha_to_one else float(noise.log_snr[0])
    stride = noise.num_train_timesteps // grid.steps

    def level(timestep: int) -> float:
        if timestep >= noise.num_train_timesteps:
            raise InvalidRequestError(
                f"this start makes PLMS look at timestep {timestep}, beyond the"
                f" {noise.num_train_timesteps} trained ones; choose another strength",
                field="strength",
            )
        return float(noise.log_snr[timestep]) if timestep >= 0 else final

    asked = [int(timestep) for timestep in grid.timesteps]
    asked = (asked[:2] + asked[1:])[grid.begin :]
    found = []
    for index, timestep in enumerate(asked):
        if index == 1:
            start, target = timestep + stride, timestep
        else:
            start, target = timestep, timestep - stride
        found.append(_Evaluation(timestep, level(timestep), level(start), level(target)))
    return found
