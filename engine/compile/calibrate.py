"""Calibration for int8: what the tensors of a float plan hold along real trajectories.

:func:`record` draws them and notes the network's inputs; :func:`observe` runs the segment chain
over these again and reduces every activation to a range and a sample, in memory that does not grow
with the number of moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from engine.compile.manifest import SegmentSpec
from engine.compile.quantize_graph import GraphFile, Site
from engine.compile.quantize_scales import FloatArray
from engine.compile.recording import (
    DRAWINGS,
    Array,
    Drawing,
    Moment,
    Progress,
    record,
    untold,
)

__all__ = [
    "DRAWINGS",
    "Array",
    "Chain",
    "Drawing",
    "Moment",
    "Observed",
    "Progress",
    "batches",
    "observe",
    "open_session",
    "record",
    "untold",
]

# ------------------------------------------------------------------------------ the segment chain


class Chain:
    """A plan's UNet segments on this CPU, over numpy arrays, any of them replaced by a trial."""

    def __init__(self, folder: Path, segments: Sequence[SegmentSpec]) -> None:
        self.segments = tuple(segments)
        self._folder = folder
        self._sessions = [open_session(folder / segment.file) for segment in segments]

    def run(self, known: Mapping[str, Array], trials: Mapping[int, Any] | None = None) -> Array:
        """The prediction for the rows in ``known``."""
        return self.tensors(known, trials)["prediction"]

    def tensors(
        self, known: Mapping[str, Array], trials: Mapping[int, Any] | None = None, first: int = 0
    ) -> dict[str, Array]:
        """Run the segments from ``first`` on; ``known`` and everything that they make, by source.

        Args:
            trials: sessions that run in place of the segments' own, by index.
        """
        result = dict(known)
        for i in range(first, len(self.segments)):
            session = (trials or {}).get(i, self._sessions[i])
            spec = self.segments[i]
            outputs = session.run([port.name for port in spec.outputs], self.feeds(i, result))
            result.update(zip((port.source for port in spec.outputs), outputs, strict=True))
        return result

    def feeds(self, segment: int, known: Mapping[str, Array]) -> dict[str, Array]:
        """What a segment takes of ``known``."""
        ports = self.segments[segment].inputs
        return {port.name: known[port.source] for port in ports if port.source in known}


def open_session(path: Path) -> Any:
    """A session of one thread, unless the process has a pool of threads for its graphs already."""
    from engine.runtime.onnxruntime import set_threads

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    set_threads(options, 1)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batches(moments: Sequence[Moment], cells: int = 2048) -> Iterator[dict[str, Array]]:
    """``moments`` in order, as many at once as have ``cells`` latent cells together (or one)."""
    height, width = moments[0]["sample"].shape[-2:]
    rows = max(1, cells // (height * width))
    for i in range(0, len(moments), rows):
        part = moments[i : i + rows]
        yield {name: np.concatenate([moment[name] for moment in part]) for name in part[0]}


# ------------------------------------------------------------------------------ statistics


class Observed:
    """What one tensor held: its range, a sample of its values, and elements a row."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.elements = 0
        self._samples: list[FloatArray] = []

    def add(self, values: FloatArray, keep: int = 1024) -> None:
        """Take in a batch (rows, …); evenly spaced values of it are kept."""
        flat = values.ravel()
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        self.elements = flat.size // len(values)
        # An odd stride, so that it does not fall on the same channels of every row.
        stride = max(1, flat.size // keep) | 1
        self._samples.append(flat[::stride].copy())

    @property
    def sample(self) -> FloatArray:
        """The values kept."""
        return np.concatenate(self._samples)


def observe(
    folder: Path,
    segments: Sequence[SegmentSpec],
    sites: Mapping[str, Sequence[Site]],
    moments: Sequence[Moment],
    progress: Progress = untold,
) -> dict[tuple[str, str], Observed]:
    """Inputs and outputs of every site along ``moments``, by (segment, tensor)."""
    chain = Chain(folder, segments)
    wanted = {name: sorted({t for s in of for t in (s.x, s.y)}) for name, of in sites.items()}
    probes = [_probe(folder / s.file, wanted[s.name]) for s in segments]
    seen: dict[tuple[str, str], Observed] = {}
    parts = list(batches(moments))
    for done, known in enumerate(parts):
        progress(done, len(parts))
        for i, spec in enumerate(segments):
            feeds = chain.feeds(i, known)
            given = [port.name for port in spec.outputs]
            inner = [name for name in wanted[spec.name] if name not in (*feeds, *given)]
            outputs = probes[i].run([*given, *inner], feeds)
            tensors = {**feeds, **dict(zip([*given, *inner], outputs, strict=True))}
            for name in wanted[spec.name]:
                seen.setdefault((spec.name, name), Observed()).add(tensors[name])
            known.update((port.source, tensors[port.name]) for port in spec.outputs)
    return seen


def _probe(path: Path, tensors: Sequence[str]) -> Any:
    """A session of a graph that also gives inner tensors."""
    graph = GraphFile(path)
    proto = graph.model.graph
    present = {value.name for value in (*proto.input, *proto.output)}
    for name in tensors:
        if name not in present:
            proto.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    trial = path.with_name(f".probe-{path.name}")
    graph.save(trial)
    try:
        return open_session(trial)
    finally:
        trial.unlink()
