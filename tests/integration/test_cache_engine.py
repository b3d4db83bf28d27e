"""The noise cache in the whole engine: what a hit draws, what a miss leaves, and what off means."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cache.memory import MemoryNoiseCache
from engine.compile.plan import Plan
from engine.engine import Engine, EngineConfig
from engine.model import Model
from engine.ports import (
    CacheKey,
    Candidate,
    Embedding,
    JumpTable,
    NoiseCache,
    Offer,
    ReuseProfile,
    StateKind,
    StoredState,
    Wish,
)
from engine.reuse_noise import NoiseReuseConfig
from engine.runtime.base import Runtime
from engine.types import (
    CacheDirective,
    CacheMode,
    GenerateRequest,
    Picture,
    ReuseOutcome,
    Snapshot,
)

ANY = JumpTable(((-1.0, 0.5),))
NOISY = ReuseProfile(jumps=ANY, kind=StateKind.NOISY, fractions=(0.25, 0.5))
FINISHED = ReuseProfile(jumps=ANY, kind=StateKind.CLEAN, fractions=(1.0,))
APPROXIMATE = CacheDirective(mode=CacheMode.APPROXIMATE)


class WatchedCache(MemoryNoiseCache):
    """Lets a test wait until an offer has arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Semaphore(0)

    def offer(self, key: CacheKey, offer: Offer) -> bool:
        stored = super().offer(key, offer)
        self.arrived.release()
        return stored


