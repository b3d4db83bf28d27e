"""``darkroom cache stats|inspect|clear``: of the Redis that is configured, else of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engine.errors import InvalidRequestError
from engine.types import CacheScope
from server.cache_contents import backend_of, forgotten, on_redis, redis_operator
from server.config import ServeConfig
from server.operator_client import LOCAL, KeyOption, call, reply_as
from server.schemas.cache import CacheCleared, CacheReport
from server.settings import Settings, served_config

_out = Console()

TenantOption = Annotated[str | None, typer.Option(help="This tenant's states alone.")]
SharedOption = Annotated[bool, typer.Option("--shared", help="Those alone that all share.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Of this model's weights alone: its id, or their fingerprint."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A YAML file; by default what DARKROOM_CONFIG names."),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        help=f"Ask a running server. By default the configured Redis is asked itself; without one,"
        f" {LOCAL}.",
        show_default=False,
    ),
]


def stats(
    tenant: TenantOption = None,
    shared: SharedOption = False,
    model: ModelOption = None,
    config: ConfigOption = None,
    url: UrlOption = None,
    key_file: KeyOption = None,
) -> None:
    """Say what the noise cache holds, by tenant and model."""
    report = _look(tenant, shared, model, served_config(config), url, key_file)
    table = Table("tenant", "model", "checkpoint", "pictures", "states", "bytes", "limit")
    for share in report.shares:
        table.add_row(
            _who(share.tenant),
            ", ".join(share.models),
            share.checkpoint[:12],
            str(share.entries),
            str(share.states),
            f"{share.bytes:,}",
            f"{share.limit_bytes:,}",
        )
    _out.print(table)
    where = "" if report.backend != "memory" else f", the sum of {len(report.workers)} workers"
    _out.print(
        f"{report.backend}, {report.policy}: {report.states} states, {report.bytes:,} bytes{where}"
    )
    if report.missing:
        _out.print(f"without {', '.join(report.missing)}: no answer", style="yellow")


def inspect(
    tenant: Annotated[str | None, typer.Argument(help="Left out: everybody.")] = None,
    shared: SharedOption = False,
    model: ModelOption = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100)] = 20,
    config: ConfigOption = None,
    url: UrlOption = None,
    key_file: KeyOption = None,
) -> None:
    """Show the states that are worth the most, by the eviction policy's score."""
    report = _look(tenant, shared, model, served_config(config), url, key_file, best=count)
    for share in report.shares:
        table = Table("state", "kind", "log-SNR", "uses", "bytes", "score", "worker")
        for state in share.best:
            table.add_row(
                state.id,
                state.kind,
                "" if state.log_snr is None else f"{state.log_snr:.3f}",
                str(state.uses),
                f"{state.bytes:,}",
                f"{state.score:.4f}",
                state.worker or "",
            )
        models = ", ".join(share.models) or f"checkpoint {share.checkpoint[:12]}"
        _out.print(f"{_who(share.tenant)}, {models}")
        _out.print(table)


def clear(
    tenant: TenantOption = None,
    shared: SharedOption = False,
    model: ModelOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Everybody's, of all models.")] = False,
    config: ConfigOption = None,
    url: UrlOption = None,
    key_file: KeyOption = None,
) -> None:
    """Forget states: a tenant's, a model's, or a tenant's of a model; every worker follows."""
    served = served_config(config)
    if everything == (tenant is not None or shared or model is not None):
        raise InvalidRequestError(
            "say which states: --tenant NAME or --shared, --model NAME, or --all alone"
        )
    if url is None and backend_of(served) == "redis":
        scope = _scope(tenant, shared, model, served)
        with redis_operator(served.redis) as operator:
            gone = forgotten(operator.clear(scope), {})
    else:
        query = _query(tenant, shared, model) | ({"everything": True} if everything else {})
        told = call("DELETE", url or LOCAL, "/v1/cache", key_file, query=query)
        gone = reply_as(CacheCleared, told, url or LOCAL)
    for share in gone.shares:
        _out.print(
            f"{_who(share.tenant)}, checkpoint {share.checkpoint[:12]}: {share.states} states of"
            f" {share.entries} pictures, {share.bytes:,} bytes",
            highlight=False,
        )
    _out.print(f"{gone.states} states forgotten")


# ---------------------------------------------------------------------- helpers


def _look(
    tenant: str | None,
    shared: bool,
    model: str | None,
    served: ServeConfig,
    url: str | None,
    key_file: Path | None,
    *,
    best: int = 0,
) -> CacheReport:
    if url is None and backend_of(served) == "redis":
        scope = _scope(tenant, shared, model, served)
        with redis_operator(served.redis) as operator:
            return on_redis(served, operator.shares(scope, best=best), {}, best=best)
    query = _query(tenant, shared, model) | {"best": best}
    told = call("GET", url or LOCAL, "/v1/cache", key_file, query=query)
    return reply_as(CacheReport, told, url or LOCAL)


def _query(tenant: str | None, shared: bool, model: str | None) -> dict[str, str | int | bool]:
    """The same as the routes take it."""
    query: dict[str, str | int | bool] = {}
    if tenant is not None:
        query["tenant"] = tenant
    if shared:
        query["shared"] = True
    if model is not None:
        query["checkpoint" if _is_fingerprint(model) else "model"] = model
    return query


def _scope(tenant: str | None, shared: bool, model: str | None, served: ServeConfig) -> CacheScope:
    """The same for who asks Redis without a server: a model is read where it lies."""
    checkpoint = model
    if model is not None and not _is_fingerprint(model):
        from engine.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(_folder(model, served)).fingerprint
    return CacheScope(tenant=tenant, shared=shared, checkpoint=checkpoint)


def _folder(model: str, served: ServeConfig) -> Path:
    """The folder of a configured model, by id or alias; else of that name, as when it was added.

    Raises:
        InvalidRequestError: there is none.
    """
    models = Settings.from_environment().models
    for known in served.models:
        if model in (known.id, *known.aliases):
            return known.path or models / known.id
    from server.cache_wiring import model_folder

    return model_folder(Settings.from_environment(), model)


def _is_fingerprint(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _who(tenant: str | None) -> str:
    return "(shared)" if tenant is None else tenant
