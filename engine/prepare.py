"""From a request to a trajectory: defaults, conditioning, solver table, first latent.

Random numbers are drawn from the request's own CPU generator in the order of Diffusers'
``pipeline_stable_diffusion*.py``, so that a seed means the same picture in both.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

import torch

from engine.errors import InvalidRequestError
from engine.model import Model
from engine.solvers import TOP, Level, SolverTable, Start, Strength
from engine.text import EncodedText, TextRequest
from engine.trajectory import Blend, Keep, LaneKey, Listener, Trajectory, guided_rows
from engine.types import GenerateRequest

_SEED_BITS = 32  # what every other tool's seed field takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A request with every default filled in, and its table."""

    request: GenerateRequest
    width_px: int
    height_px: int
    seed: int
    guidance: float
    guided: tuple[bool, ...]
    table: SolverTable


@dataclass(frozen=True, slots=True)
class Reentry:
    """A state of the noise cache that a trajectory starts from.

    Attributes:
        latent: (channels, height, width) float32.
        log_snr: level at which it enters.
        noisy: it is x itself; else a clean latent, to be brought to the level with fresh noise.
    """

    latent: torch.Tensor
    log_snr: float
    noisy: bool


def resolve(request: GenerateRequest, model: Model) -> Resolved:
    """Fill in the checkpoint's defaults and build the solver table.

    Raises:
        InvalidRequestError, LimitExceededError, UnsupportedError: naming the field.
    """
    width_px, height_px = _size(request, model)
    numbers = _table(request, model, _start(request))
    guidance = model.spec.guidance_default if request.guidance is None else request.guidance
    embeds_guidance = model.spec.guidance_embedding_size is not None
    return Resolved(
        request=request,
        width_px=width_px,
        height_px=height_px,
        seed=secrets.randbits(_SEED_BITS) if request.seed is None else request.seed,
        guidance=guidance,
        guided=guided_rows(
            numbers.evaluations,
            guidance,
            request.guidance_interval,
            can_guide=not embeds_guidance,
        ),
        table=numbers,
    )


def enter_at(resolved: Resolved, model: Model, log_snr: float) -> Resolved:
    """The same request with a table that begins at a level; guidance acts where it would have."""
    rest = _table(resolved.request, model, Level(log_snr))
    return replace(resolved, table=rest, guided=resolved.guided[-rest.evaluations :])


def encode(resolved: Resolved, model: Model) -> EncodedText:
    """Conditioning of a request; a negative row only where guidance will use it."""
    request = resolved.request
    wanted = TextRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt if any(resolved.guided) else None,
        width_px=resolved.width_px,
        height_px=resolved.height_px,
        guidance=resolved.guidance,
        clip_skip=request.clip_skip,
    )
    return model.prompts.encode([wanted])[0]


def build(
    resolved: Resolved,
    text: EncodedText,
    model: Model,
    *,
    request_id: str,
    listener: Listener,
    deadline_at_s: float | None = None,
    reentry: Reentry | None = None,
    keep: Keep | None = None,
) -> Trajectory:
    """Draw the first latent, and put it all into a trajectory.

    Args:
        reentry: state of the noise cache to start from; ``resolved`` is then what
            :func:`enter_at` made for its level.
    """
    generator = torch.Generator("cpu").manual_seed(resolved.seed)
    entry = _enter(resolved, model, generator, reentry)
    shape = model.latent_shape(resolved.width_px, resolved.height_px)
    return Trajectory(
        id=request_id,
        lane=LaneKey(model.digest, shape, int(text.conditioning.context.shape[1])),
        table=resolved.table,
        conditioning=text.conditioning,
        guidance=resolved.guidance,
        guidance_rescale=resolved.request.guidance_rescale,
        guided=resolved.guided,
        start=entry.start,
        generator=generator,
        listener=listener,
        extra=entry.extra,
        blend=entry.blend,
        keep=keep,
        entered_at=None if reentry is None else reentry.log_snr,
        preview_every=resolved.request.preview_every,
        preview=model.preview,
        priority=resolved.request.priority,
        deadline_at_s=deadline_at_s,
    )


# ---------------------------------------------------------------------- size and table


