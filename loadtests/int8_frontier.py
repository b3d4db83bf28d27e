"""What int8 costs in agreement and gives in speed, for every setting of its dial.

    python -m loadtests.int8_frontier [--model tintype] [--dials 20 25 30 35 40] [--sheet FILE]

One study of the float plan serves all settings. Speeds are medians over interleaved rounds of the
ratio to fp32, UNet only, at the two rows that a guided picture takes. ``SNR held out`` is that of
the network's output along trajectories of prompts and seeds that calibration never saw. Pictures
are drawn with the model's own solver, guided, and compared with those of the fp32 plan.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from rich.console import Console
from rich.table import Table

from engine.compile.calibrate import Chain, Drawing, Moment, batches, record
from engine.compile.plan import Plan
from engine.compile.quantize import Int8Config, Study, scheme_of
from engine.compile.sensitivity import decibel, noise_of
from engine.engine import Engine
from engine.model import Model
from engine.runtime import open_runtime
from engine.types import GenerateRequest, Picture
from loadtests.common import conditions, open_plan, settings_with_threads

PROMPTS = Path(__file__).parent.parent / "models" / "prompts" / "seen.json"
SHEET_PAIRS_ACROSS = 4


@dataclass
class Setting:
    """One row of the table: fp32 (``dial`` None) or int8 at a setting of the dial."""

    dial: float | None
    plan: Plan
    table: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    held_out_db: float = 200.0
    speed: dict[int, float] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of the whole plan."""
        return sum(path.stat().st_size for path in self.plan.folder.rglob("*") if path.is_file())


def main() -> None:
    """Print the table; write the contact sheet and, where asked, JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--dials", type=float, nargs="+", default=[20, 25, 30, 35, 40])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, default=Path("out/int8_sheet.png"))
    parser.add_argument("--sheet-dial", type=float, default=Int8Config().min_snr_db)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    exact = Setting(
        None,
        open_plan(settings_with_threads(options.threads), options.model, "onnxruntime", "fp32"),
    )
    prompts = spread_prompts(options.prompts)
    with tempfile.TemporaryDirectory() as scratch:
        dials = sorted({*options.dials, options.sheet_dial})
        settings = [exact, *make_settings(exact.plan, dials, Path(scratch))]
        for setting in settings:
            setting.pictures = draw(setting.plan, prompts, options)
        measure_held_out(settings, prompts)
        measure_speed(settings, options)
        print_table(settings, options)
        chosen = next(s for s in settings if s.dial == options.sheet_dial)
        write_sheet(exact.pictures, chosen.pictures, options.sheet)
        if options.json is not None:
            rows = [as_json(setting, exact) for setting in settings]
            options.json.write_text(json.dumps(rows, indent=1))


def spread_prompts(count: int) -> list[str]:
    """``count`` prompts, evenly over the list that the default model's quality is judged on."""
    known = [entry["prompt"] for entry in json.loads(PROMPTS.read_text())]
    return [known[i] for i in np.linspace(0, len(known) - 1, count).astype(int)]


def make_settings(plan: Plan, dials: Sequence[float], scratch: Path) -> list[Setting]:
    """An int8 plan for each dial, all from one study of a copy of ``plan``."""
    base = Path(shutil.copytree(plan.folder, scratch / "fp32"))
    study = Study.make(base, plan.manifest, scheme_of("onnxruntime"), Int8Config())
    settings = []
    for dial in dials:
        folder = Path(shutil.copytree(base, scratch / f"int8-{dial:g}"))
        chosen = study.choose(dial)
        study.write(folder, chosen)
        manifest = plan.manifest.model_copy(
            update={"precision": "int8", "digest": f"{plan.digest}-{dial:g}"}
        )
        settings.append(Setting(dial, Plan(folder, manifest), study.table(chosen)))
    return settings


def draw(plan: Plan, prompts: Sequence[str], options: argparse.Namespace) -> list[Picture]:
    """One guided picture for each prompt, each alone."""
    runtime = open_runtime("onnxruntime", threads=options.threads)
    engine = Engine(device=runtime.device)
    engine.load(Model.open(plan, runtime))
    engine.start()
    try:
        return [
            engine.generate(
                GenerateRequest(
                    prompt=prompt, seed=i, steps=options.steps, guidance=options.guidance
                )
            )
            for i, prompt in enumerate(prompts)
        ]
    finally:
        engine.close()
        runtime.close()


