"""The step loop around a network in closed form: no weights, no runtime."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.errors import (
    CancelledError,
    ClosedError,
    DeadlineExceededError,
    ExecutionError,
    InvalidRequestError,
    OverloadedError,
)
from engine.lane import combine_guidance
from engine.loop import LoopConfig, StepLoop, Tick
from engine.rows import RowLimits
from engine.scheduler import TickPolicy
from engine.solvers import SOLVERS
from engine.trajectory import Blend, LaneKey, Trajectory, resume, table_digest
from engine.types import Image, SnapshotGrade
from tests.fake_clock import FakeClock
from tests.unit.fakes import (
    SHAPE,
    ClosedFormWalk,
    FixedTimes,
    Owner,
    owner_of,
    solver_table,
    trajectory,
)


def make_loop(
    walk: ClosedFormWalk | None = None,
    *,
    rows: int = 8,
    max_live: int = 64,
    max_resident_bytes: int = 2**30,
    clock: FakeClock | None = None,
    on_tick: Callable[[Tick], None] | None = None,
) -> StepLoop:
    return StepLoop(
        {"plan": walk or ClosedFormWalk()},
        TickPolicy(FixedTimes(rows=rows)),
        clock=clock or FakeClock(),
        config=LoopConfig(max_live=max_live, max_resident_bytes=max_resident_bytes),
        on_tick=on_tick,
    )


def finish(loop: StepLoop) -> None:
    while loop.tick():
        pass


def alone(item: Trajectory, walk: ClosedFormWalk | None = None) -> torch.Tensor:
    loop = make_loop(walk)
    loop.submit(item)
    finish(loop)
    latent = owner_of(item).latent
    assert latent is not None, owner_of(item).error
    return latent


def test_a_trajectory_takes_one_row_a_tick_and_ends_once() -> None:
    loop, item = make_loop(), trajectory("t")
    loop.submit(item)
    finish(loop)
    owner = owner_of(item)
    assert [event.step for event in owner.events] == [1, 2, 3, 4, 5]
    assert [event.log_snr for event in owner.events] == list(item.table.log_snr[1:])
    assert owner.endings == 1
    assert loop.live == 0


def test_the_latent_equals_the_table_applied_by_hand() -> None:
    item = trajectory("t", numbers=solver_table("dpmpp_2m", 7), guidance=3.0, tag=1.0)
    walk = ClosedFormWalk()
    state = torch.zeros(5, *SHAPE, dtype=torch.float64)
    state[0] = item.start
    for row in range(7):
        t = torch.full((2,), float(item.table.timesteps[row]))
        both = walk(state[0].float().expand(2, *SHAPE), t, item.conditioning.context, {})
        out = both[1] + 3.0 * (both[0] - both[1])
        columns = torch.cat([state, out[None].double(), torch.zeros(1, *SHAPE).double()])
        state = torch.einsum("ij,j...->i...", torch.tensor(item.table.transition[row]), columns)
    assert torch.allclose(alone(item).double(), state[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_does_not_depend_on_its_batch_mates(seed: int) -> None:
    """Solvers, steps, guidance, amplitude mixed; joining and leaving at random times."""
    chance = random.Random(seed)
    solvers = ["ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]

    def build(i: int) -> Trajectory:
        chance_i = random.Random(1000 * seed + i)
        return trajectory(
            f"t{i}",
            numbers=solver_table(chance_i.choice(solvers), chance_i.randint(1, 12)),
            guidance=chance_i.choice([1.0, 2.0, 7.5]),
            interval=chance_i.choice([(0.0, 1.0), (0.2, 0.8)]),
            tag=chance_i.random(),
            seed=i,
            scale=chance_i.choice([1.0, 1.0, 10.0]),
        )

    singles = [alone(build(i)) for i in range(12)]
    loop, waiting = make_loop(rows=7), [build(i) for i in range(12)]
    items = list(waiting)
    while waiting or loop.live:
        if waiting and chance.random() < 0.5:
            loop.submit(waiting.pop())
        loop.tick()
    for single, item in zip(singles, items, strict=True):
        latent = owner_of(item).latent
        assert latent is not None
        assert torch.linalg.norm(latent - single) <= 1e-5 * torch.linalg.norm(single)


def test_guidance_costs_two_rows_and_none_costs_one() -> None:
    walk = ClosedFormWalk()
    loop = make_loop(walk)
    loop.submit(trajectory("plain"))
    loop.submit(trajectory("guided", guidance=5.0))
    loop.submit(trajectory("first half", guidance=5.0, interval=(0.0, 0.5)))
    finish(loop)
    assert walk.batches == [5, 5, 5, 4, 4]


def test_a_tick_reports_members_rows_and_times() -> None:
    ticks: list[Tick] = []
    clock = FakeClock()
    loop = make_loop(ClosedFormWalk(clock), clock=clock, on_tick=ticks.append)
    loop.submit(trajectory("a", guidance=2.0))
    loop.tick()
    assert (ticks[0].members, ticks[0].rows) == (1, 2)
    assert ticks[0].walk_s == pytest.approx(0.1)


def test_cancel_takes_effect_before_the_next_step() -> None:
    loop, item = make_loop(), trajectory("t")
    loop.submit(item)
    loop.tick()
    loop.cancel("t")
    loop.tick()
    assert isinstance(owner_of(item).error, CancelledError)
    assert len(owner_of(item).events) == 1
    assert loop.live == 0
    loop.cancel("t")  # unknown by now: ignored
    assert not loop.tick()


def test_a_deadline_that_passes_ends_the_trajectory() -> None:
    clock = FakeClock()
    loop = make_loop(ClosedFormWalk(clock), clock=clock)
    item = trajectory("t", deadline_at_s=clock.now_s() + 0.25)
    loop.submit(item)
    finish(loop)
    assert isinstance(owner_of(item).error, DeadlineExceededError)
    assert "3 of 5" in str(owner_of(item).error)


@pytest.mark.parametrize("kind", ["raise", "nan"])
def test_a_failing_row_fails_alone(kind: str) -> None:
    walk = ClosedFormWalk()
    walk.poison[0.75] = kind
    loop = make_loop(walk)
    good = [trajectory(f"g{i}", seed=i) for i in range(3)]
    bad = trajectory("bad", tag=0.75)
    for item in (*good, bad):
        loop.submit(item)
    finish(loop)
    assert isinstance(owner_of(bad).error, ExecutionError)
    for i, item in enumerate(good):
        assert torch.equal(owner_of(item).latent, alone(trajectory(f"x{i}", seed=i)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["raise", "nan"])
def test_a_failure_that_does_not_repeat_costs_nobody_anything(kind: str) -> None:
    """The retry draws no noise twice, so even a stochastic solver's picture is the same."""
    walk = ClosedFormWalk()
    walk.poison[0.75] = kind
    walk.times = 1
    loop = make_loop(walk)
    numbers = solver_table("euler_ancestral", 6)
    items = [trajectory("bad", tag=0.75, numbers=numbers), trajectory("good", numbers=numbers)]
    for item in items:
        loop.submit(item)
    finish(loop)
    assert owner_of(items[0]).error is None
    expected = alone(trajectory("x", tag=0.75, numbers=numbers))
    latent = owner_of(items[0]).latent
    assert latent is not None
    assert torch.allclose(latent, expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_does_not_fit_its_lane_fails_alone() -> None:
    loop, good = make_loop(), trajectory("good")
    bad = trajectory("bad")
    bad.start = torch.zeros(4, 9, 9)
    loop.submit(good)
    loop.submit(bad)
    finish(loop)
    assert isinstance(owner_of(bad).error, ExecutionError)
    assert owner_of(good).latent is not None


def test_a_batch_that_is_out_of_memory_is_halved_and_the_next_ones_are_smaller() -> None:
    walk = ClosedFormWalk()
    walk.memory_rows = 4
    loop = make_loop(walk, rows=8)
    items = [trajectory(f"t{i}", seed=i, guidance=3.0) for i in range(4)]
    for item in items:
        loop.submit(item)
    finish(loop)
    assert walk.batches[:3] == [8, 4, 4]
    assert max(walk.batches[3:]) == 4
    for i, item in enumerate(items):
        expected = alone(trajectory(f"x{i}", seed=i, guidance=3.0))
        latent = owner_of(item).latent
        assert latent is not None
        assert torch.allclose(latent, expected, rtol=1e-5, atol=1e-6)


def test_a_lane_takes_no_larger_batches_than_its_graphs() -> None:
    walk = ClosedFormWalk(limits=RowLimits(most=3))
    loop = make_loop(walk, rows=8)
    items = [trajectory(f"t{i}", seed=i) for i in range(8)]
    for item in items:
        loop.submit(item)
    finish(loop)
    assert max(walk.batches) == 3
    assert all(owner_of(item).latent is not None for item in items)


def test_a_guided_step_runs_also_where_graphs_take_a_single_row() -> None:
    latent = alone(trajectory("t", guidance=3.0), ClosedFormWalk(limits=RowLimits(most=1)))
    assert torch.allclose(latent, alone(trajectory("u", guidance=3.0)), rtol=1e-5, atol=1e-6)


def test_resident_state_is_bounded_in_bytes_and_what_does_not_fit_is_refused_alone() -> None:
    slot_bytes = 4 * ((5 + 1) * 4 * 6 * 5 + 2 * 3 * 2)  # planes of the state, and the context
    loop = make_loop(max_resident_bytes=3 * slot_bytes + 1)
    items = [trajectory(f"t{i}") for i in range(4)]
    for item in items:
        loop.submit(item)
    loop.tick()
    assert isinstance(owner_of(items[3]).error, OverloadedError)
    finish(loop)
    assert all(owner_of(item).latent is not None for item in items[:3])
    loop.submit(trajectory("t3"))
    finish(loop)
    assert loop.live == 0


@pytest.mark.parametrize("first", [True, False])
def test_what_does_not_fit_its_lane_leaves_nothing_behind(first: bool) -> None:
    loop, bad = make_loop(max_live=1), trajectory("bad")
    bad.start = torch.zeros(4, 9, 9)
    if not first:
        loop.submit(trajectory("before"))
        finish(loop)
    loop.submit(bad)
    finish(loop)
    assert isinstance(owner_of(bad).error, ExecutionError)
    after = trajectory("after")
    loop.submit(after)
    finish(loop)
    assert owner_of(after).latent is not None


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"lcm", "tcd"}))
def test_a_full_snapshot_continues_bit_equal(solver: str) -> None:
    numbers = solver_table(solver, 8, SOLVERS[solver].schedules[0])
    whole = alone(trajectory("a", numbers=numbers, guidance=3.0))
    loop, item = make_loop(), trajectory("b", numbers=numbers, guidance=3.0)
    loop.submit(item)
    for _ in range(3):
        loop.tick()
    future = loop.snapshot("b")
    loop.tick()
    snapshot = future.result(0)
    assert snapshot.row == 3
    assert snapshot.log_snr == numbers.log_snr[3]
    again = resume(trajectory("c", numbers=numbers, guidance=3.0, seed=99), snapshot)
    assert torch.equal(alone(again), whole)


