"""Pictures a second of the engine beside what a user would pick instead, in one run.

    python -m loadtests.bench_engine [--model tintype] [--batches 1 4 8 16] [--threads 1 2]

Each contender runs in a process of its own, so that peak memory is its own and no thread pool is
shared; contenders take turns and the median of the rounds is quoted, so that a noisy machine is
noisy for all. Same steps, same guidance (two UNet rows a picture), same solver; text encoding and
VAE decoding are left out on every side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests.common import (
    TimedRuntime,
    conditions,
    model_folder,
    open_plan,
    peak_memory_mb,
    settings_with_threads,
)

CONTENDERS = (
    "diffusers eager",
    "diffusers compile",
    "darkroom torch",
    "darkroom onnxruntime fp32",
    "darkroom onnxruntime int8",
)
GUIDANCE = 4.0


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tintype")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of one process")
    parser.add_argument("--turns", type=int, default=2, help="of all contenders")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measure(options)))
        return
    turns: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for threads in options.threads:
        for turn in range(options.turns):
            for name in options.contenders:
                print(f"{name}, {threads} threads, turn {turn + 1} …", file=sys.stderr)
                turns.setdefault((name, threads), []).append(_in_child(options, name, threads))
    results = {key: _median(runs) for key, runs in turns.items()}
    _print(options, results)
    if options.json is not None:
        rows = [{"contender": c, "threads": t, **r} for (c, t), r in results.items()]
        options.json.write_text(json.dumps(rows, indent=1))


def _in_child(options: argparse.Namespace, name: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtests.bench_engine", "--model", options.model]
    command += ["--steps", str(options.steps), "--rounds", str(options.rounds)]
    command += ["--batches", *map(str, options.batches)]
    command += ["--child", name, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median of each figure over the turns."""
    merged: dict[str, Any] = {"peak_mb": statistics.median(run["peak_mb"] for run in runs)}
    for key in ("pictures_per_s", "overhead"):
        merged[key] = {b: statistics.median(run[key][b] for run in runs) for b in runs[0][key]}
    return merged


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median pictures a second by batch, and peak memory, of one contender in this process."""
    import torch

    threads = options.threads[-1]
    torch.set_num_threads(threads)
    make: Callable[[argparse.Namespace, int], Callable[[int], dict[str, float]]]
    make = _diffusers if options.child.startswith("diffusers") else _darkroom
    draw = make(options, threads)
    speed: dict[str, float] = {}
    overhead: dict[str, float] = {}
    for batch in options.batches:
        draw(batch)
        runs = [draw(batch) for _ in range(options.rounds)]
        speed[str(batch)] = statistics.median(batch / run["wall_s"] for run in runs)
        overhead[str(batch)] = statistics.median(run.get("overhead", 0.0) for run in runs)
    return {"pictures_per_s": speed, "overhead": overhead, "peak_mb": peak_memory_mb()}


def _diffusers(options: argparse.Namespace, threads: int) -> Callable[[int], dict[str, float]]:
    import torch
    from diffusers import DDIMScheduler, DiffusionPipeline

    folder = model_folder(settings_with_threads(threads), options.model)
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if options.child == "diffusers compile":
        pipe.unet = torch.compile(pipe.unet)
    context = pipe.encode_prompt("cat", "cpu", 1, True)

    def draw(batch: int) -> dict[str, float]:
        began_s = time.perf_counter()
        pipe(
            prompt_embeds=context[0].expand(batch, -1, -1),
            negative_prompt_embeds=context[1].expand(batch, -1, -1),
            num_inference_steps=options.steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(i) for i in range(batch)],
            output_type="latent",
        )
        return {"wall_s": time.perf_counter() - began_s}

    return draw


def _darkroom(options: argparse.Namespace, threads: int) -> Callable[[int], dict[str, float]]:
    from engine.engine import Engine
    from engine.loop import Tick
    from engine.model import Model
    from engine.runtime import open_runtime
    from engine.types import GenerateRequest

    backend, _, precision = options.child.removeprefix("darkroom ").partition(" ")
    settings = settings_with_threads(threads)
    plan = open_plan(settings, options.model, backend, precision or "fp32")
    runtime = TimedRuntime(open_runtime(backend, threads=threads))
    ticks: list[Tick] = []
    engine = Engine(device=runtime.device, on_tick=ticks.append)
    model = Model.open(plan, runtime)
    engine.load(model)
    engine.start()
    engine.generate(GenerateRequest(prompt="cat", steps=2))

    def draw(batch: int) -> dict[str, float]:
        # Whole batches on both sides: B* would keep ticks smaller, which is not the question here.
        engine.times.set(model.native_lane(), {2 * batch: 1.0})
        ticks.clear()
        runtime.graphs_s = 0.0
        began_s = time.perf_counter()
        handles = [
            engine.submit(
                GenerateRequest(
                    prompt="cat", solver="ddim", steps=options.steps, guidance=GUIDANCE, seed=i
                )
            )
            for i in range(batch)
        ]
        for handle in handles:
            for _ in handle.events():
                pass
        wall_s = time.perf_counter() - began_s
        graphs_s, ticks_s = runtime.graphs_s, sum(tick.total_s for tick in ticks)
        for handle in handles:
            handle.result()
        return {"wall_s": wall_s, "overhead": 1.0 - graphs_s / ticks_s}

    return draw


def _print(options: argparse.Namespace, results: dict[tuple[str, int], dict[str, Any]]) -> None:
    table = Table(
        "contender", "threads", title=conditions(options, hide=("child", "contenders", "json"))
    )
    for batch in options.batches:
        table.add_column(f"batch {batch}", justify="right")
    table.add_column("loop overhead", justify="right")
    table.add_column("peak memory", justify="right")
    for (name, threads), result in results.items():
        base = results.get(("diffusers eager", threads), result)["pictures_per_s"]
        cells = []
        for batch in map(str, options.batches):
            speed = result["pictures_per_s"][batch]
            cells.append(f"{speed:.2f}/s  {speed / base[batch]:.2f}x")
        largest = str(max(options.batches))
        at = "8" if "8" in result["overhead"] else largest
        overhead = f"{100 * result['overhead'][at]:.1f} % at {at}" if "dark" in name else ""
        table.add_row(name, str(threads), *cells, overhead, f"{result['peak_mb']:.0f} MB")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
