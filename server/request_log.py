"""Structured logs: one line a request, prompts only where the configuration says so.

Lines are JSON objects with ``time``, ``level``, ``logger`` and ``event`` first. The level is that
of all loggers of ours, and can be switched while the server runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, Any, Literal

from engine.types import Timings
from server.config import LoggingConfig
from server.messages import Drawn

Level = Literal["debug", "info", "warning", "error"]
ROOTS = ("server", "engine", "cache")
"""Our loggers: each module logs under its own name."""
UNMATCHED = "unmatched"
"""The route of a request that none took: no such path, no key, or more than may be read."""
SCOPE_KEY = "darkroom.record"
_FIELDS = "darkroom_fields"

_log = logging.getLogger("server.request")


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request so far; routes add to it, the middleware writes it down.

    Attributes:
        outcome: code of the error that ended it, or None.
        trace_id: of the trace that is kept of it, or None.
    """

    id: str
    method: str
    tenant: str | None = None
    model: str | None = None
    user: str | None = None
    prompt: str | None = None
    outcome: str | None = None
    pictures: int = 0
    seeds: list[int] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    timings: Timings | None = None
    trace_id: str | None = None

    def failed(self, code: str) -> None:
        """Note the error that ends the request; what follows from it changes nothing."""
        self.outcome = self.outcome or code

    def asked(self, *, tenant: str, model: str, prompt: str, user: str | None) -> None:
        """Note who wants what. The user's name is kept as a hash only."""
        self.tenant, self.model, self.prompt = tenant, model, prompt
        if user:
            self.user = hashlib.sha256(user.encode("utf-8", "replace")).hexdigest()[:16]

    def drew(self, pictures: Sequence[Drawn]) -> None:
        """Note finished pictures; of several, the longest time of each phase counts."""
        self.pictures += len(pictures)
        self.seeds += [picture.seed for picture in pictures]
        self.workers += [picture.worker for picture in pictures]
        self.timings = slowest([picture.timings for picture in pictures])


def record_of(scope: Mapping[str, Any]) -> RequestRecord:
    """The record of the request; a fresh one that nobody reads outside the gateway's layers."""
    found = scope.get(SCOPE_KEY)
    return found if isinstance(found, RequestRecord) else RequestRecord(id="", method="")


def slowest(timings: Sequence[Timings]) -> Timings:
    """The longest of each phase: pictures of one request are drawn side by side."""
    if not timings:
        return Timings()
    return Timings(
        queue_s=max(item.queue_s for item in timings),
        encode_s=max(item.encode_s for item in timings),
        cache_s=max(item.cache_s for item in timings),
        denoise_s=max(item.denoise_s for item in timings),
        decode_s=max(item.decode_s for item in timings),
    )


class RequestLog:
    """Writes the line of a finished request."""

    def __init__(self, config: LoggingConfig) -> None:
        self._prompts = config.prompts

    def write(self, record: RequestRecord, *, route: str, status: int, seconds: float) -> None:
        """Log ``record``; requests that the server failed are errors, all others information."""
        level = logging.ERROR if status >= 500 and status not in (503, 504) else logging.INFO
        if not _log.isEnabledFor(level):
            return
        fields: dict[str, Any] = {
            "request_id": record.id,
            "tenant": record.tenant,
            "method": record.method,
            "route": route,
            "status": status,
            "outcome": record.outcome or "ok",
            "duration_ms": round(seconds * 1000, 2),
        }
        if record.trace_id is not None:
            fields["trace_id"] = record.trace_id
        if record.model is not None:
            fields["model"] = record.model
        if record.user is not None:
            fields["user"] = record.user
        if self._prompts and record.prompt is not None:
            fields["prompt"] = record.prompt
        if record.pictures:
            fields |= {"pictures": record.pictures, "seeds": record.seeds}
            fields["workers"] = sorted(set(record.workers))
        if record.timings is not None:
            fields["timings_ms"] = {
                name.removesuffix("_s"): round(getattr(record.timings, name) * 1000, 2)
                for name in ("queue_s", "encode_s", "cache_s", "denoise_s", "decode_s")
            }
        _log.log(level, "request", extra={_FIELDS: fields})


# ------------------------------------------------------------------------------ configuration


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object; a traceback becomes one of its strings."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class TextFormatter(logging.Formatter):
    """A record for people at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """``time level event key=value …``, and the traceback below it."""
        time_of_day = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = [
            f"{name}={value}"
            for name, value in getattr(record, _FIELDS, {}).items()
            if value is not None
        ]
        line = " ".join(
            [time_of_day, f"{record.levelname.lower():7}", record.getMessage(), *fields]
        )
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def configure_logging(config: LoggingConfig, stream: IO[str] | None = None) -> None:
    """Send our loggers to ``stream`` (standard error) as ``config`` says.

    Calling it again replaces what the last call set up.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    for name in ROOTS:
        root = logging.getLogger(name)
        root.handlers = [handler]
        root.propagate = False
    set_level(config.level)


def set_level(level: Level) -> None:
    """Switch the level of every logger of ours in this process."""
    for name in ROOTS:
        logging.getLogger(name).setLevel(level.upper())


def level() -> Level:
    """The level that is in force."""
    names: dict[int, Level] = {
        logging.DEBUG: "debug",
        logging.INFO: "info",
        logging.WARNING: "warning",
        logging.ERROR: "error",
    }
    return names.get(_log.getEffectiveLevel(), "warning")
