"""Plans on disk: addressed by a digest of everything that went in, whole or not there at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.compile.manifest import PlanManifest, Tap
from engine.compile.plan_files import MANIFEST, hash_file, read_manifest, seal, sync
from engine.compile.plan_space import Lease, StoredPlan, choose, folders, remove, stored
from engine.errors import PlanCorruptError, PlanError, PlanStorageError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.compile.tensorrt_profile import EngineTarget

_BUILDING = ".building-"
_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as a build goes on."""


class Transform(Protocol):
    """Changes the exported graphs of a plan before it is sealed: quantization."""

    @property
    def recipe(self) -> dict[str, object]:
        """What it does, as JSON; part of the plan's digest."""
        ...

    def __call__(
        self, folder: Path, manifest: PlanManifest, checkpoint: Checkpoint, progress: Progress
    ) -> PlanManifest:
        """Rewrite graph files in ``folder`` in place.

        ``manifest`` is that of a float plan, complete but for its hashes: the folder can be opened
        and run, for calibration. Returns the manifest with whatever the rewriting changed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled checkpoint: its folder, whose files have been verified, and its manifest.

    As long as it is referred to, its store does not remove it.
    """

    folder: Path
    manifest: PlanManifest
    _lease: Lease | None = field(default=None, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """Of everything that went in."""
        return self.manifest.digest

    @property
    def timings_folder(self) -> Path:
        """Where what was measured of the plan on some device is kept: beside it, not in it."""
        return self.folder.with_name(f"{self.folder.name}.timings")


class PlanStore:
    """Builds and opens the plans under one folder. Any number of processes may share it.

    Args:
        max_bytes: what its plans may take together. Before it would be more, those that nobody has
            open are removed, least recently used first; None for any amount.
    """

    def __init__(self, root: Path, *, max_bytes: int | None = None) -> None:
        self._root = root
        self._max_bytes = max_bytes

    def build(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str = "onnxruntime",
        precision: str = "fp32",
        cuts: Sequence[str] | None = None,
        taps: Sequence[Tap] = (),
        transform: Transform | None = None,
        target: EngineTarget | None = None,
        progress: Progress | None = None,
    ) -> Plan:
        """The plan with these ingredients: built unless it is there, and by one process only.

        Args:
            cuts: units of the UNet after which to cut (see :mod:`engine.compile.units`); None:
                between blocks.
            taps: inner tensors to let out or in.
            transform: for int8, how to quantize; None: :func:`int8_transform` with its defaults.
            target: for backend ``tensorrt``, the GPUs and shapes to build engines for; None: this
                machine's GPU, and every shape that the model allows.

        Raises:
            UnsupportedError: the backend or the exporter cannot do it; says what can.
            PlanError: a cut or tap names no unit, or the export failed.
            PlanStorageError: the plan could not be written.
        """
        from engine.compile.build import Ingredients, build_plan

        if precision == "int8" and transform is None:
            from engine.compile.quantize import INT8_BACKENDS, int8_transform

            transform = int8_transform(backend) if backend in INT8_BACKENDS else None
        ingredients = Ingredients.of(
            checkpoint,
            backend=backend,
            precision=precision,
            cuts=None if cuts is None else tuple(cuts),
            taps=tuple(taps),
            recipe={} if transform is None else transform.recipe,
            target=target,
        )
        tell = progress or _say_nothing
        folder = self._root / ingredients.digest
        with _storage(self._root), self._alone(ingredients.digest):
            if (known := self._load_if_whole(folder)) is not None:
                return known
            temporary = self._root / f"{_BUILDING}{ingredients.digest}"
            self._sweep(but=temporary)
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                manifest = build_plan(ingredients, temporary, tell)
                if transform is not None:
                    manifest = transform(temporary, manifest, checkpoint, tell)
                if ingredients.target is not None:
                    from engine.compile.tensorrt import build_engines

                    manifest = build_engines(temporary, manifest, ingredients.target, tell)
                seal(temporary, manifest)
                temporary.replace(folder)
                sync(self._root)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            built = self._load(folder)
        self._make_room(but=built)
        return built

    def open(self, plan: str | Path) -> Plan:
        """Open a plan by digest, by the beginning of one, or by folder, and verify its files.

        Raises:
            PlanError: there is no such plan, or more than one.
            PlanCorruptError: its files are not those that were built.
        """
        if (Path(plan) / MANIFEST).is_file():
            return self._load(Path(plan))
        found = [folder for folder in self._folders() if folder.name.startswith(str(plan))]
        if len(found) != 1:
            raise PlanError(f"{len(found) or 'no'} plans match {plan!s} in {self._root}")
        return self._load(found[0])

    def digests(self) -> list[str]:
        """Every plan of the store, verified or not."""
        return [folder.name for folder in self._folders()]

    def stored(self) -> list[StoredPlan]:
        """What every plan of the store takes, least recently used first."""
        return stored(self._root)

    def remove(self, digest: str) -> bool:
        """Remove a plan; False where it is in use, being built, or gone.

        Raises:
            PlanStorageError: the system refuses.
        """
        with _storage(self._root):
            return remove(self._root, digest)

    def _make_room(self, but: Plan) -> None:
        """Keep within the bound. A store that cannot is a warning, no reason to fail a build."""
        if self._max_bytes is None:
            return
        plans = self.stored()
        left = sum(plan.size_bytes for plan in plans)
        for plan in choose(plans, max_bytes=self._max_bytes, keep=(but.digest,)):
            with suppress(OSError):
                if remove(self._root, plan.digest):
                    left -= plan.size_bytes
                    _log.info("removed plan %s of %s to make room", plan.digest[:12], plan.model)
        if left > self._max_bytes:
            _log.warning("plans take %d bytes of %d: the others are in use", left, self._max_bytes)

    def _folders(self) -> list[Path]:
        return folders(self._root)

    def _load_if_whole(self, folder: Path) -> Plan | None:
        """The plan in ``folder``; None where there is none, and a corrupt one is removed."""
        if not (folder / MANIFEST).exists():
            return None
        try:
            return self._load(folder)
        except PlanCorruptError as error:
            _log.warning("building again: %s", error)
            shutil.rmtree(folder)
            return None

    @staticmethod
    def _load(folder: Path) -> Plan:
        lease = Lease(folder)
        manifest = read_manifest(folder)
        for name, expected in manifest.files.items():
            path = folder / name
            if not path.is_file() or hash_file(path) != expected:
                raise PlanCorruptError(
                    f"plan {manifest.digest[:12]}: {name} is missing or was changed;"
                    " remove the folder and build the plan again"
                )
        return Plan(folder, manifest, lease)

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """Hold the lock of ``digest``, which the system frees when its process dies."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._lock_file(digest).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sweep(self, but: Path) -> None:
        """Remove what builders that died have left: folders whose lock nobody holds."""
        for folder in set(self._root.glob(f"{_BUILDING}*")) - {but}:
            lock_file = self._lock_file(folder.name.removeprefix(_BUILDING))
            with lock_file.open("w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)

    def _lock_file(self, digest: str) -> Path:
        return self._root / f".{digest}.lock"


def _say_nothing(_stage: str, _done: int, _total: int) -> None:
    pass


@contextmanager
def _storage(root: Path) -> Iterator[None]:
    """Name what the operating system refused."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "check its permissions"
        raise PlanStorageError(
            f"a plan cannot be written to {root}: {error.strerror or error};"
            f" {advice}, or choose another folder"
        ) from error
