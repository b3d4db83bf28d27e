"""What every request for pictures may say, and what every picture's reply tells."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.types import CacheDirective, CacheMode, Reuse
from server.messages import Drawn, PictureFormat
from server.schemas.base import Body, Reply, ScheduleName, Seed, SolverName, TimingsReply

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
MAX_CLIP_SKIP = 64
"""More layers than any text encoder has; the model's own bound is lower."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class CacheBody(Body):
    """What the request lets the noise cache do."""

    mode: Literal["off", "exact", "approximate"]
    """`exact` reuses only the very same request; `approximate` starts from the steps that a
    similar prompt already paid for, and the reply names it."""
    min_similarity: Annotated[float, Field(ge=-1.0, le=1.0)] = -1.0
    """Floor on the cosine between both prompts."""
    max_jump: Fraction = 1.0
    """Largest share of the steps to skip."""

    def directive(self) -> CacheDirective:
        """The same for the engine."""
        return CacheDirective(
            mode=CacheMode(self.mode), min_similarity=self.min_similarity, max_jump=self.max_jump
        )


class DrawBody(Body):
    """What every request for pictures may say."""

    prompt: Annotated[str, Field(max_length=32_000, examples=["a red umbrella"])]
    """What to draw. The configured bound on its length is usually lower."""
    model: Annotated[str | None, Field(max_length=64, examples=["tintype"])] = None
    """A configured model's id or alias; by default the first."""
    n: Annotated[int | None, Field(ge=1, le=128, examples=[1])] = None
    """How many pictures; picture i, from 0, is drawn with seed + i."""
    size: Annotated[
        str | None, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", examples=["auto"])
    ] = None
    """`auto`, the model's own size (when editing: the picture's), or WIDTHxHEIGHT in pixels."""
    quality: Annotated[Quality | None, Field(examples=["auto"])] = None
    """How many steps where `steps` is left out: low 10, high and hd 30, xhigh 40, max 50, and
    20 otherwise; of a few-step solver (lcm, tcd) a fifth of that."""
    output_format: Annotated[PictureFormat | None, Field(examples=["png"])] = None
    """The format of the finished pictures; png by default. Partial pictures are always PNG."""
    output_compression: Annotated[int | None, Field(ge=0, le=100)] = None
    """Quality of JPEG and WebP, 0 to 100, by default 90; PNG is exact and ignores it."""
    user: Annotated[str | None, Field(max_length=256)] = None
    """Your name for an end user. Only a hash of it is noted, in the request's log line."""
    safety_identifier: Annotated[str | None, Field(max_length=256)] = None
    """The newer name of `user`; wins where both are given."""
    moderation: Literal["auto", "low"] | None = None
    """Accepted without effect: the operator decides whether and how content is checked."""
    background: Literal["auto", "opaque", "transparent"] | None = None
    """Pictures are opaque; `transparent` is refused."""

    negative_prompt: Annotated[str, Field(max_length=32_000)] = ""
    """What to keep out; needs guidance above 1."""
    steps: Annotated[int | None, Field(ge=1, le=1000, examples=[20])] = None
    """Denoising steps; by default what `quality` says."""
    solver: Annotated[SolverName | None, Field(examples=["dpmpp_2m"])] = None
    """By default the checkpoint's own."""
    schedule: Annotated[ScheduleName | None, Field(examples=["karras"])] = None
    """How the steps are spread over the noise levels; by default the solver's own."""
    timesteps: Annotated[
        tuple[Annotated[float, Field(ge=0.0)], ...] | None, Field(min_length=1, max_length=1000)
    ] = None
    """Custom timesteps, descending; they replace `steps` and `schedule`."""
    guidance: Annotated[float | None, Field(ge=0.0, le=1000.0, examples=[5.0])] = None
    """Classifier-free guidance scale; 1 or less turns guidance off and halves the work."""
    guidance_interval: tuple[Fraction, Fraction] | None = None
    """The part of the steps, as two fractions, in which guidance acts; all by default."""
    guidance_rescale: Fraction = 0.0
    """The part by which a guided prediction gets back the spread that it had unguided, against
    overexposure at high guidance; without effect where guidance is off. 0.7 is usual."""
    clip_skip: Annotated[int, Field(ge=0, le=MAX_CLIP_SKIP)] = 0
    """Last layers of the text encoders to leave out for the prompt, as in Diffusers: 0 leaves out
    none. Automatic1111's number is one more. `max_clip_skip` of the model bounds it."""
    eta: Fraction | None = None
    """Share of fresh noise of the solvers that have it (ddim, tcd)."""
    seed: Annotated[Seed | None, Field(examples=[7])] = None
    """The seed of the first picture; drawn, and named in the reply, where it is left out."""
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """Higher goes first, up to what the tenant may ask for."""
    deadline_s: Annotated[float | None, Field(gt=0.0, le=86_400.0)] = None
    """Seconds after which the pictures are worthless. What the measured step times say cannot be
    met is refused at once with 429: `overloaded` where it could be met after `Retry-After` seconds,
    `deadline_too_short` where a picture takes longer even alone; then `Retry-After` is the time in
    which the queue drains, and more time or fewer steps help. Without one, a request is refused
    that would wait longer than the server's `admission.max_wait_s` before it begins."""
    cache: CacheBody | None = None
    """By default off for a request that names its seed, and for others what the server's
    `cache.default` says, which is off unless its operator has set it to approximate."""
    metadata: bool = True
    """Whether the files hold the parameters that drew them, the prompt included."""


