"""What travels between gateway, router and worker: plain values that pickle, without tensors.

Gateway and router never import torch; a snapshot travels as opaque bytes that only workers read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from engine.errors import DarkroomError
from engine.types import CacheScope, CacheShare, GenerateRequest, Reuse, Timings
from server.config import ModelConfig

PictureFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a picture leaves the worker: encoded there, so that gateways stay light."""

    format: PictureFormat = "png"
    quality: int = 90
    """Of JPEG and WebP, 1 to 100."""
    metadata: bool = True
    """Whether the file holds the parameters that drew it, the prompt included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTask:
    """One picture to draw. A request for n pictures is n tasks that share ``request_id``.

    Attributes:
        id: of the trajectory; unique over the whole application.
        index: which of the request's pictures this is, from 0.
        model: a configured model's id; the gateway has filled in the default.
        deadline_at_s: Unix time after which the picture is worthless, the queue included.
        listening: whether anybody wants ``Stepped`` events; without a listener none are sent.
        traced: whether the finished picture tells its ticks.
        snapshot: where another worker stood with this task; opaque to all but workers.
        patient: whoever asked has said how long he waits: the deadline is all that bounds it.
        spared_steps: UNet rows at native size that it does without, of those that were asked for.
    """

    id: str
    request_id: str
    tenant: str
    model: str
    request: GenerateRequest
    index: int = 0
    output: Output = field(default_factory=Output)
    deadline_at_s: float | None = None
    listening: bool = False
    traced: bool = False
    snapshot: bytes | None = None
    patient: bool = False
    spared_steps: float = 0.0


@dataclass(frozen=True, slots=True)
class Queued:
    """The task waits for a worker: ``position`` from 1, ``steps_ahead`` in UNet rows."""

    index: int
    position: int
    steps_ahead: int


@dataclass(frozen=True, slots=True)
class Started:
    """The task's first step begins on a worker (again, after a failover)."""

    index: int
    worker: str
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step is done. ``preview`` is a small encoded PNG, where one was asked for."""

    index: int
    step: int
    steps: int
    preview: bytes | None = None


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A full snapshot by value, for the dispatcher's eyes only: what a failover starts from."""

    index: int
    step: int
    snapshot: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """One step of a picture: ``rows`` shared its tick, which ended so long after the first began.

    ``ended_s`` and ``tick_s`` are the worker's; a picture that moved here has those since.
    """

    step: int
    rows: int
    ended_s: float
    tick_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A finished picture, encoded, with everything needed to draw it again."""

    index: int
    data: bytes
    format: PictureFormat
    width_px: int
    height_px: int
    seed: int
    solver: str
    schedule: str
    steps: int
    guidance: float
    model: str
    plan_digest: str
    worker: str
    approximations: Mapping[str, str] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    attempts: int = 1
    cache: Reuse | None = None
    """What it owes to the noise cache; None on an engine without one."""
    ticks: tuple[Tick, ...] = ()
    """Of a traced task, else none."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The task ended without a picture."""

    index: int
    error: DarkroomError


PictureEvent: TypeAlias = Queued | Started | Stepped | Drawn | Failed
"""What a dispatcher tells the APIs."""
WorkerEvent: TypeAlias = Started | Stepped | Checkpointed | Drawn | Failed
"""What a worker tells a dispatcher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A configured model, as clients and admission see it."""

    id: str
    family: str
    native_px: int
    size_multiple_px: int
    min_px: int
    max_px: int
    guidance_default: float
    guidable: bool
    """Whether guidance costs a second UNet row (distilled models embed it)."""
    solver_default: str
    schedule_default: str
    precision: str
    backend: str
    plan_digest: str
    created_s: int
    """Unix time of the plan."""
    checkpoint: str = ""
    """Fingerprint of weights and configuration: models that differ in precision only share it."""
    scheduler_class: str = ""
    """Of Diffusers, as the checkpoint names it."""
    scheduler_stand_in: str | None = None
    """``LMSDiscrete as dpmpp_2m`` where another solver draws what names none, as replies say it."""
    scheduler_note: str = ""
    """How close that solver comes, or what of the class is served."""
    inpainting_only: bool = False
    max_clip_skip: int = 0
    """Layers that every text encoder can do without."""

    def rows(self, request: GenerateRequest) -> int:
        """UNet rows that ``request`` costs, an upper bound: two a step with guidance."""
        guidance = self.guidance_default if request.guidance is None else request.guidance
        return self.evaluations(request) * (2 if self.guidable and guidance > 1.0 else 1)

    def evaluations(self, request: GenerateRequest) -> int:
        """Rows of the solver table of ``request``, an upper bound."""
        steps = request.steps if request.timesteps is None else len(request.timesteps)
        if request.image is not None and request.mask is None:
            steps = max(1, int(steps * request.strength))
        return 2 * steps - 1 if (request.solver or self.solver_default) == "heun" else steps

    def area(self, request: GenerateRequest) -> float:
        """Pixels of ``request`` in units of the native picture: how much dearer a row is."""
        if request.image is not None:
            height_px, width_px = request.image.shape[:2]
        else:
            width_px = request.width_px or self.native_px
            height_px = request.height_px or self.native_px
        return float(width_px * height_px) / self.native_px**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChange:
    """What an operator wants done to a model, on every worker that is up."""

    action: Literal["add", "reload", "remove"]
    model: ModelConfig
    """To add: all of it. To reload or remove: the id alone counts."""
    at_s: float = 0.0
    """Unix time of it: of two changes of a model, the later one counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOrder:
    """What an operator wants of the noise caches in the workers' memory."""

    action: Literal["look", "clear"]
    scope: CacheScope
    best: int = 0
    """To look: so many states of each share beside its sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAnswer:
    """What a worker's own noise cache holds, or held until it was cleared."""

    worker: str
    shares: tuple[CacheShare, ...] | None
    """None: it has not answered in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether every configured model is warm, and what is missing where not."""

    ready: bool
    workers: int
    missing: tuple[str, ...] = ()
    draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy the application is. Steps are UNet rows at native size."""

    queued: int = 0
    queued_steps: float = 0.0
    running: int = 0
    running_steps: float = 0.0
    steps_per_s: float = 0.0
    """What all workers together do at saturation, as measured."""
