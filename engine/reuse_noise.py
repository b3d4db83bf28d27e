"""Approximate caching in the engine: where a request enters, and what it leaves for others.

After NIRVANA (Agarwal et al., NSDI 2024), with states labelled by their noise level instead of a
step: a hit is a trajectory whose solver table begins at the stored level, whatever solver and steps
the state came from. Off means exact: without a hit nothing of a picture changes, for states are
copied in passing and a request draws the same numbers either way.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from engine.errors import InvalidRequestError
from engine.model import Model
from engine.noise_entry import Way, row_of, ways_in
from engine.noise_io import Looker, OfferWriter, SlowCacheError
from engine.noise_key import claim_of, exact_id, key_of
from engine.noise_statistics import ReuseCounts, ReuseStatistics
from engine.ports import (
    CacheKey,
    Clock,
    Embedding,
    NoiseCache,
    Offer,
    ReuseProfile,
    StateKind,
    StoredState,
    SystemClock,
    Wish,
)
from engine.prepare import Reentry, Resolved, enter_at
from engine.trajectory import Keep
from engine.types import CacheDirective, CacheMode, Reuse, ReuseOutcome, Snapshot

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseReuseConfig:
    """Dials and bounds of an engine's use of its cache.

    Attributes:
        profiles: of models by the name of their checkpoint, each for the weights that it was
            measured on; other names and other weights use ``profile``.
        share_between_tenants: off by default: who shares states with strangers can be asked, by
            similar prompts, what they have drawn.
        budget_s: how long a request waits for the cache; what takes longer is a counted miss.
        candidates: closest entries to choose from.
        duplicate_similarity: a prompt this close to a ``CLEAN`` entry stores nothing new.
        max_pending_offers: beyond it, offers are dropped and counted.
    """

    profile: ReuseProfile = field(default_factory=ReuseProfile)
    profiles: Mapping[str, ReuseProfile] = field(default_factory=dict)
    share_between_tenants: bool = False
    budget_s: float = 0.05
    candidates: int = 8
    duplicate_similarity: float = 0.999
    max_pending_offers: int = 64

    def __post_init__(self) -> None:
        if not (self.budget_s > 0 and self.candidates >= 1 and self.max_pending_offers >= 1):
            raise InvalidRequestError(
                "budget_s must be above 0; candidates and max_pending_offers 1 or more"
            )


@dataclass(frozen=True, slots=True)
class Visit:
    """What came of a request's look into the cache.

    Attributes:
        resolved: the request; with a reentry, its table begins at that level.
        reuse: to be told; None on an engine without a cache.
        reentry: where its trajectory enters; None to start from noise.
        final: its finished latent, (channels, height, width), where the very request was stored.
        keep: which states to copy in passing, and who takes them.
    """

    resolved: Resolved
    reuse: Reuse | None = None
    reentry: Reentry | None = None
    final: torch.Tensor | None = None
    keep: Keep | None = None

    @property
    def approximations(self) -> Mapping[str, str]:
        """A reentry is an approximation, with its jump; an exact hit is none."""
        if self.reentry is None or self.reuse is None:
            return {}
        left = self.resolved.table.evaluations
        steps = self.reuse.steps_skipped + left
        return {"noise_cache": f"{self.reuse.steps_skipped} of {steps} steps"}


def continued(snapshot: Snapshot, resolved: Resolved, model: Model) -> Visit:
    """The visit of a trajectory that another engine has begun: where that one entered, so does it.

    Nothing is stored of it: the states that it had passed are gone.
    """
    if snapshot.entered_at is None:
        return Visit(resolved)
    entered = enter_at(resolved, model, snapshot.entered_at)
    reuse = Reuse(
        outcome=ReuseOutcome.HIT,
        mode=CacheMode.APPROXIMATE,
        steps_skipped=resolved.table.evaluations - entered.table.evaluations,
        log_snr=snapshot.entered_at,
        note="entered before it moved here",
    )
    return Visit(entered, reuse, reentry=Reentry(snapshot.x, snapshot.entered_at, noisy=True))


@dataclass(frozen=True, slots=True)
class _Found:
    """What a look found: the closest entry's similarity, a way in, and its state."""

    closest: float | None = None
    way: Way | None = None
    state: StoredState | None = None


_NOTHING = _Found()


