"""What spans say of a request: never a prompt, a seed, or what else would draw it again."""

from __future__ import annotations

from opentelemetry.util.types import AttributeValue

from server.messages import Drawn, PictureTask

Attributes = dict[str, AttributeValue]


def named(**values: AttributeValue) -> Attributes:
    """``values`` under our own names, which no convention of OpenTelemetry's takes."""
    return {f"darkroom.{name}": value for name, value in values.items()}


def of_request(task: PictureTask) -> Attributes:
    """What all tasks of a request share. Its id is the one in the log; of a job, the job's."""
    return named(
        request_id=task.request_id.rpartition(".")[0] or task.request_id,
        tenant=task.tenant,
        model=task.model,
        steps=task.request.steps,
    )


def of_picture(drawn: Drawn) -> Attributes:
    """How a picture was drawn; ``cache`` only where there is one."""
    told = named(
        solver=drawn.solver,
        schedule=drawn.schedule,
        steps=drawn.steps,
        guidance=drawn.guidance,
        width_px=drawn.width_px,
        height_px=drawn.height_px,
        worker=drawn.worker,
        attempts=drawn.attempts,
        approximations=[f"{name}={dial}" for name, dial in sorted(drawn.approximations.items())],
    )
    return told if drawn.cache is None else told | named(cache=str(drawn.cache.outcome))
