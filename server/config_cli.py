"""``darkroom config check|show`` and ``darkroom keys new``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit

import typer
import yaml

from engine.errors import InvalidRequestError
from server.config import ServeConfig
from server.settings import Settings, served_config

config_app = typer.Typer(help="The configuration of `darkroom serve`.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A YAML file; by default what DARKROOM_CONFIG names."),
]


@config_app.command()
def check(config: ConfigOption = None) -> None:
    """Say whether the configuration can be served, and name everything that is wrong."""
    from server.auth import KeyRing
    from server.jobs.addresses import AllowedHosts
    from server.telemetry.opening import check_installed

    served = served_config(config)
    keys = KeyRing.of(served)
    AllowedHosts(served.jobs.webhook_hosts)
    check_installed(served.telemetry)
    models = Settings.from_environment().models
    for i, model in enumerate(served.models):
        folder = model.path or models / model.id
        if not (folder / "model_index.json").is_file():
            key = f"models.{i}.{'id' if model.path is None else 'path'}"
            raise InvalidRequestError(
                f"{key}: {folder} is no folder in Diffusers layout", field=key
            )
    who = f"{len(keys.tenants())} tenants with keys" if keys.enabled else "no keys needed"
    where = "in memory"
    if served.redis.url is not None:
        from server.jobs.redis_client import connect

        redis = served.redis
        connect(served.redis.url, redis.timeout_s, redis.tls)  # which it does at its first use only
        where = "in Redis"
    typer.echo(
        f"ok: {', '.join(model.id for model in served.models)}"
        f" on {served.http.host}:{served.http.port}, {who}, jobs {where}"
    )


@config_app.command()
def show(config: ConfigOption = None) -> None:
    """Print the configuration that counts, defaults and environment included, as YAML."""
    typer.echo(yaml.safe_dump(_without_secrets(served_config(config)), sort_keys=False), nl=False)


@keys_app.command()
def new() -> None:
    """Make an API key. It is shown once: only its hash belongs in the configuration."""
    from server.auth import new_key

    made = new_key()
    typer.echo(f"key: {made.key}\nhash: {made.hash}")
    typer.echo(
        "The key is shown this once: give it to its user."
        " The hash goes into the configuration, into auth.tenants[].key_hashes.",
        err=True,
    )


@keys_app.callback()
def _keys() -> None:
    """A group of commands, even with one in it."""


def _without_secrets(config: ServeConfig) -> dict[str, object]:
    """As plain values, without what may be a password in the address of Redis."""
    plain: dict[str, object] = config.model_dump(mode="json")
    parts = urlsplit(config.redis.url or "")
    if parts.query or "@" in parts.netloc:
        host = "***@" + parts.netloc.rpartition("@")[2]
        masked = urlunsplit(parts._replace(netloc=host, query=""))
        plain["redis"] = {**config.redis.model_dump(mode="json"), "url": masked}
    return plain
