"""The environment is read in one module, and a bad value is refused by key and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import InvalidRequestError
from server.settings import Settings, usable_cores


def test_defaults_need_nothing(tmp_path: Path) -> None:
    settings = Settings.from_environment({"XDG_CACHE_HOME": str(tmp_path)})
    assert settings.home == tmp_path / "darkroom"
    assert settings.plans == tmp_path / "darkroom" / "plans"
    assert settings.threads == usable_cores() >= 1
    assert settings.device is None
    assert Settings.from_environment({"DARKROOM_DEVICE": "cuda:1"}).device == "cuda:1"


@pytest.mark.parametrize(
    ("key", "value"),
    [("DARKROOM_THREADS", "0"), ("DARKROOM_THREADS", "two"), ("DARKROOM_THREDS", "2")],
)
def test_a_bad_setting_is_named(key: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=key):
        Settings.from_environment({key: value})
