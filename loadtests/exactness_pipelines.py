"""Darkroom's latents beside those of Diffusers' own pipelines, same checkpoint, seed and numbers.

    python -m loadtests.exactness_pipelines [--cases 60] [--seed 0]

A seeded sample over the default model and tiny checkpoints of each family: text to image, image to
image and inpainting; every solver and schedule that both sides take; with guidance and without.
The bound is 1e-3 relative in fp32 (float32 sums in another order; nothing else differs).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from engine.checkpoint import Checkpoint
from engine.compile.plan import PlanStore
from engine.engine import Engine
from engine.model import Model
from engine.runtime import open_runtime
from engine.solvers import SOLVERS
from engine.types import GenerateRequest

BOUND = 1e-3

_SCHEDULE_KEYS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}
_SOLVERS = (
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "plms",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One picture to draw on both sides."""

    family: str
    mode: str
    solver: str
    schedule: str | None
    steps: int
    guidance: float
    seed: int
    strength: float = 0.6
    clip_skip: int = 0
    guidance_rescale: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"{self.family} {self.mode} {self.solver}/{self.schedule or 'own'}"
            f" {self.steps} steps, guidance {self.guidance:g}"
        ]
        if self.guidance_rescale:
            parts.append(f"rescaled by {self.guidance_rescale:g}")
        if self.clip_skip:
            parts.append(f"clip skip {self.clip_skip}")
        return ", ".join(parts)


def sample_cases(families: Sequence[str], count: int, seed: int) -> Iterator[Case]:
    """A seeded sample; families take turns, so that each is there."""
    chance = random.Random(seed)
    for i in range(count):
        family = families[i % len(families)]
        solver = "lcm" if family == "lcm" else chance.choice(_SOLVERS)
        schedules = [name for name in SOLVERS[solver].schedules if name in _SCHEDULE_KEYS]
        mode = "inpaint" if family == "inpaint9" else chance.choice(["text", "text", "image"])
        if mode == "text" and family in ("sd15", "default") and chance.random() < 0.3:
            mode = "inpaint"
        yield Case(
            family=family,
            mode="text" if family == "lcm" else mode,
            solver=solver,
            schedule=None if solver == "lcm" else chance.choice(schedules),
            steps=chance.randint(2, 8) if solver == "lcm" else chance.randint(3, 25),
            guidance=chance.choice([1.0, 2.0, 7.5]),
            seed=chance.randrange(2**31),
            strength=chance.choice([0.4, 0.75, 1.0]),
            clip_skip=chance.choice([0, 0, 1]),
            # Diffusers has it in its text-to-image pipelines only.
            guidance_rescale=chance.choice([0.0, 0.7])
            if mode == "text" and family != "lcm"
            else 0.0,
        )


