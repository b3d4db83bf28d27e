"""What gateways, the router and workers say to each other. Small: no pictures, no prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from engine.errors import DarkroomError
from server.messages import Load, ModelInfo
from server.switched import NOTHING, Switched


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A task as admission sees it: what it costs and who waits for it.

    Attributes:
        id: of the task.
        request_id: what it is part of.
        gateway: the replica that waits; its silence frees everything it holds.
        steps: UNet rows at native size that it still needs.
        width: steps that it puts into each tick of its worker.
        arrived_at_s: Unix time of its first admission; a resumed ticket keeps it, and its place.
        deadline_at_s: Unix time after which it is worthless.
        resumed: admitted before, so that no bound applies: its worker, or the router itself, died
            since, or others of its request have begun already.
        patient: who waits has said how long: no bound on the wait applies but the deadline.
        spared_steps: that it does without, of those that were asked for: so much later it may
            begin.
    """

    id: str
    request_id: str
    gateway: str
    tenant: str
    model: str
    steps: float
    width: float
    arrived_at_s: float
    priority: int = 0
    deadline_at_s: float | None = None
    resumed: bool = False
    patient: bool = False
    spared_steps: float = 0.0


@dataclass(frozen=True, slots=True)
class Grant:
    """``ticket`` may run on ``worker`` now."""

    ticket: Ticket
    worker: str


@dataclass(frozen=True, slots=True)
class Place:
    """A ticket still waits: at ``position`` from 1, behind ``steps_ahead``."""

    ticket_id: str
    position: int
    steps_ahead: int


@dataclass(frozen=True, slots=True)
class Expired:
    """A ticket's deadline passed while it waited."""

    ticket_id: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The whole request was not admitted. A value, not raised: a refusal must be cheap."""

    error: DarkroomError


RouterNews: TypeAlias = Grant | Place | Expired | Refused
"""What a request hears from the router: a refusal alone, or else at least one of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What a worker measured of a model, at its native size."""

    steps_per_s: float
    """At saturation."""
    saturation_steps: float
    """B*: the steps of a tick beyond which a larger tick brings nothing."""
    tick_s: float
    """Seconds of a tick with one guided picture: no picture is faster than its ticks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A task at work, in a worker's report."""

    id: str
    model: str
    steps_left: float
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker tells the router every second.

    Attributes:
        id: the replica's, under which gateways reach it.
        rates: of the models that are loaded.
        models: every model that it can serve, the default first, loaded or not.
        live: what it works on.
        switched: what it has heard of an operator's changes; it may still be at work on them.
    """

    id: str
    rates: Mapping[str, Rate]
    models: tuple[ModelInfo, ...]
    live: tuple[Live, ...] = ()
    switched: Switched = NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportReply:
    """The answer to a report.

    Attributes:
        cancel: ids of tasks that run for nobody any more.
        outstanding_steps: waiting and running in the whole application; autoscaling reads it here.
        switched: what the worker is to be like, beside what is configured.
    """

    cancel: tuple[str, ...]
    outstanding_steps: float
    switched: Switched = NOTHING


@dataclass(frozen=True, slots=True)
class Wait:
    """What is before a new request of up to this ``priority``, in seconds of work.

    Attributes:
        seconds: of all of it, running and waiting.
        queued_s: of what waits.
    """

    priority: int
    seconds: float
    queued_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTable(Load):
    """The load in such detail that a gateway can tell what the router would refuse.

    It says nothing of when it was taken: clocks of two machines differ. The gateway knows that it
    was after its question went out, and before the answer came.

    Attributes:
        requests: that wait.
        tenants: steps that wait, of each tenant that has some.
        waits: by (model, tenant), where a request of theirs would have to queue: what is before
            one that comes now, the lowest priority first. Above the last nothing is certain.
        rates: steps a second of those models.
    """

    requests: int = 0
    tenants: Mapping[str, float] = field(default_factory=dict)
    waits: Mapping[tuple[str, str], tuple[Wait, ...]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """The answer to a gateway's heartbeat: what it may answer without asking again."""

    models: tuple[ModelInfo, ...]
    load: LoadTable
    workers: tuple[str, ...]
    """The names of those that report."""
    gateways: tuple[str, ...] = ()
    """The names of those that were heard lately, whoever asks among them."""
    switched: Switched = NOTHING
    """What operators have changed, through whichever gateway."""
