"""int8 plans: calibrated on real trajectories, with what to quantize chosen by measurement.

::

    record    draw pictures on the float plan, note the network's inputs     (recording)
    observe   ranges of every activation along them, and their scales        (calibrate)
    measure   damage of each group of nodes alone, against the work it saves (sensitivity)
    choose    the longest frontier above the dial                            (sensitivity)
    write     both variants of each segment, on one new file of weights      (quantize_graph)

Activation scales are static, so a picture does not depend on its batch mates. Low-rank factors,
text encoders and the autoencoder stay float, and so do segments that do not run at every step:
int8 would save next to nothing there.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.compile import calibrate, quantize_graph, quantize_scales, recording, sensitivity
from engine.compile.calibrate import DRAWINGS, Array, Drawing, Moment, untold
from engine.compile.manifest import PlanManifest, SegmentSpec, constant_segments
from engine.compile.plan import Progress, Transform
from engine.compile.quantize_graph import GraphFile, Scheme, insert_qdq, write_together
from engine.compile.quantize_scales import Scale, activation_scale
from engine.compile.sensitivity import Group, Trials, decibel
from engine.errors import InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

INT8_BACKENDS = ("onnxruntime", "tensorrt")
"""Backends that have an int8 recipe."""

TABLE = "int8.json"
"""In the plan's folder: what was measured and decided, for ``darkroom inspect``."""

