"""How a batch of UNet rows is run: within the graphs' bounds, in sizes that they like, in memory.

Rows do not influence each other, so a batch may be cut, and padded, anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import InvalidRequestError, OutOfMemoryError


@dataclass(frozen=True, slots=True)
class RowLimits:
    """Batches that a network takes.

    Attributes:
        most: largest batch; None for any.
        sizes: batches that it is prepared for, ascending. Others cost a compilation or a
            recording each, so a batch is padded to the next of these.
    """

    most: int | None = None
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise InvalidRequestError(f"a network must take one row at least, not {self.most}")
        if list(self.sizes) != sorted(set(self.sizes)) or any(size < 1 for size in self.sizes):
            raise InvalidRequestError(f"batch sizes must ascend from 1, not {self.sizes}")

    def padded(self, rows: int) -> int:
        """The batch to run ``rows`` in."""
        for size in self.sizes:
            if size >= rows and (self.most is None or size <= self.most):
                return size
        return rows


class Walk(Protocol):
    """Runs a network once: what :class:`engine.denoiser.Denoiser` does."""

    @property
    def limits(self) -> RowLimits:
        """Batches that it takes."""
        ...

    def __call__(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        added: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """(rows, in_channels, h, w), (rows,), (rows, tokens, width) to (rows, channels, h, w)."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs of one walk. Row order: every member's prompt row, then the negative rows.

    Attributes:
        sample: (rows, in_channels, height, width).
        timesteps: (rows,) float32.
        context: (rows, tokens, width).
        added: further per-row inputs.
        guided: (members,) positions of the members that have a negative row, in its order.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    added: dict[str, torch.Tensor]
    guided: torch.Tensor

    def __len__(self) -> int:
        return len(self.sample)


def run_rows(
    walk: Walk,
    rows: Rows,
    *,
    most: int | None = None,
    on_out_of_memory: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Evaluate the network on ``rows``, in as few runs as its limits and memory allow.

    Args:
        most: rows of one run, on top of the network's own limit.
        on_out_of_memory: told of every batch that did not fit, before its halves are run.

    Returns:
        (rows, channels, height, width) float32, in the order of ``rows``.

    Raises:
        OutOfMemoryError: a single row does not fit.
    """
    limits = walk.limits
    bounds = [bound for bound in (most, limits.most) if bound is not None]
    step = max(1, min([len(rows), *bounds]))
    parts = []
    start = 0
    while start < len(rows):
        end = min(start + step, len(rows))
        try:
            parts.append(_run_padded(walk, rows, start, end, limits.padded(end - start)))
        except OutOfMemoryError:
            if on_out_of_memory is not None:
                on_out_of_memory(end - start)
            if end - start == 1:
                raise
            step = (end - start) // 2
            continue
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _run_padded(walk: Walk, rows: Rows, start: int, end: int, size: int) -> torch.Tensor:
    """Run rows ``start`` to ``end`` in a batch of ``size``: the last one is repeated to fill it."""
    if end - start == size == len(rows):
        out = walk(rows.sample, rows.timesteps, rows.context, rows.added)
    else:
        order = torch.arange(start, start + size, device=rows.sample.device).clamp(max=end - 1)
        added = {name: tensor[order] for name, tensor in rows.added.items()}
        out = walk(rows.sample[order], rows.timesteps[order], rows.context[order], added)
    return out[: end - start].float()
