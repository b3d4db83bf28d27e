"""A running picture as bytes: what a worker sends away so that another can go on from there.

The layout, all integers little-endian::

    magic "DRKS" | version u16 | header length u32 | header: JSON | tensors: float32 | sha256 of all

The header says which planes of the solver state follow: those of a young or one-step solver are
zero and stay at home. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.errors import InvalidRequestError
from engine.types import Snapshot, SnapshotGrade

VERSION = 1
MAX_BYTES = 256 << 20
"""Bound on what is decoded: five planes of a 16-channel latent of 8192 px fit."""

_MAGIC = b"DRKS"
_PREFIX = struct.Struct("<4sHI")
_CHECKSUM_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a task stands.

    Attributes:
        seed: that the worker drew where the request named none; the picture must keep it.
        snapshot: of full grade.
    """

    seed: int
    snapshot: Snapshot


def encode_standing(standing: Standing) -> bytes:
    """The bytes of a standing.

    Raises:
        InvalidRequestError: its snapshot is not a full one.
    """
    snapshot = standing.snapshot
    if snapshot.grade is not SnapshotGrade.FULL or snapshot.state is None:
        raise InvalidRequestError("only full snapshots travel")
    assert snapshot.generator_state is not None
    state = _floats(snapshot.state)
    kept = [i for i, plane in enumerate(state) if plane.any()]
    parts = [state[i].tobytes() for i in kept]
    if snapshot.clean is not None:
        parts.append(_floats(snapshot.clean).tobytes())
    header = json.dumps(
        {
            "seed": standing.seed,
            "row": snapshot.row,
            "log_snr": snapshot.log_snr,
            "shape": state.shape,
            "planes": kept,
            "clean": snapshot.clean is not None,
            "generator": base64.b64encode(snapshot.generator_state).decode(),
            "plan": snapshot.plan_digest,
            "table": snapshot.table_digest,
            "entered_at": snapshot.entered_at,
        }
    ).encode()
    body = b"".join([_PREFIX.pack(_MAGIC, VERSION, len(header)), header, *parts])
    return body + hashlib.sha256(body).digest()


def decode_standing(data: bytes) -> Standing:
    """The standing in ``data``.

    Raises:
        InvalidRequestError: it is no snapshot, of another version, cut short or changed.
    """
    header, tensors = _open(data)
    try:
        slots, *latent = (int(size) for size in header["shape"])
        kept = [int(plane) for plane in header["planes"]]
        entered_at = header["entered_at"]
        generator_state = base64.b64decode(header["generator"], validate=True)
        planes = len(kept) + bool(header["clean"])
        found = np.frombuffer(tensors, np.dtype("<f4")).reshape(planes, *latent)
        state = np.zeros((slots, *latent), np.float32)
        state[kept] = found[: len(kept)]
        whole = torch.from_numpy(state)
        return Standing(
            seed=int(header["seed"]),
            snapshot=Snapshot(
                SnapshotGrade.FULL,
                log_snr=float(header["log_snr"]),
                x=whole[0],
                clean=torch.from_numpy(found[-1].copy()) if header["clean"] else None,
                state=whole,
                row=int(header["row"]),
                generator_state=generator_state,
                plan_digest=str(header["plan"]),
                table_digest=str(header["table"]),
                entered_at=None if entered_at is None else float(entered_at),
            ),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InvalidRequestError("the snapshot's header makes no sense") from error


def _open(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of what is whole and of this version."""
    if len(data) > MAX_BYTES:
        raise InvalidRequestError(f"a snapshot of {len(data)} bytes; at most {MAX_BYTES}")
    if len(data) < _PREFIX.size + _CHECKSUM_BYTES or not data.startswith(_MAGIC):
        raise InvalidRequestError("this is no snapshot")
    _, version, header_bytes = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise InvalidRequestError(f"a snapshot of version {version}; this worker reads {VERSION}")
    body = data[:-_CHECKSUM_BYTES]
    if hashlib.sha256(body).digest() != data[-_CHECKSUM_BYTES:]:
        raise InvalidRequestError("the snapshot was cut short or changed")
    begin = _PREFIX.size + header_bytes
    try:
        header: dict[str, Any] = json.loads(body[_PREFIX.size : begin])
    except ValueError as error:
        raise InvalidRequestError("the snapshot's header cannot be read") from error
    return header, body[begin:]


def _floats(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    floats: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = (
        tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
    )
    return floats
