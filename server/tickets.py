"""What a task costs, in the words of admission."""

from __future__ import annotations

from server.messages import ModelInfo, PictureTask
from server.routing import Ticket


def steps_of(task: PictureTask, info: ModelInfo) -> float:
    """UNet rows at native size that a task costs, an upper bound."""
    return info.rows(task.request) * info.area(task.request)


def width_of(task: PictureTask, info: ModelInfo) -> float:
    """Steps that a task puts into each tick of its worker."""
    return steps_of(task, info) / info.evaluations(task.request)


def ticket_of(
    task: PictureTask,
    info: ModelInfo,
    *,
    gateway: str,
    arrived_at_s: float,
    resumed: bool = False,
) -> Ticket:
    """The ticket with which ``gateway`` asks for a worker; ``arrived_at_s`` is Unix time."""
    return Ticket(
        id=task.id,
        request_id=task.request_id,
        gateway=gateway,
        tenant=task.tenant,
        model=task.model,
        steps=steps_of(task, info),
        width=width_of(task, info),
        arrived_at_s=arrived_at_s,
        priority=task.request.priority,
        deadline_at_s=task.deadline_at_s,
        resumed=resumed,
        patient=task.patient,
        spared_steps=task.spared_steps,
    )
