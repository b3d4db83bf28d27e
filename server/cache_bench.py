"""Draws pictures from chosen sources on a real engine: the ``generate`` of a calibration."""

# ruff: noqa: ARG002  (the shelf has the arguments of the protocol)
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cache.calibration import Draw
from cache.embedding import embed
from engine.engine import Engine, EngineConfig
from engine.handle import Handle
from engine.model import Model
from engine.noise_key import claim_of
from engine.ports import (
    CacheKey,
    CacheStatistics,
    Candidate,
    Embedding,
    JumpTable,
    Offer,
    ReuseProfile,
    StateRef,
    StoredState,
    Wish,
)
from engine.reuse_noise import NoiseReuseConfig
from engine.types import (
    CacheDirective,
    CacheMode,
    CacheScope,
    CacheShare,
    GenerateRequest,
    Image,
    Picture,
)

_WHATEVER = JumpTable(((-1.0, 0.99),))
_OFF = CacheDirective(mode=CacheMode.OFF)
_BATCH = 64


class Shelf:
    """A noise cache that finds exactly what it was told to, and keeps what it is offered by claim.

    One thread submits: what :meth:`show` chose is what the next request finds.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Offer] = {}
        self._shown: Offer | None = None
        self._arrived = threading.Condition()

    def show(self, claim: str | None) -> None:
        """Let the next request find the states that this claim has left; None for none."""
        self._shown = None if claim is None else self._kept[claim]

    def wait(self, claim: str) -> None:
        """Wait until the claim's states are here."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: claim in self._kept, timeout=600.0):
                raise TimeoutError("a source's states did not arrive")

    def has(self, claim: str) -> bool:
        """Whether the claim's states are here."""
        return claim in self._kept

    def start(self) -> None:
        """Nothing goes on in the background."""

    def embed(self, context: npt.NDArray[np.float32]) -> Embedding:
        """As every cache does."""
        return embed(context)

    def nearest(
        self, key: CacheKey, embedding: Embedding, *, claim: str, limit: int
    ) -> Sequence[Candidate]:
        """What is shown, as similar as can be."""
        if self._shown is None:
            return []
        refs = tuple(StateRef(s.id, s.kind, s.log_snr) for s, _ in self._shown.states)
        return [Candidate(self._shown.entry, 1.0, refs)]

    def fetch(
        self, key: CacheKey, wishes: Sequence[Wish], *, claim: str = ""
    ) -> StoredState | None:
        """The first wish."""
        assert self._shown is not None
        return {state.id: state for state, _ in self._shown.states}[wishes[0].state]

    def offer(self, key: CacheKey, offer: Offer) -> bool:
        """Keep it."""
        with self._arrived:
            self._kept[offer.claim] = offer
            self._arrived.notify_all()
        return True

    def statistics(self) -> CacheStatistics:
        """Entries only."""
        return CacheStatistics(backend="shelf", entries=len(self._kept))

    def shares(self, scope: CacheScope, *, best: int = 0) -> Sequence[CacheShare]:
        """None: the states of a calibration are nobody's."""
        return ()

    def clear(self, scope: CacheScope) -> Sequence[CacheShare]:
        """Forget all, which was nobody's."""
        self._kept.clear()
        return ()

    def close(self) -> None:
        """Nothing to let go of."""


class Bench:
    """One model under one kind of state. :meth:`generate` is what a calibration takes.

    Args:
        base: what all requests share: steps, solver, guidance.
        on_drawn: told after every picture.
    """

    def __init__(
        self,
        model: Model,
        profile: ReuseProfile,
        base: GenerateRequest,
        *,
        on_drawn: Callable[[], None] = lambda: None,
    ) -> None:
        self._base = base
        self._shelf = Shelf()
        self._on_drawn = on_drawn
        reuse = NoiseReuseConfig(profile=replace(profile, jumps=_WHATEVER), budget_s=60.0)
        self._engine = Engine(
            device=model.device,
            config=EngineConfig(noise_reuse=reuse),
            noise_cache=self._shelf,
        )
        self._engine.load(model)
        self._engine.start()

    def generate(self, draws: Sequence[Draw]) -> list[Image]:
        """The pictures, in order; sources that are not there yet are drawn first."""
        pictures: list[Image] = []
        for begin in range(0, len(draws), _BATCH):
            pictures += self._batch(draws[begin : begin + _BATCH])
        return pictures

    def close(self) -> None:
        """Stop the engine; the model stays open."""
        self._engine.close(close_models=False)

    def _batch(self, draws: Sequence[Draw]) -> list[Image]:
        sources = {draw.source for draw in draws if draw.source is not None}
        missing = sorted(s for s in sources if not self._shelf.has(_claim(s)))
        self._shelf.show(None)
        for handle in [
            self._engine.submit(self._request(prompt, seed, 1.0), tenant=_tenant(seed))
            for prompt, seed in missing
        ]:
            handle.result()
            self._on_drawn()
        for source in missing:
            self._shelf.wait(_claim(source))
        pictures = [handle.result() for handle in [self._submit(draw) for draw in draws]]
        for draw, picture in zip(draws, pictures, strict=True):
            _check(draw, picture)
            self._on_drawn()
        return [picture.image for picture in pictures]

    def _submit(self, draw: Draw) -> Handle:
        if draw.source is None:
            self._shelf.show(None)
            steps = self._base.steps - int(draw.share * self._base.steps + 1e-9)
            plain = self._request(draw.prompt, draw.seed, 0.0)
            return self._engine.submit(replace(plain, steps=steps, cache=_OFF))
        self._shelf.show(_claim(draw.source))
        # Another tenant than the sources', so that its own states do not take their place.
        return self._engine.submit(self._request(draw.prompt, draw.seed, draw.share), tenant="draw")

    def _request(self, prompt: str, seed: int, share: float) -> GenerateRequest:
        directive = CacheDirective(mode=CacheMode.APPROXIMATE, max_jump=share)
        return replace(self._base, prompt=prompt, seed=seed, cache=directive)


def _check(draw: Draw, picture: Picture) -> None:
    """A picture that did not start where it should would be measured as if it had."""
    skipped = picture.reuse.steps_skipped if picture.reuse is not None else 0
    if (draw.source is not None and draw.share > 0) != (skipped > 0):
        raise RuntimeError(f"asked to skip {draw.share:.0%} of the steps, {skipped} were skipped")


def _tenant(seed: int) -> str:
    return f"source {seed}"


def _claim(source: tuple[str, int]) -> str:
    prompt, seed = source
    return claim_of(_tenant(seed), prompt)
