"""News of jobs between gateways: hints to look, over one channel of Redis."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from server.jobs.bell import Bell
from server.jobs.redis_client import key

_IDLE_S = 5.0
_AGAIN_S = 0.5


class News(Bell):
    """Rings here for what happens in any gateway. Readers that miss a ring look by themselves.

    Args:
        redis: the client; it is not closed here.
    """

    def __init__(self, redis: Any) -> None:
        super().__init__()
        self._redis = redis
        self._listening: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._listening = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Stop listening."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)

    async def tell(self, job_id: str) -> None:
        """Ring here at once, and everywhere else when Redis passes it on."""
        self.ring(job_id)
        with suppress(RedisError, OSError):
            await self._redis.publish(key("news"), job_id)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(key("news"))
                    while True:
                        message = await channel.get_message(timeout=_IDLE_S)
                        if message is not None:
                            self.ring(message["data"].decode())
            except (RedisError, OSError):
                await asyncio.sleep(_AGAIN_S)
