"""How a plan runs, as options of the commands that run one."""

from __future__ import annotations

from typing import Annotated

import typer

CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="With torch: compile with inductor, a minute or more for each shape; default: off.",
        show_default=False,
    ),
]
CudaGraphsOption = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="On CUDA: record each shape and replay it; default: on for tensorrt, off for torch.",
        show_default=False,
    ),
]
ProviderOption = Annotated[
    str | None,
    typer.Option(help="With onnxruntime: cpu, cuda or tensorrt; default: the device's own."),
]
