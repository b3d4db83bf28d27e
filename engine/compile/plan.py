"""Plans on disk: addressed by a digest of everything that went in, whole or not there at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from engine.compile.manifest import PLAN_FORMAT, PlanManifest, SegmentSpec, Tap
from engine.errors import PlanCorruptError, PlanError, PlanStorageError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.compile.tensorrt_profile import EngineTarget

MANIFEST = "plan.json"
_BUILDING = ".building-"
_MANIFEST_HASH = "plan.sha256"
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
    """A compiled checkpoint: its folder, whose files have been verified, and its manifest."""

    folder: Path
    manifest: PlanManifest

    @property
    def digest(self) -> str:
        """Of everything that went in."""
        return self.manifest.digest

    @property
    def timings_folder(self) -> Path:
        """Where what was measured of the plan on some device is kept: beside it, not in it."""
        return self.folder.with_name(f"{self.folder.name}.timings")


class PlanStore:
    """Builds and opens the plans under one folder. Any number of processes may share it."""

    def __init__(self, root: Path) -> None:
        self._root = root

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
                _seal(temporary, manifest)
                temporary.replace(folder)
                _sync(self._root)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return self._load(folder)

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

    def _folders(self) -> list[Path]:
        return sorted(path.parent for path in self._root.glob(f"[!.]*/{MANIFEST}"))

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
        manifest = _read_manifest(folder)
        for name, expected in manifest.files.items():
            path = folder / name
            if not path.is_file() or _hash_file(path) != expected:
                raise PlanCorruptError(
                    f"plan {manifest.digest[:12]}: {name} is missing or was changed;"
                    " remove the folder and build the plan again"
                )
        return Plan(folder, manifest)

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


def _seal(folder: Path, manifest: PlanManifest) -> None:
    """Hash every file into the manifest, write it, and bring all of it to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _hash_file(path) for path in paths}

    def hashed(segment: SegmentSpec) -> SegmentSpec:
        return segment.model_copy(update={"sha256": files.get(segment.file, "")})

    encoder = manifest.vae_encoder
    sealed = manifest.model_copy(
        update={
            "files": files,
            "unet": tuple(hashed(segment) for segment in manifest.unet),
            "text_encoders": tuple(
                spec.model_copy(update={"segment": hashed(spec.segment)})
                for spec in manifest.text_encoders
            ),
            "vae_decoder": hashed(manifest.vae_decoder),
            "vae_encoder": None if encoder is None else hashed(encoder),
        }
    )
    text = sealed.model_dump_json(indent=1) + "\n"
    (folder / MANIFEST).write_text(text)
    (folder / _MANIFEST_HASH).write_text(_manifest_hash(text))
    for path in (*paths, folder / MANIFEST, folder / _MANIFEST_HASH):
        _sync(path)
    for path in {path.parent for path in paths} | {folder}:
        _sync(path)


def _read_manifest(folder: Path) -> PlanManifest:
    try:
        text = (folder / MANIFEST).read_text()
        expected = (folder / _MANIFEST_HASH).read_text()
    except FileNotFoundError as error:
        raise PlanCorruptError(f"{folder.name}: {Path(error.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanCorruptError(f"{folder.name}: {MANIFEST} cannot be read: {error}") from error
    if _manifest_hash(text) != expected:
        raise PlanCorruptError(f"{folder.name}: {MANIFEST} was changed; build the plan again")
    found = json.loads(text).get("format")
    if found != PLAN_FORMAT:
        raise PlanError(
            f"{folder.name}: plan format {found}, this version reads {PLAN_FORMAT}; build it again"
        )
    try:
        return PlanManifest.model_validate_json(text)
    except ValidationError as error:
        raise PlanCorruptError(f"{folder.name}: {MANIFEST}: {error}") from error


def _manifest_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() + "\n"


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
