"""The configuration file as it lies on disk, what is laid over it, and how its errors are told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from engine.errors import InvalidRequestError
from server.config import ServeConfig


class Override(NamedTuple):
    """A value that is laid over the file, and where it came from, for the error that names it."""

    value: str | int | float | bool
    source: str


def read_config(path: Path | None, overrides: Mapping[str, Override] | None = None) -> ServeConfig:
    """Read a YAML file; without one, the defaults.

    Args:
        overrides: by dotted key (``http.port``), laid over the file before anything is validated.

    Raises:
        InvalidRequestError: naming the file and every key that is wrong, never a value.
    """
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidRequestError(f"{path} cannot be read: {error}", field="config") from error
    return checked_config(content, overrides, "configuration" if path is None else str(path))


def checked_config(
    content: Any, overrides: Mapping[str, Override] | None = None, where: str = "configuration"
) -> ServeConfig:
    """A file's content, read already; ``where`` is how messages name it.

    Raises:
        InvalidRequestError: naming every key that is wrong, never a value.
    """
    overrides = overrides or {}
    try:
        return ServeConfig.model_validate(_laid_over(content, overrides))
    except ValidationError as error:
        wrong = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "config"
            named = f"{overrides[key].source} ({key})" if key in overrides else key
            wrong.append(f"{named}: {item['msg']}")
        raise InvalidRequestError(f"{where}: {'; '.join(wrong)}", field="config") from error


def _laid_over(content: Any, overrides: Mapping[str, Override]) -> Any:
    """``content`` with every override in its place; what is no mapping is left to the validator."""
    content = {} if content is None else content
    for key, override in overrides.items():
        *sections, name = key.split(".")
        inner = content
        for section in sections:
            if not isinstance(inner, dict):
                return content
            if inner.get(section) is None:
                inner[section] = {}
            inner = inner[section]
        if isinstance(inner, dict):
            inner[name] = override.value
    return content
