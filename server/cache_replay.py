"""Traces through the noise cache: with pictures on a real engine, or with the cache alone.

Which states a request may start from, which are kept and which go does not depend on what is in
them. A replay without pictures therefore tells the steps saved of any policy at any size, for the
price of one text encoding per prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cache.memory import MemoryNoiseCache
from cache.policy import EvictionPolicy
from cache.traces import Arrival
from engine.engine import Engine, EngineConfig
from engine.handle import Handle
from engine.model import Model
from engine.noise_entry import row_of, ways_in
from engine.noise_key import claim_of, key_of
from engine.ports import Embedding, Offer, ReuseProfile, StateKind, StoredState
from engine.prepare import encode, resolve
from engine.reuse_noise import NoiseReuseConfig
from engine.types import CacheDirective, CacheMode, GenerateRequest, Picture

TENANT = "trace"
_WITH = CacheDirective(mode=CacheMode.APPROXIMATE)
_WITHOUT = CacheDirective(mode=CacheMode.OFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay saved."""

    requests: int
    hits: int
    steps_asked: int
    steps_saved: int
    most_bytes: int
    evicted: int

    @property
    def saved(self) -> float:
        """Share of all steps."""
        return self.steps_saved / self.steps_asked


def embed_prompts(trace: Sequence[Arrival], model: Model) -> dict[str, Embedding]:
    """The embedding of every prompt of a trace."""
    cache = MemoryNoiseCache()
    prompts = dict.fromkeys(arrival.prompt for arrival in trace)
    return {prompt: cache.embed(_context(prompt, model)) for prompt in prompts}


def simulate(
    trace: Sequence[Arrival],
    embeddings: Mapping[str, Embedding],
    model: Model,
    base: GenerateRequest,
    profile: ReuseProfile,
    *,
    limit_bytes: int,
    policy: EvictionPolicy,
    duplicate_similarity: float = NoiseReuseConfig().duplicate_similarity,
) -> Replayed:
    """Replay a trace with the cache alone: no picture is drawn, and states are zeros."""
    resolved = resolve(base, model)
    levels = resolved.table.log_snr
    key = key_of(resolved, model, TENANT)
    blank = np.zeros(key.latent_shape, dtype=np.float32)
    steps = resolved.table.evaluations
    typical = max(1, int(steps * max((share for _, share in profile.jumps.steps), default=0.0)))
    now_s = 0.0
    cache = MemoryNoiseCache(limit_bytes=limit_bytes, policy=policy, now_s=lambda: now_s)
    hits = saved = most_bytes = 0
    for number, arrival in enumerate(trace):
        now_s = arrival.at_s
        embedding, claim = embeddings[arrival.prompt], claim_of(TENANT, arrival.prompt)
        found = cache.nearest(key, embedding, claim=claim, limit=NoiseReuseConfig().candidates)
        wishes = [way.wish for way in ways_in(found, levels, profile, _WITH)]
        state = cache.fetch(key, wishes, claim=claim)
        skipped = 0
        if state is not None:
            skipped = next(wish.steps_saved for wish in wishes if wish.state == state.id)
            hits, saved = hits + 1, saved + skipped
        if profile.kind is StateKind.NOISY:
            stores = state is None
        else:
            stores = not found or found[0].similarity < duplicate_similarity
        rows = [row for share in profile.fractions if (row := row_of(share, levels)) > skipped]
        if stores and rows:
            entry = f"{number:032x}"
            states = tuple(
                (
                    StoredState(f"{entry}.{i}", profile.kind, float(levels[row]), blank),
                    min(row, typical),
                )
                for i, row in enumerate(rows)
            )
            cache.offer(key, Offer(entry, embedding, claim, states))
            most_bytes = max(most_bytes, cache.statistics().size_bytes)
    return Replayed(
        requests=len(trace),
        hits=hits,
        steps_asked=steps * len(trace),
        steps_saved=saved,
        most_bytes=most_bytes,
        evicted=cache.statistics().evicted,
    )


def draw_trace(
    trace: Sequence[Arrival],
    model: Model,
    base: GenerateRequest,
    profile: ReuseProfile | None,
    *,
    limit_bytes: int,
    policy: EvictionPolicy,
    at_once: int = 8,
    on_drawn: Callable[[int, Picture], None] = lambda _number, _picture: None,
) -> Replayed:
    """Replay a trace on a real engine, ``at_once`` requests at a time, as fast as it goes.

    Scores age by the trace's clock. Request i has seed i. Without a profile the cache is off.
    """
    now_s = 0.0
    cache = MemoryNoiseCache(limit_bytes=limit_bytes, policy=policy, now_s=lambda: now_s)
    reuse = NoiseReuseConfig(profile=profile or ReuseProfile(), budget_s=5.0)
    engine = Engine(device=model.device, config=EngineConfig(noise_reuse=reuse), noise_cache=cache)
    engine.load(model)
    engine.start()
    running: deque[tuple[int, Handle]] = deque()
    most_bytes = 0

    def take_first() -> None:
        number, handle = running.popleft()
        on_drawn(number, handle.result())

    try:
        for number, arrival in enumerate(trace):
            if len(running) == at_once:
                take_first()
            now_s = arrival.at_s
            directive = _WITHOUT if profile is None else _WITH
            asked = replace(base, prompt=arrival.prompt, seed=number, cache=directive)
            running.append((number, engine.submit(asked, tenant=TENANT)))
            most_bytes = max(most_bytes, cache.statistics().size_bytes)
        while running:
            take_first()
    finally:
        engine.close(close_models=False)
    counts = engine.reuse_statistics()
    assert counts is not None
    return Replayed(
        requests=len(trace),
        hits=sum(counts.hits_by_jump),
        steps_asked=counts.steps_asked,
        steps_saved=counts.steps_saved,
        most_bytes=most_bytes,
        evicted=cache.statistics().evicted,
    )


def _context(prompt: str, model: Model) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    resolved = resolve(GenerateRequest(prompt=prompt, seed=0, guidance=1.0), model)
    context = encode(resolved, model).conditioning.context[0]
    return np.asarray(context.numpy(), dtype=np.float32)
