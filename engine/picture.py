"""The finished picture, with everything needed to draw it again."""

from __future__ import annotations

import torch

from engine.model import Model
from engine.models import Served
from engine.prepare import Resolved
from engine.reuse_noise import Visit
from engine.types import Image, Picture, Timings


def describe(
    visit: Visit, served: Served, image: Image, latent: torch.Tensor, timings: Timings
) -> Picture:
    """What a request became: its resolved numbers, and every approximation that touched it.

    Args:
        latent: (channels, height, width), the final one.
    """
    model, resolved = served.model, visit.resolved
    return Picture(
        image=image,
        latent=latent,
        seed=resolved.seed,
        solver=resolved.table.solver,
        schedule=resolved.table.schedule,
        steps=resolved.table.steps,
        evaluations=resolved.table.evaluations,
        guidance=resolved.guidance,
        width_px=resolved.width_px,
        height_px=resolved.height_px,
        model=served.name,
        plan_digest=model.digest,
        guidance_rescale=resolved.request.guidance_rescale,
        clip_skip=resolved.request.clip_skip,
        approximations={
            **model.approximations,
            **_substitution(visit.resolved, model),
            **model.vae.approximations(resolved.width_px, resolved.height_px),
            **visit.approximations,
        },
        reuse=visit.reuse,
        timings=timings,
    )


def _substitution(resolved: Resolved, model: Model) -> dict[str, str]:
    """A solver that draws in place of the checkpoint's own; one that was asked for is exact."""
    found = model.solver_defaults.substitution
    return {} if found is None or resolved.request.solver is not None else {"scheduler": found}
