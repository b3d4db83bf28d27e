"""The noise cache of a configuration: in this worker's memory, or shared by all in Redis."""

from __future__ import annotations

from pathlib import Path

from cache.memory import MemoryNoiseCache
from cache.policy import policy_named
from cache.profiles import FILE_NAME, read_profile
from cache.redis import RedisNoiseCache
from engine.ports import NoiseCache
from engine.reuse_noise import NoiseReuseConfig
from server.config import ServeConfig
from server.redis_settings import redis_settings


def noise_cache(config: ServeConfig) -> NoiseCache | None:
    """The cache that the configuration asks for; the caller closes it. Opens no connection yet."""
    wanted = config.cache
    if not wanted.enabled:
        return None
    policy = policy_named(wanted.policy, half_life_s=wanted.half_life_s)
    if config.redis.url is None:
        return MemoryNoiseCache(limit_bytes=wanted.max_bytes, policy=policy)
    settings = redis_settings(config.redis, wanted.budget_s)
    return RedisNoiseCache(settings, limit_bytes=wanted.max_bytes, policy=policy)


def reuse_config(config: ServeConfig, models: Path) -> NoiseReuseConfig:
    """How the engine uses it: as ``darkroom cache calibrate`` has measured, where it has.

    Raises:
        InvalidRequestError: a model's profile cannot be read.
    """
    folders = [model.path or models / model.id for model in config.models]
    return NoiseReuseConfig(
        profiles={
            folder.name: read_profile(folder / FILE_NAME)
            for folder in folders
            if (folder / FILE_NAME).is_file()
        },
        share_between_tenants=config.cache.share_between_tenants,
        budget_s=config.cache.budget_s,
    )
