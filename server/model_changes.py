"""An operator's change to the models of one worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.messages import ModelChange, ModelInfo

if TYPE_CHECKING:
    from server.loaded_models import LoadedModels


def apply_change(models: LoadedModels, change: ModelChange) -> ModelInfo | None:
    """Do it. Blocks while it compiles, opens, or waits for what the old plan still draws.

    Raises:
        DarkroomError: see :class:`server.loaded_models.LoadedModels`.
    """
    if change.action == "add":
        return models.add(change.model)
    if change.action == "reload":
        return models.reload(change.model.id)
    models.remove(change.model.id)
    return None
