"""What an operator has switched while the application runs, as every process knows it.

A small value that goes along with what processes tell each other anyway: workers' reports,
gateways' heartbeats, and the answers to both. Each process merges what it hears, and of two words
on the same thing the later one counts. So a process that is replaced learns from the others what
it missed, the router too; only when all end at once is it forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from server import request_log
from server.messages import ModelChange
from server.request_log import Level

FORGET_S = 3600.0
"""How long it is known that a model was removed: whoever is cut off for longer has ended."""


@dataclass(frozen=True, slots=True)
class LevelChange:
    """The log level since ``at_s``, Unix time."""

    level: Level
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """All of it; a value that never changes.

    Attributes:
        models: the last change of each model, by its id. That of an added model stays an ``add``
            when it is reloaded, only a later one.
        log: None while the level is as configured.
    """

    models: Mapping[str, ModelChange] = field(default_factory=dict)
    log: LevelChange | None = None

    def merged(self, other: Switched, now_s: float) -> Switched:
        """What both say, less removals that are forgotten by ``now_s``, Unix time."""
        models = dict(self.models)
        for name, change in other.models.items():
            if name not in models or models[name].at_s < change.at_s:
                models[name] = change
        kept = {
            name: change
            for name, change in models.items()
            if change.action != "remove" or change.at_s > now_s - FORGET_S
        }
        logs = [log for log in (self.log, other.log) if log is not None]
        return Switched(models=kept, log=max(logs, key=lambda log: log.at_s, default=None))

    def stamped(self, change: ModelChange, now_s: float) -> ModelChange:
        """``change`` as of now: after everything that is known of its model, whatever the clock."""
        known = self.models.get(change.model.id)
        if known is None:
            return replace(change, at_s=now_s)
        return replace(change, at_s=max(now_s, math.nextafter(known.at_s, math.inf)))

    def with_model(self, change: ModelChange) -> Switched:
        """With a stamped change that was made."""
        known = self.models.get(change.model.id)
        if change.action == "reload" and known is not None and known.action == "add":
            change = replace(known, at_s=change.at_s)
        return replace(self, models={**self.models, change.model.id: change})

    def with_level(self, level: Level, now_s: float) -> Switched:
        """With the log level as of now."""
        at_s = now_s if self.log is None else max(now_s, math.nextafter(self.log.at_s, math.inf))
        return replace(self, log=LevelChange(level, at_s))

    def added(self, name: str) -> bool:
        """Whether an operator has added the model, and not removed it since."""
        return name in self.models and self.models[name].action == "add"

    def removed(self, name: str) -> bool:
        """Whether an operator has removed it."""
        return name in self.models and self.models[name].action == "remove"


NOTHING = Switched()
"""As configured."""


def heed(before: Switched, after: Switched) -> Switched:
    """Switch the log level of this process where it has changed; returns ``after``."""
    if after.log is not None and after.log != before.log:
        request_log.set_level(after.log.level)
    return after
