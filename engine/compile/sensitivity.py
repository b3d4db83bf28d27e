"""Which nodes int8 may have: the damage each does alone, against the time that it saves.

A group is the nodes that read one activation, which share its quantization. Every group is
quantized alone and the network's output compared with the float one's, over steps from the whole
schedule, with and without guidance. Groups are then taken in order of damage per work saved for
as long as the network as a whole stays above the dial. Work is counted, not timed, so that the
same calibration gives the same plan on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.compile.calibrate import Array, Chain, Observed, Progress, open_session
from engine.compile.manifest import SegmentSpec
from engine.compile.quantize_graph import GraphFile, Scheme, Site, insert_qdq
from engine.compile.quantize_scales import Scale

# Measured on one core with VNNI, ONNX Runtime 1.32, convolutions of 48 to 320 channels and matrix
# products of 96 to 1280: an int8 product takes about a quarter of the float one's time, and
# quantizing or dequantizing an element as long as 28 float multiply-adds. This predicts that the
# first and the last convolution, and small 1x1 ones, lose time in int8, and so they do.
_PRODUCT_SAVING = 0.75
_MACS_PER_ELEMENT = 28.0


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes of one segment that read one activation.

    Attributes:
        macs: float multiply-adds for one row.
        saved: those that int8 saves, less what quantizing costs; negative where it does not pay.
        noise: noise power over signal power at the network's output with only this group in int8.
    """

    segment: int
    sites: tuple[Site, ...]
    macs: int
    saved: float
    noise: float = 0.0

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of its nodes."""
        return tuple(site.node for site in self.sites)


def groups_of(
    segments: Sequence[SegmentSpec],
    sites: Mapping[str, Sequence[Site]],
    seen: Mapping[tuple[str, str], Observed],
    scheme: Scheme,
) -> list[Group]:
    """Every group of the network, in the order in which it runs."""
    result = []
    for i, segment in enumerate(segments):
        readers: dict[str, list[Site]] = {}
        for site in sites[segment.name]:
            readers.setdefault(site.x, []).append(site)
        for x, of in readers.items():
            outputs = {site.node: seen[segment.name, site.y].elements for site in of}
            macs = sum(site.fan_in * outputs[site.node] for site in of)
            moved = seen[segment.name, x].elements + sum(
                outputs[site.node] for site in of if scheme.outputs and site.kind == "conv"
            )
            saved = _PRODUCT_SAVING * macs - _MACS_PER_ELEMENT * moved
            result.append(Group(i, tuple(of), macs, saved))
    return result


def noise_of(prediction: Array, exact: Array) -> Array:
    """Noise power over signal power of each row: (rows,)."""
    axes = tuple(range(1, exact.ndim))
    error = np.square(prediction.astype(np.float64) - exact).sum(axis=axes)
    return np.asarray(error / np.square(exact.astype(np.float64)).sum(axis=axes))


def decibel(noise: float) -> float:
    """A noise-to-signal ratio as SNR; 200 dB stands for none at all."""
    return float(-10 * np.log10(max(noise, 1e-20)))


class Trials:
    """Runs the network with some groups in int8, without writing a plan.

    Args:
        known: rows of the network's inputs; all tensors between segments are kept for them.
        scales: of each segment, by tensor name.
    """

    def __init__(
        self,
        folder: Path,
        segments: Sequence[SegmentSpec],
        scales: Mapping[str, Mapping[str, Scale]],
        scheme: Scheme,
        known: Mapping[str, Array],
    ) -> None:
        self._chain = Chain(folder, segments)
        self._graphs = [GraphFile(folder / segment.file) for segment in segments]
        self._scales = scales
        self._scheme = scheme
        self._exact = self._chain.tensors(known)
        self._opened: dict[tuple[int, frozenset[str]], Any] = {}

    def noise(self, groups: Iterable[Group]) -> Array:
        """Noise over signal of each row with ``groups`` in int8: (rows,)."""
        chosen: dict[int, list[Site]] = {}
        for group in groups:
            chosen.setdefault(group.segment, []).extend(group.sites)
        if not chosen:
            return np.zeros(len(self._exact["sample"]))
        trials = {i: self._session(i, sites) for i, sites in chosen.items()}
        tensors = self._chain.tensors(self._exact, trials, first=min(chosen))
        return noise_of(tensors["prediction"], self._exact["prediction"])

    def _session(self, segment: int, sites: Sequence[Site]) -> Any:
        graph = self._graphs[segment].copy()
        name = self._chain.segments[segment].name
        insert_qdq(graph, sites, self._scales[name], self._scheme)
        trial = graph.path.with_name(f".trial-{graph.path.name}")
        graph.save(trial)
        try:
            return open_session(trial)
        finally:
            trial.unlink()


def measure(groups: Sequence[Group], trials: Trials, progress: Progress) -> list[Group]:
    """The same groups, with the noise of each alone."""
    measured = []
    for done, group in enumerate(groups):
        progress(done, len(groups))
        noise = float(trials.noise([group]).mean())
        measured.append(Group(group.segment, group.sites, group.macs, group.saved, noise))
    return measured


def choose(groups: Sequence[Group], trials: Trials, min_snr_db: float) -> list[Group]:
    """The groups to quantize: the longest frontier whose measured SNR is ``min_snr_db`` or more.

    Groups that save nothing are left out. SNR is that of the mean noise over all rows.
    """
    paying = sorted(
        (group for group in groups if group.saved > 0),
        key=lambda group: (group.noise / group.saved, group.segment, group.nodes),
    )
    low, high = 0, len(paying)
    while low < high:  # invariant: `low` groups are fine, more than `high` are not
        middle = (low + high + 1) // 2
        if decibel(float(trials.noise(paying[:middle]).mean())) >= min_snr_db:
            low = middle
        else:
            high = middle - 1
    return paying[:low]