def measure_held_out(settings: Sequence[Setting], prompts: Sequence[str]) -> None:
    """SNR of the network's output along the float plan's own trajectories."""
    plan = settings[0].plan
    drawings = [
        Drawing(prompt, seed=50 + i, steps=(20, 10, 30)[i % 3], guided=i % 2 == 0)
        for i, prompt in enumerate(prompts[:8])
    ]
    moments = record(plan.folder, plan.manifest, rows=96, drawings=drawings)
    exact = predictions(settings[0], moments)
    for setting in settings[1:]:
        noise = noise_of(predictions(setting, moments), exact)
        setting.held_out_db = decibel(float(noise.mean()))


def predictions(setting: Setting, moments: Sequence[Moment]) -> np.ndarray[Any, Any]:
    """The network's output for every moment: (rows, channels, height, width)."""
    chain = Chain(setting.plan.folder, setting.plan.manifest.unet)
    return np.concatenate([chain.run(known) for known in batches(moments)])


def measure_speed(settings: Sequence[Setting], options: argparse.Namespace) -> None:
    """Speed of the UNet against fp32, in rounds in which every plan takes its turn."""
    runtime = open_runtime("onnxruntime", threads=options.threads)
    models = [Model.open(setting.plan, runtime) for setting in settings]
    for batch in options.batches:
        walks = [model.blank_walk(model.native_lane()) for model in models]
        times: list[list[float]] = [[] for _ in walks]
        for round_index in range(options.rounds + 2):
            for walk, seconds in zip(walks, times, strict=True):
                began_s = time.perf_counter()
                walk(2 * batch)
                if round_index >= 2:  # the first ones warm up
                    seconds.append(time.perf_counter() - began_s)
        for setting, seconds in zip(settings, times, strict=True):
            ratios = [a / b for a, b in zip(times[0], seconds, strict=True)]
            setting.speed[batch] = statistics.median(ratios)
    for model in models:
        model.close()
    runtime.close()


def latent_error(picture: Picture, exact: Picture) -> float:
    """Relative error of the final latent."""
    return float(torch.linalg.norm(picture.latent - exact.latent) / torch.linalg.norm(exact.latent))


def psnr_db(picture: Picture, exact: Picture) -> float:
    """Pixel PSNR of two pictures of 8 bits; 99 for equal ones."""
    error = np.mean(np.square(picture.image.astype(np.float64) - exact.image))
    return float(10 * np.log10(255**2 / error)) if error > 0 else 99.0


def as_json(setting: Setting, exact: Setting) -> dict[str, Any]:
    """Everything measured of one setting."""
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
        "latent_error": [statistics.median(errors), max(errors)],
        "psnr_db": [statistics.median(psnr), min(psnr)],
        "plan_bytes": setting.size_bytes,
        "segments": setting.table.get("segments"),
    }


def print_table(settings: Sequence[Setting], options: argparse.Namespace) -> None:
    """The frontier, a row for each setting of the dial."""
    table = Table("dial", title=conditions(options))
    for batch in options.batches:
        table.add_column(f"speed, batch {batch}", justify="right")
    for name in (
        "in int8",
        "SNR",
        "worst step",
        "SNR held out",
        "latent error median / max",
        "PSNR median / min",
        "plan",
    ):
        table.add_column(name, justify="right")
    for setting in settings:
        row = as_json(setting, settings[0])
        cells = [f"{row['speed'][batch]:.2f}x" for batch in options.batches]
        if setting.dial is None:
            cells += ["", "", "", "", "", ""]
        else:
            cells += [
                f"{100 * row['int8_share']:.0f} %",
                f"{row['snr_db']:.1f} dB",
                f"{row['worst_step_db']:.1f} dB",
                f"{row['held_out_db']:.1f} dB",
                "{:.3f} / {:.3f}".format(*row["latent_error"]),
                "{:.1f} / {:.1f} dB".format(*row["psnr_db"]),
            ]
        name = "fp32" if setting.dial is None else f"{setting.dial:g} dB"
        table.add_row(name, *cells, f"{row['plan_bytes'] / 1e6:.1f} MB")
    Console(width=170).print(table)


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
    sheet.save(path)


if __name__ == "__main__":
    main()
