"""Properties of tables, without Diffusers and without a model."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError, LimitExceededError, UnsupportedError
from engine.solvers import (
    COLUMNS,
    SLOTS,
    SOLVERS,
    Level,
    NoiseSchedule,
    SolverOptions,
    SolverTable,
    Start,
    Strength,
    advance,
    initial_state,
    renoise,
    table,
)
from engine.solvers.options import TOP

SD = NoiseSchedule()
ZERO_SNR = NoiseSchedule(rescale_betas_zero_snr=True)
OFFSET = SolverOptions(steps_offset=1, set_alpha_to_one=False)
FIRST_ORDER = ("ddim", "ddpm", "euler", "euler_ancestral", "lcm", "tcd")

# No deadline: test machines are busy. Few examples: building a table is the slow part.
checked = settings(deadline=None, max_examples=40)
solvers = st.sampled_from(sorted(SOLVERS))
steps_counts = st.integers(1, 50)


def make(
    solver: str,
    steps: int = 10,
    start: Start = TOP,
    *,
    schedule: str | None = None,
    noise: NoiseSchedule = SD,
    prediction_type: str = "v_prediction",
    options: SolverOptions | None = None,
) -> SolverTable:
    return table(
        solver,
        schedule or SOLVERS[solver].schedules[0],
        steps,
        start,
        noise_schedule=noise,
        prediction_type=prediction_type,
        options=options,
    )


@checked
@given(solvers, steps_counts)
def test_shapes_levels_and_ends(solver: str, steps: int) -> None:
    rows = make(solver, steps)
    n = rows.evaluations
    assert rows.timesteps.shape == (n,)
    assert rows.log_snr.shape == (n + 1,)
    assert rows.transition.shape == (n, SLOTS, COLUMNS)
    assert rows.clean.shape == (n, 2)
    assert rows.draws_noise.shape == (n,)
    assert n == {"heun": 2 * steps - 1, "plms": steps + (steps > 1)}.get(solver, steps)
    assert np.all(np.isfinite(rows.transition))
    assert np.all(np.diff(rows.log_snr) >= 0), "levels only ever get cleaner"
    assert not np.any(rows.transition[~rows.draws_noise, :, -1]), "noise only where it is drawn"
    assert not rows.draws_noise[-1] or np.any(rows.transition[-1, :, -1])


@checked
@given(solvers, steps_counts)
def test_a_table_never_reads_a_slot_before_it_is_written(solver: str, steps: int) -> None:
    rows = make(solver, steps)
    junk = initial_state(np.ones(1))
    junk[1:] = 1e9
    clean = initial_state(np.ones(1))
    out, noise = np.full((1, 1), 0.5), np.zeros((1, 1))
    for row in range(rows.evaluations):
        matrix = rows.transition[row : row + 1]
        junk = advance(matrix, junk[None], out, noise)[0]
        clean = advance(matrix, clean[None], out, noise)[0]
    assert junk[0] == pytest.approx(clean[0])


def test_arrays_are_read_only() -> None:
    rows = make("unipc")
    for array in (rows.timesteps, rows.log_snr, rows.transition, rows.clean, rows.draws_noise):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def gaussian(x: npt.NDArray[np.float64], log_snr: float, std: float) -> npt.NDArray[np.float64]:
    """The exact v prediction when every pixel of the data is N(0, std^2)."""
    alpha, sigma = renoise(log_snr)
    x0 = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x
    return np.asarray((alpha * x - x0) / sigma)


@checked
@given(st.integers(200, 400), st.floats(0.5, 2.0))
def test_ddim_keeps_gaussian_data_gaussian(steps: int, std: float) -> None:
    # The probability-flow ODE of N(0, std^2) multiplies x by the ratio of marginal deviations.
    rows = make("ddim", steps)
    state = initial_state(np.ones(1))
    for row in range(rows.evaluations):
        out = gaussian(state[0], float(rows.log_snr[row]), std)
        state = advance(rows.transition[[row]], state[None], out[None], np.zeros((1, 1)))[0]
    alpha, sigma = renoise(float(rows.log_snr[0]))
    assert state[0, 0] == pytest.approx(std / math.hypot(alpha * std, sigma), rel=0.02)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("lcm", "tcd")])
def test_more_steps_come_closer_to_the_exact_flow(solver: str) -> None:
    def deviation(steps: int) -> float:
        rows = make(solver, steps, schedule="trailing")
        # Without noise, in expectation: the covariance is carried through the linear network.
        errors = []
        state = np.zeros((SLOTS, SLOTS + 1))
        state[0, 0] = 1.0
        covariance = np.zeros((SLOTS, SLOTS))
        covariance[0, 0] = 1.0
        for row in range(rows.evaluations):
            gain = gaussian(np.ones(1), float(rows.log_snr[row]), 0.5)[0]
            step = rows.transition[row, :, :SLOTS].copy()
            step[:, 0] += gain * rows.transition[row, :, SLOTS]
            fresh = rows.transition[row, :, SLOTS + 1]
            covariance = step @ covariance @ step.T + np.outer(fresh, fresh)
            errors.append(covariance[0, 0])
        return abs(math.sqrt(errors[-1]) - 0.5)

    # A start at sigma < 1 cannot know the data's own share: hence the floor.
    assert deviation(200) <= max(deviation(10), 2e-3)
    assert deviation(200) < 0.02


@checked
@given(solvers, st.integers(2, 50), st.data())
def test_entering_on_a_level_is_the_rest_of_the_schedule_from_first_order(
    solver: str, steps: int, data: st.DataObject
) -> None:
    whole = make(solver, steps)
    stride = 2 if solver == "heun" else 1
    if solver == "plms":
        return
    index = stride * data.draw(st.integers(0, steps - 1))
    entered = make(solver, steps, Level(float(whole.log_snr[index])))
    np.testing.assert_array_equal(entered.timesteps, whole.timesteps[index:])
    np.testing.assert_array_equal(entered.log_snr, whole.log_snr[index:])
    first = replace_history(whole.transition[index]) if solver in FIRST_ORDER else None
    if first is not None:
        np.testing.assert_allclose(entered.transition[0], first)
    assert not np.any(entered.transition[0, :, 1:5][0]), "a newcomer has no history"
    if solver in FIRST_ORDER:
        np.testing.assert_array_equal(entered.transition, whole.transition[index:])


def replace_history(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    without = matrix.copy()
    without[:, 1:5] = 0
    return without


@checked
@given(solvers, st.integers(1, 50), st.floats(-4.5, 5.0))
def test_entering_between_levels_prepends_exactly_that_level(
    solver: str, steps: int, log_snr: float
) -> None:
    whole = make(solver, steps)
    if log_snr >= whole.log_snr[-1]:
        return
    rows = make(solver, steps, Level(log_snr))
    assert rows.log_snr[0] == pytest.approx(log_snr, abs=1e-6)
    assert rows.timesteps[0] == pytest.approx(SD.timestep_at(log_snr), abs=1e-3) or (
        # On a level that the schedule has, it keeps the schedule's own (rounded) timestep.
        np.min(np.abs(whole.log_snr - log_snr)) < 1e-5
    )
    below = whole.log_snr[whole.log_snr > log_snr + 1e-6]
    assert set(np.round(below, 9)) == set(np.round(rows.log_snr[1:], 9))
    assert np.all(np.isfinite(rows.transition))
    assert np.max(np.abs(rows.transition)) < 50, "no extrapolation from a tiny first step"


@checked
@given(solvers, st.floats(-4.5, 4.0))
def test_a_state_of_pure_data_survives_any_entry(solver: str, log_snr: float) -> None:
    # With a network that knows the picture exactly, every solver must return that picture.
    # PLMS averages raw outputs of several levels: only for epsilon is that a constant here.
    prediction_type = "epsilon" if solver == "plms" else "v_prediction"
    rows = make(solver, 12, Level(log_snr), prediction_type=prediction_type)
    picture, noise = np.array([0.7, -0.3]), np.array([1.1, -0.4])
    alpha, sigma = rows.level(0)
    state = initial_state(alpha * picture + sigma * noise)
    for row in range(rows.evaluations):
        alpha, sigma = rows.level(row)
        seen = picture if prediction_type == "v_prediction" else alpha * picture
        out = ((alpha if seen is picture else 1.0) * state[0] - seen) / sigma
        clean = rows.clean[row, 0] * state[0] + rows.clean[row, 1] * out
        np.testing.assert_allclose(clean, picture, atol=2e-3 if solver == "lcm" else 1e-9)
        state = advance(rows.transition[[row]], state[None], out[None], np.zeros((1, 2)))[0]
    end = rows.level(-1)
    np.testing.assert_allclose(state[0], picture, atol=2 * end[1] + 2e-3)


@checked
@given(st.floats(allow_nan=False))
def test_renoise_preserves_variance_and_inverts(log_snr: float) -> None:
    alpha, sigma = renoise(log_snr)
    assert alpha**2 + sigma**2 == pytest.approx(1.0)
    if abs(log_snr) < 30:
        assert math.log(alpha**2 / sigma**2) == pytest.approx(log_snr, abs=1e-6)


def test_renoise_at_both_ends() -> None:
    assert renoise(-math.inf) == (0.0, 1.0)
    assert renoise(math.inf) == (1.0, 0.0)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "lcm", "tcd"])
def test_zero_terminal_snr_starts_at_pure_noise(solver: str) -> None:
    schedule = "distilled" if solver in ("lcm", "tcd") else "trailing"
    rows = make(solver, 4, schedule=schedule, noise=ZERO_SNR)
    assert rows.log_snr[0] == -math.inf
    assert rows.level(0) == (0.0, 1.0)
    assert np.all(np.isfinite(rows.transition))
    assert rows.clean[0].tolist() == pytest.approx([0.0, -1.0], abs=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_state_of_pure_noise_enters_where_zero_snr_is_served(solver: str) -> None:
    if SOLVERS[solver].zero_snr:
        rows = make(solver, 8, Level(-math.inf))
        assert rows.log_snr[0] == -math.inf
        assert np.all(np.isfinite(rows.transition))
    else:
        with pytest.raises(InvalidRequestError, match=f"{solver!r} cannot start at zero SNR"):
            make(solver, 8, Level(-math.inf))
    with pytest.raises(InvalidRequestError, match="finite log-SNR"):
        make(solver, 8, Level(-math.inf), prediction_type="epsilon")


@checked
@given(st.sampled_from(sorted(SOLVERS)), steps_counts, st.floats(0.01, 1.0))
def test_strength_skips_what_diffusers_skips(solver: str, steps: int, strength: float) -> None:
    taken = min(int(steps * strength), steps)
    if taken == 0:
        with pytest.raises(InvalidRequestError, match="leaves no step"):
            make(solver, steps, Strength(strength))
        return
    rows = make(solver, steps, Strength(strength))
    whole = make(solver, steps)
    stride = 2 if solver == "heun" else 1
    np.testing.assert_array_equal(rows.timesteps, whole.timesteps[(steps - taken) * stride :])


def test_initial_scales() -> None:
    for solver in SOLVERS:
        assert make(solver).initial_scale == pytest.approx(1.0)
    sigma = make("euler", schedule="trailing").level(0)[1]
    assert make("euler", schedule="trailing").initial_scale == pytest.approx(sigma)
    karras = make("heun", schedule="karras", options=SolverOptions(spacing="linspace"))
    assert karras.initial_scale == pytest.approx(karras.level(0)[1])


def test_align_your_steps_are_the_published_ten() -> None:
    published = {
        "align_your_steps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
        "align_your_steps_sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
    }
    for name, timesteps in published.items():
        assert make("dpmpp_2m", 10, schedule=name).timesteps.tolist() == timesteps


def test_align_your_steps_keep_their_snr_on_another_noise_schedule() -> None:
    cosine = NoiseSchedule("squaredcos_cap_v2")
    ours = make("dpmpp_2m", 10, schedule="align_your_steps", noise=cosine)
    published = make("dpmpp_2m", 10, schedule="align_your_steps")
    assert ours.timesteps[0] == 999
    np.testing.assert_allclose(ours.log_snr[1:-1], published.log_snr[1:-1], atol=0.02)


def test_custom_timesteps() -> None:
    options = SolverOptions(timesteps=(900.0, 500.0, 100.0))
    rows = make("euler", 3, schedule="custom", options=options)
    assert rows.timesteps.tolist() == [900, 500, 100]
    fractional = SolverOptions(timesteps=(900.5, 500.0, 100.0))
    assert make("euler", 3, schedule="custom", options=fractional).timesteps[0] == 900.5
    for bad, message in (
        (None, "needs timesteps"),
        ((500.0, 900.0, 100.0), "descending"),
        ((900.0, 500.0), "2 timesteps were given for 3"),
        ((1000.0, 500.0, 100.0), "within 0..999"),
        ((900.0, math.nan, 100.0), "descending"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            make("euler", 3, schedule="custom", options=SolverOptions(timesteps=bad))
    with pytest.raises(InvalidRequestError, match="whole timesteps"):
        make("dpmpp_2m", 3, schedule="custom", options=fractional)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(InvalidRequestError, match="at least 1") as caught:
        make("ddim", steps)
    assert caught.value.field == "steps"


def test_ten_thousand_steps_are_refused_naming_the_bound() -> None:
    with pytest.raises(LimitExceededError, match="limit of 1000") as caught:
        make("ddim", 10_000)
    assert caught.value.limit == 1000


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [51, 123, 333, 499, 500, 999, 1000])
def test_many_steps_give_a_sound_table_or_a_typed_error(solver: str, steps: int) -> None:
    for schedule in SOLVERS[solver].schedules:
        if schedule == "custom":
            continue
        refused: list[str | None] = []
        try:
            rows = make(solver, steps, schedule=schedule, options=OFFSET)
        except InvalidRequestError as error:
            refused.append(error.field)
        else:
            assert np.all(np.isfinite(rows.transition))
            assert rows.timesteps.min() >= 0
            assert rows.timesteps.max() <= 1000
        assert refused in ([], ["steps"])


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown solver 'euler_b'; allowed: ddim, "):
        make("ddim").__class__ and table(
            "euler_b", "leading", 5, noise_schedule=SD, prediction_type="epsilon"
        )
    with pytest.raises(InvalidRequestError, match=r"unknown schedule 'beta'; allowed: leading, "):
        make("ddim", schedule="beta")
    with pytest.raises(UnsupportedError, match="prediction_type='flow_prediction'"):
        make("ddim", prediction_type="flow_prediction")


def test_bad_starts_and_options_are_refused() -> None:
    whole = make("dpmpp_2m")
    with pytest.raises(InvalidRequestError, match="last level"):
        make("dpmpp_2m", start=Level(math.inf))
    with pytest.raises(InvalidRequestError, match="last level"):
        make("ddim", start=Level(20.0), options=OFFSET)
    assert make("dpmpp_2m", start=Level(float(whole.log_snr[-2]) + 0.5)).evaluations == 1
    with pytest.raises(InvalidRequestError, match="not a number"):
        Level(math.nan)
    for value in (0.0, 1.1, -0.2, math.nan):
        with pytest.raises(InvalidRequestError, match="strength"):
            Strength(value)
    with pytest.raises(InvalidRequestError, match="eta"):
        SolverOptions(eta=1.5)
    with pytest.raises(UnsupportedError, match="solver_order=4"):
        SolverOptions(solver_order=4)
    with pytest.raises(UnsupportedError, match="spacing"):
        SolverOptions(spacing="karras")
    with pytest.raises(InvalidRequestError, match="original_inference_steps"):
        make("lcm", 60)


def test_mixed_solvers_advance_in_one_multiply() -> None:
    tables = [make(solver, 6) for solver in SOLVERS]
    rng = np.random.default_rng(0)
    states = rng.standard_normal((len(tables), SLOTS, 4, 3, 3))
    out = rng.standard_normal((len(tables), 4, 3, 3))
    noise = rng.standard_normal((len(tables), 4, 3, 3))
    rows = np.stack([rows.transition[i % rows.evaluations] for i, rows in enumerate(tables)])
    together = advance(rows, states, out, noise)
    for i in range(len(tables)):
        alone = advance(rows[[i]], states[[i]], out[[i]], noise[[i]])[0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-12, atol=1e-12)


def test_a_table_prints_its_rows() -> None:
    text = str(make("dpmpp_2m", 3, prediction_type="epsilon"))
    assert text.splitlines()[0] == (
        "dpmpp_2m / leading / epsilon: 3 steps, 3 evaluations, x starts at 1 * noise"
    )
    assert "+inf" in text or "inf" in text.splitlines()[-1]
    assert "h1" in text.splitlines()[3]
    assert len(text.splitlines()) == 6
