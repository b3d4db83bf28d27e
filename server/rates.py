"""What a worker's engine measured, in the words of admission."""

from __future__ import annotations

from contextlib import suppress

from engine.engine import Engine
from engine.errors import InvalidRequestError
from server.routing import Rate

_GUIDED_ROWS = 2


def rates_of(engine: Engine) -> dict[str, Rate]:
    """The rates of every open model, by name."""
    rates = {}
    times = engine.times
    for name in engine.models:
        with suppress(InvalidRequestError):  # closed since it was listed
            lane = engine.native_lane(name)
            rows = times.saturation_rows(lane)
            rates[name] = Rate(
                steps_per_s=rows / times.tick_s(lane, rows),
                saturation_steps=float(rows),
                tick_s=times.tick_s(lane, _GUIDED_ROWS),
            )
    return rates