class ReuseReply(Reply):
    """What a picture owes to the noise cache."""

    outcome: Literal["hit", "miss", "slow", "failed", "off", "bypassed"]
    """`slow` and `failed` are misses: no answer in time, or none at all. `off`: not asked for.
    `bypassed`: this kind of request does not use the cache, as `note` says."""
    mode: Literal["off", "exact", "approximate"]
    """What the request asked for, or what the server does where it asked for nothing."""
    source: str | None = None
    """Id of the stored state that it started from, or that it is; null without a hit."""
    similarity: float | None = None
    """Cosine to the prompt that was reused; of a miss, to the closest one; of an exact hit 1."""
    steps_skipped: int = 0
    """Evaluations of the model that it was spared; of an exact hit all."""
    note: str = ""
    """What else there is to say, such as why the cache was bypassed."""

    @classmethod
    def of(cls, reuse: Reuse) -> ReuseReply:
        """What the engine said."""
        return cls(
            outcome=reuse.outcome.value,
            mode=reuse.mode.value,
            source=reuse.source,
            similarity=reuse.similarity,
            steps_skipped=reuse.steps_skipped,
            note=reuse.note,
        )


class DrawnReply(Reply):
    """Everything needed to draw one picture again, and how long it took."""

    index: int
    seed: int
    solver: str
    schedule: str
    steps: int
    guidance: float
    width_px: int
    height_px: int
    model: str
    plan_digest: str
    """The compiled model, precision and backend that drew it."""
    approximations: dict[str, str]
    """Each approximation that touched the picture, by name, with its dial; empty means exact."""
    cache: ReuseReply | None = None
    """null where the server has no noise cache."""
    attempts: int
    """More than 1 where a worker was lost on the way."""
    timings_ms: TimingsReply

    @classmethod
    def of(cls, picture: Drawn) -> DrawnReply:
        """What a worker said of a picture."""
        times = picture.timings
        return cls(
            index=picture.index,
            seed=picture.seed,
            solver=picture.solver,
            schedule=picture.schedule,
            steps=picture.steps,
            guidance=picture.guidance,
            width_px=picture.width_px,
            height_px=picture.height_px,
            model=picture.model,
            plan_digest=picture.plan_digest,
            approximations=dict(picture.approximations),
            cache=None if picture.cache is None else ReuseReply.of(picture.cache),
            attempts=picture.attempts,
            timings_ms=TimingsReply.of(times),
        )
