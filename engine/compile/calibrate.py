"""Calibration for int8: real trajectories of a float plan, and what its tensors hold along them.

First the engine's own step loop draws a few pictures and every input of the network is noted
(:func:`record`). Those moments are small, so that any number of passes can run the segment chain
over them again: :func:`observe` reduces every activation to a range and a sample, in memory that
does not grow with the number of moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

from engine.compile.manifest import PlanManifest, SegmentSpec
from engine.compile.plan import Plan
from engine.compile.quantize_graph import GraphFile, Site
from engine.compile.quantize_scales import FloatArray
from engine.rows import RowLimits

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Told (done, total) as a pass goes on."""
Moment = Mapping[str, Array]
"""Inputs of the network at one step, by source name, each (rows, …)."""


def untold(*_: object) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture to draw for calibration."""

    prompt: str
    seed: int
    steps: int
    guided: bool
    """At the checkpoint's own scale; else without guidance."""


DRAWINGS = tuple(
    Drawing(prompt, seed=7000 + i, steps=steps, guided=i % 3 != 2)
    for i, (prompt, steps) in enumerate(
        (
            ("a red umbrella", 20),
            ("a happy face", 8),
            ("a pizza on a blue background", 20),
            ("a small dog beside a house", 30),
            ("", 20),
            ("a photo of a mountain at night", 12),
            ("three yellow flowers", 50),
            ("a guitar on a white background", 4),
            ("a portrait of an old astronaut, oil painting, intricate details", 20),
            ("a rocket", 28),
        )
    )
)
"""With and without guidance, and step counts that between them visit every part of the schedule.
Other prompts and seeds than any table of ours is measured on."""


def record(
    folder: Path,
    manifest: PlanManifest,
    *,
    rows: int,
    drawings: Sequence[Drawing] = DRAWINGS,
    progress: Progress = untold,
) -> list[Moment]:
    """Draw ``drawings`` on a float plan with its own solver; ``rows`` inputs of the network.

    The rows kept are a fixed random choice over all steps of all drawings, one row each.
    """
    from engine.model import Model
    from engine.runtime.onnxruntime import OnnxRuntime

    # A plan for another backend holds the same float graphs, which this CPU runs.
    plan = Plan(folder, manifest.model_copy(update={"backend": "onnxruntime"}))
    seen: list[Moment] = []
    runtime = OnnxRuntime()
    model = Model.open(plan, runtime)
    try:
        for done, drawing in enumerate(drawings):
            progress(done, len(drawings))
            _draw(model, drawing, seen)
    finally:
        model.close()
        runtime.close()
    chosen = np.random.default_rng(0).permutation(len(seen))[:rows]
    return [seen[i] for i in sorted(chosen)]


def _draw(model: Any, drawing: Drawing, seen: list[Moment]) -> None:
    """Run one trajectory alone on this thread; note every row of every step in ``seen``."""
    from engine.loop import StepLoop
    from engine.prepare import build, encode, resolve
    from engine.saturation import StepTimeTable
    from engine.scheduler import TickPolicy
    from engine.types import GenerateRequest

    image, mask = _picture(model.spec.latent.native_px) if model.takes_mask else (None, None)
    request = GenerateRequest(
        prompt=drawing.prompt,
        seed=drawing.seed,
        steps=drawing.steps,
        guidance=None if drawing.guided else 1.0,
        image=image,
        mask=mask,
        strength=1.0,
    )
    resolved = resolve(request, model)
    loop = StepLoop({model.digest: _Recorder(model, seen)}, TickPolicy(StepTimeTable()))
    listener = _Listener()
    loop.submit(
        build(resolved, encode(resolved, model), model, request_id="drawing", listener=listener)
    )
    while loop.tick():
        pass
    if listener.error is not None:
        raise listener.error


class _Recorder:
    """A model's network that notes every row that it is given."""

    def __init__(self, model: Any, seen: list[Moment]) -> None:
        self._denoiser = model.denoiser
        self._seen = seen
        self.limits: RowLimits = model.denoiser.limits

    def __call__(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        added: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        given = self._denoiser.inputs(sample, timesteps, context, added)
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in given.items()}
        self._seen.extend({n: a[i : i + 1] for n, a in arrays.items()} for i in range(len(sample)))
        out: torch.Tensor = self._denoiser(sample, timesteps, context, added)
        return out


class _Listener:
    error: Exception | None = None

    def on_first_tick(self, queued_s: float) -> None:
        pass

    def on_step(self, event: object) -> None:
        pass

    def on_done(self, latent: torch.Tensor, denoise_s: float) -> None:
        pass

    def on_error(self, error: Exception) -> None:
        self.error = error


def _picture(side_px: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """For models that need one: a colour ramp, and a mask over its right half."""
    ramp = np.linspace(0, 255, side_px).astype(np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    mask = np.where(across < 128, 0, 255).astype(np.uint8)
    return np.stack([across, down, 255 - across], axis=-1), mask


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
