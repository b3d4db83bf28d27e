"""``darkroom generate``: draw without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from engine.errors import InvalidRequestError
from server.cli_plans import (
    DEFAULT_MODEL,
    BackendOption,
    ModelOption,
    PrecisionOption,
    plan_of,
    shown_progress,
)
from server.runtime_options import CompileOption, CudaGraphsOption, ProviderOption
from server.settings import Settings

if TYPE_CHECKING:
    from engine.types import Image

_out = Console()


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
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N; by default DARKROOM_DEVICE, else cpu (tensorrt: cuda)."
        ),
    ] = None,
    compile: CompileOption = None,
    cuda_graphs: CudaGraphsOption = None,
    provider: ProviderOption = None,
) -> None:
    """Draw a picture from a prompt."""
    from engine.compile.choices import PlanChoices
    from engine.engine import Engine
    from engine.model import Model
    from engine.png import format_of, parameters_of, save_image
    from engine.runtime.choices import RuntimeChoices
    from engine.types import GenerateRequest

    format_of(out)  # a file that cannot be written is refused before any work
    settings = Settings.from_environment()
    runs = RuntimeChoices(
        backend=backend,
        device=device or settings.device,
        compile=compile,
        cuda_graphs=cuda_graphs,
        provider=provider,
    )
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
    runtime = runs.open(threads=settings.threads)
    plan = plan_of(settings, model, PlanChoices(backend=backend, precision=precision))
    engine = Engine(device=runtime.device)
    engine.load(Model.open(plan, runtime))
    engine.start()
    try:
        with shown_progress() as progress:
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
