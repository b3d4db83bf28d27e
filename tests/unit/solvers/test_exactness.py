"""Tables against Diffusers' scheduler classes, around an analytic denoiser."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.errors import DarkroomError, UnsupportedError
from engine.solvers import SOLVERS, NoiseSchedule, SolverOptions, table
from loadtests.exactness_cases import Case, generate
from loadtests.exactness_runs import build, relative_error, run_diffusers, run_table
from loadtests.exactness_tables import ALL_STEPS, TOLERANCE, TOLERANCE64, examine

CASES = tuple(generate())


def _refusal(case: Case, steps: int) -> DarkroomError | None:
    try:
        build(case, steps)
    except DarkroomError as error:
        return error
    return None


def _seeded_sample() -> list[Case]:
    """Every solver on every schedule at least once, and a share of everything else."""
    chooser = random.Random(20261123)
    shuffled = chooser.sample(CASES, len(CASES))
    first: dict[tuple[str, str], Case] = {}
    for case in shuffled:
        served = case.schedule in SOLVERS[case.solver].schedules
        if served and case.prediction_type != "epsilon":
            first.setdefault((case.solver, case.schedule), case)
    return [*first.values(), *shuffled[:60]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", _seeded_sample(), ids=lambda case: case.name)
def test_a_seeded_sample_equals_diffusers(case: Case) -> None:
    steps = random.Random(case.name).sample(ALL_STEPS, 2)
    outcome = examine(case, [1, *steps])
    assert outcome.agrees, outcome


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_combination_equals_diffusers_or_is_refused(case: Case) -> None:
    outcome = examine(case, ALL_STEPS)
    assert outcome.agrees, outcome


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("solver", SOLVERS)
def test_twenty_steps_on_stable_diffusions_schedule_are_equal_in_float32(solver: str) -> None:
    case = Case(solver, SOLVERS[solver].schedules[0], "epsilon")
    assert relative_error(case, 20, torch.float32) < TOLERANCE / 10
    assert relative_error(case, 20, torch.float64) < TOLERANCE64 / 100


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_comparison_notices_a_wrong_solver() -> None:
    right = Case("dpmpp_2m", "trailing", "v_prediction")
    wrong = Case("unipc", "trailing", "v_prediction")
    reference = run_diffusers(right, 8, torch.float64)
    ours = run_table(wrong, 8, torch.float64)
    assert np.linalg.norm(ours - reference) / np.linalg.norm(reference) > TOLERANCE


REFUSED = tuple(case for case in CASES if _refusal(case, 5))


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refusals_name_what_is_refused_and_what_is_allowed(case: Case) -> None:
    with pytest.raises(UnsupportedError, match="allowed: ") as caught:
        build(case, 5)
    named = (case.solver, case.schedule, case.prediction_type)
    assert any(repr(name) in str(caught.value) for name in named)


def test_epsilon_is_refused_at_zero_terminal_snr() -> None:
    noise = NoiseSchedule(rescale_betas_zero_snr=True)
    with pytest.raises(UnsupportedError, match="zero terminal SNR"):
        table("ddim", "leading", 5, noise_schedule=noise, prediction_type="epsilon")


def test_unipc_refuses_the_options_whose_last_step_diffusers_computes_as_nan() -> None:
    for options in (SolverOptions(solver_type="bh1"), SolverOptions(lower_order_final=False)):
        with pytest.raises(UnsupportedError, match="final_sigmas_type 'zero'"):
            table(
                "unipc",
                "trailing",
                5,
                noise_schedule=NoiseSchedule(),
                prediction_type="v_prediction",
                options=options,
            )
