"""``darkroom cache``: look into the noise cache, clear it, and measure what it is worth."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cache.calibration import SHARES
from cache.policy import DEFAULT_HALF_LIFE_S, DEFAULT_POLICY
from cache.profiles import FILE_NAME, read_profile, write_profile
from engine.errors import InvalidRequestError
from engine.ports import ReuseProfile, StateKind
from server.cache_operator_cli import clear, inspect, stats
from server.cache_tables import calibration_table
from server.settings import Settings

cache_app = typer.Typer(
    help="The noise cache: what it holds, and what it is worth.", no_args_is_help=True
)
cache_app.command()(stats)
cache_app.command()(inspect)
cache_app.command()(clear)
_out = Console()

ModelOption = Annotated[str, typer.Option("--model", "-m", help="A model's name, or its folder.")]
EvaluatorOption = Annotated[
    str,
    typer.Option(help="module:class of what scores pictures, with load(folder), score, features."),
]
EvaluatorFolderOption = Annotated[
    Path | None, typer.Option(help="What the evaluator loads; by default MODELS/loupe.")
]
KINDS = {
    "noisy": ReuseProfile(kind=StateKind.NOISY),
    "clean": ReuseProfile(kind=StateKind.CLEAN),
    "finished": ReuseProfile(kind=StateKind.CLEAN, fractions=(1.0,)),
}
"""What can be stored: x itself, clean predictions on the way, or the finished picture."""


@cache_app.command()
def calibrate(
    model: ModelOption = "tintype",
    kind: Annotated[str, typer.Option(help=f"What to store: {', '.join(KINDS)}.")] = "finished",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts of your model's world, one a line; by default tintype's."),
    ] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of prompts in a bin.")] = 24,
    steps: int = 20,
    solver: str | None = None,
    keep: Annotated[float, typer.Option(help="Least ratio of the score to no cache.")] = 0.98,
    keep_diversity: Annotated[
        float, typer.Option(help="Least ratio of the distance between seeds' pictures.")
    ] = 0.9,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of a prompt to compare.")] = 8,
    evaluator: EvaluatorOption = "models.loupe:Loupe",
    evaluator_folder: EvaluatorFolderOption = None,
    precision: str = "fp32",
    out: Annotated[Path | None, typer.Option(help="By default beside the model.")] = None,
) -> None:
    """Measure how far similar prompts may jump, and write the table that keeps quality."""
    from cache.calibration import calibrate as measure
    from engine.types import GenerateRequest
    from server.cache_bench import Bench
    from server.cache_wiring import evaluator as evaluator_named
    from server.cache_wiring import model_folder, opened_model, pairs_of_world

    settings = Settings.from_environment()
    profile = _kind(kind)
    judge = evaluator_named(evaluator, settings, evaluator_folder)
    with opened_model(settings, model, precision) as opened:
        bench = Bench(opened, profile, GenerateRequest(prompt="", steps=steps, solver=solver))
        try:
            chosen = pairs_of_world(settings, opened, pairs, prompts)
            found = measure(
                chosen,
                bench.generate,
                judge.score,
                judge.features,
                shares=shares_of(profile),
                keep=keep,
                keep_diversity=keep_diversity,
                seeds=seeds,
                exclusive=profile.kind is StateKind.NOISY,
            )
            fingerprint = opened.spec.fingerprint
        finally:
            bench.close()
    _out.print(calibration_table(found))
    path = out or model_folder(settings, model) / FILE_NAME
    measured = {
        "steps": steps,
        "solver": solver,
        "precision": precision,
        "keep": keep,
        "keep_diversity": keep_diversity,
        "quality": [asdict(row) for row in found.quality],
        "diversity": [asdict(row) for row in found.diversity],
    }
    calibrated = replace(profile, jumps=found.jumps, checkpoint=fingerprint)
    write_profile(path, calibrated, measured)
    _out.print(f"{path}: {found.jumps.steps or 'no jump keeps so much'}", soft_wrap=True)


@cache_app.command()
def replay(
    model: ModelOption = "tintype",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Your own trace, one prompt a line as they came; else a synthetic one."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1)] = 400,
    zipf: Annotated[float, typer.Option(help="Exponent of the subjects' popularity.")] = 0.8,
    profile: Annotated[Path | None, typer.Option(help="A calibrated profile.")] = None,
    limit_mb: Annotated[float, typer.Option(help="Of the cache, in MB.")] = 256.0,
    policy: str = DEFAULT_POLICY,
    half_life_s: float = DEFAULT_HALF_LIFE_S,
    steps: int = 20,
    draw: Annotated[
        bool, typer.Option(help="Draw the pictures, with the cache and without.")
    ] = True,
    evaluator: EvaluatorOption = "models.loupe:Loupe",
    evaluator_folder: EvaluatorFolderOption = None,
    precision: str = "fp32",
) -> None:
    """Replay a trace of prompts: steps saved, at what quality, and what fewer steps would keep."""
    import numpy as np

    from cache.policy import policy_named
    from cache.traces import TraceConfig, reuse_within
    from engine.types import GenerateRequest, Picture
    from server.cache_replay import Replayed, draw_trace, embed_prompts, simulate
    from server.cache_wiring import evaluator as evaluator_named
    from server.cache_wiring import model_folder, opened_model, trace_of

    settings = Settings.from_environment()
    found = profile or model_folder(settings, model) / FILE_NAME
    used = read_profile(found) if profile or found.exists() else ReuseProfile()
    chosen = policy_named(policy, half_life_s=half_life_s)
    trace = trace_of(settings, prompts, TraceConfig(requests=requests, zipf=zipf))
    base = GenerateRequest(prompt="", steps=steps)
    limit_bytes = int(limit_mb * 1e6)
    _out.print(
        f"{len(trace)} requests of {prompts}"
        if prompts
        else f"{requests} requests over {trace[-1].at_s / 3600:.1f} h, Zipf {zipf}; of repeats"
        f" {reuse_within(trace, 300):.0%} within 5 minutes, {reuse_within(trace, 3600):.0%} within"
        " an hour",
        soft_wrap=True,
    )
    with opened_model(settings, model, precision) as opened:
        if used.checkpoint not in (None, opened.spec.fingerprint):
            raise InvalidRequestError(
                f"{found} was measured on other weights than those of {model!r}: run"
                " `darkroom cache calibrate` first",
                field="profile",
            )
        if not draw:
            embeddings = embed_prompts(trace, opened)
            result = simulate(
                trace, embeddings, opened, base, used, limit_bytes=limit_bytes, policy=chosen
            )
            _out.print(f"saved {result.saved:.1%} of the steps; {result}")
            return
        judge = evaluator_named(evaluator, settings, evaluator_folder)

        def drawn(steps: int, profile: ReuseProfile | None) -> tuple[Replayed, float]:
            """What a replay with so many steps saved, and its mean score."""
            scores: list[float] = []

            def score(number: int, picture: Picture) -> None:
                scores.append(judge.score([picture.image], [trace[number].prompt])[0])

            asked = replace(base, steps=steps)
            done = draw_trace(
                trace,
                opened,
                asked,
                profile,
                limit_bytes=limit_bytes,
                policy=chosen,
                on_drawn=score,
            )
            return done, float(np.mean(scores))

        _, whole = drawn(steps, None)
        result, cached = drawn(steps, used)
        fewer = max(1, round(steps * (1.0 - result.saved)))
        _, honest = drawn(fewer, None)
    _out.print(
        f"saved {result.saved:.1%} of the steps at {cached / whole:.4f} of the score;"
        f" {fewer} of {steps} steps without the cache keep {honest / whole:.4f}; {result}",
        soft_wrap=True,
    )


# ---------------------------------------------------------------------- helpers


def _kind(name: str) -> ReuseProfile:
    if name not in KINDS:
        raise InvalidRequestError(f"kind is {name!r}; allowed: {', '.join(KINDS)}", field="kind")
    return KINDS[name]


def shares_of(profile: ReuseProfile) -> tuple[float, ...]:
    """The jumps to measure: none beyond the last state that is stored."""
    return tuple(share for share in SHARES if share <= max(profile.fractions))
