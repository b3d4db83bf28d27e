"""The one module that reads the environment. A bad value is refused by key and value."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError
from server.config import ServeConfig
from server.config_file import Override, checked_config, read_config

PREFIX = "DARKROOM_"
CONFIG_KEYS: Mapping[str, str] = {
    "DARKROOM_HOST": "http.host",
    "DARKROOM_PORT": "http.port",
    "DARKROOM_PUBLIC_URL": "http.public_url",
    "DARKROOM_REDIS_URL": "redis.url",
    "DARKROOM_REPLICAS": "workers.replicas",
    "DARKROOM_DEVICE": "workers.device",
    "DARKROOM_LOG_LEVEL": "logging.level",
    "DARKROOM_LOG_FORMAT": "logging.format",
    # OpenTelemetry's own names, under which every service of a platform is told.
    "OTEL_EXPORTER_OTLP_ENDPOINT": "telemetry.endpoint",
    "OTEL_EXPORTER_OTLP_HEADERS": "telemetry.headers",
    "OTEL_SERVICE_NAME": "telemetry.service_name",
}
"""Variables that are laid over the configuration file, and the keys that they set."""
_OWN_KEYS = (
    "DARKROOM_CONFIG",
    "DARKROOM_HOME",
    "DARKROOM_MODELS",
    "DARKROOM_PLANS_MAX_GB",
    "DARKROOM_THREADS",
)
GIGABYTE = 1_000_000_000
_PLANS_MAX_GB = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where things are and how much of the machine to use."""

    home: Path
    """Compiled plans and their measurements (``DARKROOM_HOME``)."""
    models: Path
    """Folder of checkpoints, each a folder in Diffusers layout (``DARKROOM_MODELS``)."""
    threads: int
    """CPU threads of the graphs (``DARKROOM_THREADS``); the cores that this process may use."""
    plans_max_bytes: int = _PLANS_MAX_GB * GIGABYTE
    """What plans may take on the disk (``DARKROOM_PLANS_MAX_GB``); least recently used ones go."""
    device: str | None = None
    """Where pictures are drawn without a server (``DARKROOM_DEVICE``); None: as the backend has
    it."""
    config: Path | None = None
    """The configuration file of ``darkroom serve`` (``DARKROOM_CONFIG``)."""

    @property
    def plans(self) -> Path:
        """Where plans are stored."""
        return self.home / "plans"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read ``DARKROOM_*``.

        Raises:
            InvalidRequestError: a key that is not known, or a value that cannot be used.
        """
        environ = os.environ if environ is None else environ
        given = {key: value for key, value in environ.items() if key.startswith(PREFIX)}
        known = {*_OWN_KEYS, *CONFIG_KEYS}
        if unknown := sorted(given.keys() - known):
            raise InvalidRequestError(
                f"unknown setting {unknown[0]}; known: {', '.join(sorted(known))}"
            )
        config = given.get("DARKROOM_CONFIG")
        cache_home = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return cls(
            home=Path(given.get("DARKROOM_HOME") or Path(cache_home) / "darkroom").absolute(),
            models=Path(given.get("DARKROOM_MODELS") or _bundled_models()).absolute(),
            threads=_positive(given, "DARKROOM_THREADS", default=usable_cores()),
            plans_max_bytes=GIGABYTE
            * _positive(given, "DARKROOM_PLANS_MAX_GB", default=_PLANS_MAX_GB),
            device=given.get("DARKROOM_DEVICE") or None,
            config=Path(config).absolute() if config else None,
        )


def served_config(
    path: Path | None = None,
    *,
    flags: Mapping[str, str | int | float | bool | None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ServeConfig:
    """The configuration that counts: flags over the environment over the file over the defaults.

    Args:
        path: of the file; by default what ``DARKROOM_CONFIG`` names.
        flags: values from the command line by dotted key; those that are None were not given.

    Raises:
        InvalidRequestError: naming the variable, flag or key that is wrong.
    """
    environ = os.environ if environ is None else environ
    path = path or Settings.from_environment(environ).config
    overrides = _overrides(environ) | {
        key: Override(value, f"--{key.rpartition('.')[2].replace('_', '-')}")
        for key, value in (flags or {}).items()
        if value is not None
    }
    return read_config(path, overrides)


def deployed_config(
    content: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> ServeConfig:
    """The same for a deployment that states its keys itself, as KubeRay's does: secrets come from
    the environment.

    Raises:
        InvalidRequestError: naming the variable or key that is wrong.
    """
    return checked_config(dict(content), _overrides(os.environ if environ is None else environ))


def _overrides(environ: Mapping[str, str]) -> dict[str, Override]:
    return {
        key: Override(environ[name], name) for name, key in CONFIG_KEYS.items() if environ.get(name)
    }


def set_default_environment(values: Mapping[str, str]) -> None:
    """What other libraries read from the environment; what is set already stays."""
    for key, value in values.items():
        os.environ.setdefault(key, value)


def clear_environment(keys: Iterable[str]) -> None:
    """Unset what other libraries would read."""
    for key in keys:
        os.environ.pop(key, None)


@contextmanager
def extended_environment(values: Mapping[str, str]) -> Iterator[None]:
    """The same for a while, for processes that are started meanwhile."""
    mine = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del os.environ[key]


def usable_cores() -> int:
    """Cores that this process may run on, container limits included."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(allowed or 1, _cgroup_cores() or allowed or 1))


def _cgroup_cores() -> int | None:
    """The CPU quota of the control group (version 2), rounded up; None without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    if quota == "max":
        return None
    return max(1, -(-int(quota) // int(period)))


def _bundled_models() -> Path:
    """The repository's own ``models/``, where the default model is."""
    return Path(__file__).resolve().parent.parent / "models"


def _positive(given: Mapping[str, str], key: str, *, default: int) -> int:
    text = given.get(key, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise InvalidRequestError(f"{key}={text!r}; allowed: a whole number, 1 or more", field=key)
    return int(text)
