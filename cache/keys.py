"""Names: which requests may share states, and under which keys Redis holds them.

The only module that makes Redis keys. All keys of a namespace (a tenant's states of one model)
share one hash tag, so that a cluster keeps them on one node and one script may touch them all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from engine.ports import CacheKey

SCHEMA = 1
"""Raised when the meaning of anything stored changes; caches of different schemas never meet."""

PREFIX = f"darkroom:noise:{SCHEMA}"
REGISTRY = f"{PREFIX}:namespaces"
"""Sorted set of the namespaces in use, by the Unix time at which one was last opened."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A tenant's states of one checkpoint: the unit of the byte limit, and of clearing."""

    tenant: str | None
    checkpoint: str

    @property
    def tag(self) -> str:
        """Digest that names it in Redis; no tenant's id appears in a key."""
        return _digest(
            "shared" if self.tenant is None else f"tenant:{self.tenant}", self.checkpoint
        )

    @property
    def name(self) -> str:
        """How the registry lists it; :meth:`named` reads it."""
        return json.dumps([self.tenant, self.checkpoint])

    @classmethod
    def named(cls, name: str) -> Namespace:
        """The namespace of that :attr:`name`.

        Raises:
            ValueError: it is no namespace's name.
        """
        try:
            match json.loads(name):
                case [None | str() as tenant, str() as checkpoint]:
                    named = cls(tenant, checkpoint)
                    # Keys cannot be made of half a surrogate pair, and no two names are one's.
                    if named.tag and named.name == name:
                        return named
        except (ValueError, RecursionError):
            pass
        raise ValueError("not the name of a namespace")  # which may be anything: not repeated

    @property
    def states(self) -> str:
        """Hash of states, entries and their bookkeeping."""
        return self._key("states")

    @property
    def scores(self) -> str:
        """Sorted set: a state's id by its eviction score."""
        return self._key("scores")

    @property
    def size(self) -> str:
        """Counter of charged bytes."""
        return self._key("bytes")

    @property
    def log(self) -> str:
        """Stream of changes, from which every worker's index follows."""
        return self._key("log")

    @property
    def keys(self) -> tuple[str, str, str, str]:
        """Every key of the namespace, in the order in which the scripts declare them."""
        return self.states, self.scores, self.size, self.log

    def _key(self, part: str) -> str:
        return f"{PREFIX}:{{{self.tag}}}:{part}"


def namespace_of(key: CacheKey) -> Namespace:
    """The namespace of a request's key."""
    return Namespace(key.tenant, key.checkpoint)


def compatibility(key: CacheKey, embedding: str) -> str:
    """Digest of what must match within a namespace; ``embedding`` names the prompts' embedder."""
    return _digest(
        embedding,
        key.noise_schedule,
        "x".join(map(str, key.latent_shape)),
        key.negative_prompt,
        key.guidance,
        key.conditions,
    )


def _digest(*parts: str) -> str:
    """32 hex digits; lengths are hashed too, so that no two lists of parts run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]
