"""What the engine asks of others: the consumer owns the interface.

Implementations live in ``cache/`` and ``server/``; the engine never imports them. Nothing here
imports torch: states cross this seam as numpy arrays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidRequestError
from engine.types import CacheScope, CacheShare

Embedding: TypeAlias = npt.NDArray[np.float32]
"""(dimensions,) float32 of length 1."""

Latent: TypeAlias = npt.NDArray[np.float32]
"""(channels, height, width) float32."""


@runtime_checkable
class Clock(Protocol):
    """Monotonic time, injected so that tests move it by hand instead of sleeping."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start."""
        return time.monotonic()


# ---------------------------------------------------------------------- the noise cache


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """What must be equal for one request to start from another's state. Different keys never meet.

    Attributes:
        tenant: whose states these are; None where all tenants share by explicit setting.
        checkpoint: fingerprint of weights and configs.
        noise_schedule: digest of the checkpoint's betas.
        latent_shape: (channels, height, width).
        negative_prompt: exact; "" also where guidance is off and it has no effect.
        guidance: class of the guidance scale, with its interval.
        conditions: digest of everything else in the request that steers the picture (adapters and
            controls with their weights, and whatever is added to requests after them).
    """

    tenant: str | None
    checkpoint: str
    noise_schedule: str
    latent_shape: tuple[int, int, int]
    negative_prompt: str = field(repr=False)
    guidance: str
    conditions: str


class StateKind(StrEnum):
    """What a stored latent is, and so how a trajectory starts from it."""

    NOISY = "noisy"
    """x itself at its level: entered as it is. Only one picture of a prompt may use it."""
    CLEAN = "clean"
    """A clean prediction: entered at its level, or at any noisier one, under fresh noise."""
    FINAL = "final"
    """The final latent of a finished picture, at full precision: decoded as it is."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """One latent as the cache keeps it.

    Attributes:
        id: unique in the namespace.
        log_snr: level at which ``NOISY`` stands, or from which ``CLEAN`` was predicted.
    """

    id: str
    kind: StateKind
    log_snr: float
    latent: Latent


@dataclass(frozen=True, slots=True)
class StateRef:
    """A stored state without its latent."""

    id: str
    kind: StateKind
    log_snr: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """An earlier picture of the same key whose prompt is close.

    Attributes:
        entry: its id.
        similarity: cosine of the embeddings, -1 to 1.
        states: what is still stored of it.
    """

    entry: str
    similarity: float
    states: tuple[StateRef, ...]


@dataclass(frozen=True, slots=True)
class Wish:
    """A state that would serve, and the evaluations that it would save."""

    state: str
    steps_saved: int


@dataclass(frozen=True, slots=True)
class Offer:
    """What one picture leaves in the cache.

    Attributes:
        entry: unique id of the picture.
        embedding: of its prompt; None for ``FINAL`` states, which are found by id alone.
        claim: digest of tenant and prompt: no other picture of these starts from ``NOISY`` states.
        states: with the evaluations that each saves whoever starts from it.
    """

    entry: str
    embedding: Embedding | None
    claim: str
    states: tuple[tuple[StoredState, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """What a cache holds at this moment, and what it has done since it was opened here."""

    backend: str
    available: bool = True
    namespaces: int = 0
    entries: int = 0
    states: int = 0
    size_bytes: int = 0
    limit_bytes: int = 0
    """Of one namespace."""
    policy: str = ""
    hits: int = 0
    misses: int = 0
    stored: int = 0
    refused: int = 0
    """Offers that were not stored: too large, a duplicate, or no room."""
    evicted: int = 0
    corrupt: int = 0
    """Values that could not be read: foreign, truncated or damaged."""
    errors: int = 0
    timeouts: int = 0
    skipped: int = 0
    """Calls that were not made because the backend had just failed."""
    resyncs: int = 0
    """Times that an index was read anew from the backend."""


class NoiseCache(Protocol):
    """Keeps states of earlier pictures and finds those of similar prompts. Safe from any thread.

    What requests call never raises for an outage: a cache that cannot be reached finds and stores
    nothing, and counts it in its statistics. What operators call does.
    """

    def start(self) -> None:
        """Begin what goes on in the background; twice is harmless."""
        ...

    def embed(self, context: npt.NDArray[np.float32]) -> Embedding:
        """The embedding of a prompt from its conditioning, (tokens, width)."""
        ...

    def nearest(
        self, key: CacheKey, embedding: Embedding, *, claim: str, limit: int
    ) -> Sequence[Candidate]:
        """The closest entries of ``key``, best first, without those that ``claim`` may not use."""
        ...

    def fetch(
        self, key: CacheKey, wishes: Sequence[Wish], *, claim: str = ""
    ) -> StoredState | None:
        """The first of ``wishes`` that is there and free for ``claim``; counts as a use of it."""
        ...

    def offer(self, key: CacheKey, offer: Offer) -> bool:
        """Store a picture's states, evicting others where there is no room; False if refused."""
        ...

    def statistics(self) -> CacheStatistics:
        """Contents and counters."""
        ...

    def shares(self, scope: CacheScope, *, best: int = 0) -> Sequence[CacheShare]:
        """What is held within ``scope``, with up to ``best`` states of each share; no empty ones.

        Raises:
            BackendUnavailableError: an operator is told that the store cannot be asked.
        """
        ...

    def clear(self, scope: CacheScope) -> Sequence[CacheShare]:
        """Forget what is held within ``scope``; says what that was.

        Pictures that are being drawn may leave states afterwards.

        Raises:
            BackendUnavailableError: an operator is told that it did not happen, or not to the end.
        """
        ...

    def close(self) -> None:
        """Stop threads and let go of connections that the cache itself has made."""
        ...


