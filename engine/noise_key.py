"""What must be equal for two requests to share states: the noise cache's key of a request."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np

from engine.model import Model
from engine.ports import CacheKey
from engine.prepare import Resolved
from engine.types import GenerateRequest

_NEVER_IN_PIXELS = frozenset({"priority", "deadline_s", "preview_every", "cache"})
"""Fields that change how a picture is drawn, but not which."""

_NOT_IN_STATES = _NEVER_IN_PIXELS | {
    "prompt",  # similarity compares it
    "seed",  # another one is the point
    "steps",  # a state is labelled by its level, whatever table led there and goes on
    "solver",
    "schedule",
    "timesteps",
    "eta",
    "width_px",  # in the latent's shape
    "height_px",
    "negative_prompt",  # in the key by itself
    "guidance",
    "guidance_interval",
    "image",  # text to image only
    "mask",
    "strength",
}
"""Fields that states of different requests may differ in, or that the key has by itself. All
others, and any that is added to requests later, must be equal: forgetting one here costs hits,
never a wrong picture."""


def key_of(resolved: Resolved, model: Model, tenant: str | None) -> CacheKey:
    """The key of a request; ``tenant`` None where all share."""
    request = resolved.request
    guided = any(resolved.guided)
    return CacheKey(
        tenant=tenant,
        checkpoint=model.spec.fingerprint,
        noise_schedule=digest(model.solver_defaults.noise_schedule),
        latent_shape=model.latent_shape(resolved.width_px, resolved.height_px),
        negative_prompt=request.negative_prompt if guided else "",
        guidance=_guidance_class(resolved, embedded=model.spec.guidance_embedding_size is not None),
        conditions=digest(_fields(request, without=_NOT_IN_STATES)),
    )


def exact_id(resolved: Resolved, model: Model) -> str:
    """Digest of everything that decides the pixels: equal requests draw the identical picture."""
    fields = _fields(resolved.request, without=_NEVER_IN_PIXELS)
    defaults = (
        resolved.seed,
        resolved.width_px,
        resolved.height_px,
        resolved.guidance,
        resolved.guided,
        resolved.table.transition,
        resolved.table.timesteps,
    )
    return "x" + digest((model.digest, fields, defaults))[:31]


def claim_of(tenant: str | None, prompt: str) -> str:
    """Digest of a tenant's prompt: what a ``NOISY`` state remembers of those who used it."""
    return digest((tenant, prompt))[:32]


def _guidance_class(resolved: Resolved, *, embedded: bool) -> str:
    """Scales of a class steer alike: the nearest whole number, and its interval."""
    if embedded:
        return f"embedded {round(resolved.guidance)}"
    if not any(resolved.guided):
        return "off"
    low, high = resolved.request.guidance_interval
    return f"{round(resolved.guidance)} in {low}-{high}"


def _fields(request: GenerateRequest, *, without: frozenset[str]) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(request))
    return {name: getattr(request, name) for name in names if name not in without}


def digest(value: object) -> str:
    """Hex digest of a plain value; equal exactly for equal values of equal types.

    Raises:
        TypeError: a kind of value of which nobody can say when two are equal.
    """
    hasher = hashlib.sha256()
    for part in _parts(value):
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def _parts(value: object) -> list[bytes]:
    kind = type(value).__name__.encode()
    if isinstance(value, Enum):
        return [b"enum", kind, str(value.value).encode()]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return [kind, value if isinstance(value, bytes) else repr(value).encode()]
    if isinstance(value, np.ndarray):
        return [b"array", f"{value.dtype.str}{value.shape}".encode(), value.tobytes()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        pairs = sorted(value.items())
        return [kind, b"%d" % len(pairs), *(p for pair in pairs for v in pair for p in _parts(v))]
    if isinstance(value, Sequence):
        return [kind, b"%d" % len(value), *(part for item in value for part in _parts(item))]
    raise TypeError(f"a {type(value).__name__} has no digest")
