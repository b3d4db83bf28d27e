"""What was measured of the noise cache, as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from cache.calibration import BEYOND_ERROR, Calibration, Quality


def calibration_table(found: Calibration) -> Table:
    """Quality by similarity and jump, with fewer steps beside each."""
    table = Table(
        *("similarity", "skipped", "pairs", "kept", "±", "fewer steps keep", "worth it"),
        *("Fréchet", "fewer steps", "agreement", "fewer steps"),
    )
    for row in found.quality:
        table.add_row(
            f"{row.low:.3f}",
            f"{row.share:.0%}",
            str(row.pairs),
            f"{row.ratio:.3f}",
            f"{row.error:.3f}",
            f"{row.ratio_fewer:.3f}",
            _worth(row),
            f"{row.frechet:.3f}",
            f"{row.frechet_fewer:.3f}",
            f"{row.agreement:.3f}",
            f"{row.agreement_fewer:.3f}",
        )
    spread = ", ".join(f"{d.share:.0%}: {d.ratio:.3f}" for d in found.diversity)
    table.caption = f"diversity of seeds, a ratio to no cache: {spread}"
    return table


def _worth(row: Quality) -> str:
    """Beside fewer steps: better or worse beyond the error, or as good."""
    if row.beaten:
        return "no"
    return "yes" if row.ratio - row.ratio_fewer > BEYOND_ERROR * row.error else "as good"
