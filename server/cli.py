"""The ``darkroom`` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine.errors import DarkroomError, InvalidRequestError
from server.cache_cli import cache_app
from server.config_cli import config_app, keys_app
from server.models_cli import models_app
from server.plans_cli import plans_app
from server.serve_cli import serve
from server.settings import Settings

if TYPE_CHECKING:
    from engine.compile.choices import PlanChoices
    from engine.compile.plan import Plan
    from engine.types import Image

app = typer.Typer(
    name="darkroom",
    help="A production inference server for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(cache_app, name="cache")
app.add_typer(models_app, name="models")
app.add_typer(plans_app, name="plans")
_out = Console()
_err = Console(stderr=True)

ModelArgument = Annotated[
    str, typer.Argument(help="A model's name, or a folder in Diffusers layout.")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="A model's name, or its folder.")]
BackendOption = Annotated[str, typer.Option(help="onnxruntime, torch or tensorrt.")]
PrecisionOption = Annotated[str, typer.Option(help="fp32, fp16, bf16 or int8.")]

DEFAULT_MODEL = "tintype"


def main() -> None:
    """Entry point: an error raised on purpose is one line and exit status 2, not a traceback."""
    try:
        app()
    except DarkroomError as error:
        # Neither wrapped nor read as markup: paths are there to be copied, and may hold brackets.
        text = escape(f"{type(error).__name__}: {error}")
        _err.print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="png, jpg or webp file.")] = Path(
        "out.png"
    ),
    model: ModelOption = DEFAULT_MODEL,
    negative: Annotated[str, typer.Option(help="What to keep out.")] = "",
    steps: int = 20,
    solver: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, unipc, …")] = None,
    schedule: Annotated[str | None, typer.Option(help="trailing, karras, …")] = None,
    guidance: float | None = None,
    eta: float | None = None,
    seed: int | None = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=64, help="Pictures.")] = 1,
    image: Annotated[Path | None, typer.Option(help="Start from this picture.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Repaint where this one is white.")] = None,
    strength: float = 0.8,
    backend: BackendOption = "onnxruntime",
    precision: PrecisionOption = "fp32",
) -> None:
    """Draw a picture from a prompt."""
    from engine.compile.choices import PlanChoices
    from engine.engine import Engine
    from engine.model import Model
    from engine.png import format_of, parameters_of, save_image
    from engine.runtime import open_runtime
    from engine.types import GenerateRequest

    format_of(out)  # a file that cannot be written is refused before any work
    settings = Settings.from_environment()
    picture_in, mask_in = (_read_image(image, "RGB"), _read_image(mask, "L"))
    requests = [
        GenerateRequest(
            prompt=prompt,
            negative_prompt=negative,
            width_px=width,
            height_px=height,
            steps=steps,
            solver=solver,
            schedule=schedule,
            guidance=guidance,
            eta=eta,
            seed=None if seed is None else seed + i,
            image=picture_in,
            mask=mask_in,
            strength=strength,
        )
        for i in range(count)
    ]
    runtime = open_runtime(backend, threads=settings.threads)
    plan = _plan(settings, model, PlanChoices(backend=backend, precision=precision))
    engine = Engine(device=runtime.device)
    engine.load(Model.open(plan, runtime))
    engine.start()
    try:
        with _progress() as progress:
            task = progress.add_task("denoising", total=None)
            handles = [
                engine.submit(request, on_event=lambda _: progress.advance(task))
                for request in requests
            ]
            pictures = [handle.result() for handle in handles]
    finally:
        engine.close()
        runtime.close()
    for i, picture in enumerate(pictures):
        path = out if count == 1 else out.with_stem(f"{out.stem}-{i + 1}")
        save_image(picture.image, path, parameters_of(picture, prompt, negative))
        times = picture.timings
        _out.print(
            f"{path}  seed {picture.seed}  {picture.steps} steps of {picture.solver}"
            f" in {times.denoise_s:.2f} s (queue {times.queue_s:.2f}, encode {times.encode_s:.2f},"
            f" decode {times.decode_s:.2f})",
            highlight=False,
        )


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
    plan = _plan(Settings.from_environment(), model, choices)
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
    folder = _model_folder(settings, what, must_exist=False)
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


# ---------------------------------------------------------------------- helpers


def _plan(settings: Settings, model: str, choices: PlanChoices) -> Plan:
    """The plan of a model, built first where it is not there."""
    from engine.checkpoint import Checkpoint
    from engine.compile.plan import PlanStore

    folder = _model_folder(settings, model, must_exist=True)
    assert folder is not None
    checkpoint = Checkpoint.open(folder)
    with _progress() as progress:
        task = progress.add_task(f"compiling {checkpoint.name}", total=None, visible=False)

        def show(stage: str, done: int, total: int) -> None:
            text = f"compiling {checkpoint.name}: {stage}"
            progress.update(task, description=text, completed=done, total=total, visible=True)

        store = PlanStore(settings.plans, max_bytes=settings.plans_max_bytes)
        return choices.build(store, checkpoint, show)


def _model_folder(settings: Settings, model: str, *, must_exist: bool) -> Path | None:
    for folder in (Path(model), settings.models / model):
        if (folder / "model_index.json").exists():
            return folder
    if not must_exist:
        return None
    known = sorted(path.parent.name for path in settings.models.glob("*/model_index.json"))
    raise InvalidRequestError(
        f"no model {model!r}; known: {', '.join(known) or 'none'}, or a folder in Diffusers layout",
        field="model",
    )


def _read_image(path: Path | None, mode: str) -> Image | None:
    if path is None:
        return None
    import numpy as np
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(path) as opened:
            return np.asarray(opened.convert(mode), dtype=np.uint8)
    except (OSError, UnidentifiedImageError) as error:
        raise InvalidRequestError(f"{path} cannot be read as a picture: {error}") from error


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_err, transient=True) as progress:
        yield progress
