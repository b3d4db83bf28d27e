"""Runs of units as modules with named inputs and outputs: what is exported, or run directly.

``segments(unet)`` gives one segment per block, what depends on the prompt alone (``context``)
first; ``cuts`` and ``taps`` say otherwise. This is the only place that turns them into inputs and
outputs, so a plan's ONNX graphs and its torch modules cannot differ.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from itertools import pairwise

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from engine.compile.lowrank import LowRank, Site, using
from engine.compile.manifest import Tap
from engine.compile.units import PREDICTION, Read, Unit, flatten
from engine.errors import PlanError


class Segment(nn.Module):
    """Consecutive units as one module.

    Attributes:
        name: its block (``down.1``), or its first unit where it begins inside a block.
        unit_names: of its units, which are also the tensors that it produces.
        reads: tensors that it takes from outside; ``all_reads`` also those that only units read
            whose work a ``replace`` tap makes void.
        gives: names of the tensors that it returns.
        input_taps: tensors added to, or put in place of, what its units produce.
        sites: its layers that take low-rank factors, and whose work shows.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        gives: Sequence[str],
        taps: Sequence[Tap],
        sites: Sequence[Site],
    ) -> None:
        super().__init__()
        produced = {unit.name for unit in units}
        self.name = units[0].block
        self.unit_names = tuple(unit.name for unit in units)
        self.gives = tuple(gives)
        self.input_taps = {
            tap.tensor: tap for tap in taps if tap.direction == "in" and tap.tensor in produced
        }
        self._added = {n: t.input_name for n, t in self.input_taps.items() if t.mode == "add"}
        self._replaced = {n: t.input_name for n, t in self.input_taps.items() if t.mode != "add"}
        live = _live(units, gives, self._replaced)
        self._live = {unit.name for unit in live}
        self.reads = _outer_reads(live, produced)
        self.all_reads = _outer_reads(units, produced)
        self.body = nn.ModuleList(unit.module for unit in units)
        own = {id(m) for unit in live for m in unit.module.modules() if isinstance(m, LowRank)}
        self.sites = tuple(site for site in sites if id(site.layer) in own)
        self._steps = [
            (unit.name, [r.source if r.source in produced else r.name for r in unit.reads])
            for unit in units
        ]

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once.

        Args:
            feeds: by input name: every read, the tensor of every ``replace`` tap, and any ``add``
                taps and pairs of low-rank factors.

        Returns:
            The tensors of ``gives``, by name.
        """
        known = self.run_units(feeds)
        return {name: known[name] for name in self.gives}

    def run_units(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Like ``forward``, but every tensor that its units produce.

        Without the tensors of ``replace`` taps, and given ``all_reads``, those are produced too.
        """
        known = dict(feeds)
        replaced = {name: feeds[tap] for name, tap in self._replaced.items() if tap in feeds}
        skip_dead = len(replaced) == len(self._replaced)
        with using(self.sites, feeds):
            for (name, reads), module in zip(self._steps, self.body, strict=True):
                if name in replaced:
                    known[name] = replaced[name]
                elif not skip_dead or name in self._live:
                    made: Tensor = module(*(known[read] for read in reads))
                    added = feeds.get(self._added.get(name, ""))
                    known[name] = made if added is None else made + added
        return known


def _live(units: Sequence[Unit], gives: Sequence[str], replaced: Container[str]) -> list[Unit]:
    """The units whose work shows in what a segment gives, while taps replace some of theirs."""
    needed, live = set(gives), []
    for unit in reversed(units):
        if unit.name in needed and unit.name not in replaced:
            live.append(unit)
            needed |= {read.source for read in unit.reads}
    return live[::-1]


def _outer_reads(units: Sequence[Unit], produced: Collection[str]) -> tuple[Read, ...]:
    """What ``units`` read that none of their segment produces."""
    outer = {r.name: r for unit in units for r in unit.reads if r.source not in produced}
    return tuple(outer.values())


def segments(
    unet: UNet2DConditionModel,
    cuts: Sequence[str] | None = None,
    taps: Sequence[Tap] = (),
    sites: Sequence[Site] = (),
) -> tuple[Segment, ...]:
    """Split ``unet`` into segments that share its weights.

    Args:
        cuts: names of the units after which to cut; None cuts between blocks, () nowhere. Cuts
            that leave out the last unit of ``context`` make it run at every step with what
            follows.
        taps: tensors to bring out or to let in.
        sites: what :func:`engine.compile.lowrank.wrap_unet` returned for this UNet.

    Raises:
        PlanError: a cut or tap names no unit.
        UnsupportedError: the UNet holds something that has no unit.
    """
    units = flatten(unet)
    known = {unit.name for unit in units}
    for name in [*(cuts or ()), *(tap.tensor for tap in taps)]:
        if name not in known:
            raise PlanError(f"no unit is named {name!r}; the UNet has: {', '.join(sorted(known))}")

    groups = _split(units, set(default_cuts(units) if cuts is None else cuts))
    wanted = {PREDICTION} | {tap.tensor for tap in taps if tap.direction == "out"}
    result = []
    for i, group in enumerate(groups):
        later = {read.source for g in groups[i + 1 :] for unit in g for read in unit.reads}
        gives = [unit.name for unit in group if unit.name in later | wanted]
        result.append(Segment(group, gives, taps, sites))
    return tuple(_named(groups, result))


def default_cuts(units: Sequence[Unit]) -> tuple[str, ...]:
    """The last unit of every block but the last."""
    return tuple(a.name for a, b in pairwise(units) if a.block != b.block)


def _split(units: Sequence[Unit], cuts: set[str]) -> list[list[Unit]]:
    groups: list[list[Unit]] = [[]]
    for unit in units:
        groups[-1].append(unit)
        if unit.name in cuts and unit is not units[-1]:
            groups.append([])
    return groups


def _named(groups: Sequence[Sequence[Unit]], parts: Sequence[Segment]) -> Sequence[Segment]:
    begun: set[str] = set()
    for group, part in zip(groups, parts, strict=True):
        block = group[0].block
        part.name = group[0].name if block in begun else block
        begun |= {unit.block for unit in group}
    return parts