class StuckCache(MemoryNoiseCache):
    """Does not answer before the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def nearest(
        self, key: CacheKey, embedding: Embedding, *, claim: str, limit: int
    ) -> Sequence[Candidate]:
        self.gate.wait(60.0)
        return []

    def offer(self, key: CacheKey, offer: Offer) -> bool:
        self.gate.wait(60.0)
        return False


class BrokenCache(MemoryNoiseCache):
    """Has a bug in everything."""

    def nearest(
        self, key: CacheKey, embedding: Embedding, *, claim: str, limit: int
    ) -> Sequence[Candidate]:
        raise RuntimeError("nearest")

    def fetch(self, key: CacheKey, wishes: Sequence[Wish], *, claim: str = "") -> StoredState:
        raise RuntimeError("fetch")

    def offer(self, key: CacheKey, offer: Offer) -> bool:
        raise RuntimeError("offer")


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tiny_plan: Callable[[str], Plan], cpu_runtime: Runtime) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(
        cache: NoiseCache | None = None, profile: ReuseProfile = NOISY, **dials: object
    ) -> Engine:
        reuse = NoiseReuseConfig(profile=profile, **{"budget_s": 5.0, **dials})  # type: ignore[arg-type]
        engine = Engine(config=EngineConfig(noise_reuse=reuse), noise_cache=cache)
        engine.load(Model.open(tiny_plan("text"), cpu_runtime))
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close(drain=False)


def request(prompt: str, seed: int | None = 1, **changes: object) -> GenerateRequest:
    values = {"steps": 8, "solver": "ddim", "cache": APPROXIMATE, **changes}
    return GenerateRequest(prompt=prompt, seed=seed, **values)  # type: ignore[arg-type]


def draw(engine: Engine, asked: GenerateRequest, tenant: str = "ada") -> Picture:
    return engine.submit(asked, tenant=tenant).result(60)


def stored(cache: WatchedCache) -> None:
    assert cache.arrived.acquire(timeout=30)


# ---------------------------------------------------------------------- off means exact


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral"])
def test_without_a_hit_pictures_are_those_of_an_engine_without_a_cache(
    make_engine: MakeEngine, solver: str
) -> None:
    """Off; at K = 0 with the cache full of what it would take; and on a first miss."""
    plain = make_engine()
    cache = WatchedCache()
    cached = make_engine(cache)
    asked = request("a dog", 5, solver=solver)
    expected = draw(plain, replace(asked, cache=None))
    missed = draw(cached, asked)
    stored(cache)
    nothing = replace(APPROXIMATE, max_jump=0.0)
    unlike = replace(APPROXIMATE, min_similarity=1.0)
    for same in (
        missed,
        draw(cached, replace(asked, cache=None)),  # a named seed
        draw(cached, replace(asked, cache=CacheDirective(mode=CacheMode.OFF))),
        draw(cached, replace(asked, cache=nothing), "bob"),
        draw(cached, replace(asked, cache=unlike)),
    ):
        assert torch.equal(same.latent, expected.latent)
        assert np.array_equal(same.image, expected.image)
        assert same.approximations == {}
        assert same.reuse is not None
        assert same.reuse.steps_skipped == 0
    assert expected.reuse is None
    assert missed.reuse is not None
    assert missed.reuse.outcome is ReuseOutcome.MISS


def test_a_named_seed_is_off_unless_it_asks_and_no_seed_is_on(make_engine: MakeEngine) -> None:
    cache = WatchedCache()
    engine = make_engine(cache)
    named = draw(engine, request("a dog", 5, cache=None))
    drawn = draw(engine, request("a dog", None, cache=None))
    assert named.reuse is not None
    assert drawn.reuse is not None
    assert (named.reuse.outcome, drawn.reuse.outcome) == (ReuseOutcome.OFF, ReuseOutcome.MISS)
    stored(cache)
    assert cache.statistics().entries == 1


# ---------------------------------------------------------------------- a hit


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_a_noisy_hit_goes_on_where_the_other_picture_was(
    make_engine: MakeEngine, solver: str
) -> None:
    """The same prompt from the stored state ends in the same picture, half the steps later.

    Up to half precision; a multistep solver also begins again at first order there.
    """
    cache = WatchedCache()
    engine = make_engine(cache, share_between_tenants=True)
    asked = request("a dog", 5, solver=solver)
    whole = draw(engine, asked, "ada")
    stored(cache)
    hit = draw(engine, replace(asked, seed=6), "bob")
    assert hit.reuse is not None
    assert hit.reuse.outcome is ReuseOutcome.HIT
    assert hit.reuse.similarity == pytest.approx(1.0, abs=1e-5)
    skipped = 6 if solver == "heun" else 4  # of Heun's 15 evaluations; 7 would halve a step
    assert hit.reuse.steps_skipped == whole.evaluations - hit.evaluations == skipped
    assert hit.approximations["noise_cache"] == f"{skipped} of {whole.evaluations} steps"
    assert (hit.seed, hit.steps) == (6, 8)
    apart = torch.linalg.norm(hit.latent - whole.latent) / torch.linalg.norm(whole.latent)
    assert apart < (0.1 if solver == "dpmpp_2m" else 5e-3)
    other_noise = draw(engine, replace(asked, seed=6, cache=None), "bob")
    distance = torch.linalg.norm(other_noise.latent - whole.latent)
    assert distance > 0.3 * torch.linalg.norm(whole.latent)


def test_a_hit_between_two_levels_gets_a_table_from_exactly_there(make_engine: MakeEngine) -> None:
    cache = WatchedCache()
    engine = make_engine(cache)
    draw(engine, request("a dog", 5))
    stored(cache)
    hit = draw(engine, request("a cat", 6, steps=11, solver="dpmpp_2m"))
    assert hit.reuse is not None
    assert hit.reuse.outcome is ReuseOutcome.HIT
    assert 1 <= hit.reuse.steps_skipped <= 5
    assert hit.evaluations == 11 - hit.reuse.steps_skipped


def test_no_two_pictures_of_a_prompt_start_from_the_same_noise(make_engine: MakeEngine) -> None:
    cache = WatchedCache()
    engine = make_engine(cache)
    for seed in (1, 2, 3):
        repeat = draw(engine, request("a dog", seed))
        assert repeat.reuse is not None
        assert repeat.reuse.outcome is ReuseOutcome.MISS
        stored(cache)
    sources = [draw(engine, request("a cat", seed)).reuse for seed in (4, 5, 6)]
    used = [reuse.source.partition(".")[0] for reuse in sources if reuse and reuse.source]
    assert len(used) == len(set(used)) == 3
    fourth = draw(engine, request("a cat", 7)).reuse
    assert fourth is not None
    assert fourth.outcome is ReuseOutcome.MISS


def test_a_clean_state_is_brought_to_the_level_with_the_requests_own_noise(
    make_engine: MakeEngine,
) -> None:
    cache = WatchedCache()
    engine = make_engine(cache, FINISHED)
    first = draw(engine, request("a dog", 1))
    stored(cache)
    hits = [draw(engine, request("a dog", seed)) for seed in (2, 3, 2)]
    for hit in hits:
        assert hit.reuse is not None
        assert (hit.reuse.outcome, hit.reuse.steps_skipped) == (ReuseOutcome.HIT, 4)
    assert torch.equal(hits[0].latent, hits[2].latent)
    assert not torch.allclose(hits[0].latent, hits[1].latent, atol=0.05)
    assert not torch.allclose(hits[0].latent, first.latent, atol=0.05)


def test_the_request_narrows_how_far_a_hit_may_jump(make_engine: MakeEngine) -> None:
    cache = WatchedCache()
    engine = make_engine(cache, FINISHED)
    draw(engine, request("a dog", 1))
    stored(cache)
    for share, skipped in ((0.25, 2), (0.3, 2), (1.0, 4)):
        hit = draw(engine, request("a dog", 2, cache=replace(APPROXIMATE, max_jump=share)))
        assert hit.reuse is not None
        assert hit.reuse.steps_skipped == skipped


def test_guidance_acts_in_the_same_part_of_the_schedule_after_a_hit(
    make_engine: MakeEngine,
) -> None:
    cache = WatchedCache()
    engine = make_engine(cache, FINISHED)
    late = {"guidance": 6.0, "guidance_interval": (0.75, 1.0)}
    draw(engine, request("a dog", 1, **late))
    stored(cache)
    handle = engine.submit(request("a dog", 2, **late), tenant="ada")
    rows = [event.batch_rows for event in handle.events()]
    assert rows == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "other",
    [
        {"negative_prompt": "blurry"},
        {"guidance": 9.0},
        {"width_px": 64},
        {"clip_skip": 1},
        {"guidance_rescale": 0.7},
    ],
    ids=["negative prompt", "guidance", "size", "clip skip", "rescale"],
)
def test_requests_that_differ_in_their_key_do_not_meet(
    make_engine: MakeEngine, other: dict[str, object]
) -> None:
    cache = WatchedCache()
    engine = make_engine(cache, FINISHED)
    draw(engine, request("a dog", 1))
    stored(cache)
    missed = draw(engine, request("a dog", 2, **other)).reuse
    stranger = draw(engine, request("a dog", 2), "bob").reuse
    assert missed is not None
    assert stranger is not None
    assert (missed.outcome, stranger.outcome) == (ReuseOutcome.MISS, ReuseOutcome.MISS)
    assert (missed.similarity, stranger.similarity) == (None, None)


def test_a_profile_measured_on_other_weights_is_not_used(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has looked at what such jumps do to these weights' pictures."""
    nowhere = ReuseProfile(jumps=JumpTable(()), kind=StateKind.CLEAN, fractions=(1.0,))
    skipped = []
    for profile in (FINISHED, replace(FINISHED, checkpoint="other weights")):
        cache = WatchedCache()
        engine = make_engine(cache, nowhere, profiles={"tiny-text": profile})
        draw(engine, request("a dog", 1))
        stored(cache)
        hits = [draw(engine, request("a dog", seed)).reuse for seed in (2, 3)]
        skipped.append([reuse.steps_skipped for reuse in hits if reuse is not None])
    assert skipped == [[4, 4], [0, 0]]
    (warning,) = (record.message for record in caplog.records if "other weights" in record.message)
    assert "darkroom cache calibrate" in warning