_TRIAL_CELLS, _TRIAL_ROWS = 8192, (4, 24)
"""Latent cells that one sensitivity trial runs, and the bounds of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Config:
    """The dial of int8, and what it is decided on.

    Attributes:
        min_snr_db: signal over quantization noise that the network's output must keep, over the
            calibration rows. More is closer to float, and slower. The default is where the
            frontier of ``python -m loadtests.int8_frontier`` bends: on tintype, everything that
            pays in int8 gives 27 dB; 30 dB brings pictures 4 dB of PSNR closer for 7 % of the
            work, and 35 dB 3 dB more for another 17 %.
        rows: calibration rows that activation ranges are read from.
        drawings: the calibration set.
    """

    min_snr_db: float = 30.0
    rows: int = 128
    drawings: tuple[Drawing, ...] = DRAWINGS

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_snr_db) and 0.0 <= self.min_snr_db <= 100.0):
            raise InvalidRequestError(
                f"min_snr_db is {self.min_snr_db}; allowed: 0 to 100", field="min_snr_db"
            )
        if not 4 <= self.rows <= 4096:
            raise InvalidRequestError(f"rows is {self.rows}; allowed: 4 to 4096", field="rows")
        if not self.drawings:
            raise InvalidRequestError("drawings is empty; give one or more", field="drawings")


def int8_transform(backend: str, config: Int8Config | None = None) -> Transform:
    """What :meth:`PlanStore.build` applies to make an int8 plan of ``backend``.

    Raises:
        UnsupportedError: the backend has no int8 recipe; lists those that have.
    """
    return Int8Transform(scheme_of(backend), config or Int8Config())


def scheme_of(backend: str) -> Scheme:
    """What integer arithmetic a backend has on this machine.

    Raises:
        UnsupportedError: it has none; lists those that have.
    """
    if backend == "onnxruntime":
        return Scheme(signed=False, weight_bits=8 if sums_u8s8_exactly() else 7, outputs=True)
    if backend == "tensorrt":
        return Scheme(signed=True, weight_bits=8, outputs=False)
    raise UnsupportedError(f"{backend} has no int8 recipe; these have: {', '.join(INT8_BACKENDS)}")


def sums_u8s8_exactly(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU adds products of uint8 and int8 without saturating at 16 bits.

    x86 needs VNNI for that; where the flags cannot be read, the answer is the safe one.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


@dataclass(frozen=True, slots=True)
class Int8Transform:
    """A :class:`~engine.compile.plan.Transform`: float graphs in, int8 graphs and a table out."""

    scheme: Scheme
    config: Int8Config

    @property
    def recipe(self) -> dict[str, object]:
        """Scheme, dial, calibration set, and the code and runtime that calibrate."""
        config: dict[str, object] = json.loads(json.dumps(asdict(self.config)))
        versions = {"quantizer": _sources(), "calibrated on onnxruntime": version("onnxruntime")}
        return {"kind": "static qdq", **asdict(self.scheme), **config, **versions}

    def __call__(
        self,
        folder: Path,
        manifest: PlanManifest,
        checkpoint: Checkpoint,  # noqa: ARG002 - the plan's own graphs are all that it needs
        progress: Progress,
    ) -> PlanManifest:
        """See :class:`~engine.compile.plan.Transform`."""
        study = Study.make(folder, manifest, self.scheme, self.config, progress)
        chosen = study.choose(self.config.min_snr_db)
        table = study.table(chosen)
        study.write(folder, chosen, progress)
        (folder / TABLE).write_text(json.dumps(table, indent=1) + "\n")
        return manifest


def _sources() -> str:
    """Digest of the modules that decide what an int8 plan holds."""
    this, chain = (sys.modules[name] for name in (__name__, constant_segments.__module__))
    modules = (this, chain, quantize_graph, quantize_scales, recording, calibrate, sensitivity)
    parts = [Path(str(module.__file__)).read_bytes() for module in modules]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Study:
    """A float plan's sensitivity to int8: made once, it answers for every setting of the dial."""

    segments: tuple[SegmentSpec, ...]
    scheme: Scheme
    scales: Mapping[str, Mapping[str, Scale]]
    """By segment, by tensor."""
    groups: tuple[Group, ...]
    trials: Trials
    rows: Mapping[str, Array]
    """Inputs of the network in the rows of the trials, by source."""

    @classmethod
    def make(
        cls,
        folder: Path,
        manifest: PlanManifest,
        scheme: Scheme,
        config: Int8Config,
        progress: Progress = untold,
    ) -> Study:
        """Calibrate and measure the float plan in ``folder``."""

        def tell(stage: str) -> calibrate.Progress:
            return lambda done, total: progress(stage, done, total)

        segments = manifest.unet
        moments = calibrate.record(
            folder,
            manifest,
            rows=config.rows,
            drawings=config.drawings,
            progress=tell("drawing for calibration"),
        )
        constant = constant_segments(segments)
        sites = {
            s.name: [] if s.name in constant else GraphFile(folder / s.file).sites()
            for s in segments
        }
        seen = calibrate.observe(folder, segments, sites, moments, tell("reading ranges"))
        scales: dict[str, dict[str, Scale]] = {segment.name: {} for segment in segments}
        for (segment, tensor), what in seen.items():
            scales[segment][tensor] = activation_scale(
                what.low, what.high, what.sample, signed=scheme.signed
            )
        rows = _trial_rows(moments)
        trials = Trials(folder, segments, scales, scheme, rows)
        groups = sensitivity.groups_of(segments, sites, seen, scheme)
        measured = sensitivity.measure(groups, trials, tell("measuring sensitivity"))
        return cls(segments, scheme, scales, tuple(measured), trials, rows)

    def choose(self, min_snr_db: float) -> list[Group]:
        """The groups to quantize at a setting of the dial."""
        return sensitivity.choose(self.groups, self.trials, min_snr_db)

    def write(
        self,
        folder: Path,
        chosen: Iterable[Group],
        progress: Progress = untold,
    ) -> None:
        """Rewrite the segments' graphs in ``folder``, both variants alike, and their weights."""
        sites = [(group.segment, site) for group in chosen for site in group.sites]
        for i, segment in enumerate(self.segments):
            progress("writing int8 graphs", i, len(self.segments))
            own = [site for at, site in sites if at == i]
            if not own:
                continue
            files = [segment.file, *([segment.adapters_file] if segment.adapters_file else [])]
            graphs = [GraphFile(folder / file) for file in files]
            for graph in graphs:
                insert_qdq(graph, own, self.scales[segment.name], self.scheme)
            write_together(graphs, (folder / segment.file).with_suffix(".weights"))

    def table(self, chosen: Sequence[Group]) -> dict[str, Any]:
        """What was measured and decided, as JSON: SNR in all, by segment, by step, by group."""
        taken = {(group.segment, group.nodes) for group in chosen}
        noise = self.trials.noise(chosen)
        macs = sum(group.macs for group in self.groups)
        return {
            "snr_db": _rounded(float(noise.mean())),
            "int8_share_of_macs": round(sum(g.macs for g in chosen) / macs, 4) if macs else 0.0,
            "segments": {
                segment.name: _rounded(
                    float(self.trials.noise(g for g in chosen if g.segment == i).mean())
                )
                for i, segment in enumerate(self.segments)
            },
            "steps": [
                {"timestep": round(float(t), 3), "snr_db": _rounded(float(n))}
                for t, n in sorted(zip(self.rows["timestep"], noise, strict=True))
            ],
            "groups": [
                {
                    "segment": self.segments[group.segment].name,
                    "nodes": list(group.nodes),
                    "weights": [site.weight for site in group.sites],
                    "macs": group.macs,
                    "saved": round(group.saved),
                    "snr_db": _rounded(group.noise),
                    "int8": (group.segment, group.nodes) in taken,
                }
                for group in self.groups
            ],
        }


def _rounded(noise: float) -> float:
    return round(decibel(noise), 2)


def _trial_rows(moments: Sequence[Moment]) -> dict[str, Array]:
    """Rows of ``moments`` whose timesteps lie evenly over all that they have."""
    height, width = moments[0]["sample"].shape[-2:]
    low, high = _TRIAL_ROWS
    count = min(len(moments), max(low, min(high, _TRIAL_CELLS // (height * width))))
    ordered = sorted(moments, key=lambda moment: float(moment["timestep"][0]))
    picked = [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, count)]
    return {name: np.concatenate([moment[name] for moment in picked]) for name in picked[0]}
