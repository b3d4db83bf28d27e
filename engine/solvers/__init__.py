"""Solver tables: a trajectory's denoising as rows of numbers.

Pure float64 numpy, no model and no torch. :func:`table` builds one request's table;
:func:`from_scheduler_config` reads what a checkpoint asks for.
"""

from engine.solvers.forms import COLUMNS, PREDICTION_TYPES, SLOTS
from engine.solvers.noise_schedule import NoiseSchedule
from engine.solvers.options import TOP, Level, SolverOptions, Start, Strength, Top
from engine.solvers.registry import SCHEDULES, SOLVERS, Solver
from engine.solvers.scheduler_config import (
    SCHEDULER_CLASSES,
    SchedulerDefaults,
    from_scheduler_config,
)
from engine.solvers.table import (
    MAX_STEPS,
    SolverTable,
    advance,
    initial_state,
    renoise,
    table,
)

__all__ = [
    "COLUMNS",
    "MAX_STEPS",
    "PREDICTION_TYPES",
    "SCHEDULES",
    "SCHEDULER_CLASSES",
    "SLOTS",
    "SOLVERS",
    "TOP",
    "Level",
    "NoiseSchedule",
    "SchedulerDefaults",
    "Solver",
    "SolverOptions",
    "SolverTable",
    "Start",
    "Strength",
    "Top",
    "advance",
    "from_scheduler_config",
    "initial_state",
    "renoise",
    "table",
]
