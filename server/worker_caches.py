"""An operator's order to the caches in the workers' memory: sent by a gateway, done by a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.ports import NoiseCache
from engine.types import CacheShare
from server.messages import CacheAnswer, CacheOrder
from server.remote import CALL_TIMEOUT_S, ReplicaLostError, WorkersClient


async def ask_everywhere(
    workers: WorkersClient,
    names: Sequence[str],
    order: CacheOrder,
    *,
    timeout_s: float = CALL_TIMEOUT_S,
) -> list[CacheAnswer]:
    """What the workers of these names say, asked at the same time.

    One that is gone is left out, as its memory is gone with it; one that is silent for
    ``timeout_s`` is told as such.
    """

    async def ask(name: str) -> CacheAnswer | None:
        try:
            async with asyncio.timeout(timeout_s):
                shares = await workers.ask_cache(name, order)
        except ReplicaLostError:
            return None
        except TimeoutError:
            return CacheAnswer(worker=name, shares=None)
        return CacheAnswer(worker=name, shares=shares)

    answers = await asyncio.gather(*(ask(name) for name in names))
    return [answer for answer in answers if answer is not None]


def carry_out(order: CacheOrder, cache: NoiseCache | None) -> tuple[CacheShare, ...]:
    """What ``cache`` holds, or held until it was cleared; nothing where there is none.

    Raises:
        BackendUnavailableError: its store cannot be asked.
    """
    if cache is None:
        return ()
    if order.action == "clear":
        return tuple(cache.clear(order.scope))
    return tuple(cache.shares(order.scope, best=order.best))
