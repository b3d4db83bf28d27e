"""Memory of a device, and which model to close when another needs room. No threads, no engine."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

DEFAULT_SHARE = 0.6
"""Part of the device's memory for open models; the rest is for pictures in the making."""

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_PAGE_BYTES = 4096
_UNKNOWN_BYTES = 8 << 30


# ---------------------------------------------------------------------- policy


@dataclass(slots=True, eq=False)
class Entry:
    """A model that may be open.

    Attributes:
        size_bytes: that it takes, or would take; corrected when it is opened.
        leaving: it was removed, and only finishes what it has begun.
        users: unfinished requests.
        used_at_s: when its last use began or ended.
        opening_s: seconds that opening it took the last time.
    """

    name: str
    size_bytes: int
    open: bool = False
    leaving: bool = False
    users: int = 0
    used_at_s: float = 0.0
    opening_s: float = 0.0


def missing_bytes(entries: Iterable[Entry], wanted: Entry, budget_bytes: int) -> int:
    """Bytes that must be freed before ``wanted`` fits; 0 or less when it does."""
    return (
        sum(entry.size_bytes for entry in entries if entry.open) + wanted.size_bytes - budget_bytes
    )


def patience_s(wanted: Entry, least_s: float) -> float:
    """How long ``wanted`` waits before it may push out a model that is in use.

    Many times what opening costs: two models that share too little memory would otherwise spend
    it all on opening each other.
    """
    return max(least_s, 5.0 * wanted.opening_s)


def victim(entries: Iterable[Entry], *, may_push: bool) -> Entry | None:
    """The open model to close next: the idle one longest unused.

    None where all are in use, unless the one that waits ``may_push``.
    """
    candidates = [entry for entry in entries if entry.open]
    idle = [entry for entry in candidates if entry.users == 0]
    return min(idle or (candidates if may_push else []), key=lambda e: e.used_at_s, default=None)


# ---------------------------------------------------------------------- devices


def total_bytes(device: torch.device) -> int:
    """Memory of a device; on CPU, what this process's container may use of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    found = [size for size in (_meminfo_bytes(), _cgroup_bytes()) if size is not None]
    return min(found, default=_UNKNOWN_BYTES)


def used_bytes(device: torch.device) -> int:
    """Memory in use: of the whole device on CUDA, of this process on CPU; 0 where unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0


def give_back(device: torch.device) -> None:
    """Return to the system what closed models have left in this process's pools."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _meminfo_bytes() -> int | None:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_bytes() -> int | None:
    try:
        return int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # "max" is no number
        return None
