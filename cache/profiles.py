"""A measured :class:`~engine.ports.ReuseProfile` as a file beside its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequestError
from engine.ports import JumpTable, ReuseProfile, StateKind

FILE_NAME = "noise_cache.json"
"""In a checkpoint's folder."""

FORMAT = 2


def write_profile(path: Path, profile: ReuseProfile, measured: Mapping[str, Any]) -> None:
    """Write a profile, with what was measured for people to read."""
    content = {
        "format": FORMAT,
        "checkpoint": profile.checkpoint,
        "kind": profile.kind.value,
        "fractions": list(profile.fractions),
        "jumps": [list(step) for step in profile.jumps.steps],
        "measured": measured,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_profile(path: Path) -> ReuseProfile:
    """The profile of a file.

    Raises:
        InvalidRequestError: naming the file and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise InvalidRequestError(
                f"{path} has format {content['format']}; this build reads {FORMAT}"
            )
        return ReuseProfile(
            jumps=JumpTable(tuple((float(at), float(share)) for at, share in content["jumps"])),
            kind=StateKind(content["kind"]),
            fractions=tuple(float(share) for share in content["fractions"]),
            checkpoint=content["checkpoint"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(f"{path} is no noise cache profile: {error}") from error
