"""``darkroom models``: what can be served here, and changes to what a running server serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.errors import DarkroomError
from server.describe import describe_solver
from server.operator_client import LOCAL, KeyOption, call, reply_as
from server.runtime_options import CompileOption, CudaGraphsOption, ProviderOption
from server.schemas.openai import ModelReply
from server.settings import Settings

models_app = typer.Typer(
    help="Models: list those here; add, reload and remove those of a running server.",
    invoke_without_command=True,
)
_out = Console()

UrlOption = Annotated[str, typer.Option(help="The server.")]
Id = Annotated[str, typer.Argument(help="The id that clients ask for.")]


@models_app.callback()
def models(context: typer.Context) -> None:
    """Without a command: list the models that can be served here."""
    if context.invoked_subcommand is not None:
        return
    from engine.checkpoint import Checkpoint

    settings = Settings.from_environment()
    table = Table("model", "family", "native size", "prediction", "solver", "served")
    for folder in sorted(settings.models.glob("*/model_index.json")):
        try:
            spec = Checkpoint.open(folder.parent).model_spec()
        except DarkroomError as error:
            table.add_row(folder.parent.name, "", "", "", "", escape(f"no: {error}"))
            continue
        native = f"{spec.latent.native_px} px"
        solver = describe_solver(spec.scheduler_config)
        table.add_row(spec.name, spec.family, native, spec.prediction_type, solver, "yes")
    _out.print(table)


@models_app.command()
def add(
    path: Annotated[Path, typer.Argument(help="A folder in Diffusers layout.")],
    id: Annotated[str | None, typer.Option(help="By default the folder's name.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16 or int8.")] = "fp32",
    backend: Annotated[str, typer.Option(help="onnxruntime, torch or tensorrt.")] = "onnxruntime",
    compile: CompileOption = None,
    cuda_graphs: CudaGraphsOption = None,
    provider: ProviderOption = None,
    url: UrlOption = LOCAL,
    key_file: KeyOption = None,
) -> None:
    """Serve one more model, without dropping a request. The folder is the server's to read."""
    folder = path.absolute()
    body: dict[str, str | bool | None] = {"id": id or folder.name, "path": str(folder)}
    body |= {"precision": precision, "backend": backend}
    body |= {"compile": compile, "cuda_graphs": cuda_graphs, "provider": provider}
    _tell(call("POST", url, "/v1/admin/models", key_file, body=body), url)


@models_app.command("reload")
def reload_(id: Id, url: UrlOption = LOCAL, key_file: KeyOption = None) -> None:
    """Compile a model's folder as it is now, and draw what is new with that."""
    path = f"/v1/admin/models/{quote(id, safe='')}/reload"
    _tell(call("POST", url, path, key_file), url)


@models_app.command()
def remove(id: Id, url: UrlOption = LOCAL, key_file: KeyOption = None) -> None:
    """Stop serving a model that was added, once it has finished what it began."""
    call("DELETE", url, f"/v1/admin/models/{quote(id, safe='')}", key_file)
    _out.print(f"{url} no longer serves {id}", highlight=False)


def _tell(told: dict[str, Any], url: str) -> None:
    model = reply_as(ModelReply, told, url)
    details = model.darkroom
    _out.print(
        f"serves {model.id}: {details.family}, {details.precision} on"
        f" {details.backend}, plan {details.plan_digest[:12]}",
        highlight=False,
    )
