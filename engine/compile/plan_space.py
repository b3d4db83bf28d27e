"""The space that plans take: which there are, which are in use, and which go to make room.

A plan is *in use* while some process holds a :class:`Lease` on it, a shared ``flock`` that the
system frees when the process dies. Removing one takes the same lock exclusively and renames the
folder first, so that nobody ever sees half a plan.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from engine.compile.plan_files import MANIFEST, MANIFEST_HASH

_REMOVING = ".removing-"


class Lease:
    """Says that a plan is in use, until this object is gone.

    Raises nothing: on a file system without locks, or a plan that may only be read, there is just
    less to know.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = os.open(folder / MANIFEST_HASH, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            os.utime(folder / MANIFEST_HASH)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPlan:
    """What a folder of the store says of itself; its files are not verified.

    Attributes:
        model, precision, backend: empty where the manifest cannot be read.
        size_bytes: on disk, measurements kept beside it included.
        used_at_s: when it was last opened, in seconds since 1970.
        in_use: whether some process has it open now.
    """

    digest: str
    model: str
    precision: str
    backend: str
    size_bytes: int
    used_at_s: float
    in_use: bool


def folders(root: Path) -> list[Path]:
    """The folders of every plan under ``root``."""
    return sorted(path.parent for path in root.glob(f"[!.]*/{MANIFEST}"))


def stored(root: Path) -> list[StoredPlan]:
    """Every plan of a store, least recently used first. One that goes meanwhile is left out."""
    plans = []
    for folder in folders(root):
        with suppress(FileNotFoundError):
            plans.append(_look(folder))
    return sorted(plans, key=lambda plan: plan.used_at_s)


def choose(
    plans: Collection[StoredPlan],
    *,
    max_bytes: int | None = None,
    idle_s: float | None = None,
    keep: Collection[str] = (),
    now_s: float | None = None,
) -> list[StoredPlan]:
    """Which plans to remove: those idle for too long, then the least recently used.

    Args:
        max_bytes: what all plans may take together; None for any amount.
        idle_s: how long a plan may lie unopened; None for ever.
        keep: digests that stay. Plans in use stay too, even if the rest takes more than it may.
        now_s: by default the time.
    """
    now_s = time.time() if now_s is None else now_s
    free = [plan for plan in plans if not plan.in_use and plan.digest not in keep]
    free.sort(key=lambda plan: plan.used_at_s)
    total_bytes = sum(plan.size_bytes for plan in plans)
    chosen = []
    for plan in free:
        idle = idle_s is not None and now_s - plan.used_at_s > idle_s
        if idle or (max_bytes is not None and total_bytes > max_bytes):
            chosen.append(plan)
            total_bytes -= plan.size_bytes
    return chosen


def remove(root: Path, digest: str) -> bool:
    """Remove a plan and its measurements; False where it is in use, being built, or gone.

    Raises:
        OSError: the system refuses.
    """
    folder = root / digest
    with suppress(BlockingIOError, FileNotFoundError), _exclusively(_lock(root, digest)):
        with _exclusively(folder / MANIFEST_HASH):
            doomed = root / f"{_REMOVING}{digest}"
            shutil.rmtree(doomed, ignore_errors=True)  # of a removal that died
            folder.rename(doomed)
        shutil.rmtree(doomed)
        shutil.rmtree(_timings(folder), ignore_errors=True)
        return True
    return False


def _look(folder: Path) -> StoredPlan:
    model = precision = backend = ""
    with suppress(ValueError, KeyError, TypeError):
        manifest = json.loads((folder / MANIFEST).read_text())
        model, precision = str(manifest["model"]["name"]), str(manifest["precision"])
        backend = str(manifest["backend"])
    stamp = folder / MANIFEST_HASH
    return StoredPlan(
        digest=folder.name,
        model=model,
        precision=precision,
        backend=backend,
        size_bytes=_size_bytes(folder) + _size_bytes(_timings(folder)),
        used_at_s=(stamp if stamp.exists() else folder).stat().st_mtime,
        in_use=_in_use(stamp),
    )


def _lock(root: Path, digest: str) -> Path:
    """The lock of whoever builds the plan; a plan that was copied here has none yet."""
    path = root / f".{digest}.lock"
    path.touch()
    return path


def _timings(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.timings")


def _size_bytes(folder: Path) -> int:
    """A torch plan's weights are links to the checkpoint's: they count too, as nobody can tell
    which of the two stays."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _in_use(stamp: Path) -> bool:
    try:
        with _exclusively(stamp):
            return False
    except BlockingIOError:
        return True
    except OSError:  # no lock can be had, so nobody has one
        return False


@contextmanager
def _exclusively(path: Path) -> Iterator[None]:
    """Hold the lock of a file that exists, or raise BlockingIOError at once."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