class Reference:
    """Diffusers' pipelines on one checkpoint."""

    def __init__(self, folder: Path) -> None:
        from diffusers import DiffusionPipeline

        self._pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        self._pipe.set_progress_bar_config(disable=True)
        if not hasattr(self._pipe.text_encoder, "text_model"):
            # Its clip_skip asks for a module that Transformers 5 dropped.
            object.__setattr__(self._pipe.text_encoder, "text_model", self._pipe.text_encoder)
        self._config = dict(self._pipe.scheduler.config)

    def latent(self, case: Case, image: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> Any:
        """(channels, height, width) float32 final latent."""
        import diffusers
        from PIL import Image

        scheduler_class = getattr(diffusers, SOLVERS[case.solver].diffusers)
        keys = {} if case.schedule is None else _SCHEDULE_KEYS[case.schedule]
        if case.solver == "dpmpp_2m_sde":
            keys = keys | {"algorithm_type": "sde-dpmsolver++"}
        if case.solver == "ddim":
            keys = keys | {"clip_sample": False}  # its class default; no latent model clips
        if case.solver == "plms":
            keys = keys | {"skip_prk_steps": True}
        pipe: Any = {
            "text": lambda: self._pipe,
            "image": lambda: diffusers.AutoPipelineForImage2Image.from_pipe(self._pipe),
            "inpaint": lambda: diffusers.AutoPipelineForInpainting.from_pipe(self._pipe),
        }[case.mode]()
        if case.solver != "lcm":
            pipe.scheduler = _begun(scheduler_class.from_config(self._config, **keys))
        pipe.set_progress_bar_config(disable=True)
        inputs: dict[str, Any] = {}
        if case.mode != "text":
            inputs = {"image": Image.fromarray(image), "strength": case.strength}
        if case.mode == "inpaint":
            inputs["mask_image"] = Image.fromarray(mask)
            inputs |= {"height": image.shape[0], "width": image.shape[1]}
        if case.family != "lcm":
            inputs["negative_prompt"] = "dog"
        if case.clip_skip:
            inputs["clip_skip"] = case.clip_skip
        if case.guidance_rescale:
            inputs["guidance_rescale"] = case.guidance_rescale
        return pipe(
            "a red umbrella",
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            generator=torch.Generator("cpu").manual_seed(case.seed),
            output_type="latent",
            **inputs,
        ).images[0]


def _begun(scheduler: Any) -> Any:
    """A scheduler that is told to begin at its first step, as image-to-image pipelines tell it.

    Text-to-image pipelines leave it to look its first timestep up. Where two round to the same
    number (exponential sigmas of few steps) it takes the second, and runs out of steps at the end.
    """
    set_timesteps = scheduler.set_timesteps

    def begin(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.set_begin_index(0)

    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_timesteps = begin
    return scheduler


def request_of(
    case: Case, image: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]
) -> GenerateRequest:
    """The same picture, as our request."""
    return GenerateRequest(
        prompt="a red umbrella",
        negative_prompt="" if case.family == "lcm" else "dog",
        steps=case.steps,
        solver=case.solver,
        schedule=case.schedule,
        guidance=case.guidance,
        seed=case.seed,
        image=None if case.mode == "text" else image,
        mask=mask if case.mode == "inpaint" else None,
        strength=case.strength,
        clip_skip=case.clip_skip,
        guidance_rescale=case.guidance_rescale,
    )


class Pair:
    """One checkpoint on both sides."""

    def __init__(self, folder: Path, plans: Path, *, precision: str = "fp32") -> None:
        checkpoint = Checkpoint.open(folder)
        self.runtime = open_runtime("onnxruntime", threads=torch.get_num_threads())
        plan = PlanStore(plans).build(checkpoint, backend="onnxruntime", precision=precision)
        self.model = Model.open(plan, self.runtime)
        self.engine = Engine(device=self.runtime.device)
        self.engine.load(self.model)
        self.engine.start()
        self._reference = Reference(folder)
        side_px = self.model.spec.latent.native_px
        generator = np.random.default_rng(0)
        small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        self.image = np.kron(small, np.ones((side_px // 4, side_px // 4, 1), np.uint8))
        self.mask = np.zeros((side_px, side_px), np.uint8)
        self.mask[: side_px // 2] = 255

    def relative_error(self, case: Case) -> float:
        """‖ours − theirs‖ / ‖theirs‖ of the final latents."""
        theirs = self._reference.latent(case, self.image, self.mask)
        ours = self.engine.generate(request_of(case, self.image, self.mask)).latent
        return float(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs))

    def close(self) -> None:
        """Close our side."""
        self.engine.close()
        self.runtime.close()


def main() -> int:
    """Print the table; exit status 1 when a case is out of bounds."""
    from tests.conftest import DEFAULT_MODEL
    from tests.tiny import write_checkpoint

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    families = ["default", "sd15", "sd21-v", "sdxl", "lcm", "inpaint9"]
    table = Table("case", "relative error", title=f"bound {BOUND:g}, seed {options.seed}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        cases = list(sample_cases(families, options.cases, options.seed))
        for family in families:
            folder = DEFAULT_MODEL
            if family != "default":
                folder = write_checkpoint(family, root / f"tiny-{family}")
            pair = Pair(folder, root / "plans")
            for case in (case for case in cases if case.family == family):
                error = pair.relative_error(case)
                worst = max(worst, error if np.isfinite(error) else np.inf)
                table.add_row(str(case), f"{error:.1e}")
            pair.close()
    console = Console()
    console.print(table)
    console.print(f"{len(cases)} cases, worst {worst:.1e}, bound {BOUND:g}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
