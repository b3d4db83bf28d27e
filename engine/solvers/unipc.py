"""UniPC, a unified predictor-corrector (arXiv 2302.04867).

Diffusers: scheduling_unipc_multistep.py.

One evaluation serves two updates: it first corrects the step that led here (whose start is kept in
``e``), then predicts the next. ``h1``..``h3`` hold the clean predictions of the steps before.
"""

from __future__ import annotations

import math

import numpy as np

from engine.solvers.forms import H1, H2, H3, E, Row, X, alpha_sigma, predictions
from engine.solvers.grid import Grid
from engine.solvers.noise_schedule import FloatArray, NoiseSchedule
from engine.solvers.options import SolverOptions


def unipc(
    grid: Grid, prediction_type: str, options: SolverOptions, _noise: NoiseSchedule
) -> list[Row]:
    """Multistep UniPC in x0-prediction form, B(h) = h (bh1) or e^h - 1 (bh2, the default)."""
    bh1 = options.solver_type == "bh1"
    rows = []
    order_before = 0
    for step in range(grid.begin, grid.count):
        level = float(grid.levels[step])
        x0, _ = predictions(prediction_type, level)
        corrected = X
        if order_before and step - 1 not in options.disable_corrector:
            corrected = _correct(grid, step, x0, order_before, bh1)
        order = _order(grid, step, options)
        rows.append(
            Row(
                timestep=float(grid.timesteps[step]),
                log_snr=level,
                clean=x0,
                x=_predict(grid, step, corrected, x0, order, bh1),
                e=corrected,
                h1=x0,
                h2=H1,
                h3=H2,
            )
        )
        order_before = order
    return rows


def _order(grid: Grid, step: int, options: SolverOptions) -> int:
    order = options.solver_order
    if options.lower_order_final:
        order = min(order, grid.count - step)
    return min(order, 1 + grid.usable_history(step))


def _predict(
    grid: Grid, step: int, x: FloatArray, x0: FloatArray, order: int, bh1: bool
) -> FloatArray:
    """UniP: from this step's entry to the next level."""
    h, ratios, slopes = _history(grid, step, x0, (H1, H2), order)
    moved = _first_order(grid, step, x, x0)
    if order == 1:
        return moved
    # The paper's degenerate case: for order 2 both B(h) are given the weight 1/2.
    weights = np.full(1, 0.5) if order == 2 else _weights(ratios, h, order, bh1)[: order - 1]
    return _add(grid, step, moved, weights, slopes, h, bh1)


def _correct(grid: Grid, step: int, x0: FloatArray, order: int, bh1: bool) -> FloatArray:
    """UniC: the step that led here again, now knowing the clean prediction at its end."""
    h, ratios, slopes = _history(grid, step - 1, H1, (H2, H3), order)
    moved = _first_order(grid, step - 1, E, H1)
    weights = np.full(1, 0.5) if order == 1 else _weights([*ratios, 1.0], h, order, bh1)
    return _add(grid, step - 1, moved, weights, [*slopes, x0 - H1], h, bh1)


def _first_order(grid: Grid, step: int, x: FloatArray, x0: FloatArray) -> FloatArray:
    level, target = float(grid.levels[step]), float(grid.levels[step + 1])
    _, sigma = alpha_sigma(level)
    alpha_next, sigma_next = alpha_sigma(target)
    return sigma_next / sigma * x - alpha_next * math.expm1((level - target) / 2) * x0


def _history(
    grid: Grid, step: int, newest: FloatArray, older: tuple[FloatArray, ...], order: int
) -> tuple[float, list[float], list[FloatArray]]:
    """h of a step, and the lambda ratios and slopes of the ``order - 1`` records before it."""
    at = grid.half_log_snr
    h = at(step + 1) - at(step)
    ratios = [(at(step - back) - at(step)) / h for back in range(1, order)]
    slopes = [(record - newest) / ratio for record, ratio in zip(older, ratios, strict=False)]
    return h, ratios, slopes


def _weights(ratios: list[float], h: float, order: int, bh1: bool) -> FloatArray:
    """Solve R(h) rho = b(h) (eq. 12), truncated to as many conditions as there are records."""
    count = len(ratios)
    matrix = np.asarray([np.power(ratios, power) for power in range(count)])
    values = []
    phi, factorial = math.expm1(-h) / -h - 1.0, 1
    for index in range(1, order + 1):
        values.append(phi * factorial / _b_of(h, bh1))
        factorial *= index + 1
        phi = phi / -h - 1.0 / factorial
    return np.linalg.solve(matrix, np.asarray(values[:count]))


def _b_of(h: float, bh1: bool) -> float:
    return -h if bh1 else math.expm1(-h)


def _add(
    grid: Grid,
    step: int,
    moved: FloatArray,
    weights: FloatArray,
    slopes: list[FloatArray],
    h: float,
    bh1: bool,
) -> FloatArray:
    alpha_next, _ = alpha_sigma(float(grid.levels[step + 1]))
    pulls = sum((w * slope for w, slope in zip(weights, slopes, strict=True)), np.zeros(()))
    return np.asarray(moved - alpha_next * _b_of(h, bh1) * pulls)
