"""What a graph gave for the same inputs before: a few results, found again by comparing tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    inputs: Tensors
    versions: Mapping[str, int]
    """How often each of ``inputs`` had been written to when it was computed with."""
    outputs: Tensors

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), *self.outputs.values()))

    def is_for(self, inputs: Tensors) -> bool:
        """Whether ``inputs`` hold what ``outputs`` were computed from."""
        return inputs.keys() == self.inputs.keys() and all(
            known._version == self.versions[name] and _equal(known, inputs[name])
            for name, known in self.inputs.items()
        )


def _equal(known: Tensor, given: Tensor) -> bool:
    if known is given:
        return True
    alike = (known.shape, known.dtype, known.device) == (given.shape, given.dtype, given.device)
    return alike and torch.equal(known, given)


def _versions(inputs: Tensors) -> dict[str, int]:
    return {name: tensor._version for name, tensor in inputs.items()}


def _renewed(entry: _Entry, inputs: Tensors) -> _Entry:
    """``entry`` with the tensors that it was asked for with: they are likely to come again."""
    if any(tensor.is_inference() for tensor in inputs.values()):
        return entry
    if all(tensor is entry.inputs[name] for name, tensor in inputs.items()):
        return entry
    return _Entry(dict(inputs), _versions(inputs), entry.outputs)


class TensorMemo:
    """The latest results of one function of tensors. Safe to use from several threads.

    Inputs are kept by reference and compared by identity first, then by value; those that torch
    has seen written to since count as unknown. Writes that torch does not count (through an
    array that shares their memory, ``.data``, a replayed CUDA graph) would go unnoticed: whoever
    feeds a memo does none.

    Args:
        max_entries: results kept, the latest used ones.
        max_bytes: of their inputs and outputs together. The latest alone is kept whatever its
            size: it is that of one run.
    """

    def __init__(self, *, max_entries: int = 4, max_bytes: int = 512 * 2**20) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: list[_Entry] = []  # the latest used last
        self._lock = threading.Lock()
        self._closed = False

    def recall(self, inputs: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        """What ``compute()`` gave for ``inputs``, run now only if that is not known any more.

        Two threads that ask at once may both compute. The result is shared: it must not be
        written to.
        """
        with self._lock:
            entries = tuple(self._entries)
        # Compared outside the lock: on a GPU it waits for the device.
        for entry in reversed(entries):
            if entry.is_for(inputs):
                self._use(entry, instead=_renewed(entry, inputs))
                return entry.outputs
        if any(tensor.is_inference() for tensor in inputs.values()):
            return compute()  # torch does not count the writes to these
        entry = _Entry(dict(inputs), _versions(inputs), compute())
        self._use(entry, instead=entry)
        return entry.outputs

    def clear(self) -> bool:
        """Forget everything; returns whether there was anything."""
        with self._lock:
            held, self._entries = bool(self._entries), []
        return held

    def close(self) -> None:
        """Forget everything, for good: results of computations that still run are not kept."""
        with self._lock:
            self._closed = True
            self._entries.clear()

    def _use(self, entry: _Entry, *, instead: _Entry) -> None:
        """Put ``instead`` in ``entry``'s place, as the latest; let go of the oldest ones."""
        with self._lock:
            if self._closed:
                return
            kept = [known for known in self._entries if known is not entry]
            kept.append(instead)
            while len(kept) > 1 and (
                len(kept) > self._max_entries
                or sum(known.size_bytes for known in kept) > self._max_bytes
            ):
                del kept[0]
            self._entries = kept
