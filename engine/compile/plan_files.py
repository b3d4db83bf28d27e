"""The files of a plan: hashed into its manifest when it is built, and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import ValidationError

from engine.compile.manifest import PLAN_FORMAT, PlanManifest, SegmentSpec
from engine.errors import PlanCorruptError, PlanError

MANIFEST = "plan.json"
MANIFEST_HASH = "plan.sha256"
"""Written once; its modification time says when the plan was last opened (``plan_space``)."""


def seal(folder: Path, manifest: PlanManifest) -> None:
    """Hash every file into the manifest, write it, and bring all of it to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}

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
    (folder / MANIFEST_HASH).write_text(_manifest_hash(text))
    for path in (*paths, folder / MANIFEST, folder / MANIFEST_HASH):
        sync(path)
    for path in {path.parent for path in paths} | {folder}:
        sync(path)


def read_manifest(folder: Path) -> PlanManifest:
    """The manifest of the plan in ``folder``; the files that it names are not looked at.

    Raises:
        PlanCorruptError: it is missing, or not as it was written.
        PlanError: another version wrote it.
    """
    try:
        text = (folder / MANIFEST).read_text()
        expected = (folder / MANIFEST_HASH).read_text()
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


def hash_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