def _size(request: GenerateRequest, model: Model) -> tuple[int, int]:
    """(width, height) in pixels: as asked, or as the image, or the checkpoint's own."""
    latent = model.spec.latent
    if request.image is not None:
        height_px, width_px = request.image.shape[:2]
        for name, asked, found in (
            ("width_px", request.width_px, width_px),
            ("height_px", request.height_px, height_px),
        ):
            if asked is not None and asked != found:
                raise InvalidRequestError(
                    f"{name} is {asked}, but the image has {found}; leave it out", field=name
                )
        if request.mask is not None and request.mask.shape != request.image.shape[:2]:
            raise InvalidRequestError(
                f"the mask is {request.mask.shape[1]}x{request.mask.shape[0]} px,"
                f" the image {width_px}x{height_px} px; they must be equal",
                field="mask",
            )
    else:
        width_px = latent.native_px if request.width_px is None else request.width_px
        height_px = latent.native_px if request.height_px is None else request.height_px
    for name, side_px in (("width_px", width_px), ("height_px", height_px)):
        if side_px % latent.size_multiple_px or not latent.min_px <= side_px <= latent.max_px:
            raise InvalidRequestError(
                f"{name} is {side_px}; allowed: multiples of {latent.size_multiple_px}"
                f" from {latent.min_px} to {latent.max_px}",
                field=name,
            )
    return width_px, height_px


def _table(request: GenerateRequest, model: Model, start: Start) -> SolverTable:
    return model.solver_defaults.table(
        request.steps,
        start,
        solver=request.solver,
        schedule=request.schedule,
        eta=request.eta,
        timesteps=request.timesteps,
    )


def _start(request: GenerateRequest) -> Start:
    # Repainting at full strength keeps nothing of the image under the mask: it starts at the top.
    if request.image is None or (request.mask is not None and request.strength == 1.0):
        return TOP
    return Strength(request.strength)


# ---------------------------------------------------------------------- the first latent


@dataclass(frozen=True, slots=True)
class _Entry:
    start: torch.Tensor
    extra: torch.Tensor | None = None
    blend: Blend | None = None


def _enter(
    resolved: Resolved, model: Model, generator: torch.Generator, reentry: Reentry | None
) -> _Entry:
    if resolved.request.mask is not None:
        return _enter_inpainting(resolved, model, generator)
    if model.takes_mask:
        raise InvalidRequestError(
            f"{model.spec.name} is an inpainting model: it needs an image and a mask", field="mask"
        )
    if resolved.request.image is None:
        # Drawn also where it is not used, so that stochastic solvers draw the same after it.
        noise = _noise(resolved, model, generator)
        if reentry is None:
            return _Entry(resolved.table.initial_scale * noise)
        if reentry.noisy:
            return _Entry(reentry.latent)
        return _Entry(_renoised(resolved.table, reentry.latent, noise))
    clean = model.vae.encode(resolved.request.image, generator)
    return _Entry(_renoised(resolved.table, clean, _noise(resolved, model, generator)))


def _enter_inpainting(resolved: Resolved, model: Model, generator: torch.Generator) -> _Entry:
    request = resolved.request
    assert request.image is not None
    assert request.mask is not None
    from_top = request.strength == 1.0
    clean = None
    if not (model.takes_mask and from_top):
        clean = model.vae.encode(request.image, generator)
    noise = _noise(resolved, model, generator)
    if clean is None or from_top:
        start = resolved.table.initial_scale * noise
    else:
        start = _renoised(resolved.table, clean, noise)
    # Drawn also where it is not used: Diffusers does, and stochastic solvers draw after it.
    masked = model.vae.encode_masked(request.image, request.mask, generator)
    mask = model.vae.mask(request.mask)
    if model.takes_mask:
        return _Entry(start, extra=torch.cat([mask, masked]))
    assert clean is not None
    return _Entry(start, blend=Blend(mask, clean, noise))


def _noise(resolved: Resolved, model: Model, generator: torch.Generator) -> torch.Tensor:
    shape = model.latent_shape(resolved.width_px, resolved.height_px)
    return torch.randn((1, *shape), generator=generator)[0]


def _renoised(numbers: SolverTable, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    alpha, sigma = numbers.level(0)
    return alpha * clean + sigma * noise
