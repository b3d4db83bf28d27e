"""Bodies of Automatic1111's interface.

Its clients send every field that they know, and forks have added more: fields that are not listed
here are accepted without effect, as the original does.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from server.schemas.base import Reply

Text = Annotated[str, Field(max_length=32_000)]
Picture = Annotated[str, Field(max_length=200_000_000)]
"""Base64, or a ``data:image/…;base64,`` URL. Never an address."""


class Lenient(BaseModel):
    """Base of these bodies: what is not known is ignored."""

    model_config = ConfigDict(
        extra="ignore", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


class DrawSettings(Lenient):
    """What both ways to draw share."""

    # ---- honoured
    prompt: Annotated[Text, Field(examples=["a red umbrella"])] = ""
    negative_prompt: Text | None = ""
    seed: Annotated[int | None, Field(ge=-1, le=2**63 - 1, examples=[-1])] = -1
    """-1 draws one. Picture i of a batch uses seed + i."""
    sampler_name: Annotated[str | None, Field(max_length=64, examples=["DPM++ 2M"])] = None
    """A name from `samplers`, also with a scheduler at its end (`DPM++ 2M Karras`); by default the
    checkpoint's own."""
    sampler_index: Annotated[str | None, Field(max_length=64)] = None
    """The older name of `sampler_name`."""
    scheduler: Annotated[str | None, Field(max_length=64, examples=["Automatic"])] = None
    """A name or label from `schedulers`; `Automatic` is the solver's own."""
    steps: Annotated[int | None, Field(ge=1, le=1000, examples=[20])] = None
    cfg_scale: Annotated[float | None, Field(ge=0.0, le=1000.0, examples=[7.0])] = None
    """Guidance; by default the checkpoint's own."""
    width: Annotated[int | None, Field(ge=1, le=99_999)] = None
    """By default the model's own width, not 512."""
    height: Annotated[int | None, Field(ge=1, le=99_999)] = None
    batch_size: Annotated[int | None, Field(ge=1, le=128, examples=[1])] = 1
    n_iter: Annotated[int | None, Field(ge=1, le=128, examples=[1])] = 1
    """Pictures are batch_size × n_iter; how they share batches is the server's affair."""
    eta: Annotated[float | None, Field(ge=0.0, le=1.0)] = None
    """Of the samplers that have it (DDIM, TCD); others ignore it."""
    send_images: bool | None = True
    """False leaves the pictures out of the reply."""
    override_settings: dict[str, Any] | None = None
    """`sd_model_checkpoint` chooses the model, `samples_format` the file format (png, jpg, webp),
    and `CLIP_stop_at_last_layers` the layer of the text encoder that is taken: 1 is the last, and
    SDXL models ignore it, as in the original. All others are accepted without effect."""

    # ---- refused where they would change the picture
    styles: Annotated[list[str] | None, Field(max_length=64)] = None
    """Only empty: there are no stored styles."""
    tiling: bool | None = False
    """Only false."""
    restore_faces: bool | None = False
    """Only false."""
    subseed_strength: float | None = 0.0
    """Only 0: seeds are not mixed."""
    refiner_checkpoint: str | None = None
    """Only empty."""
    script_name: str | None = None
    """Only empty: there are no scripts."""
    alwayson_scripts: dict[str, Any] | None = None
    """Only empty: there are no extensions."""

    # ---- accepted without effect
    subseed: int | None = -1
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    s_churn: float | None = None
    """As are s_tmin, s_tmax, s_noise and s_min_uncond: the solvers draw no extra noise."""
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    s_min_uncond: float | None = None
    do_not_save_samples: bool | None = False
    """As is every choice of what to save: the server keeps no pictures."""
    do_not_save_grid: bool | None = False
    save_images: bool | None = False
    override_settings_restore_afterwards: bool | None = True
    """They always end with the request."""
    script_args: list[Any] | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = False
    comments: dict[str, Any] | None = None


class Txt2ImgBody(DrawSettings):
    """Pictures from a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "a red umbrella", "sampler_name": "DPM++ 2M", "steps": 10}]
        }
    )

    denoising_strength: float | None = None
    """Without effect here: it belongs to the second pass that `enable_hr` asks for."""
    enable_hr: bool | None = False
    """Only false: there is no second pass."""


class Img2ImgBody(DrawSettings):
    """Pictures from a picture, in all or where a mask is white."""

    init_images: Annotated[list[Picture], Field(min_length=1, max_length=1)]
    """One picture, in base64 or as a data URL; addresses are never fetched."""
    denoising_strength: Annotated[float | None, Field(gt=0.0, le=1.0, examples=[0.75])] = 0.75
    mask: Picture | None = None
    """White, or opaque where it has transparency, is repainted."""
    inpainting_mask_invert: Annotated[int | None, Field(ge=0, le=1)] = 0
    resize_mode: Annotated[int | None, Field(ge=0, le=1)] = 0
    """0 stretches the picture to width and height, 1 crops it. Filling (2) and latent upscaling
    (3) are refused."""
    include_init_images: bool | None = False
    """Whether `parameters` of the reply repeats them."""

    # ---- accepted without effect
    mask_blur: float | None = None
    """As are mask_blur_x and mask_blur_y: masks are decided by latent cell."""
    inpainting_fill: Annotated[int | None, Field(ge=0, le=3)] = None
    """Repainting always starts from what is under the mask; a strength of 1 keeps none of it."""
    inpaint_full_res: bool | int | None = None
    """As is inpaint_full_res_padding: the whole picture is drawn, at its size."""
    inpaint_full_res_padding: int | None = None
    initial_noise_multiplier: float | None = None
    image_cfg_scale: float | None = None


class DrawReply(Reply):
    """Pictures, and what drew them."""

    images: list[str]
    """Base64, without a `data:` prefix."""
    parameters: dict[str, Any]
    """The request, with its defaults."""
    info: str
    """JSON: `seed`, `all_seeds`, `infotexts`, `sampler_name` and the like."""


class ProgressState(Reply):
    """What is being drawn."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressReply(Reply):
    """How far the caller's requests on this gateway are."""

    progress: float
    """0 to 1; 0 also when nothing runs."""
    eta_relative: float
    """Seconds that are left, if the rest goes as the beginning did."""
    state: ProgressState
    current_image: str | None
    """The last preview, as PNG in base64."""
    textinfo: str | None


class Sampler(Reply):
    """A solver under the name that this interface gives it."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class Scheduler(Reply):
    """A way to spread the steps over the noise levels."""

    name: str
    label: str
    aliases: list[str] | None = None
    default_rho: float = -1.0
    need_inner_model: bool = False


class SdModel(Reply):
    """A model, as this interface lists it."""

    title: str
    model_name: str
    hash: str
    """The first ten digits of the plan's digest; files name the same."""
    sha256: str | None = None
    filename: str
    """The id again: models have no path here."""
    config: str | None = None


class OptionsBody(Lenient):
    """Settings to change: only the model has an effect."""

    sd_model_checkpoint: Annotated[str | None, Field(max_length=256, examples=["tintype"])] = None
    """The model of the caller's later requests on this gateway, until it ends. A request that names
    its own in `override_settings` does not depend on which gateway it meets."""


class PngInfoBody(Lenient):
    """A picture file to read."""

    image: Picture


class PngInfoReply(Reply):
    """The parameters that a file carries."""

    info: str
    """In this interface's text format; empty where the file has none."""
    items: dict[str, str]
    parameters: dict[str, str]
    """The same, by name."""
