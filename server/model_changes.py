"""An operator's changes to the models of one worker: as asked, and as heard of later."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING

from engine.errors import DarkroomError
from engine.ports import Clock
from server.messages import ModelChange, ModelInfo
from server.switched import NOTHING, Switched, heed

if TYPE_CHECKING:
    from server.loaded_models import LoadedModels

_log = logging.getLogger(__name__)

TRY_AGAIN_S = 60.0
"""After a change that the others have made did not succeed here."""


class ModelChanges:
    """Makes changes, one at a time, and remembers which.

    A change that a gateway asks for is made at once. It counts only when the gateway has said so
    to the router, which it does when all workers have made it: :meth:`hear` tells of that, and of
    everything that was changed before this worker was there. :meth:`catch_up` makes what is
    missing. Safe from any thread.

    Args:
        configured: models that this worker was started with; they stay.
        clock: gives Unix time.
    """

    def __init__(self, models: LoadedModels, configured: Collection[str], clock: Clock) -> None:
        self._models = models
        self._configured = frozenset(configured)
        self._clock = clock
        self._changing = threading.Lock()
        self._made_at_s: dict[str, float] = {}
        """By model: up to which change it is as wanted."""
        self._not_before_s: dict[str, float] = {}
        self._switched = NOTHING

    @property
    def switched(self) -> Switched:
        """What was heard of."""
        return self._switched

    def hear(self, switched: Switched) -> bool:
        """Note what the router says; whether something is to be caught up with now."""
        merged = self._switched.merged(switched, self._clock.now_s())
        self._switched = heed(self._switched, merged)
        return bool(self._missing())

    def apply(self, change: ModelChange) -> ModelInfo | None:
        """Do what a gateway asks. Blocks while it compiles, opens, or waits for what is drawn.

        Returns:
            The model as it is now; None without one, as where it has yet to be caught up with.

        Raises:
            DarkroomError: see :class:`server.loaded_models.LoadedModels`.
        """
        name = change.model.id
        with self._changing:
            if change.action == "add" and self._left_over(name):
                self._models.remove(name)
            if change.action != "add" and not self._serves(name) and self._switched.added(name):
                return None
            info = self._make(change)
            self._made_at_s[name] = change.at_s
            return info

    def catch_up(self) -> None:
        """Make what the others have made. Blocks like :meth:`apply`; logs what fails."""
        with self._changing:
            for change in self._missing():
                name = change.model.id
                try:
                    self._catch_up(change)
                except Exception as error:
                    self._not_before_s[name] = self._clock.now_s() + TRY_AGAIN_S
                    _log.warning(
                        "model %s is not as on the other workers (%s); trying again in %.0f s",
                        *(name, error, TRY_AGAIN_S),
                        exc_info=not isinstance(error, DarkroomError),
                    )
                else:
                    self._made_at_s[name] = change.at_s

    def _missing(self) -> list[ModelChange]:
        now_s = self._clock.now_s()
        return [
            change
            for name, change in self._switched.models.items()
            if self._made_at_s.get(name, -math.inf) < change.at_s
            and self._not_before_s.get(name, -math.inf) <= now_s
        ]

    def _catch_up(self, change: ModelChange) -> None:
        name = change.model.id
        if change.action == "add":
            change = ModelChange(
                action="reload" if self._serves(name) else "add", model=change.model
            )
        elif not self._serves(name) or (change.action == "remove" and name in self._configured):
            return
        self._make(change)
        _log.info("model %s: %s, as on the other workers", name, change.action)

    def _make(self, change: ModelChange) -> ModelInfo | None:
        if change.action == "add":
            return self._models.add(change.model)
        if change.action == "reload":
            return self._models.reload(change.model.id)
        self._models.remove(change.model.id)
        return None

    def _left_over(self, name: str) -> bool:
        """Whether a model is from an addition that never came to count: its gateway died."""
        return (
            self._serves(name) and name not in self._configured and not self._switched.added(name)
        )

    def _serves(self, name: str) -> bool:
        return any(info.id == name for info in self._models.infos)
