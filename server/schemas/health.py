"""Bodies of the health routes."""

from __future__ import annotations

from typing import Literal

from server.schemas.base import Reply


class AliveReply(Reply):
    """The gateway's process answers."""

    status: Literal["alive"] = "alive"


class ReadyReply(Reply):
    """Whether pictures can be drawn."""

    ready: bool
    workers: int
    """Workers that are up."""
    missing: list[str]
    """What is not warm yet: models, or parts of the application."""
    draining: bool
    """Whether the application is about to end."""
