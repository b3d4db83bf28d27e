"""What the int8 frontier prints and draws: its table, SNR by segment and step, contact sheet."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from rich.console import Console
from rich.table import Table

from engine.compile.plan import Plan
from engine.types import Picture
from loadtests.common import conditions

SHEET_PAIRS_ACROSS = 4


@dataclass
class Setting:
    """One row of the table: fp32 (``dial`` None) or int8 at a setting of the dial."""

    dial: float | None
    plan: Plan
    table: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    held_out_db: float | None = None
    speed: dict[int, float] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of the whole plan."""
        return sum(path.stat().st_size for path in self.plan.folder.rglob("*") if path.is_file())


def latent_error(picture: Picture, exact: Picture) -> float:
    """Relative error of the final latent."""
    return float(torch.linalg.norm(picture.latent - exact.latent) / torch.linalg.norm(exact.latent))


def psnr_db(picture: Picture, exact: Picture) -> float:
    """Pixel PSNR of two pictures of 8 bits; 99 for equal ones."""
    error = np.mean(np.square(picture.image.astype(np.float64) - exact.image))
    return float(10 * np.log10(255**2 / error)) if error > 0 else 99.0


def as_json(setting: Setting, exact: Setting) -> dict[str, Any]:
    """Everything measured of one setting; what was left out is None."""
    pairs = list(zip(setting.pictures, exact.pictures, strict=True))
    psnr = [psnr_db(*pair) for pair in pairs]
    errors = [latent_error(*pair) for pair in pairs]
    steps = [step["snr_db"] for step in setting.table.get("steps", [])]
    return {
        "dial": setting.dial,
        "speed": setting.speed,
        "int8_share": setting.table.get("int8_share_of_macs", 0.0),
        "snr_db": setting.table.get("snr_db"),
        "worst_step_db": min(steps) if steps else None,
        "held_out_db": setting.held_out_db,
        "latent_error": [statistics.median(errors), max(errors)] if pairs else None,
        "psnr_db": [statistics.median(psnr), min(psnr)] if pairs else None,
        "plan_bytes": setting.size_bytes,
        "segments": setting.table.get("segments"),
        "steps": setting.table.get("steps"),
    }


def print_table(settings: Sequence[Setting], options: argparse.Namespace) -> None:
    """The frontier, a row for each setting of the dial; then SNR by segment and by step."""
    table = Table("dial", title=conditions(options, hide=("json", "keep")))
    for name in (
        *(f"speed, batch {batch}" for batch in options.batches),
        "in int8",
        "SNR",
        "worst step",
        "SNR held out",
        "latent error median / max",
        "PSNR median / min",
        "plan",
    ):
        table.add_column(name, justify="right")
    rows = [as_json(setting, settings[0]) for setting in settings]
    for row in rows:
        speeds = [row["speed"].get(batch) for batch in options.batches]
        cells = ["" if speed is None else f"{speed:.2f}x" for speed in speeds]
        if row["dial"] is None:
            cells += [""] * 6
        else:
            cells += [f"{100 * row['int8_share']:.0f} %"]
            cells += [
                "" if row[key] is None else f"{row[key]:.1f} dB"
                for key in ("snr_db", "worst_step_db", "held_out_db")
            ]
            errors, psnr = row["latent_error"], row["psnr_db"]
            cells += ["{:.3f} / {:.3f}".format(*errors) if errors else ""]
            cells += ["{:.1f} / {:.1f} dB".format(*psnr) if psnr else ""]
        table.add_row(_name(row), *cells, f"{row['plan_bytes'] / 1e6:.1f} MB")
    console = Console(width=170)
    console.print(table)
    quantized = [row for row in rows if row["dial"] is not None]
    for title, key, label in (("segment", "segments", str), ("timestep", "steps", _timestep)):
        part = Table(title, *map(_name, quantized), title=f"SNR in dB by {title}")
        for entry in _entries(quantized[0], key):
            part.add_row(label(entry), *(f"{_entries(r, key)[entry]:.1f}" for r in quantized))
        console.print(part)


def _name(row: dict[str, Any]) -> str:
    return "fp32" if row["dial"] is None else f"{row['dial']:g} dB"


def _timestep(entry: int | float) -> str:
    return f"{entry:.0f}"


def _entries(row: dict[str, Any], key: str) -> dict[Any, float]:
    """SNR by segment name, or by timestep (the mean in dB where one occurs more than once)."""
    if key == "segments":
        return dict(row[key])
    found: dict[float, list[float]] = {}
    for step in row[key]:
        found.setdefault(step["timestep"], []).append(step["snr_db"])
    return {timestep: statistics.fmean(snr) for timestep, snr in found.items()}


def write_sheet(exact: Sequence[Picture], other: Sequence[Picture], path: Path) -> None:
    """Pairs of pictures, fp32 left and int8 right of it."""
    height, width = exact[0].image.shape[:2]
    gap = 8
    rows = -(-len(exact) // SHEET_PAIRS_ACROSS)
    size = (SHEET_PAIRS_ACROSS * (2 * width + gap) - gap, rows * (height + gap) - gap)
    sheet = Pillow.new("RGB", size, "white")
    for i, pair in enumerate(zip(exact, other, strict=True)):
        down, across = divmod(i, SHEET_PAIRS_ACROSS)
        for j, picture in enumerate(pair):
            place = (across * (2 * width + gap) + j * width, down * (height + gap))
            sheet.paste(Pillow.fromarray(picture.image), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
