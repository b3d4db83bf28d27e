"""``darkroom serve``: compile, start, say where it listens, and end as a service should."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from server.config import ModelConfig, ServeConfig
from server.config_file import checked_config
from server.lifecycle import Application, check_port
from server.precompile import Compiled, precompile
from server.runtime_options import CompileOption, CudaGraphsOption, ProviderOption
from server.settings import served_config
from server.telemetry.opening import check_installed

_err = Console(stderr=True, highlight=False, soft_wrap=True)


def serve(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A YAML file; by default what DARKROOM_CONFIG names."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Serve this model or folder alone.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Of that model: fp32, int8, …")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Of that model: onnxruntime, torch or tensorrt.")
    ] = None,
    compile: CompileOption = None,
    cuda_graphs: CudaGraphsOption = None,
    provider: ProviderOption = None,
    device: Annotated[str | None, typer.Option(help="Of the workers: cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to run on; by default one of its own, here.")
    ] = None,
) -> None:
    """Serve pictures over HTTP until SIGTERM or Ctrl-C; what is in flight then is finished."""
    began_s = time.monotonic()
    flags = {
        "http.host": host,
        "http.port": port,
        "workers.replicas": workers,
        "workers.device": device,
    }
    served = with_model(
        served_config(config, flags=flags),
        model,
        precision=precision,
        backend=backend,
        compile=compile,
        cuda_graphs=cuda_graphs,
        provider=provider,
    )
    if address is None:
        check_port(served.http)  # on a cluster, gateways listen elsewhere
        check_installed(served.telemetry)
    application = Application(served, address=address)
    for plan in _compile(served) if address is None else ():
        _err.print(f"{plan.model}: plan {plan.digest[:12]}")
    with _err.status("starting"):
        readiness = application.start()
    _err.print(
        f"[bold green]ready[/] on {_url(served)} after {time.monotonic() - began_s:.0f} s,"
        f" workers: {readiness.workers}; page at /, interface at /docs"
    )
    try:
        application.wait()
        _err.print(f"draining: what is in flight has {served.drain_timeout_s:.0f} s to finish")
    finally:
        application.drain()
    _err.print("ended")


def with_model(config: ServeConfig, model: str | None, **given: str | bool | None) -> ServeConfig:
    """The configuration with one model alone, or with keys of the first one replaced.

    Args:
        given: by key of a model; None was not given.

    Raises:
        InvalidRequestError: they do not go together.
    """
    given = {key: value for key, value in given.items() if value is not None}
    chosen = config.models[0]
    if model is not None:
        folder = Path(model)
        if (folder / "model_index.json").is_file():
            chosen = ModelConfig(id=folder.resolve().name, path=folder.resolve())
        else:
            named = [known for known in config.models if known.id == model]
            chosen = named[0] if named else ModelConfig(id=model)
    elif not given:
        return config
    others = () if model is not None else config.models[1:]
    models = [chosen.model_dump() | given, *(other.model_dump() for other in others)]
    return checked_config(config.model_dump() | {"models": models})


def _compile(config: ServeConfig) -> list[Compiled]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bars:
        bar = bars.add_task("looking at the models", total=None)

        def show(model: str, stage: str, done: int, total: int) -> None:
            bars.update(bar, description=f"compiling {model}: {stage}", completed=done, total=total)

        return precompile(config, show)


def _url(config: ServeConfig) -> str:
    host = f"[{config.http.host}]" if ":" in config.http.host else config.http.host
    return f"http://{host}:{config.http.port}"