# ---------------------------------------------------------------------- exact


def test_exact_gives_the_identical_picture_without_a_step(make_engine: MakeEngine) -> None:
    cache = WatchedCache()
    engine = make_engine(cache)
    exact = CacheDirective(mode=CacheMode.EXACT)
    asked = request("a dog", 5, cache=exact, solver="euler_ancestral")
    first = draw(engine, asked)
    stored(cache)
    handle = engine.submit(replace(asked, priority=3, preview_every=2), tenant="ada")
    assert list(handle.events()) == []
    again = handle.result(60)
    assert np.array_equal(again.image, first.image)
    assert torch.equal(again.latent, first.latent)
    assert again.reuse is not None
    assert (again.reuse.outcome, again.reuse.steps_skipped) == (ReuseOutcome.HIT, 8)
    assert again.approximations == {}
    changes: list[dict[str, Any]] = [
        {"seed": 6},
        {"steps": 9},
        {"guidance": 4.5},
        {"prompt": "a dog."},
        {"clip_skip": 1},
        {"guidance_rescale": 0.7},
        {"guidance_rescale": 0.7000001},
    ]
    for change in changes:
        other = draw(engine, replace(asked, **change)).reuse
        assert other is not None
        assert other.outcome is ReuseOutcome.MISS
    approximate = draw(engine, replace(asked, cache=APPROXIMATE)).reuse
    assert approximate is not None
    assert approximate.outcome is ReuseOutcome.MISS


# ---------------------------------------------------------------------- others bypass, faults


