"""JSON and safetensors files of a checkpoint, read without trusting them and without torch.

A weight file is judged by its header alone, so that a broken one is found in milliseconds and
before anything is compiled; see the format at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from engine.errors import CorruptCheckpointError, UnsafeCheckpointError

MAX_JSON_BYTES = 32 * 2**20
"""Bound on a config, an index or a tokenizer's settings."""
MAX_HEADER_BYTES = 100_000_000
"""The bound that the safetensors library itself sets."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_MAX_HASHES = 1024


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The safetensors files of one network.

    Attributes:
        files: one, or the shards in the order of their names.
        shapes: of every tensor, by its name in the file.
    """

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]


def read_json(path: Path, label: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Args:
        label: how messages call the file, e.g. ``unet/config.json``.

    Raises:
        CorruptCheckpointError: missing, unreadable, too large, or no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CorruptCheckpointError(
                f"{label}: {size} bytes; at most {MAX_JSON_BYTES} are read"
            )
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CorruptCheckpointError(
            f"{label}: missing; a checkpoint is a folder in Diffusers layout, with model_index.json"
        ) from None
    except OSError as error:
        raise CorruptCheckpointError(f"{label}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{label}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{label}: expected a JSON object")
    return content


def refuse_pickles(folder: Path, label: str) -> None:
    """Refuse a folder that holds pickled weights, even beside safetensors: somebody will load them.

    Raises:
        UnsafeCheckpointError: naming the files and the way out.
    """
    if not folder.is_dir():
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES)
    if not pickles:
        return
    safe = any(p.suffix == ".safetensors" for p in folder.iterdir())
    remedy = (
        "delete them, safetensors files are beside them"
        if safe
        else "convert them: load the pipeline once where you trust it, then call "
        "save_pretrained(folder, safe_serialization=True)"
    )
    raise UnsafeCheckpointError(
        f"{label or 'model folder'}: {', '.join(pickles)}: pickled weights can run code when "
        f"loaded, so Darkroom reads safetensors only; {remedy}"
    )


def find_weights(folder: Path, stem: str, label: str) -> WeightFiles:
    """Locate and check the weights of one network: whole or sharded, full precision before fp16.

    Args:
        stem: ``diffusion_pytorch_model`` or ``model``.

    Raises:
        CorruptCheckpointError: nothing there, or a file or shard is broken.
    """
    for whole, index in (
        (f"{stem}.safetensors", f"{stem}.safetensors.index.json"),
        (f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
    ):
        if (folder / whole).is_file():
            return WeightFiles((folder / whole,), read_header(folder / whole, f"{label}/{whole}"))
        if (folder / index).is_file():
            return _find_shards(folder, index, label)
    raise CorruptCheckpointError(
        f"{label}/{stem}.safetensors: missing, and so are its fp16 and sharded forms"
    )


def _find_shards(folder: Path, index: str, label: str) -> WeightFiles:
    weight_map = read_json(folder / index, f"{label}/{index}").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{label}/{index}: has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        if not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise CorruptCheckpointError(
                f"{label}/{index}: {shard!r} is not the name of a safetensors file beside it"
            )
        header = read_header(folder / shard, f"{label}/{shard}")
        for tensor in header:
            if weight_map.get(tensor) != shard:
                raise CorruptCheckpointError(
                    f"{label}/{shard}: {tensor} is not listed for this file in {index}"
                )
        shapes |= header
    for tensor in weight_map:
        if tensor not in shapes:
            raise CorruptCheckpointError(
                f"{label}/{weight_map[tensor]}: lacks {tensor}, which {index} promises"
            )
    return WeightFiles(tuple(folder / shard for shard in shards), shapes)


def read_header(path: Path, label: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a safetensors file, after checking that its bytes can hold them.

    Raises:
        CorruptCheckpointError: naming the file, and the tensor where one is to blame.
    """
    hint = "the file is truncated or was tampered with; download it again"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CorruptCheckpointError(
                    f"{label}: header of {length} bytes in a file of {size}: {hint}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CorruptCheckpointError(f"{label}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{label}: header is not valid JSON; {hint}") from error
    if not isinstance(header, dict):
        raise CorruptCheckpointError(f"{label}: header is not a JSON object; {hint}")
    header.pop("__metadata__", None)
    end = 0
    shapes: dict[str, tuple[int, ...]] = {}
    for name, start, stop, shape in sorted(
        (_entry(name, entry, label) for name, entry in header.items()), key=lambda e: e[1:3]
    ):
        # The format allows neither holes nor overlaps, which could hide a second payload.
        if start != end or stop > size - 8 - length:
            raise CorruptCheckpointError(
                f"{label}: {name} lies at bytes {start} to {stop}, expected from {end}, "
                f"of {size - 8 - length}: {hint}"
            )
        end = stop
        shapes[name] = shape
    if end != size - 8 - length:
        raise CorruptCheckpointError(
            f"{label}: {size - 8 - length - end} bytes belong to no tensor: {hint}"
        )
    return shapes


def _entry(name: str, entry: object, label: str) -> tuple[str, int, int, tuple[int, ...]]:
    """(name, first byte, end, shape) of one tensor, whose size fits its shape and type."""
    if isinstance(entry, dict):
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
            raise CorruptCheckpointError(
                f"{label}: {name} has type {dtype!r}; Darkroom reads {', '.join(_DTYPE_BYTES)}"
            )
        if _are_naturals(shape) and _are_naturals(offsets) and len(offsets) == 2:
            start, stop = offsets
            if stop - start == math.prod(shape) * _DTYPE_BYTES[dtype]:
                return name, start, stop, tuple(shape)
    raise CorruptCheckpointError(
        f"{label}: {name}: its shape, type and place in the file contradict each other; "
        "the file was tampered with; download it again"
    )


def _are_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


_hashes: OrderedDict[tuple[str, int, int], str] = OrderedDict()
_hashes_lock = threading.Lock()


def file_sha256(path: Path) -> str:
    """Digest of a file's content, remembered in this process while size and time stay the same."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    with _hashes_lock:
        if key in _hashes:
            _hashes.move_to_end(key)
            return _hashes[key]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with _hashes_lock:
        _hashes[key] = digest
        while len(_hashes) > _MAX_HASHES:
            _hashes.popitem(last=False)
    return digest
