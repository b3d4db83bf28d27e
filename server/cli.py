"""The ``darkroom`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.errors import DarkroomError
from server.cache_cli import cache_app
from server.cli_plans import (
    DEFAULT_MODEL,
    BackendOption,
    ModelArgument,
    PrecisionOption,
    model_folder,
    plan_of,
)
from server.config_cli import config_app, keys_app
from server.generate_cli import generate
from server.models_cli import models_app
from server.plans_cli import plans_app
from server.serve_cli import serve
from server.settings import Settings

app = typer.Typer(
    name="darkroom",
    help="A production inference server for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(generate)
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(cache_app, name="cache")
app.add_typer(models_app, name="models")
app.add_typer(plans_app, name="plans")
_out = Console()
_err = Console(stderr=True)


def main() -> None:
    """Entry point: an error raised on purpose is one line and exit status 2, not a traceback."""
    try:
        app()
    except DarkroomError as error:
        # Neither wrapped nor read as markup: paths are there to be copied, and may hold brackets.
        text = escape(f"{type(error).__name__}: {error}")
        _err.print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command("compile")
def compile_(
    model: ModelArgument = DEFAULT_MODEL,
    backend: BackendOption = "onnxruntime",
    precision: PrecisionOption = "fp32",
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="X.Y",
            help="Compute capability to build tensorrt engines for, e.g. 8.9; by default this"
            " machine's. `darkroom doctor` lists those that there are.",
        ),
    ] = None,
    min_snr_db: Annotated[
        float | None,
        typer.Option(help="The dial of int8: more is closer to float, and slower; by default 30."),
    ] = None,
) -> None:
    """Compile a checkpoint into a plan, and say where it is."""
    from engine.compile.choices import PlanChoices

    choices = PlanChoices(
        backend=backend, precision=precision, capability=gpu, min_snr_db=min_snr_db
    )
    plan = plan_of(Settings.from_environment(), model, choices)
    _out.print(f"{plan.manifest.digest}\n{plan.folder}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(help="A plan's digest or folder, or a model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest itself.")] = False,
) -> None:
    """Say what is in a plan or a model."""
    from engine.checkpoint import Checkpoint
    from engine.compile.plan import PlanStore

    settings = Settings.from_environment()
    folder = model_folder(settings, what, must_exist=False)
    if folder is not None and not (Path(what) / "plan.json").exists():
        spec = Checkpoint.open(folder).model_spec()
        from server.describe import describe_solver

        told = spec.model_dump(mode="json") | {"solver": describe_solver(spec.scheduler_config)}
        _out.print_json(data=told)
        return
    plan = PlanStore(settings.plans).open(what)
    if as_json:
        _out.print_json(plan.manifest.model_dump_json())
    else:
        from server.describe import describe_plan

        describe_plan(_out, plan.manifest, plan.folder)


@app.command()
def doctor() -> None:
    """Say what is usable on this machine, and what to install."""
    from server.doctor import examine

    settings = Settings.from_environment()
    table = Table("part", "state", "what to do")
    findings = examine(settings)
    for finding in findings:
        colour = {"ok": "green", "absent": "yellow", "broken": "red"}[finding.state]
        # Extras in brackets would be read as styles, and vanish.
        detail = f"[{colour}]{escape(finding.detail)}[/]"
        table.add_row(finding.part, detail, escape(finding.advice))
    _out.print(table)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
