"""Keys, states and offers for tests of the noise cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache.accounting import entry_bytes, state_bytes
from cache.codec import encode
from cache.embedding import DIMENSIONS, unit
from cache.index import state_id
from engine.ports import CacheKey, Embedding, Offer, StateKind, StoredState

SHAPE = (4, 6, 5)


def key(tenant: str | None = "ada", **changes: object) -> CacheKey:
    values: dict[str, object] = {
        "tenant": tenant,
        "checkpoint": "weights",
        "noise_schedule": "betas",
        "latent_shape": SHAPE,
        "negative_prompt": "",
        "guidance": "3:0.0-1.0",
        "conditions": "",
        **changes,
    }
    return CacheKey(**values)  # type: ignore[arg-type]


def prompt(number: int, towards: int | None = None, cosine: float = 0.0) -> Embedding:
    """A random unit vector; with ``towards``, one of that cosine to another prompt's."""
    own = unit(np.random.default_rng(number).standard_normal(DIMENSIONS))
    if towards is None:
        return own
    other = prompt(towards)
    apart = unit(own - np.dot(own, other) * other)
    return unit(cosine * other + np.sqrt(1.0 - cosine**2) * apart)


def latent(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    values = np.random.default_rng(number).standard_normal(SHAPE)
    return values.astype(np.float16).astype(np.float32)  # what half precision holds


def offer(
    number: int,
    *,
    kind: StateKind = StateKind.CLEAN,
    levels: Sequence[float] = (-2.0, -1.0),
    saved: Sequence[int] = (2, 4),
    embedding: Embedding | None = None,
    claim: str = "",
) -> Offer:
    """The offer of picture ``number``: entry ``e<number>``, states ``e<number>.0``, ``.1`` …"""
    entry = f"e{number}"
    states = tuple(
        (StoredState(state_id(entry, i), kind, level, latent(100 * number + i)), steps)
        for i, (level, steps) in enumerate(zip(levels, saved, strict=True))
    )
    return Offer(entry, prompt(number) if embedding is None else embedding, claim, states)


def charged_bytes(offered: Offer) -> int:
    """What an offer is charged, whichever store takes it."""
    exclusive = any(state.kind is StateKind.NOISY for state, _ in offered.states)
    return entry_bytes(offered.embedding, exclusive=exclusive) + sum(
        state_bytes(encode(state)) for state, _ in offered.states
    )
