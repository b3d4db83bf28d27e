"""Every stage that derives from the base runs, writes stock files, and changes pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import (
    ControlNetModel,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

from models.training import controlnet, lcm, lora
from models.training.adapters import KOHYA_FILE, PEFT_FILE, add_lora, load_parts, start_lora
from models.training.base import Noiser
from models.training.common import load_checkpoint
from tests.models.tiny_base import write_base, write_icons, write_latents

pytestmark = pytest.mark.filterwarnings("ignore")

Picture = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("world")
    write_icons(work)
    write_latents(work)
    write_base(work / "base")
    return work


def run(monkeypatch: pytest.MonkeyPatch, stage: ModuleType, world: Path, *options: str) -> Path:
    """Run a stage's command line for a few steps; returns the folder that it wrote."""
    out = world / "out" / "-".join([stage.__name__.rpartition(".")[2], *options]).replace("--", "")
    arguments = ["stage", "--base", str(world / "base"), "--work", str(world), "--out", str(out)]
    short = ["--smoke", "--batch", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*arguments, *short, *options])
    stage.main()
    return out


def draw(pipe: StableDiffusionPipeline, **options: object) -> Picture:
    """One small picture in four steps, ``(h, w, 3)`` in 0 to 1."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "np"} | options
    picture: Picture = pipe("a red apple", generator=generator, **settings).images[0]
    return picture


def stock(world: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(world / "base", local_files_only=True)


@pytest.mark.parametrize("text", [False, True])
def test_a_style_lora_loads_in_both_layouts(
    world: Path, monkeypatch: pytest.MonkeyPatch, text: bool
) -> None:
    out = run(monkeypatch, lora, world, "--style", "night" if text else "twemoji", "--rank", "4",
              *(["--text"] if text else []))  # fmt: skip
    assert "licen" in (out / "README.md").read_text().lower()
    plain = draw(stock(world))
    pictures = []
    for name in (PEFT_FILE, KOHYA_FILE):
        factors = load_file(out / name)
        loud = {k: v if k.endswith("alpha") else v + 0.05 for k, v in factors.items()}
        pipe = stock(world)
        pipe.load_lora_weights(loud if name == PEFT_FILE else _halved_up(loud, factors))
        pictures.append(draw(pipe))
    assert np.abs(pictures[0] - plain).max() > 0.02
    np.testing.assert_allclose(pictures[0], pictures[1], atol=2e-3)


def _halved_up(
    loud: dict[str, torch.Tensor], factors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same change as in the other layout, whose upper factors are half as large."""
    return {k: factors[k] + 0.1 if ".lora_up." in k else v for k, v in loud.items()}


