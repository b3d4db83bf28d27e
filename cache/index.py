"""The index of one namespace: which entries are closest to a prompt, and what is stored of them.

Exact search: one matrix-vector product over all embeddings of a key. That is the right tool at the
sizes that occur: a byte limit of a gigabyte holds some 10⁵ entries of the smallest latents and 10³
of SDXL's. ``python -m loadtests.cache_index`` measures it beside an approximate library.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cache.embedding import DIMENSIONS
from engine.ports import Candidate, Embedding, StateRef

_FIRST_CAPACITY = 64


class VectorTable:
    """Unit vectors by name, searched exactly. Not thread-safe."""

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        self._vectors = np.zeros((_FIRST_CAPACITY, dimensions), dtype=np.float32)
        self._names: list[str] = []
        self._slots: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._names)

    def put(self, name: str, vector: Embedding) -> None:
        """Add a vector, or replace the one of that name."""
        slot = self._slots.get(name)
        if slot is None:
            slot = len(self._names)
            if slot == len(self._vectors):
                self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
            self._names.append(name)
            self._slots[name] = slot
        self._vectors[slot] = vector

    def remove(self, name: str) -> None:
        """Forget a vector; the last one takes its row, so that the table stays dense."""
        slot = self._slots.pop(name)
        last = self._names.pop()
        if last != name:
            self._vectors[slot] = self._vectors[len(self._names)]
            self._names[slot] = last
            self._slots[last] = slot

    def nearest(
        self, vector: Embedding, limit: int, without: Sequence[str] = ()
    ) -> list[tuple[str, float]]:
        """Up to ``limit`` (name, cosine) pairs, best first; equal ones in no fixed order."""
        if not self._names:
            return []
        cosines: npt.NDArray[np.float32] = self._vectors[: len(self._names)] @ vector
        for name in without:
            if (slot := self._slots.get(name)) is not None:
                cosines[slot] = -np.inf
        limit = min(limit, len(cosines))
        best = np.argpartition(cosines, -limit)[-limit:]
        ordered = best[np.argsort(-cosines[best], kind="stable")]
        return [(self._names[i], float(cosines[i])) for i in ordered if np.isfinite(cosines[i])]


@dataclass(slots=True)
class _Entry:
    group: str | None
    claims: set[str]
    states: dict[str, StateRef] = field(default_factory=dict)


class EntryIndex:
    """Entries of one namespace by their key's digest. Safe from any thread; applying a change twice
    is harmless, so that a replica may read the log again.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._tables: dict[str, VectorTable] = {}
        self._claimed: defaultdict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()

    @property
    def entries(self) -> int:
        """Entries in it."""
        return len(self._entries)

    @property
    def states(self) -> int:
        """States of all entries."""
        with self._lock:
            return sum(len(entry.states) for entry in self._entries.values())

    def names(self) -> set[str]:
        """Ids of all entries."""
        with self._lock:
            return set(self._entries)

    def add(
        self,
        entry: str,
        group: str | None,
        embedding: Embedding | None,
        states: Sequence[StateRef],
        claims: Sequence[str] = (),
    ) -> None:
        """Add an entry, or replace what is known of it.

        Args:
            group: digest of its key; None, like the embedding, for entries found by id alone.
        """
        with self._lock:
            self._forget(entry)
            if not states:
                return
            ordered = sorted(states, key=lambda state: (state.log_snr, state.id))
            self._entries[entry] = _Entry(group, set(claims), {s.id: s for s in ordered})
            for claim in claims:
                self._claimed[claim].add(entry)
            if group is not None and embedding is not None:
                self._tables.setdefault(group, VectorTable(len(embedding))).put(entry, embedding)

    def claim(self, entry: str, claim: str) -> None:
        """Note that ``claim`` has used the entry and may not again."""
        with self._lock:
            if (known := self._entries.get(entry)) is not None:
                known.claims.add(claim)
                self._claimed[claim].add(entry)

    def drop_state(self, state: str) -> None:
        """Forget a state, and its entry with the last one."""
        entry = entry_of(state)
        with self._lock:
            known = self._entries.get(entry)
            if known is None:
                return
            known.states.pop(state, None)
            if not known.states:
                self._forget(entry)

    def drop(self, entry: str) -> None:
        """Forget an entry."""
        with self._lock:
            self._forget(entry)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._tables.clear()
            self._claimed.clear()

    def nearest(
        self, group: str, embedding: Embedding, *, claim: str, limit: int
    ) -> list[Candidate]:
        """The closest entries of a group that ``claim`` has not used, best first."""
        with self._lock:
            table = self._tables.get(group)
            if table is None:
                return []
            found = table.nearest(embedding, limit, tuple(self._claimed.get(claim, ())))
            return [
                Candidate(name, similarity, tuple(self._entries[name].states.values()))
                for name, similarity in found
            ]

    def _forget(self, entry: str) -> None:
        known = self._entries.pop(entry, None)
        if known is None:
            return
        for claim in known.claims:
            self._claimed[claim].discard(entry)
            if not self._claimed[claim]:
                del self._claimed[claim]
        if known.group is not None and (table := self._tables.get(known.group)) is not None:
            table.remove(entry)
            if not len(table):
                del self._tables[known.group]


def state_id(entry: str, number: int) -> str:
    """Id of an entry's state."""
    return f"{entry}.{number}"


def entry_of(state: str) -> str:
    """The entry that a state belongs to."""
    return state.rpartition(".")[0]