class NoiseReuse:
    """One engine's side of its noise cache. Safe from any thread. The cache stays the caller's."""

    def __init__(
        self,
        cache: NoiseCache,
        config: NoiseReuseConfig | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self._cache = cache
        self._config = config or NoiseReuseConfig()
        self._counts = ReuseCounts()
        self._stale: set[str] = set()  # models that were warned about
        self._looker = Looker(self._config.budget_s)
        self._writer = OfferWriter(
            cache,
            max_pending=self._config.max_pending_offers,
            clock=clock or SystemClock(),
            on_written=self._counts.written,
        )

    def start(self) -> None:
        """Start the writer, and what the cache does in the background; its owner closes it."""
        self._cache.start()
        self._writer.start()

    def close(self) -> None:
        """Write what is queued and stop."""
        self._looker.close()
        self._writer.close()

    def statistics(self) -> ReuseStatistics:
        """What the cache was worth so far."""
        return self._counts.statistics()

    def visit(self, resolved: Resolved, context: torch.Tensor, model: Model, tenant: str) -> Visit:
        """Look for a state to start from, within the time budget.

        Args:
            context: (tokens, width) conditioning of the prompt.
        """
        directive = directive_of(resolved)
        if note := _bypass(resolved, directive):
            reuse = Reuse(outcome=ReuseOutcome.BYPASSED, mode=directive.mode, note=note)
            visit = Visit(resolved, reuse)
        elif directive.mode is CacheMode.OFF:
            visit = Visit(resolved, Reuse(outcome=ReuseOutcome.OFF))
        else:
            visit = self._visit(resolved, directive, context, model, tenant)
        assert visit.reuse is not None
        self._counts.visited(visit.reuse, resolved.table.evaluations)
        return visit

    def _visit(
        self,
        resolved: Resolved,
        directive: CacheDirective,
        context: torch.Tensor,
        model: Model,
        tenant: str,
    ) -> Visit:
        owner = None if self._config.share_between_tenants else tenant
        key = key_of(resolved, model, owner)
        if directive.mode is CacheMode.EXACT:
            return self._visit_exact(resolved, model, key)
        request = _Request(
            resolved,
            directive,
            self._profile(model),
            key,
            claim_of(tenant, resolved.request.prompt),
            self._cache.embed(context.numpy()),
        )
        return self._visit_approximate(request, model)

    def _profile(self, model: Model) -> ReuseProfile:
        found = self._config.profiles.get(model.spec.name)
        if found is None or found.checkpoint in (None, model.spec.fingerprint):
            return found or self._config.profile
        if model.spec.name not in self._stale:
            self._stale.add(model.spec.name)
            _log.warning(
                "the noise cache's profile of %s was measured on other weights and is not used:"
                " run `darkroom cache calibrate`",
                model.spec.name,
            )
        return self._config.profile

    # ------------------------------------------------------------------ exact

    def _visit_exact(self, resolved: Resolved, model: Model, key: CacheKey) -> Visit:
        entry = exact_id(resolved, model)
        state_id = f"{entry}.0"
        steps = resolved.table.evaluations
        outcome = ReuseOutcome.MISS
        try:
            state = self._looker.look(lambda: self._cache.fetch(key, [Wish(state_id, steps)]))
        except Exception as error:
            state, outcome = None, _failure(error)
        if state is not None and state.latent.shape == key.latent_shape:
            reuse = Reuse(
                outcome=ReuseOutcome.HIT,
                mode=CacheMode.EXACT,
                source=state.id,
                similarity=1.0,
                steps_skipped=steps,
            )
            return Visit(resolved, reuse, final=torch.from_numpy(state.latent))

        def take(snapshot: Snapshot) -> None:
            stored = StoredState(state_id, StateKind.FINAL, snapshot.log_snr, snapshot.x.numpy())
            self._put(key, Offer(entry, None, "", ((stored, steps),)))

        reuse = Reuse(outcome=outcome, mode=CacheMode.EXACT)
        return Visit(resolved, reuse, keep=Keep(frozenset({steps}), take))

    # ------------------------------------------------------------------ approximate

    def _visit_approximate(self, request: _Request, model: Model) -> Visit:
        """Find a state and enter at its level; whatever fails on the way is a counted miss."""
        outcome, found, entered = ReuseOutcome.MISS, _NOTHING, request.resolved
        if request.directive.max_jump > 0:
            try:
                found = self._looker.look(lambda: self._find(request))
                if found.way is not None:
                    entered = enter_at(request.resolved, model, found.way.log_snr)
                    outcome = ReuseOutcome.HIT
            except Exception as error:
                outcome = _failure(error)
        self._counts.compared(found.closest)
        way, state = found.way, found.state
        if outcome is not ReuseOutcome.HIT or way is None or state is None:
            reuse = Reuse(outcome=outcome, mode=CacheMode.APPROXIMATE, similarity=found.closest)
            return Visit(request.resolved, reuse, keep=self._keep(request, 0, found.closest))
        skipped = request.resolved.table.evaluations - entered.table.evaluations
        reuse = Reuse(
            outcome=outcome,
            mode=CacheMode.APPROXIMATE,
            source=state.id,
            similarity=way.similarity,
            steps_skipped=skipped,
            log_snr=way.log_snr,
        )
        noisy = state.kind is StateKind.NOISY
        return Visit(
            entered,
            reuse,
            reentry=Reentry(torch.from_numpy(state.latent), way.log_snr, noisy=noisy),
            # What follows from another picture's noise is that picture's: it is stored already.
            keep=None if noisy else self._keep(request, skipped, found.closest),
        )

    def _find(self, request: _Request) -> _Found:
        """The best state that is there. On a look's thread."""
        candidates = self._cache.nearest(
            request.key, request.embedding, claim=request.claim, limit=self._config.candidates
        )
        if not candidates:
            return _NOTHING
        closest = candidates[0].similarity
        levels = request.resolved.table.log_snr
        ways = ways_in(candidates, levels, request.profile, request.directive)
        wishes = [way.wish for way in ways]
        state = self._cache.fetch(request.key, wishes, claim=request.claim) if ways else None
        # A foreign value under our id could have any shape.
        if state is None or state.latent.shape != request.key.latent_shape:
            return _Found(closest)
        return _Found(closest, next(way for way in ways if way.wish.state == state.id), state)

    def _keep(self, request: _Request, skipped: int, closest: float | None) -> Keep | None:
        """States to copy of a trajectory that enters ``skipped`` evaluations late."""
        profile, levels = request.profile, request.resolved.table.log_snr
        known = closest is not None and closest >= self._config.duplicate_similarity
        if profile.kind is StateKind.CLEAN and known:
            return None
        steps = len(levels) - 1
        typical = max(1, int(steps * max((share for _, share in profile.jumps.steps), default=0)))
        saved = {}  # by row of the table that the trajectory will have
        for share in profile.fractions:
            row = row_of(share, levels)
            if row > skipped and (profile.kind is StateKind.CLEAN or row < steps):
                saved[row - skipped] = min(row, typical)
        if not saved:
            return None
        collected: list[tuple[StoredState, int]] = []
        entry = uuid.uuid4().hex

        def take(snapshot: Snapshot) -> None:
            latent = snapshot.x if profile.kind is StateKind.NOISY else snapshot.clean
            assert latent is not None
            id_ = f"{entry}.{len(collected)}"
            row = sorted(saved)[len(collected)]
            state = StoredState(id_, profile.kind, snapshot.log_snr, latent.numpy())
            collected.append((state, saved[row]))
            if len(collected) == len(saved):
                self._put(
                    request.key,
                    Offer(entry, request.embedding, request.claim, tuple(collected)),
                )

        return Keep(frozenset(saved), take)

    def _put(self, key: CacheKey, offer: Offer) -> None:
        if not self._writer.put(key, offer):
            self._counts.dropped()


@dataclass(frozen=True, slots=True)
class _Request:
    resolved: Resolved
    directive: CacheDirective
    profile: ReuseProfile
    key: CacheKey
    claim: str
    embedding: Embedding


def directive_of(resolved: Resolved) -> CacheDirective:
    """What the request asks of the cache: a named seed means the picture that it stands for."""
    request = resolved.request
    if request.cache is not None:
        return request.cache
    return CacheDirective(mode=CacheMode.APPROXIMATE if request.seed is None else CacheMode.OFF)


def _bypass(resolved: Resolved, directive: CacheDirective) -> str:
    """Why this request does not use the cache, if so."""
    request = resolved.request
    if directive.mode is CacheMode.OFF:
        return ""
    if request.image is not None:
        return "only text to image uses the noise cache"
    if directive.mode is CacheMode.EXACT and request.seed is None:
        return "an exact hit needs a seed"
    return ""


def _failure(error: Exception) -> ReuseOutcome:
    if isinstance(error, SlowCacheError):
        return ReuseOutcome.SLOW
    _log.error("the noise cache failed: %s", type(error).__name__)
    return ReuseOutcome.FAILED