def test_a_snapshot_goes_on_only_where_it_was_taken() -> None:
    loop, item = make_loop(), trajectory("t")
    loop.submit(item)
    loop.tick()
    future = loop.snapshot("t")
    state = loop.snapshot("t", SnapshotGrade.STATE)
    missing = loop.snapshot("nobody")
    loop.tick()
    with pytest.raises(InvalidRequestError, match="nobody"):
        missing.result(0)
    assert state.result(0).state is None
    with pytest.raises(InvalidRequestError, match="full snapshot"):
        resume(trajectory("u"), state.result(0))
    with pytest.raises(InvalidRequestError, match="solver table"):
        resume(trajectory("u", numbers=solver_table("ddim", 9)), future.result(0))
    other = LaneKey("another plan", SHAPE, tokens=3)
    with pytest.raises(InvalidRequestError, match="another plan"):
        resume(trajectory("u", lane=other), future.result(0))
    assert table_digest(solver_table("ddim", 9)) != table_digest(solver_table("ddim", 5))


def test_previews_come_at_the_steps_asked_for_from_the_clean_prediction() -> None:
    seen: list[torch.Tensor] = []

    def preview(clean: torch.Tensor) -> Image:
        seen.append(clean)
        return np.zeros((2, 2, 3), np.uint8)

    loop = make_loop()
    numbers = solver_table("ddim", 6)
    item = trajectory("t", numbers=numbers, preview_every=2, preview=preview)
    loop.submit(item)
    finish(loop)
    with_preview = [e.step for e in owner_of(item).events if e.preview is not None]
    assert with_preview == [2, 4]  # the last step has the picture itself
    assert seen[0].shape == SHAPE


