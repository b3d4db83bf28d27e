"""The nouns of jobs: plain values that a store keeps as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from engine.types import CacheDirective, CacheMode, GenerateRequest
from server.messages import Output, PictureFormat, PictureTask

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
MAX_EVENTS = 4096
"""Of one job that are kept; the oldest go first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookTarget:
    """Whom to tell when the job is done. The secret signs what is sent, and is never shown."""

    url: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What was asked for: fixed when the job is made, so that any gateway draws the same pictures.

    Attributes:
        request: fields of the :class:`GenerateRequest` that all pictures share.
        seeds: one for each picture.
        rows: UNet rows that the whole job costs.
        base_url: prefix of links, without a slash at its end.
        inline: whether replies carry the pictures themselves, beside links.
        listed: False for pictures that were stored only to be linked to.
    """

    id: str
    tenant: str
    created_at_s: float
    deadline_at_s: float
    model: str
    request: Mapping[str, Any] = field(repr=False)
    seeds: tuple[int, ...]
    output: Output = field(default_factory=Output)
    width_px: int
    height_px: int
    rows: int
    base_url: str = ""
    inline: bool = False
    listed: bool = True
    webhook: WebhookTarget | None = None

    def tasks(self, attempt: int, done: Collection[int] = ()) -> list[PictureTask]:
        """The pictures that are still to draw, as tasks with ids of this attempt's own."""
        request = unpack(self.request)
        name = f"{self.id}.{attempt}"
        return [
            PictureTask(
                id=f"{name}.{index}",
                request_id=name,
                tenant=self.tenant,
                model=self.model,
                request=replace(request, seed=seed),
                index=index,
                output=self.output,
                deadline_at_s=self.deadline_at_s,
                patient=True,
                listening=True,
            )
            for index, seed in enumerate(self.seeds)
            if index not in done
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """How far a job is.

    Attributes:
        attempts: gateways that took it up.
        pictures: what is known of each finished picture, by index as text (JSON's keys).
        error: as the error table renders it, where the job failed.
    """

    status: Status = "queued"
    attempts: int = 1
    started_at_s: float | None = None
    finished_at_s: float | None = None
    pictures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None

    @property
    def final(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in FINAL

    def done(self) -> frozenset[int]:
        """Indices of the pictures that are there."""
        return frozenset(int(index) for index in self.pictures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as a store hands it out.

    Attributes:
        owner: the gateway that runs it.
        cancelling: whether somebody asked to end it.
    """

    spec: JobSpec
    state: JobState
    owner: str
    cancelling: bool = False


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened; ``number`` rises within a job and is what a reader resumes from."""

    number: int
    name: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JobPicture:
    """An encoded picture."""

    index: int
    format: PictureFormat
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class JobPreview:
    """The latest preview of a picture; earlier ones are not kept."""

    index: int
    step: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the owner of a job has to tell, written in one piece.

    Writing it twice is writing it once: a store skips events with numbers that it has.
    """

    state: JobState
    events: tuple[JobEvent, ...] = ()
    pictures: tuple[JobPicture, ...] = ()
    previews: tuple[JobPreview, ...] = ()


_SPEC = TypeAdapter(JobSpec)
_STATE = TypeAdapter(JobState)


def spec_json(spec: JobSpec) -> bytes:
    """The spec at rest."""
    return _SPEC.dump_json(spec)


def spec_of(text: bytes) -> JobSpec:
    """What :func:`spec_json` wrote."""
    return _SPEC.validate_json(text)


def state_json(state: JobState) -> bytes:
    """The state at rest."""
    return _STATE.dump_json(state)


def state_of(text: bytes) -> JobState:
    """What :func:`state_json` wrote."""
    return _STATE.validate_json(text)


def pack(request: GenerateRequest) -> dict[str, Any]:
    """A request as JSON values, without its seed. Requests that start from a picture are not jobs'.

    Raises:
        ValueError: it starts from a picture.
    """
    if request.image is not None:
        raise ValueError("a job does not start from a picture")
    names = {item.name for item in fields(request)} - {"image", "mask", "seed", "cache"}
    packed: dict[str, Any] = {name: getattr(request, name) for name in names}
    packed["timesteps"] = None if request.timesteps is None else list(request.timesteps)
    packed["guidance_interval"] = list(request.guidance_interval)
    packed["cache"] = None if request.cache is None else asdict(request.cache)
    return packed


def unpack(packed: Mapping[str, Any]) -> GenerateRequest:
    """What :func:`pack` wrote."""
    values = dict(packed)
    cache = values.pop("cache")
    directive = cache and CacheDirective(**{**cache, "mode": CacheMode(cache["mode"])})
    if values["timesteps"] is not None:
        values["timesteps"] = tuple(values["timesteps"])
    values["guidance_interval"] = tuple(values["guidance_interval"])
    return GenerateRequest(**values, cache=directive)
