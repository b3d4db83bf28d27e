"""``darkroom models``: what can be served here, and changes to what a running server serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.errors import BackendUnavailableError, DarkroomError
from server.describe import describe_solver
from server.errors import ServerError
from server.settings import Settings

models_app = typer.Typer(
    help="Models: list those here; add, reload and remove those of a running server.",
    invoke_without_command=True,
)
_out = Console()
_COMPILING_S = 3600.0

UrlOption = Annotated[str, typer.Option(help="The server.")]
KeyOption = Annotated[
    Path | None, typer.Option(help="A file that holds an operator's key, where keys are needed.")
]
Id = Annotated[str, typer.Argument(help="The id that clients ask for.")]
LOCAL = "http://127.0.0.1:8000"


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
    url: UrlOption = LOCAL,
    key_file: KeyOption = None,
) -> None:
    """Serve one more model, without dropping a request. The folder is the server's to read."""
    folder = path.absolute()
    body = {"id": id or folder.name, "path": str(folder)}
    body |= {"precision": precision, "backend": backend}
    _tell(_call("POST", url, "/v1/admin/models", key_file, body))


@models_app.command("reload")
def reload_(id: Id, url: UrlOption = LOCAL, key_file: KeyOption = None) -> None:
    """Compile a model's folder as it is now, and draw what is new with that."""
    path = f"/v1/admin/models/{quote(id, safe='')}/reload"
    _tell(_call("POST", url, path, key_file))


@models_app.command()
def remove(id: Id, url: UrlOption = LOCAL, key_file: KeyOption = None) -> None:
    """Stop serving a model that was added, once it has finished what it began."""
    _call("DELETE", url, f"/v1/admin/models/{quote(id, safe='')}", key_file)
    _out.print(f"{url} no longer serves {id}", highlight=False)


def _call(
    method: str, url: str, path: str, key_file: Path | None, body: dict[str, str] | None = None
) -> dict[str, Any]:
    """One call of an operator route.

    Raises:
        ServerError: the server's own refusal.
        BackendUnavailableError: nothing answers there.
    """
    import httpx  # a part of a second that no other command should cost

    headers = {}
    if key_file is not None:
        headers["authorization"] = f"Bearer {key_file.read_text().strip()}"
    try:
        # No proxy of the environment's: the key goes to that server and to nobody else.
        with httpx.Client(trust_env=False, timeout=_COMPILING_S) as client:
            reply = client.request(method, url.rstrip("/") + path, json=body, headers=headers)
    except httpx.HTTPError as error:
        raise BackendUnavailableError(f"{url} does not answer: {error}") from None
    found: dict[str, Any] = reply.json() if reply.content else {}
    if reply.is_error:
        raise ServerError(found["error"]["message"])
    return found


def _tell(model: dict[str, Any]) -> None:
    details = model["darkroom"]
    _out.print(
        f"serves {model['id']}: {details['family']}, {details['precision']} on"
        f" {details['backend']}, plan {details['plan_digest'][:12]}",
        highlight=False,
    )
