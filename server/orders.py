"""From a checked body to tasks.

Shared by every interface that draws, so that they refuse, default and count alike.
"""

from __future__ import annotations

import secrets
import time
import uuid
from dataclasses import dataclass, replace

from engine.errors import LimitExceededError
from engine.types import MAX_SEED, CacheDirective, CacheMode, GenerateRequest, Image
from server.auth import Tenant
from server.config import CacheConfig
from server.errors import ForbiddenError, NotFoundError, UnprocessableError
from server.messages import ModelInfo, Output, PictureTask
from server.schemas.draw import DrawBody
from server.services import Services
from server.sizes import Size, allowed_size

DEFAULT_STRENGTH = 0.8
DEFAULT_COMPRESSION = 90
_SEED_BITS = 32  # what every other tool's seed field takes
_DEFAULT_STEPS = 20
_STEPS = {"low": 10, "high": 30, "hd": 30, "xhigh": 40, "max": 50}
FEW_STEP_SOLVERS = ("lcm", "tcd")
FEW_STEP_PART = 5
"""They take this part of the steps that others take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Pictures that a request starts from, already at the size that is drawn.

    Attributes:
        image: (height, width, 3) uint8.
        mask: (height, width) uint8, white where it is repainted; None repaints everything.
    """

    image: Image
    mask: Image | None = None
    strength: float = DEFAULT_STRENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request that was held against model, limits and tenant: ready to draw."""

    model: ModelInfo
    tasks: tuple[PictureTask, ...]
    width_px: int
    height_px: int

    @property
    def rows(self) -> int:
        """UNet rows of all pictures together: what the request costs."""
        return sum(self.model.rows(task.request) for task in self.tasks)

    def with_previews(self, count: int) -> Order:
        """The same order with a listener, and at most ``count`` previews of each picture."""
        tasks = []
        for task in self.tasks:
            # Of e evaluations, every ceil(e / (count + 1))-th gives count previews or fewer.
            steps = self.model.evaluations(task.request)
            every = -(-steps // (count + 1)) if count else 0
            request = replace(task.request, preview_every=every)
            tasks.append(replace(task, request=request, listening=True))
        return replace(self, tasks=tuple(tasks))


async def model_named(services: Services, name: str | None) -> ModelInfo:
    """The model that a client means by ``name``, an id or an alias; by None, the default.

    Raises:
        NotFoundError: no such model is configured.
    """
    models = await services.dispatcher.models()
    if name is None and models:
        return models[0]
    ids = {alias: model.id for model in services.config.models for alias in model.aliases}
    for model in models:
        if name is not None and model.id == ids.get(name, name):
            return model
    known = ", ".join(sorted({model.id for model in models} | ids.keys())) or "none"
    raise NotFoundError(f"there is no such model; there are: {known}", field="model")


def order_of(
    body: DrawBody,
    model: ModelInfo,
    services: Services,
    tenant: Tenant,
    *,
    request_id: str,
    inputs: Inputs | None = None,
) -> Order:
    """Fill in what ``body`` leaves open, and refuse what can be refused before any work.

    Args:
        request_id: of the HTTP request; the tasks' own is unique and begins with it.
        inputs: pictures to start from; they decide the size.

    Raises:
        InvalidRequestError, LimitExceededError: a value outside its bounds.
        UnprocessableError: a size off the model's grid, transparency, or what this model cannot.
        ForbiddenError: a priority above the tenant's.
    """
    limits = services.config.limits
    _check_tenant(body, tenant)
    if body.background == "transparent":
        raise UnprocessableError(
            "pictures have no transparency; background must be auto or opaque", field="background"
        )
    _check_model(body, model)
    first_seed = secrets.randbits(_SEED_BITS) if body.seed is None else body.seed
    count = body.n or 1
    _bound("n", count, limits.max_pictures)
    _bound("seed", first_seed, MAX_SEED - count + 1)
    size = None if inputs is not None else allowed_size(body.size, model, limits)
    request = _request(body, model, first_seed, size, inputs, services.config.cache)
    request.check(limits.engine_limits())
    unique = f"{request_id}.{uuid.uuid4().hex[:12]}"
    tasks = tuple(
        PictureTask(
            id=f"{unique}.{index}",
            request_id=unique,
            tenant=tenant.id,
            model=model.id,
            request=replace(request, seed=first_seed + index),
            index=index,
            output=_output(body),
            deadline_at_s=time.time() + (body.deadline_s or limits.request_timeout_s),
            patient=body.deadline_s is not None,
        )
        for index in range(count)
    )
    if inputs is not None:
        height_px, width_px = inputs.image.shape[:2]
    else:
        width_px, height_px = size or (model.native_px, model.native_px)
    return Order(model=model, tasks=tasks, width_px=width_px, height_px=height_px)


def _check_tenant(body: DrawBody, tenant: Tenant) -> None:
    if body.priority > tenant.max_priority:
        raise ForbiddenError(
            f"priority is {body.priority}; this key may ask for at most {tenant.max_priority}",
            field="priority",
        )


def _check_model(body: DrawBody, model: ModelInfo) -> None:
    if body.clip_skip > model.max_clip_skip:
        raise UnprocessableError(
            f"clip_skip is {body.clip_skip}; {model.id} allows 0 to {model.max_clip_skip}",
            field="clip_skip",
        )
    if body.guidance_rescale and not model.guidable:
        raise UnprocessableError(
            f"guidance_rescale is {body.guidance_rescale:g}; {model.id} has guidance built in and"
            " allows 0",
            field="guidance_rescale",
        )


def _bound(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise LimitExceededError(
            f"{name} is {value}; at most {limit} is allowed", field=name, limit=limit
        )


def _request(
    body: DrawBody,
    model: ModelInfo,
    seed: int,
    size: Size | None,
    inputs: Inputs | None,
    cache: CacheConfig,
) -> GenerateRequest:
    width_px, height_px = size or (None, None)
    return GenerateRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width_px=width_px,
        height_px=height_px,
        steps=body.steps or _steps_of(body, model),
        solver=body.solver,
        schedule=body.schedule,
        timesteps=body.timesteps,
        guidance=body.guidance,
        guidance_interval=body.guidance_interval or (0.0, 1.0),
        guidance_rescale=body.guidance_rescale,
        clip_skip=body.clip_skip,
        eta=body.eta,
        seed=seed,
        image=None if inputs is None else inputs.image,
        mask=None if inputs is None else inputs.mask,
        strength=DEFAULT_STRENGTH if inputs is None else inputs.strength,
        priority=body.priority,
        cache=_cache(body, cache),
    )


def _steps_of(body: DrawBody, model: ModelInfo) -> int:
    steps = _STEPS.get(body.quality or "auto", _DEFAULT_STEPS)
    few = (body.solver or model.solver_default) in FEW_STEP_SOLVERS
    return steps // FEW_STEP_PART if few else steps


def _cache(body: DrawBody, config: CacheConfig) -> CacheDirective:
    """The default is decided here: to the engine a seed drawn by us would look like asked for."""
    if body.cache is not None:
        return body.cache.directive()
    by_default = body.seed is None and config.default == "approximate"
    return CacheDirective(mode=CacheMode.APPROXIMATE if by_default else CacheMode.OFF)


def _output(body: DrawBody) -> Output:
    compression = body.output_compression
    return Output(
        format=body.output_format or "png",
        quality=max(1, DEFAULT_COMPRESSION if compression is None else compression),
        metadata=body.metadata,
    )
