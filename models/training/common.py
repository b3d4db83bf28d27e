"""What every training stage shares: processes, averaging of weights, checkpoints, and logs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def log(message: str, **figures: float | int | str) -> None:
    """Print one line with the time, from the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        tail = "".join(
            f"  {k} {v:.4g}" if isinstance(v, float) else f"  {k} {v}" for k, v in figures.items()
        )
        print(f"{time.strftime('%H:%M:%S')}  {message}{tail}", flush=True, file=sys.stderr)


def millions(module: nn.Module) -> str:
    """A module's number of parameters, for logs: "11.02 M"."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"


class Curve:
    """A loss curve: one JSON object a line, appended, so that a resumed run goes on in the same
    file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **figures: float | int | str) -> None:
        """Append one point and print it."""
        if int(os.environ.get("RANK", "0")) == 0:
            rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
            log(self._path.stem, **figures)


def start_processes() -> tuple[int, int]:
    """Join the group that ``torchrun`` started, if it did; returns (rank, number of processes).

    On a CPU, two processes of one thread that average their gradients train twice as fast as one
    process of two threads.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return int(os.environ.get("RANK", "0")), size


def prefer_plain_attention() -> None:
    """On a CPU, train with the plain attention.

    Over a few dozen tokens its backward pass is several times faster than that of the fused kernel:
    a tenth of a UNet's whole step.
    """
    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)  # in spite of its name, the CPU's kernel too
        torch.backends.cuda.enable_mem_efficient_sdp(False)


def average_gradients(modules: list[nn.Module]) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = flat.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def average_parameters(modules: list[nn.Module]) -> None:
    """Replace every parameter by its mean over the processes, in one message.

    Done every few steps instead of averaging gradients in each ("local SGD"), it lets every process
    take its own steps: twice the updates for the same samples, and no waiting within a step.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    parameters = [p for m in modules for p in m.parameters()]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = flat.split([parameter.numel() for parameter in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.copy_(mean.view_as(parameter))


def same_everywhere(value: float) -> float:
    """The first process's number, in all processes: for decisions by the clock that all must take
    alike.
    """
    if not dist.is_initialized():
        return value
    box = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(box, src=0)
    return float(box[0])


class Ema:
    """An exponential moving average of a module's parameters, with a horizon that grows with the
    run.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self.shadow = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module."""
        self._updates += 1
        weight = 1.0 - min(self._decay, (1 + self._updates) / (10 + self._updates))
        live = module.state_dict()
        floating = [k for k in self.shadow if live[k].is_floating_point()]
        torch._foreach_lerp_(
            [self.shadow[k] for k in floating], [live[k].float() for k in floating], weight
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {"shadow": self.shadow, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.shadow, self._updates = state["shadow"], state["updates"]

    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module of the same shape."""
        target = module.state_dict()
        module.load_state_dict({k: v.to(target[k].dtype) for k, v in self.shadow.items()})


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically, from the first process only: a killed run leaves the old checkpoint or the
    new one.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """A checkpoint of our own, tensors and plain values only; None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
