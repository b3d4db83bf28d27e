"""Walks a plan's segments: noisy latents in, the network's prediction out.

The walker knows no block by name. It follows the manifest: each segment takes tensors that were
given from outside or made by an earlier segment, and leaves new ones. What add-ons and step reuse
need is data: residuals for the inputs marked as skips, tensors for input taps, names of tensors to
keep, and a choice of segments.

Segments that read neither the latent nor the timestep (keys and values of the text, by default)
give the same at every step. They run when the rows of a batch or their adapters change, not at
every tick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from engine.compile.manifest import constant_segments
from engine.compile.plan import Plan
from engine.errors import ExecutionError, OutOfMemoryError
from engine.memo import TensorMemo
from engine.rows import RowLimits
from engine.runtime.base import Graph, Runtime

PREDICTION = "prediction"


@dataclass(frozen=True, slots=True)
class Step:
    """One segment of a walk, and the tensors that nobody needs after it."""

    graph: Graph
    last_used: tuple[str, ...]


class Denoiser:
    """The network of one plan, opened on one runtime. Safe to call from several threads.

    Attributes:
        segments: names of the plan's segments, in order.
        limits: batches that it takes: those of its tightest graph, sizes that the runtime likes.
        external_inputs: one spec for each tensor that comes from outside, input taps included.

    Raises:
        PlanCorruptError, BackendUnavailableError: see :meth:`Runtime.open`.
    """

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self._device = runtime.device
        self._graphs: list[Graph] = []
        self._memos: dict[str, TensorMemo] = {}
        try:
            for segment in plan.manifest.unet:
                self._graphs.append(runtime.open(plan.folder, plan.manifest, segment))
        except BaseException:
            self.close()
            raise
        specs = plan.manifest.unet
        self.segments = tuple(segment.name for segment in specs)
        bounds = [graph.max_rows for graph in self._graphs if graph.max_rows is not None]
        self.limits = RowLimits(min(bounds, default=None), runtime.row_sizes)
        made = {port.source for segment in specs for port in segment.outputs}
        outer = {p.source: p for s in specs for p in s.inputs if p.source not in made}
        self.external_inputs = tuple(outer.values())
        constant = constant_segments(specs)
        self._memos.update((name, TensorMemo()) for name in constant)
        self._shared = {p.source for s in specs if s.name in constant for p in s.outputs}
        self._walk = lru_cache(maxsize=64)(self._plan_walk)

    def __call__(
        self,
        sample: Tensor,
        timesteps: Tensor,
        context: Tensor,
        added: Mapping[str, Tensor],
        *,
        factors: Mapping[str, Tensor] | None = None,
        residuals: Mapping[int, Tensor] | None = None,
        taps: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Evaluate the whole network once.

        Args:
            sample: (rows, in_channels, height, width) latents, as the UNet takes them.
            timesteps: (rows,), fractions allowed.
            context: (rows, tokens, width).
            added: further conditioning by name, e.g. ``text_embeds``, each (rows, …).
            factors: low-rank factors by graph input name, each stacked over the rows; rows
                without an adapter bring zeros. Between two calls they and the conditioning may
                be written to through torch, but not through an array that shares their memory:
                torch would not notice, nor would what is remembered of the last call.
            residuals: what ControlNets add, by index in their list of residuals.
            taps: tensors for input taps, by the name of the tensor that they change.

        Returns:
            (rows, channels, height, width) float32 on the runtime's device.

        Raises:
            ExecutionError: a segment failed, or a tensor does not fit.
        """
        given = self.inputs(sample, timesteps, context, added)
        given.update((f"tap.{name}", tensor) for name, tensor in (taps or {}).items())
        return self.run(given, factors=factors, residuals=residuals)[PREDICTION]

    def inputs(
        self, sample: Tensor, timesteps: Tensor, context: Tensor, added: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors from outside, under the names by which segments take them."""
        named = {"sample": sample, "timestep": timesteps, "context": context}
        return named | {f"added.{name}": tensor for name, tensor in added.items()}

    def run(
        self,
        given: Mapping[str, Tensor],
        *,
        keep: Iterable[str] = (PREDICTION,),
        segments: Sequence[str] | None = None,
        factors: Mapping[str, Tensor] | None = None,
        residuals: Mapping[int, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Walk some segments from given tensors to kept ones.

        Args:
            given: tensors by name: :meth:`inputs`, input taps as ``tap.<tensor>``, and whatever
                the segments left out would have made.
            keep: names of the tensors wanted.
            segments: those to run; None for all. They run in the plan's order.

        Returns:
            The tensors of ``keep``, float32 on the runtime's device.
        """
        known = {name: tensor.to(self._device) for name, tensor in given.items()}
        wanted = frozenset(keep)
        for step in self._walk(None if segments is None else frozenset(segments), wanted):
            outputs = self._outputs(step.graph, known, residuals or {}, factors or {})
            known.update((port.source, outputs[port.name]) for port in step.graph.spec.outputs)
            for name in step.last_used:
                known.pop(name, None)
        if missing := wanted - known.keys():
            raise ExecutionError(f"no segment of this walk makes {', '.join(sorted(missing))}")
        return {
            name: known[name].float().clone() if name in self._shared else known[name].float()
            for name in wanted
        }

    def _outputs(
        self,
        graph: Graph,
        known: Mapping[str, Tensor],
        residuals: Mapping[int, Tensor],
        factors: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Run one graph, unless what it gives is remembered."""

        def feeds() -> dict[str, Tensor]:
            return _feeds(graph, known, residuals, factors)

        def outputs() -> Mapping[str, Tensor]:
            memo = self._memos.get(graph.spec.name)
            if memo is None:
                return graph.run(feeds())
            given = _given(graph, known, factors)
            return memo.recall(given, lambda: _run_in_company(graph, feeds()))

        try:
            return outputs()
        except OutOfMemoryError:
            if not self.forget():
                raise
        return outputs()  # what was remembered may be what was lacking

    def _plan_walk(self, only: frozenset[str] | None, wanted: frozenset[str]) -> tuple[Step, ...]:
        graphs = [g for g in self._graphs if only is None or g.spec.name in only]
        steps: list[Step] = []
        needed = set(wanted)
        for graph in reversed(graphs):
            touched = {port.source for port in (*graph.spec.inputs, *graph.spec.outputs)}
            steps.append(Step(graph, tuple(touched - needed)))
            needed |= {port.source for port in graph.spec.inputs}
        return tuple(reversed(steps))

    def forget(self) -> bool:
        """Let go of what is remembered between two steps; returns whether there was anything."""
        return any([memo.clear() for memo in self._memos.values()])

    def close(self) -> None:
        """Close every graph. Closing twice is harmless."""
        for graph in self._graphs:
            graph.close()
        for memo in self._memos.values():
            memo.close()


def _given(
    graph: Graph, known: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a graph will be fed, as it was given: the very tensors, of whatever dtype."""
    inputs = {p.name: known[p.source] for p in graph.spec.inputs if p.source in known}
    if not factors:
        return inputs
    return inputs | {p.name: factors[p.name] for p in graph.spec.factors if p.name in factors}


def _run_in_company(graph: Graph, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Run a single row as two: what it gives must not depend on its having mates.

    Libraries multiply a single vector by other kernels, which round differently. The pooled text
    is one vector a row; int8 made 0.5 % of a picture out of its last bits.
    """
    if any(len(tensor) != 1 for tensor in feeds.values()) or graph.max_rows == 1:
        return graph.run(feeds)
    outputs = graph.run({name: torch.cat([tensor, tensor]) for name, tensor in feeds.items()})
    return {name: tensor[:1].clone() for name, tensor in outputs.items()}


def _feeds(
    graph: Graph,
    known: Mapping[str, Tensor],
    residuals: Mapping[int, Tensor],
    factors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    feeds = {}
    for port in graph.spec.inputs:
        if port.source not in known:
            if port.optional:
                continue
            raise ExecutionError(f"{graph.spec.name} needs {port.source}, which nothing made")
        tensor = _as(known[port.source], port.dtype)
        if port.skip is not None and port.skip in residuals:
            tensor = tensor + residuals[port.skip].to(tensor)
        feeds[port.name] = tensor
    for port in graph.spec.factors if factors else ():
        if port.name in factors:
            feeds[port.name] = _as(factors[port.name], port.dtype)
    return feeds


def _as(tensor: Tensor, dtype: str) -> Tensor:
    wanted: torch.dtype = getattr(torch, dtype)
    return tensor if tensor.dtype is wanted else tensor.to(wanted)
