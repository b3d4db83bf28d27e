"""The noise cache that a configuration describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.memory import MemoryNoiseCache
from cache.profiles import FILE_NAME, write_profile
from cache.redis import RedisNoiseCache
from engine.errors import InvalidRequestError
from engine.ports import JumpTable, ReuseProfile, StateKind
from server.config import ServeConfig
from server.noise_cache import noise_cache, reuse_config

MEASURED = ReuseProfile(jumps=JumpTable(((0.9, 0.3),)), kind=StateKind.CLEAN, fractions=(1.0,))


def config(**values: object) -> ServeConfig:
    return ServeConfig.model_validate(values)


def test_memory_is_the_default_redis_where_there_is_one_and_off_is_none() -> None:
    assert isinstance(noise_cache(config()), MemoryNoiseCache)
    assert noise_cache(config(cache={"enabled": False})) is None
    shared = noise_cache(config(redis={"url": "redis://127.0.0.1:1/0"}))
    assert isinstance(shared, RedisNoiseCache)  # and nothing was connected
    shared.close()


def test_what_was_calibrated_beside_a_model_is_used_for_it(tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    write_profile(tmp_path / "measured" / FILE_NAME, MEASURED, {})
    served = config(models=[{"id": "measured"}, {"id": "other"}])
    assert reuse_config(served, tmp_path).profiles == {"measured": MEASURED}
    (tmp_path / "measured" / FILE_NAME).write_text("{}")
    with pytest.raises(InvalidRequestError, match=r"noise_cache\.json"):
        reuse_config(served, tmp_path)
