"""The solver table: one request's whole denoising, as numbers computed before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidRequestError, LimitExceededError
from engine.solvers.forms import COLUMNS, SLOTS, alpha_sigma
from engine.solvers.grid import enter
from engine.solvers.noise_schedule import FloatArray, NoiseSchedule
from engine.solvers.options import TOP, SolverOptions, Start, Top
from engine.solvers.registry import Solver, check_combination, solver_named

MAX_STEPS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class SolverTable:
    """A row per network evaluation; all arrays are read-only float64.

    A trajectory's state is a stack of ``SLOTS`` tensors ``[x, e, h1, h2, h3]``, all zero but x at
    the start. Row ``i`` feeds x and ``timesteps[i]`` to the network and then replaces the state by
    ``transition[i] @ [x, e, h1, h2, h3, out, noise]``: see :func:`advance`. ``out`` is the raw
    (guided) output, whatever it predicts; ``noise`` is fresh unit noise where ``draws_noise[i]``
    (drawn exactly where Diffusers draws, less draws at the end that no longer change x).

    ``log_snr[i]`` labels x at the entry of row i; the last one, x after the last row. Pure noise
    (alpha = 0) is -inf, a clean image +inf: IEEE infinities, which :func:`renoise` maps to
    (0, 1) and (1, 0). ``clean[i] @ [x, out]`` is the clean prediction x0.

    A state enters at row 0 as: ``initial_scale * noise`` for a start at the top;
    ``alpha * x0 + sigma * noise`` with ``(alpha, sigma) = renoise(log_snr[0])`` from a clean latent
    or a stored clean prediction; a stored x as it is, when the table was built for its level. To
    continue a full snapshot, keep this table and go on at its next row.
    """

    solver: str
    schedule: str
    prediction_type: str
    steps: int
    timesteps: FloatArray
    log_snr: FloatArray
    transition: FloatArray
    clean: FloatArray
    draws_noise: npt.NDArray[np.bool_]
    initial_scale: float

    @property
    def evaluations(self) -> int:
        """Network evaluations, which are rows (not steps: Heun takes two a step)."""
        return len(self.timesteps)

    def level(self, row: int) -> tuple[float, float]:
        """(alpha, sigma) of x at the entry of a row; at ``evaluations``, after the last one."""
        return alpha_sigma(float(self.log_snr[row]))

    def describe(self) -> str:
        """A table of the rows, for people; zero coefficients are left out."""
        head = (
            f"{self.solver} / {self.schedule} / {self.prediction_type}: {self.steps} steps,"
            f" {self.evaluations} evaluations, x starts at {self.initial_scale:.6g} * noise"
        )
        lines = [head, f"{'row':>4} {'timestep':>9} {'log SNR':>9}  new x ="]
        lines += [
            f"{row:>4} {self.timesteps[row]:>9.3f} {self.log_snr[row]:>9.3f}"
            f"  {_terms(self.transition[row, 0])}"
            for row in range(self.evaluations)
        ]
        lines.append(f"{'end':>4} {'':>9} {self.log_snr[-1]:>9.3f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


_COLUMN_NAMES = ("x", "e", "h1", "h2", "h3", "out", "noise")


def _terms(form: FloatArray) -> str:
    terms = [f"{value:+.5g} {name}" for name, value in zip(_COLUMN_NAMES, form, strict=True)]
    return "  ".join(term for term, value in zip(terms, form, strict=True) if value) or "0"


def table(
    solver: str,
    schedule: str,
    steps: int,
    start: Start = TOP,
    *,
    noise_schedule: NoiseSchedule,
    prediction_type: str,
    options: SolverOptions | None = None,
) -> SolverTable:
    """The table of one request, built for its start.

    A start has no history, so multistep solvers begin at first order there. ``Level`` begins
    exactly at that log-SNR: on a level of the schedule the table is the schedule's rest; between
    two levels it becomes the first row's level, followed by the schedule's levels below it.
    """
    options = options or SolverOptions()
    chosen = solver_named(solver)
    _check_steps(steps)
    check_combination(chosen, schedule, prediction_type, noise_schedule, options)
    whole = chosen.grid(schedule, steps, noise_schedule, options)
    grid = enter(whole, start, noise_schedule)
    if math.isinf(grid.levels[grid.begin]):
        _check_zero_snr_start(chosen, prediction_type)
    rows = chosen.rows(grid, prediction_type, options, noise_schedule)
    transition = np.stack([row.matrix() for row in rows])
    draws = np.asarray([row.draws_noise for row in rows])
    return SolverTable(
        solver=solver,
        schedule=schedule,
        prediction_type=prediction_type,
        steps=steps,
        timesteps=_frozen(np.asarray([row.timestep for row in rows])),
        log_snr=_frozen(np.asarray([row.log_snr for row in rows] + [grid.levels[-1]])),
        transition=_frozen(transition),
        clean=_frozen(np.stack([row.clean[[0, SLOTS]] for row in rows])),
        draws_noise=_frozen(draws & _still_matters(transition)),
        initial_scale=whole.initial_scale if isinstance(start, Top) else 1.0,
    )


def _check_zero_snr_start(solver: Solver, prediction_type: str) -> None:
    if prediction_type == "epsilon" or not solver.zero_snr:
        who = "an epsilon model" if prediction_type == "epsilon" else f"solver {solver.name!r}"
        raise InvalidRequestError(
            f"{who} cannot start at zero SNR: give a finite log-SNR", field="start"
        )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise InvalidRequestError(f"steps={steps}: at least 1 is needed", field="steps")
    if steps > MAX_STEPS:
        raise LimitExceededError(
            f"steps={steps} is more than the limit of {MAX_STEPS}", field="steps", limit=MAX_STEPS
        )


def _still_matters(transition: FloatArray) -> npt.NDArray[np.bool_]:
    """False for the trailing rows whose noise has no weight, so that they draw none."""
    used = np.any(transition[:, :, COLUMNS - 1] != 0, axis=1)
    later_or_now: npt.NDArray[np.bool_] = np.logical_or.accumulate(used[::-1])[::-1]
    return later_or_now


_Scalar = TypeVar("_Scalar", bound=np.generic)


def _frozen(values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    values.flags.writeable = False
    return values


def renoise(log_snr: float) -> tuple[float, float]:
    """(alpha, sigma) with ``x = alpha * x0 + sigma * noise`` at a log-SNR."""
    return alpha_sigma(log_snr)


def initial_state(x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The state stack of a trajectory whose only slot in use is x."""
    state = np.zeros((SLOTS, *x.shape), dtype=x.dtype)
    state[0] = x
    return state


def advance(
    transition: FloatArray,
    state: npt.NDArray[np.floating],
    out: npt.NDArray[np.floating],
    noise: npt.NDArray[np.floating],
) -> npt.NDArray[np.floating]:
    """The reference step of a batch: rows of any solver, one multiply-add.

    Shapes: transition (batch, SLOTS, COLUMNS), state (batch, SLOTS, ...), out and noise
    (batch, ...). Where a row draws no noise, ``noise`` must be zero or any finite number.
    """
    columns = np.concatenate([state, out[:, None], noise[:, None]], axis=1)
    return np.asarray(np.einsum("bij,bj...->bi...", transition, columns))
