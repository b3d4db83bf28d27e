"""What int8 costs in agreement and gives in speed, for every setting of its dial.

    python -m loadtests.int8_frontier [--model tintype] [--dials 20 25 30 35 40] [--sheet FILE]

One study of the float plan serves all settings; ``--keep FOLDER`` keeps its plans, so that a second
run finds them. ``--no-timing`` leaves out the speeds, and ``--timing-only`` the pictures and the
sheet: agreement can be measured on a busy machine, speed cannot. Speeds are medians over
interleaved rounds of the ratio to fp32, UNet only, at the two rows that a guided picture takes.
``SNR held out`` is that of the network's output along trajectories of prompts and seeds that
calibration never saw. Pictures are drawn with the model's own solver, guided, and compared with
those of the fp32 plan.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.compile.calibrate import Chain, Drawing, Moment, batches, record
from engine.compile.plan import Plan
from engine.compile.quantize import TABLE, Int8Config, Study, int8_transform, scheme_of
from engine.compile.sensitivity import decibel, noise_of
from engine.engine import Engine
from engine.model import Model
from engine.runtime import open_runtime
from engine.types import GenerateRequest, Picture
from loadtests.common import open_plan, settings_with_threads
from loadtests.int8_report import Setting, as_json, print_table, write_sheet

PROMPTS = Path(__file__).parent.parent / "models" / "prompts" / "seen.json"


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
    parser.add_argument("--sheet", type=Path, default=Path("docs/int8.png"))
    parser.add_argument("--sheet-dial", type=float, default=Int8Config().min_snr_db)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the plans; without it, they go")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-timing", action="store_true")
    parts.add_argument("--timing-only", action="store_true")
    options = parser.parse_args()

    exact = Setting(
        None,
        open_plan(settings_with_threads(options.threads), options.model, "onnxruntime", "fp32"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        dials = sorted({*options.dials, options.sheet_dial})
        settings = [exact, *make_settings(exact.plan, dials, options.keep or Path(scratch))]
        if not options.timing_only:
            measure_agreement(settings, options)
        if not options.no_timing:
            measure_speed(settings, options)
        print_table(settings, options)
        if options.json is not None:
            rows = [as_json(setting, exact) for setting in settings]
            options.json.write_text(json.dumps(rows, indent=1))


def measure_agreement(settings: Sequence[Setting], options: argparse.Namespace) -> None:
    """Draw with every setting, measure them on held-out trajectories, write the contact sheet."""
    prompts = spread_prompts(options.prompts)
    for setting in settings:
        setting.pictures = draw(setting.plan, prompts, options)
    measure_held_out(settings, prompts)
    chosen = next(s for s in settings if s.dial == options.sheet_dial)
    write_sheet(settings[0].pictures, chosen.pictures, options.sheet)


def spread_prompts(count: int) -> list[str]:
    """``count`` prompts, evenly over the list that the default model's quality is judged on."""
    known = [entry["prompt"] for entry in json.loads(PROMPTS.read_text())]
    return [known[i] for i in np.linspace(0, len(known) - 1, count).astype(int)]


def make_settings(plan: Plan, dials: Sequence[float], store: Path) -> list[Setting]:
    """An int8 plan for each dial, all from one study of a copy of ``plan``.

    Args:
        store: where they are written, or found from an earlier run of the same plan and recipe.
    """
    recipe = json.dumps(int8_transform("onnxruntime").recipe, sort_keys=True)
    home = store / hashlib.sha256(f"{plan.digest} {recipe}".encode()).hexdigest()[:16]
    study: Study | None = None
    settings = []
    for dial in dials:
        folder = home / f"int8-{dial:g}"
        if not folder.exists():
            partial = home / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            study = study or _study(plan, home / "fp32")
            chosen = study.choose(dial)
            shutil.copytree(home / "fp32", partial)
            study.write(partial, chosen)
            (partial / TABLE).write_text(json.dumps(study.table(chosen)))
            partial.rename(folder)
        manifest = plan.manifest.model_copy(
            update={"precision": "int8", "digest": f"{plan.digest}-{dial:g}"}
        )
        table = json.loads((folder / TABLE).read_text())
        settings.append(Setting(dial, Plan(folder, manifest), table))
    return settings


def _study(plan: Plan, folder: Path) -> Study:
    shutil.copytree(plan.folder, folder, dirs_exist_ok=True)
    return Study.make(folder, plan.manifest, scheme_of("onnxruntime"), Int8Config())


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


if __name__ == "__main__":
    main()