def test_factors_lie_on_transformer_blocks_only(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(monkeypatch, lora, world, "--style", "silhouette", "--rank", "2")
    for name in load_file(out / PEFT_FILE):
        assert "attentions" in name
        assert "resnets" not in name
    # Two blocks down, four up, one in the middle; twelve sites in each.
    modules = {name.rsplit(".lora", 1)[0] for name in load_file(out / PEFT_FILE)}
    assert len(modules) == 12 * (2 + 4 + 1)


def test_a_resumed_run_goes_on(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, lora, world, "--style", "silhouette", "--rank", "2")
    path = world / "lora-silhouette.pt"
    state = load_checkpoint(path)
    assert state is not None
    assert state["step"] == 3
    before = path.stat().st_mtime_ns
    run(monkeypatch, lora, world, "--style", "silhouette", "--rank", "2")  # nothing left to do
    assert path.stat().st_mtime_ns == before


def test_a_run_begins_with_the_factors_of_a_folder(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("--style", "night", "--text", "--rank", "4")
    out = run(monkeypatch, lora, world, *text)
    before = load_file(out / PEFT_FILE)
    (world / "lora-night.pt").unlink()
    again = run(monkeypatch, lora, world, *text, "--start-from", str(out), "--rate", "0")
    after = load_file(again / PEFT_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    parts = load_parts(world / "base", "cpu")
    add_lora(parts.unet, r".*to_q", 4)
    with pytest.raises(ValueError, match="not for the same sites"):
        start_lora(out, parts.unet, None)


def test_the_controlnet_is_a_stock_folder_that_steers(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(monkeypatch, controlnet, world)
    control = ControlNetModel.from_pretrained(out, dtype=torch.float32)
    assert any(float(p.abs().max()) > 0 for p in control.controlnet_down_blocks.parameters())
    with torch.no_grad():  # as after a long run: these layers begin at zero
        for layer in (control.controlnet_cond_embedding.conv_out, *control.controlnet_down_blocks):
            torch.nn.init.normal_(layer.weight, std=0.2)
    pipe = StableDiffusionControlNetPipeline(**stock(world).components, controlnet=control)
    edges = np.zeros((128, 128, 3), np.uint8)
    without = draw(pipe, image=_image(edges))
    edges[::4] = 255
    assert np.abs(draw(pipe, image=_image(edges)) - without).max() > 1e-4  # without: 1e-7


def _image(pixels: npt.NDArray[np.uint8]) -> object:
    from PIL import Image

    return Image.fromarray(pixels)


def test_outlines_are_where_colours_change() -> None:
    picture = np.full((32, 32, 3), 200, np.uint8)
    picture[8:24, 8:24] = (200, 60, 200)
    edges = controlnet.outline_pictures(picture[None])[0]
    assert set(np.unique(edges)) == {0, 255}
    assert edges[16, 6:10].any()
    assert not edges[12:20, 12:20].any()
    assert not edges[:4].any()


def test_the_lcm_lora_draws_without_guidance(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(monkeypatch, lcm, world, "--rank", "4")
    pipe = stock(world)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(out, weight_name=KOHYA_FILE)
    assert np.isfinite(draw(pipe, guidance_scale=1.0)).all()


def test_the_boundary_is_the_identity_at_time_zero() -> None:
    skip, out = lcm.boundary(torch.tensor([0, 999]))
    assert skip[0].item() == 1.0
    assert out[0].item() == 0.0
    assert out[1].item() == pytest.approx(1.0, abs=1e-6)


class Oracle(torch.nn.Module):
    """Knows the clean latent behind whatever it is shown."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.clean = clean
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.alphas = Noiser("cpu").alphas

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, **_: object) -> object:
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        goal = self.clean.repeat(len(noisy) // len(self.clean), 1, 1, 1)
        velocity = (alpha.sqrt() * noisy - goal) / (1 - alpha).sqrt()
        return type("Out", (), {"sample": velocity})()


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def oracle_distiller(world: Path, clean: torch.Tensor) -> tuple[lcm.Distiller, torch.Tensor]:
    """A distiller whose student and teacher are oracles, and some prompts' tokens."""
    parts = load_parts(world / "base", "cpu")
    oracle = Oracle(clean)
    object.__setattr__(parts, "unet", oracle)
    return lcm.Distiller(parts, oracle, (2.0, 4.0)), parts.tokens(["a cat"] * 4)


def test_a_perfect_student_has_no_loss(world: Path, clean: torch.Tensor) -> None:
    """Where every prediction is of the same clean latent, both ends of a teacher's walk agree."""
    distiller, tokens = oracle_distiller(world, clean)
    assert distiller.loss(clean, tokens).item() < 2e-3


def test_a_teacher_that_knows_the_picture_walks_straight_to_it(
    world: Path, clean: torch.Tensor
) -> None:
    """The noise stays, and grows smaller as the schedule says; at time 0 none is left."""
    distiller, tokens = oracle_distiller(world, clean)
    alphas, noise = Noiser("cpu").alphas, torch.randn_like(clean)
    start, end = torch.tensor([999, 499, 259, 19]), torch.tensor([759, 259, 19, 0])

    def mixed(at: torch.Tensor) -> torch.Tensor:
        alpha = torch.where(at > 0, alphas[at], 1.0).view(-1, 1, 1, 1)
        blend: torch.Tensor = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        return blend

    words = distiller._words(tokens)
    walked = distiller._walk(mixed(start), start, end, words)
    torch.testing.assert_close(walked, mixed(end), atol=1e-4, rtol=1e-4)