@dataclass(frozen=True, slots=True)
class JumpTable:
    """How far to jump: the share of the steps that a similarity allows to skip.

    Attributes:
        steps: (similarity, share) pairs, both ascending; a similarity under the first allows none.
            The default is that of NIRVANA (Agarwal et al., NSDI 2024), for CLIP embeddings;
            ``darkroom cache calibrate`` measures a model's own.

    Raises:
        InvalidRequestError: values out of range or order.
    """

    steps: tuple[tuple[float, float], ...] = (
        (0.65, 0.1),
        (0.75, 0.2),
        (0.85, 0.3),
        (0.90, 0.4),
        (0.95, 0.5),
    )

    def __post_init__(self) -> None:
        similarities = [similarity for similarity, _ in self.steps]
        shares = [share for _, share in self.steps]
        if similarities != sorted(similarities) or shares != sorted(shares):
            raise InvalidRequestError("the jump table must ascend in both columns", field="jumps")
        if not all(math.isfinite(s) and -1.0 <= s <= 1.0 for s in similarities):
            raise InvalidRequestError("jump table: similarities are -1 to 1", field="jumps")
        if not all(0.0 <= share < 1.0 for share in shares):
            raise InvalidRequestError("jump table: shares are 0 or more, under 1", field="jumps")

    def share(self, similarity: float) -> float:
        """Largest share of the steps that may be skipped at this similarity; 0 for none."""
        # A prompt is as similar to itself as float32 can tell: 0.9999999 must count as 1.
        return max((share for at, share in self.steps if similarity >= at - 1e-6), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseProfile:
    """How a model's pictures use the cache; ``darkroom cache calibrate`` measures one.

    Attributes:
        jumps: how far similarity lets a request jump.
        kind: what is stored: ``NOISY`` or ``CLEAN``.
        fractions: after which shares of the steps, ascending; 1.0 is the finished picture, which
            makes sense for ``CLEAN`` only.
        checkpoint: fingerprint of the weights that it was measured on; other weights do not use it.
            None: not measured, for any.

    Raises:
        InvalidRequestError: a kind or fractions that cannot be.
    """

    jumps: JumpTable = JumpTable()
    kind: StateKind = StateKind.NOISY
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.kind is StateKind.FINAL:
            raise InvalidRequestError("a profile stores noisy or clean states", field="kind")
        highest = 1.0 if self.kind is StateKind.CLEAN else 0.99
        good = self.fractions and list(self.fractions) == sorted(set(self.fractions))
        if not good or not all(0.0 < f <= highest for f in self.fractions):
            raise InvalidRequestError(
                f"fractions must ascend between 0 and {highest}", field="fractions"
            )
