"""What ``darkroom inspect`` and ``darkroom models`` say of plans and solvers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from engine.compile.manifest import PlanManifest

INT8_TABLE = "int8.json"
"""In the folder of an int8 plan; ``engine.compile.quantize.TABLE``, which is slow to import."""

_LEVELS = 8
_SENSITIVE_GROUPS = 8


def describe_solver(scheduler_config: Mapping[str, Any]) -> str:
    """What draws requests that name no solver, and instead of what, where that is another one."""
    from engine.solvers import from_scheduler_config

    found = from_scheduler_config(scheduler_config)
    if found.substitution is None:
        return f"{found.solver} ({found.scheduler_class})"
    return f"{found.solver} in place of {found.scheduler_class}: {found.note}"


def describe_plan(console: Console, manifest: PlanManifest, folder: Path) -> None:
    """Print what a plan holds and, where it is int8, what was measured and decided for it."""
    latent = manifest.model.latent
    console.print(
        f"[bold]{manifest.model.name}[/] {manifest.backend} {manifest.precision}\n"
        f"digest {manifest.digest}\n"
        f"latent {latent.channels} channels, {latent.factor_px} px a cell;"
        f" native {latent.native_px} px\n"
        f"solver {describe_solver(manifest.model.scheduler_config)}\n"
        f"versions {json.dumps(manifest.versions)}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("segment", "inputs", "outputs", "adapter sites")
    for segment in manifest.unet:
        sites = sum(site.segment == segment.name for site in manifest.adapter_sites)
        inputs = [i.source for i in segment.inputs if not i.optional]
        outputs = [output.source for output in segment.outputs]
        table.add_row(segment.name, ", ".join(inputs), ", ".join(outputs), str(sites))
    console.print(table)
    if INT8_TABLE in manifest.files:
        _describe_int8(console, json.loads((folder / INT8_TABLE).read_text()))


def _describe_int8(console: Console, found: dict[str, Any]) -> None:
    groups: list[dict[str, Any]] = found["groups"]
    taken = sum(group["int8"] for group in groups)
    console.print(
        f"\n[bold]int8[/]: {100 * found['int8_share_of_macs']:.0f} % of the multiplications,"
        f" {taken} of {len(groups)} groups of layers; signal over quantization noise of the"
        f" network's output {found['snr_db']:.1f} dB",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("segment", "int8 groups", "int8 multiplications", "SNR with it alone in int8")
    for name, snr_db in found["segments"].items():
        own = [group for group in groups if group["segment"] == name]
        chosen = [group for group in own if group["int8"]]
        macs = sum(group["macs"] for group in own)
        share = sum(group["macs"] for group in chosen) / macs if macs else 0.0
        table.add_row(
            name,
            f"{len(chosen)} of {len(own)}",
            f"{100 * share:.0f} %",
            f"{snr_db:.1f} dB" if chosen else "",
        )
    console.print(table)
    steps = Table("timesteps", "SNR, median", "SNR, lowest")
    for part in _parts(sorted(found["steps"], key=lambda step: -step["timestep"])):
        levels = [step["snr_db"] for step in part]
        span = f"{part[0]['timestep']:.0f} to {part[-1]['timestep']:.0f}"
        steps.add_row(span, f"{statistics.median(levels):.1f} dB", f"{min(levels):.1f} dB")
    console.print(steps)
    sensitive = Table("most sensitive layers", "segment", "SNR with them alone in int8", "runs in")
    for group in sorted(groups, key=lambda group: group["snr_db"])[:_SENSITIVE_GROUPS]:
        sensitive.add_row(
            ", ".join(weight.removeprefix("module.body.") for weight in group["weights"]),
            group["segment"],
            f"{group['snr_db']:.1f} dB",
            "int8" if group["int8"] else "float",
        )
    console.print(sensitive)


def _parts(steps: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    """``steps`` in up to ``_LEVELS`` runs of about equal length."""
    count = min(_LEVELS, len(steps))
    for i in range(count):
        yield steps[i * len(steps) // count : (i + 1) * len(steps) // count]
