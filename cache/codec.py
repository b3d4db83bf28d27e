"""Stored states as bytes: a versioned header, the numbers, a checksum.

::

    "DRNS"  version u8  kind u8  dtype u8  0 u8  log_snr f64  channels u32  height u32  width u32
    numbers …  CRC-32 u32 of all that precedes

Little-endian. ``NOISY`` and ``CLEAN`` are kept in half precision: their rounding error, 2⁻¹¹ of
each number, is far below the noise that the remaining steps remove. ``FINAL`` stays float32, for
an exact hit means the identical picture.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np

from engine.errors import DarkroomError
from engine.ports import StateKind, StoredState

MAGIC = b"DRNS"
VERSION = 1
_HEADER = struct.Struct("<4sBBBxd3I")
_CHECKSUM = struct.Struct("<I")
_KINDS = (StateKind.NOISY, StateKind.CLEAN, StateKind.FINAL)
_DTYPES: tuple[np.dtype[np.floating], ...] = (np.dtype("<f2"), np.dtype("<f4"))
_HALF_MAX = float(np.finfo(np.float16).max)

MAX_NUMBERS = 2**26
"""A header that claims more is damaged: it is not a latent of this project's sizes."""


class CodecError(DarkroomError):
    """The bytes are no state of this version: foreign, truncated or damaged."""


def encode(state: StoredState) -> bytes:
    """A state as bytes; its id is not among them.

    Values outside half precision's range are clipped: no latent has any.
    """
    dtype = 1 if state.kind is StateKind.FINAL else 0
    latent = state.latent if dtype else np.clip(state.latent, -_HALF_MAX, _HALF_MAX)
    channels, height, width = latent.shape
    header = _HEADER.pack(
        MAGIC, VERSION, _KINDS.index(state.kind), dtype, state.log_snr, channels, height, width
    )
    body = header + np.ascontiguousarray(latent, dtype=_DTYPES[dtype]).tobytes()
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode(id_: str, data: bytes) -> StoredState:
    """The state that :func:`encode` made into ``data``.

    Raises:
        CodecError: saying what is wrong with the bytes.
    """
    if len(data) < _HEADER.size + _CHECKSUM.size:
        raise CodecError(f"a stored state of {len(data)} bytes is truncated")
    magic, version, kind, dtype, log_snr, *shape = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise CodecError("the stored value is not a state of the noise cache")
    if version != VERSION:
        raise CodecError(f"the stored state has version {version}; this build reads {VERSION}")
    body, (checksum,) = data[: -_CHECKSUM.size], _CHECKSUM.unpack(data[-_CHECKSUM.size :])
    if zlib.crc32(body) != checksum:
        raise CodecError("the stored state is damaged: its checksum does not match")
    if kind >= len(_KINDS) or dtype >= len(_DTYPES) or math.prod(shape) > MAX_NUMBERS:
        raise CodecError("the stored state's header makes no sense")
    if len(body) != _HEADER.size + math.prod(shape) * _DTYPES[dtype].itemsize:
        raise CodecError("the stored state's length does not match its shape")
    numbers = np.frombuffer(body, _DTYPES[dtype], offset=_HEADER.size).astype(np.float32)
    return StoredState(id_, _KINDS[kind], log_snr, numbers.reshape(shape))