def test_inpainting_returns_the_kept_part_exactly() -> None:
    item = trajectory("t")
    mask = torch.zeros(1, *SHAPE[1:])
    mask[:, :, :2] = 1.0
    kept = torch.randn(SHAPE)
    item.blend = Blend(mask, kept, item.start.clone())
    latent = alone(item)
    assert torch.allclose(latent[:, :, 2:], kept[:, :, 2:], atol=1e-6)
    assert not torch.allclose(latent[:, :, :2], kept[:, :, :2], atol=1e-1)


def test_rescaled_guidance_equals_diffusers_and_touches_nobody_else() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    out = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    guided, scales = torch.tensor([0, 2]), torch.tensor([7.5, 3.0])
    rescale = torch.tensor([0.7, 0.0])
    plain = combine_guidance(out, guided, scales)
    result = combine_guidance(out, guided, scales, rescale)
    expected = rescale_noise_cfg(plain[:1], out[:1], guidance_rescale=0.7)
    torch.testing.assert_close(result[:1], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[1:], plain[1:])
    assert (result[0] - plain[0]).abs().max() > 0.1


def test_a_trajectory_is_rescaled_by_its_own_part() -> None:
    one = trajectory("one", guidance=7.5)
    one.guidance_rescale = 0.7
    mate = trajectory("mate", guidance=7.5)
    loop = make_loop()
    for item in (one, mate):
        loop.submit(item)
    finish(loop)
    plain = alone(trajectory("x", guidance=7.5))
    latents = [owner_of(item).latent for item in (one, mate)]
    assert latents[0] is not None
    assert latents[1] is not None
    assert torch.allclose(latents[1], plain, rtol=1e-5, atol=1e-6)
    assert (latents[0] - plain).abs().max() > 1e-2