def test_other_modes_bypass_the_cache_and_say_so(make_engine: MakeEngine) -> None:
    engine = make_engine(WatchedCache())
    photo = np.full((32, 32, 3), 90, np.uint8)
    reuse = draw(engine, request("a dog", 1, image=photo)).reuse
    assert reuse is not None
    assert (reuse.outcome, reuse.note) == (
        ReuseOutcome.BYPASSED,
        "only text to image uses the noise cache",
    )
    unseeded = draw(engine, request("a dog", None, cache=CacheDirective(mode=CacheMode.EXACT)))
    assert unseeded.reuse is not None
    assert "seed" in unseeded.reuse.note


def test_a_cache_that_does_not_answer_is_a_counted_miss(make_engine: MakeEngine) -> None:
    cache = StuckCache()
    engine = make_engine(cache, budget_s=0.01, max_pending_offers=2)
    try:
        outcomes = [draw(engine, request("a dog", seed)).reuse for seed in range(8)]
        assert {reuse.outcome for reuse in outcomes if reuse} == {ReuseOutcome.SLOW}
        statistics = engine.reuse_statistics()
        assert statistics is not None
        assert statistics.outcomes == {ReuseOutcome.SLOW: 8}
        assert statistics.offers_dropped == 5  # one is being written, two wait
    finally:
        cache.gate.set()


def test_a_cache_with_a_bug_is_a_counted_miss(make_engine: MakeEngine) -> None:
    engine = make_engine(BrokenCache())
    for mode in (CacheMode.APPROXIMATE, CacheMode.EXACT):
        reuse = draw(engine, request("a dog", 1, cache=CacheDirective(mode=mode))).reuse
        assert reuse is not None
        assert reuse.outcome is ReuseOutcome.FAILED


def test_what_the_cache_was_worth_is_counted(make_engine: MakeEngine) -> None:
    cache = WatchedCache()
    engine = make_engine(cache, FINISHED)
    draw(engine, request("a dog", 1))
    stored(cache)
    picture = draw(engine, request("a dog", 2))
    assert picture.timings.cache_s > 0
    statistics = engine.reuse_statistics()
    assert statistics is not None
    assert statistics.outcomes == {ReuseOutcome.MISS: 1, ReuseOutcome.HIT: 1}
    assert (statistics.steps_asked, statistics.steps_saved) == (16, 4)
    assert statistics.hits_by_jump[5] == sum(statistics.hits_by_jump) == 1
    assert statistics.looks_by_similarity[-1] == sum(statistics.looks_by_similarity) == 1
    assert (statistics.offers_stored, statistics.offers_dropped) == (1, 0)


# ---------------------------------------------------------------------- with the rest


def test_hits_share_ticks_with_others_and_change_nothing_for_them(make_engine: MakeEngine) -> None:
    cache = WatchedCache()
    engine = make_engine(cache, FINISHED)
    draw(engine, request("a dog", 1))
    stored(cache)
    asked = [
        request("a dog", 2),
        request("a dog", 3, solver="dpmpp_2m_sde", steps=5),
        request("a fish", 4, cache=None, solver="unipc"),
        request("a dog", 5, solver="heun"),
    ]
    alone = [draw(engine, item).latent for item in asked]
    handles = [engine.submit(item, tenant="ada") for item in asked]
    for single, handle in zip(alone, handles, strict=True):
        together = handle.result(60).latent
        assert torch.linalg.norm(together - single) <= 1e-5 * torch.linalg.norm(single)


def test_a_hit_goes_on_elsewhere_from_its_snapshot(make_engine: MakeEngine) -> None:
    """The other engine has another cache: where the trajectory entered travels with it."""
    cache = WatchedCache()
    here, there = make_engine(cache, FINISHED), make_engine()
    draw(here, request("a dog", 1))
    stored(cache)
    asked = request("a dog", 2, solver="dpmpp_2m", steps=16)
    whole = draw(here, asked)
    taken: list[Future[Snapshot]] = []

    def second_step(event: object) -> None:
        if len(taken) < 1:
            taken.append(here.snapshot("moving"))

    handle = here.submit(asked, tenant="ada", request_id="moving", on_event=second_step)
    assert torch.equal(handle.result(60).latent, whole.latent)
    moved = there.submit(asked, snapshot=taken[0].result(60)).result(60)
    assert torch.equal(moved.latent, whole.latent)
    assert moved.reuse is not None
    assert (moved.reuse.outcome, moved.reuse.steps_skipped) == (ReuseOutcome.HIT, 8)
