"""What a soak found, as a Markdown table and a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from loadtests.soak_samples import Sample
from loadtests.soak_verdicts import Findings, ProcessReport


def table(found: Findings) -> str:
    """Two tables: processes, and the service's gauges."""
    lines = [
        "| process | memory before → after, MB | slope after the warm-up, MB/h (95 %) | open files"
        " | threads |",
        "|---|---|---|---|---|",
        *(_row(process) for process in sorted(found.processes, key=lambda item: item.name)),
        "",
        "| gauge | before | after |",
        "|---|---|---|",
        *(f"| `{name}` | {old:g} | {new:g} |" for name, (old, new) in found.gauges.items()),
    ]
    return "\n".join(lines)


def _row(process: ProcessReport) -> str:
    before, after, growth = process.before, process.after, process.growth
    slope = "too short" if growth is None else f"{growth.per_hour:+.1f} ± {growth.uncertainty:.1f}"
    return (
        f"| {process.name} | {before.memory_mb:.0f} → {after.memory_mb:.0f} | {slope}"
        f" | {before.open_files} → {after.open_files} | {before.threads} → {after.threads} |"
    )


def chart(samples: Sequence[Sample], warm_up_s: float, path: Path) -> None:
    """Memory, open files and threads of every process over the soak, as a PNG."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    start_s = samples[0].at_s
    names = sorted({process.name for sample in samples for process in sample.processes})
    for axes, field, label in zip(
        panels,
        ("memory_mb", "open_files", "threads"),
        ("own memory (USS), MB", "open files", "threads"),
        strict=True,
    ):
        for name in names:
            points = [
                ((process.at_s - start_s) / 60, getattr(process, field))
                for sample in samples
                for process in sample.processes
                if process.name == name
            ]
            axes.plot([at for at, _ in points], [value for _, value in points], label=name)
        axes.axvspan(0, warm_up_s / 60, color="0.93")
        axes.set(ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize="x-small", ncols=4)
    panels[-1].set(xlabel="minutes under load (grey: warm-up)")
    figure.savefig(path, dpi=80)
