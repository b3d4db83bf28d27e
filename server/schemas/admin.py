"""Bodies of the operator routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.request_log import Level
from server.schemas.base import Body


class LogLevel(Body):
    """How much is logged."""

    level: Annotated[Level, Field(examples=["debug"])]