def test_what_cannot_be_taken_is_refused_by_type() -> None:
    loop = make_loop(max_live=2)
    loop.submit(trajectory("a"))
    with pytest.raises(InvalidRequestError, match="live already"):
        loop.submit(trajectory("a"))
    with pytest.raises(InvalidRequestError, match="no network"):
        loop.submit(trajectory("x", lane=LaneKey("unknown", SHAPE, tokens=3)))
    loop.submit(trajectory("b"))
    with pytest.raises(OverloadedError, match="2"):
        loop.submit(trajectory("c"))
    finish(loop)
    loop.submit(trajectory("c"))


class TestThread:
    """The loop on its own thread."""

    def test_submit_and_cancel_from_many_threads(self) -> None:
        loop = make_loop(max_live=200)
        loop.start()
        items = [trajectory(f"t{i}", seed=i) for i in range(60)]

        def work(part: list[Trajectory]) -> None:
            for i, item in enumerate(part):
                loop.submit(item)
                if i % 3 == 0:
                    loop.cancel(item.id)

        threads = [threading.Thread(target=work, args=(items[i::6],)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loop.close(timeout_s=30.0)
        for item in items:
            owner = owner_of(item)
            assert owner.endings == 1
            assert owner.latent is not None or isinstance(owner.error, CancelledError)
        assert loop.live == 0

    def test_close_without_drain_fails_what_is_live(self) -> None:
        walk = ClosedFormWalk()
        walk.gate = threading.Event()
        loop, item = make_loop(walk), trajectory("t", numbers=solver_table("ddim", 50))
        loop.start()
        loop.submit(item)
        closer = threading.Thread(target=loop.close, kwargs={"drain": False})
        closer.start()
        walk.gate.set()
        closer.join(10.0)
        assert not closer.is_alive()
        assert isinstance(owner_of(item).error, ClosedError)
        with pytest.raises(ClosedError):
            loop.submit(trajectory("u"))

    def test_close_with_drain_finishes_what_is_live(self) -> None:
        loop, item = make_loop(), trajectory("t")
        loop.start()
        loop.submit(item)
        loop.close()
        assert owner_of(item).latent is not None

    def test_a_listener_that_raises_hurts_nobody_else(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        loop, good, bad = make_loop(), trajectory("good"), trajectory("bad")

        class Broken(Owner):
            def on_step(self, event: object) -> None:
                raise RuntimeError("full")

        bad.listener = Broken()
        loop.submit(good)
        loop.submit(bad)
        finish(loop)
        assert owner_of(good).latent is not None
        assert owner_of(bad).latent is not None
        assert "listener failed" in caplog.text

    def test_a_bug_in_a_tick_ends_every_wait(self, caplog: pytest.LogCaptureFixture) -> None:
        def broken(tick: Tick) -> None:
            raise RuntimeError("a bug")

        loop, item = make_loop(on_tick=broken), trajectory("t")
        loop.start()
        loop.submit(item)
        assert owner_of(item).ended.wait(10.0)
        assert isinstance(owner_of(item).error, ExecutionError)
        loop.close()
        assert "a tick failed" in caplog.text
