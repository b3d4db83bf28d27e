"""The nouns: what goes into the engine, what lives in it, and what comes out.

Tensors appear here as annotations only, so importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from engine.errors import InvalidRequestError
from engine.request import (
    MAX_SEED,
    CacheDirective,
    CacheMode,
    GenerateRequest,
    Image,
    Limits,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_SEED",
    "CacheDirective",
    "CacheMode",
    "CacheScope",
    "CacheShare",
    "CachedState",
    "Conditioning",
    "GenerateRequest",
    "Image",
    "Limits",
    "Picture",
    "Reuse",
    "ReuseOutcome",
    "Snapshot",
    "SnapshotGrade",
    "StepEvent",
    "Timings",
]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What steers one trajectory, as the UNet takes it.

    Row 0 is the prompt; row 1, present when guidance is on, the negative prompt.

    Attributes:
        context: (rows, tokens, width) hidden states of the text encoders.
        added: further per-row inputs by their graph name, each (rows, …): ``text_embeds`` and
            ``time_ids`` (SDXL), ``timestep_cond`` (embedded guidance of distilled models).
    """

    context: torch.Tensor
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """UNet rows that a guided step costs: two with guidance, one without."""
        return int(self.context.shape[0])


class SnapshotGrade(StrEnum):
    """How much of a trajectory a snapshot holds."""

    FULL = "full"
    """Everything: continues bit-equal on the same backend."""
    STATE = "state"
    """The clean prediction and its level only, for the noise cache."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A trajectory between two ticks, labelled by its log-SNR and never by its row alone.

    Attributes:
        grade: what it holds; the fields below the line are set for ``FULL`` only.
        log_snr: log(alpha² / sigma²) of the state.
        x: (channels, height, width) float32 latent, in variance-preserving scale.
        clean: (channels, height, width) float32 clean-image prediction of the last step, or None
            before the first.
        state: (slots, channels, height, width) float32 solver state, ``x`` included.
        row: next row of ``table_digest``'s table.
        generator_state: bytes of the request's own torch CPU generator.
        plan_digest: the plan that it ran on.
        table_digest: digest of the solver table, so that a snapshot cannot go on with another.
        entered_at: log-SNR at which the trajectory entered from the noise cache: its table begins
            there. None for one that began as its request says.
    """

    grade: SnapshotGrade
    log_snr: float
    x: torch.Tensor
    clean: torch.Tensor | None
    # ---- FULL only
    state: torch.Tensor | None = None
    row: int | None = None
    generator_state: bytes | None = None
    plan_digest: str | None = None
    table_digest: str | None = None
    entered_at: float | None = None


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One trajectory has advanced by one row.

    Attributes:
        step: rows done so far, 1 to ``steps``.
        log_snr: level of the latent after the step.
        batch_rows: UNet rows that shared the tick.
        tick_s: seconds that the tick took.
        preview: a small RGB picture, where one was asked for at this step.
    """

    trajectory_id: str
    step: int
    steps: int
    log_snr: float
    batch_rows: int
    tick_s: float
    preview: Image | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of one picture went, in seconds; ``queue_s`` is waiting for a first tick."""

    queue_s: float = 0.0
    encode_s: float = 0.0
    cache_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Sum of the phases."""
        return self.queue_s + self.encode_s + self.cache_s + self.denoise_s + self.decode_s


class ReuseOutcome(StrEnum):
    """What became of a request's look into the noise cache."""

    HIT = "hit"
    MISS = "miss"
    SLOW = "slow"
    """No answer within the time budget: a miss."""
    FAILED = "failed"
    """The cache could not be asked: a miss."""
    OFF = "off"
    """Not wanted: see :attr:`GenerateRequest.cache`."""
    BYPASSED = "bypassed"
    """This kind of request does not use the cache; ``Reuse.note`` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """What a picture owes to the noise cache.

    Attributes:
        source: id of the stored state that it started from; None without a hit.
        similarity: cosine between both prompts' embeddings; 1 for an exact hit.
        steps_skipped: evaluations of the solver table that it was spared.
        log_snr: level at which it entered.
        note: why the cache was bypassed.
    """

    outcome: ReuseOutcome
    mode: CacheMode = CacheMode.OFF
    source: str | None = None
    similarity: float | None = None
    steps_skipped: int = 0
    log_snr: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScope:
    """Whose states of a noise cache an operator means, and of which weights. Unsaid means all.

    Attributes:
        tenant: this one's.
        shared: those that all tenants share by explicit setting.
        checkpoint: fingerprint of the weights.

    Raises:
        InvalidRequestError: a tenant's and the shared ones at the same time.
    """

    tenant: str | None = None
    shared: bool = False
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.shared and self.tenant is not None:
            raise InvalidRequestError(
                "either a tenant's states or those that all share, not both", field="tenant"
            )

    def covers(self, tenant: str | None, checkpoint: str) -> bool:
        """Whether these states are meant; ``tenant`` is None for the shared ones."""
        if self.checkpoint not in (None, checkpoint):
            return False
        return tenant is None if self.shared else self.tenant in (None, tenant)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedState:
    """A stored state as an operator sees it: what it is worth to the eviction policy."""

    id: str
    kind: str
    log_snr: float
    uses: int
    size_bytes: int
    """Charged."""
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShare:
    """What a noise cache holds of one tenant and one checkpoint: what a byte limit is for.

    Attributes:
        tenant: None for the states that all tenants share.
        entries: pictures with at least one state.
        size_bytes: charged for entries and states.
        best: states of the highest scores, where asked for.
    """

    tenant: str | None
    checkpoint: str
    entries: int
    states: int
    size_bytes: int
    best: tuple[CachedState, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A finished picture and everything needed to draw it again."""

    image: Image
    latent: torch.Tensor
    """(channels, height, width) float32 final latent."""
    seed: int
    solver: str
    schedule: str
    steps: int
    evaluations: int
    """UNet evaluations of the table; Heun needs nearly two a step."""
    guidance: float
    width_px: int
    height_px: int
    model: str
    plan_digest: str
    guidance_rescale: float = 0.0
    clip_skip: int = 0
    approximations: Mapping[str, str] = field(default_factory=dict)
    """Each approximation that touched the picture, by name, with its dial."""
    reuse: Reuse | None = None
    """What the noise cache did; None on an engine without one."""
    timings: Timings = field(default_factory=Timings)
