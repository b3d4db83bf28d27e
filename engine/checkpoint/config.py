"""A JSON config with typed access: a value of the wrong kind names its file and its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CorruptCheckpointError

MAX_SIZE = 2**20
"""Bound on any whole number in a config: widths, vocabulary, picture sides."""
MAX_BLOCKS = 16
MAX_LAYERS = 128
"""Bounds on what makes building a module slow, so that a config cannot hang the server."""


@dataclass(frozen=True)
class Config:
    """One config file.

    Attributes:
        label: how messages call it, e.g. ``unet/config.json``.
        values: as found.
    """

    label: str
    values: Mapping[str, Any]

    def integer(self, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        """A whole number, 1 to ``most``."""
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(key, f"a whole number, 1 to {most}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A whole number, or None where the key is absent or null."""
        return None if self.values.get(key) is None else self.integer(key)

    def integers(
        self, key: str, default: int, length: int, *, most: int = MAX_SIZE
    ) -> tuple[int, ...]:
        """One whole number per block; a single one in the file stands for all of them."""
        value = self._get(key, default)
        items = value if isinstance(value, list) else [value] * length
        if len(items) != length or any(type(i) is not int or not 1 <= i <= most for i in items):
            raise self.wrong(key, f"a whole number, 1 to {most}, or {length} of them")
        return tuple(items)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of 1 to :data:`MAX_BLOCKS` strings."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a list of block names")
        if not 1 <= len(value) <= MAX_BLOCKS:
            raise self.wrong(key, f"1 to {MAX_BLOCKS} block names")
        return tuple(value)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        if not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def wrong(self, key: str, expected: str) -> CorruptCheckpointError:
        """The error for a value that is not ``expected``."""
        found = repr(self.values[key])[:80] if key in self.values else "missing"
        return CorruptCheckpointError(f"{self.label}: {key} is {found}; expected {expected}")

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        return default if value is None else value
