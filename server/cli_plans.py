"""What several commands share: naming a model, and its plan, built while a bar shows how far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from engine.errors import InvalidRequestError
from server.settings import Settings

if TYPE_CHECKING:
    from engine.compile.choices import PlanChoices
    from engine.compile.plan import Plan

_err = Console(stderr=True)

DEFAULT_MODEL = "tintype"
ModelArgument = Annotated[
    str, typer.Argument(help="A model's name, or a folder in Diffusers layout.")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="A model's name, or its folder.")]
BackendOption = Annotated[str, typer.Option(help="onnxruntime, torch or tensorrt.")]
PrecisionOption = Annotated[str, typer.Option(help="fp32, fp16, bf16 or int8.")]


def plan_of(settings: Settings, model: str, choices: PlanChoices) -> Plan:
    """The plan of a model, built first where it is not there."""
    from engine.checkpoint import Checkpoint
    from engine.compile.plan import PlanStore

    folder = model_folder(settings, model, must_exist=True)
    assert folder is not None
    checkpoint = Checkpoint.open(folder)
    with shown_progress() as progress:
        task = progress.add_task(f"compiling {checkpoint.name}", total=None, visible=False)

        def show(stage: str, done: int, total: int) -> None:
            text = f"compiling {checkpoint.name}: {stage}"
            progress.update(task, description=text, completed=done, total=total, visible=True)

        store = PlanStore(settings.plans, max_bytes=settings.plans_max_bytes)
        return choices.build(store, checkpoint, show)


def model_folder(settings: Settings, model: str, *, must_exist: bool) -> Path | None:
    """A model's folder, by name or as a path; None where there is none and none has to be.

    Raises:
        InvalidRequestError: there is none; names those that there are.
    """
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


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A bar on standard error, gone when the block is left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_err, transient=True) as progress:
        yield progress
