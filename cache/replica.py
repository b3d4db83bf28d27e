"""This process's copy of a namespace's index, kept true to Redis by its log of changes.

A replica reads the log from where it stands. It reads the whole index anew when the log does not
lead on from there: it was trimmed past that point, or the server was flushed, restarted or replaced
(the log then counts fewer entries than were applied, or more than there can have been since).
Applying a change twice is harmless, so the order of scan and log does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import redis

from cache.embedding import unit
from cache.index import EntryIndex, entry_of
from cache.keys import Namespace
from engine.ports import Embedding, StateKind, StateRef

_READ_COUNT = 512
_SCAN_COUNT = 1000
_MOST_READS = 16
_START = b"0-0"


class Replica:
    """One namespace's index. Only :meth:`follow`'s caller writes to it."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.index = EntryIndex()
        self.resyncs = 0
        self.corrupt = 0
        """Records that could not be read, and were left out."""
        self.size_bytes = 0
        """What the namespace was charged when it was last looked at."""
        self._position: bytes | None = None  # of the last log entry applied; None: never read
        self._applied = 0

    def follow(self, client: redis.Redis) -> None:
        """Catch up with Redis: one round trip when there is little news.

        Raises:
            redis.RedisError: Redis could not be asked; the index stays as it is.
        """
        if self._position is None:
            self._read_anew(client)
        for _ in range(_MOST_READS):  # the rest waits for the next call
            before, events, after = self._read_log(client)
            whole = len(events) < _READ_COUNT
            applied = self._applied + len(events)
            if applied > after or (whole and applied < before):
                self._read_anew(client)
                continue
            self._apply(client, [fields for _, fields in events])
            if events:
                self._position = events[-1][0]
            self._applied = applied
            if whole:
                return

    def _read_log(
        self, client: redis.Redis
    ) -> tuple[int, list[tuple[bytes, dict[bytes, bytes]]], int]:
        """Entries ever added to the log, what came after our position, and the count once more."""
        pipeline = client.pipeline(transaction=False)
        pipeline.xinfo_stream(self.namespace.log)
        pipeline.xread({self.namespace.log: self._position or _START}, count=_READ_COUNT)
        pipeline.xinfo_stream(self.namespace.log)
        pipeline.get(self.namespace.size)
        before, streams, after, size = pipeline.execute(raise_on_error=False)
        for answer in (before, streams, after, size):
            if isinstance(answer, Exception) and not _is_missing(answer):
                raise answer
        self.size_bytes = int(size or 0)
        events = streams[0][1] if streams and not isinstance(streams, Exception) else []
        return _added(before), list(events), _added(after)

    def _read_anew(self, client: redis.Redis) -> None:
        """Replace the index by what Redis holds."""
        pipeline = client.pipeline(transaction=False)
        pipeline.xinfo_stream(self.namespace.log)
        (info,) = pipeline.execute(raise_on_error=False)
        if isinstance(info, Exception) and not _is_missing(info):
            raise info
        found: dict[bytes, bytes] = {}
        cursor = 0
        while True:
            # HSCAN has no way to leave out large values, but those that do not match stay there.
            cursor, part = client.hscan(
                self.namespace.states, cursor, match="[emc]:*", count=_SCAN_COUNT
            )
            found.update(cast(dict[bytes, bytes], part))
            if cursor == 0:
                break
        self.index.clear()
        self._add(found, self._states_of(found))
        if self._position is not None:
            self.resyncs += 1
        self._applied = _added(info)
        missing = isinstance(info, Exception)
        self._position = _START if missing else cast(bytes, info["last-generated-id"])

    def _apply(self, client: redis.Redis, events: Iterable[dict[bytes, bytes]]) -> None:
        """Apply changes in their order; records of added entries are read in one go."""
        changes = list(events)
        added = {
            fields[b"a"].decode(): self._refs(fields[b"s"].decode())
            for fields in changes
            if b"a" in fields
        }
        records = self._records(client, list(added))
        for fields in changes:
            if b"a" in fields:
                entry = fields[b"a"].decode()
                self._add(records, {entry: added[entry]})
            for state in fields.get(b"x", b"").decode().split():
                self.index.drop_state(state)
            if b"c" in fields:
                self.index.claim(*fields[b"c"].decode().split(" ", 1))
            if b"f" in fields:
                self.index.clear()

    def _records(self, client: redis.Redis, entries: Sequence[str]) -> dict[bytes, bytes]:
        if not entries:
            return {}
        names = [f"{part}:{entry}" for entry in entries for part in "ec"]
        values = cast(list[bytes | None], client.hmget(self.namespace.states, names))
        return {
            name.encode(): value
            for name, value in zip(names, values, strict=True)
            if value is not None
        }

    def _refs(self, listed: str) -> list[StateRef]:
        """``id|kind|log_snr`` separated by spaces."""
        items = (item.partition("|") for item in listed.split())
        return [ref for id_, _, told in items if (ref := self._ref(id_, told)) is not None]

    def _states_of(self, found: dict[bytes, bytes]) -> dict[str, list[StateRef]]:
        states: dict[str, list[StateRef]] = defaultdict(list)
        for name, value in found.items():
            if name.startswith(b"m:"):
                described = value.split(b"|", 2)[-1].decode(errors="replace")  # after charge, uses
                if (ref := self._ref(name[2:].decode(), described)) is not None:
                    states[entry_of(ref.id)].append(ref)
        return states

    def _ref(self, id_: str, described: str) -> StateRef | None:
        kind, _, log_snr = described.partition("|")
        try:
            return StateRef(id_, StateKind(kind), float(log_snr))
        except ValueError:
            self.corrupt += 1
            return None

    def _add(self, records: dict[bytes, bytes], states: dict[str, list[StateRef]]) -> None:
        for entry, refs in states.items():
            record = records.get(f"e:{entry}".encode())
            if record is None:  # evicted since; its states are or will be in the log as gone
                continue
            try:
                _, group, vector = record.split(b"|", 2)
                embedding = decode_embedding(vector)
                claims = records.get(f"c:{entry}".encode(), b"").decode().split(",")
                self.index.add(
                    entry,
                    None if embedding is None else group.decode(),
                    embedding,
                    refs,
                    [claim for claim in claims if claim],
                )
            except ValueError:
                self.corrupt += 1


def encode_embedding(embedding: Embedding | None) -> bytes:
    """Half precision: its error of 2⁻¹¹ is far below the steps of any jump table."""
    return b"" if embedding is None else embedding.astype("<f2").tobytes()


def decode_embedding(data: bytes) -> Embedding | None:
    """What :func:`encode_embedding` made; None for an entry without one."""
    return unit(np.frombuffer(data, "<f2").astype(np.float32)) if data else None


def describe_state(state: StateRef) -> str:
    """``kind|log_snr``, as the log and the bookkeeping have it; a replica reads it."""
    return f"{state.kind.value}|{state.log_snr!r}"


def _is_missing(answer: Exception) -> bool:
    return isinstance(answer, redis.ResponseError) and "no such key" in str(answer)


def _added(info: Any) -> int:
    """Entries ever added to a log; 0 where there is none."""
    return 0 if isinstance(info, Exception) else int(info["entries-added"])
