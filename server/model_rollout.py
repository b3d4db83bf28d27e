"""A change of a model on all workers: made by all, or told as not made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import BackendUnavailableError, DarkroomError
from server.messages import ModelChange, ModelInfo
from server.remote import ReplicaLostError, WorkersClient

_log = logging.getLogger(__name__)


async def change_everywhere(
    workers: WorkersClient, names: Sequence[str], change: ModelChange
) -> ModelInfo | None:
    """Make ``change`` on the workers of these names, at the same time.

    A worker that dies meanwhile does not count: whoever comes instead is told by the router. An
    addition that fails on one worker is undone on the others. A reload cannot be, since the folder
    is no longer what it was. A removal that fails somewhere is made up for by the router.

    Returns:
        The model as it is now; None after a removal.

    Raises:
        ReplicaLostError: all of them are gone.
        BackendUnavailableError: one cannot do what others can; says which, why, and what is now.
        DarkroomError: none can.
    """
    answers = await asyncio.gather(
        *(workers.change_model(name, change) for name in names), return_exceptions=True
    )
    asked = list(zip(names, answers, strict=True))
    made = [name for name, answer in asked if not isinstance(answer, BaseException)]
    failed = [
        (name, answer)
        for name, answer in asked
        if isinstance(answer, BaseException) and not isinstance(answer, ReplicaLostError)
    ]
    if failed and not (made and change.action == "remove"):
        if change.action == "add":
            await _undo(workers, made, change)
        name, error = failed[0]
        if not made or not isinstance(error, DarkroomError):
            raise error
        now = "undone on the others" if change.action == "add" else "done on the others"
        raise BackendUnavailableError(f"worker {name} cannot {change.action}: {error}; {now}")
    if not made:
        raise ReplicaLostError("every worker is gone; try again when one is up")
    infos = (answer for answer in answers if isinstance(answer, ModelInfo))
    info = next(infos, None)
    if info is None and change.action != "remove":
        raise BackendUnavailableError("no worker has it open yet; try again soon")
    return info


async def _undo(workers: WorkersClient, names: Sequence[str], change: ModelChange) -> None:
    undone = await asyncio.gather(
        *(workers.change_model(name, replace(change, action="remove")) for name in names),
        return_exceptions=True,
    )
    for name, answer in zip(names, undone, strict=True):
        if isinstance(answer, BaseException) and not isinstance(answer, ReplicaLostError):
            # Nobody sees it there: what no gateway has said to the router is not published.
            _log.warning("model %s stays open on %s: %s", change.model.id, name, answer)
