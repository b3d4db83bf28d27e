"""``darkroom cache``: look into the noise cache, clear it, and measure what it is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cache.calibration import SHARES
from cache.policy import DEFAULT_HALF_LIFE_S, DEFAULT_POLICY
from cache.profiles import FILE_NAME, read_profile, write_profile
from engine.errors import InvalidRequestError
from engine.ports import ReuseProfile, StateKind
from server.cache_tables import calibration_table
from server.settings import Settings, served_config

if TYPE_CHECKING:
    from cache.inspection import Operator
    from cache.keys import Namespace

cache_app = typer.Typer(
    help="The noise cache: what it holds, and what it is worth.", no_args_is_help=True
)
_out = Console()

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A YAML file; by default what DARKROOM_CONFIG names."),
]
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
def stats(config: ConfigOption = None) -> None:
    """List every tenant's share of the Redis of the configuration."""
    with _operator(config) as operator:
        table = Table("tenant", "checkpoint", "states", "bytes")
        for namespace in operator.namespaces():
            report = operator.look(namespace)
            table.add_row(
                _who(namespace),
                namespace.checkpoint[:12],
                str(report.states),
                f"{report.size_bytes:,}",
            )
        _out.print(table)


@cache_app.command()
def inspect(
    tenant: Annotated[str | None, typer.Argument(help="Left out: the shared states.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1000)] = 20,
    config: ConfigOption = None,
) -> None:
    """Show a tenant's states that are worth the most, by the eviction policy's score."""
    with _operator(config) as operator:
        for namespace in operator.namespaces():
            if namespace.tenant != tenant:
                continue
            table = Table("state", "kind", "log-SNR", "uses", "bytes", "score")
            for state in operator.look(namespace, best=count).best:
                table.add_row(
                    state.state,
                    state.kind,
                    f"{state.log_snr:.3f}",
                    str(state.uses),
                    f"{state.size_bytes:,}",
                    f"{state.score:.4f}",
                )
            _out.print(f"{_who(namespace)}, checkpoint {namespace.checkpoint[:12]}")
            _out.print(table)


@cache_app.command()
def clear(
    tenant: Annotated[str | None, typer.Option(help="Whose states.")] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Those that all share.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Everybody's.")] = False,
    config: ConfigOption = None,
) -> None:
    """Forget states in the Redis of the configuration; every worker's index follows."""
    if sum((tenant is not None, shared, everything)) != 1:
        raise InvalidRequestError("say whose states: one of --tenant NAME, --shared, --all")
    with _operator(config) as operator:
        count = sum(
            operator.clear(namespace)
            for namespace in operator.namespaces()
            if everything or namespace.tenant == tenant
        )
    _out.print(f"{count} states forgotten")


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


@contextmanager
def _operator(config: Path | None) -> Iterator[Operator]:
    """The operator of the configured Redis; a server that does not answer is one line."""
    import redis

    from cache.inspection import Operator
    from server.redis_settings import redis_settings

    wanted = served_config(config).redis
    if wanted.url is None:
        raise InvalidRequestError(
            "no Redis is configured (redis.url, or DARKROOM_REDIS_URL): each worker keeps its cache"
            " in memory, which GET /v1/cache shows",
            field="redis.url",
        )
    client = redis_settings(wanted, 5.0).client(5.0)
    try:
        yield Operator(client)
    except redis.RedisError as error:
        raise InvalidRequestError(f"Redis cannot be asked: {type(error).__name__}") from error
    finally:
        client.close()


def _who(namespace: Namespace) -> str:
    return "(shared)" if namespace.tenant is None else namespace.tenant
