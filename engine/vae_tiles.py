"""Large pictures through the autoencoder in overlapping tiles, so that memory stays bounded.

Tiles, overlap and blending are those of Diffusers' ``AutoencoderKL.tiled_decode`` and
``tiled_encode``. The autoencoder normalises over what it sees, so a tiled picture is a little
different from a whole one: it is an approximation, and named wherever it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

from engine.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Tiling:
    """How pictures above a bound are cut.

    Attributes:
        above_px: pixels of a picture from which on it is cut; up to it, it is whole and exact.
        tile_px: side of a tile; a multiple of the latent's factor.
        overlap: part of a tile that it shares with the next one, and in which they are blended.
    """

    above_px: int = 1024 * 1024
    tile_px: int = 512
    overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.above_px < 1 or self.tile_px < 1 or not 0.0 < self.overlap <= 0.5:
            raise InvalidRequestError("tiles need a positive bound and side, and an overlap to 0.5")

    def applies(self, height_px: int, width_px: int) -> bool:
        """Whether a picture of this size is cut."""
        return height_px * width_px > self.above_px

    @property
    def dial(self) -> str:
        """How a reply names it."""
        return f"{self.tile_px} px, overlap {self.overlap:g}"


def run_in_tiles(
    run: Callable[[torch.Tensor], torch.Tensor],
    whole: torch.Tensor,
    *,
    tile: int,
    overlap: float,
    scale: Fraction,
    least: int = 1,
) -> torch.Tensor:
    """Run an autoencoder half tile by tile, blend, and put the results together.

    Args:
        run: from (1, channels, h, w) to (1, other channels, h * scale, w * scale).
        whole: (1, channels, height, width).
        tile: side of a tile, in cells of ``whole``.
        overlap: part of a tile.
        scale: cells that come out for one that goes in, each way.
        least: smallest side that ``run`` takes; a tile at the edge is grown backwards to it.

    Returns:
        (1, other channels, height * scale, width * scale), on the CPU.
    """
    out_tile = int(tile * scale)
    blend = int(out_tile * overlap)
    kept = out_tile - blend
    height, width = whole.shape[2:]
    rows: list[torch.Tensor] = []
    above: list[torch.Tensor] = []
    for top, bottom in _spans(height, tile, overlap):
        row: list[torch.Tensor] = []
        for left, right in _spans(width, tile, overlap):
            # Grown where it is small, then cut back to what it stands for.
            y, x = max(0, min(top, bottom - least)), max(0, min(left, right - least))
            out = run(whole[:, :, y:bottom, x:right]).cpu()
            out = out[:, :, int((top - y) * scale) :, int((left - x) * scale) :].clone()
            if above:
                _blend(above[len(row)].transpose(2, 3), out.transpose(2, 3), blend)
            if row:
                _blend(row[-1], out, blend)
            row.append(out)
        rows.append(torch.cat([out[:, :, :kept, :kept] for out in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def _spans(size: int, tile: int, overlap: float) -> Iterator[tuple[int, int]]:
    stride = int(tile * (1 - overlap))
    for start in range(0, size, stride):
        yield start, min(start + tile, size)


def _blend(before: torch.Tensor, after: torch.Tensor, extent: int) -> None:
    """Let ``before`` fade into the first ``extent`` columns of ``after``, in place."""
    extent = min(before.shape[3], after.shape[3], extent)
    if extent == 0:
        return
    share = torch.arange(extent, dtype=after.dtype) / extent
    after[..., :extent] = before[..., -extent:] * (1 - share) + after[..., :extent] * share
