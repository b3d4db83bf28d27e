"""Every stage that makes the base model runs, resumes, and ends in a folder that stock Diffusers
draws with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from models.training import base, captions, data, export, icons, latents, text, vae
from tests.models.tiny_base import write_icons

pytestmark = pytest.mark.filterwarnings("ignore")


def stage(monkeypatch: pytest.MonkeyPatch, module: ModuleType, work: Path, *options: str) -> None:
    """Run a stage's command line."""
    monkeypatch.setattr(sys, "argv", [module.__name__, "--work", str(work), *options])
    module.main()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_icons(tmp_path)
    np.save(tmp_path / "icons" / "extra.npy", np.full((11, 32, 32, 4), 200, dtype=np.uint8))
    return tmp_path


def test_from_artwork_to_a_stock_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--device", "cpu", "--smoke", "--batch", "4")
    widths = ("--widths", "8", "8", "8", "16")
    stage(monkeypatch, vae, work, *small, *widths, "--held-out", "1")
    stage(monkeypatch, latents, work, "--device", "cpu", "--scenes", "30", "--captions", "300")
    stage(monkeypatch, text, work, *small, "--width", "32", "--layers", "1")
    unet = (*small, "--sync", "1", "--decay", "1", "--widths", "16", "32", "32")
    for resumed in ((), (), ("--extend",)):  # the last from the state that the first one kept
        stage(monkeypatch, base, work, *unet, *resumed)
    points = [json.loads(line) for line in (work / "base.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [1, 2, 3, 4, 2, 3]
    assert all(np.isfinite(point["loss"]) for point in points)

    tuned = ("--decoder-only", "--name", "vae-tuned", "--held-out", "1")
    stage(monkeypatch, vae, work, *small, *tuned)
    before, after = (AutoencoderKL.from_pretrained(work / name) for name in ("vae", "vae-tuned"))
    grey = torch.zeros(1, 3, 64, 64)
    codes = before.encode(grey).latent_dist.mode()
    assert torch.equal(codes, after.encode(grey).latent_dist.mode())
    assert not torch.equal(before.decode(codes).sample, after.decode(codes).sample)

    out = work / "folder"
    stage(monkeypatch, export, work, "--out", str(out))
    assert str(work) not in "".join(path.read_text() for path in out.rglob("*.json"))
    pipeline = DiffusionPipeline.from_pretrained(out, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a cat", num_inference_steps=2, height=128, width=128).images[0]
    assert picture.size == data.NATIVE

    (work / "base.pt").unlink()  # a run that begins with the folder, and learns nothing
    stage(monkeypatch, base, work, *unet, "--start-from", str(out), "--rate", "0")
    stage(monkeypatch, export, work, "--out", str(work / "again"))
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        first, second = (load_file(f / f"{part}.safetensors") for f in (out, work / "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_folding_makes_unit_latents_and_keeps_pictures() -> None:
    torch.manual_seed(0)
    model = vae.build(4, (8, 8, 8, 16)).eval()
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = model.decode(model.encode(pictures).latent_dist.mode()).sample
        vae.fold_statistics(model, pictures)
        codes = model.encode(pictures).latent_dist.mode()
        after = model.decode(codes).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(codes.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(codes.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)


def test_a_scene_draws_the_same_picture_twice(work: Path) -> None:
    rng = np.random.default_rng(0)
    for canvas in data.CANVASES:
        scene = data.sample_scene(rng, canvas)
        again = data.scene_from_dict(json.loads(json.dumps(scene.as_dict())))
        picture = data.compose(scene, data.Atlas(work))
        assert picture.shape == (canvas[1], canvas[0], 3)
        assert np.array_equal(picture, data.compose(again, data.Atlas(work)))


def test_training_scenes_are_never_hidden_and_the_hidden_split_has_every_kind() -> None:
    rng = np.random.default_rng(1)
    assert not any(data.is_hidden(data.sample_scene(rng)) for _ in range(300))
    hidden = [data.sample_scene(rng, hidden=True) for _ in range(300)]
    assert any(len(scene.objects) == 2 for scene in hidden)
    assert any(scene.count > 1 for scene in hidden)
    assert any(scene.background != "white" and scene.count == 1 for scene in hidden)


def test_captions_name_the_subject_and_fit_the_text_encoder() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = data.sample_scene(rng)
        words = data.caption(scene, rng)
        assert words == words.lower()
        assert len(words.split()) < text.LENGTH - 8
        if scene.background != "white":
            assert scene.background in words


def test_a_plural_is_read_even_where_every_number_of_it_is_hidden() -> None:
    names = [concept.name for concept in data.concepts() if captions.countable(concept.name)]
    scenes = {n: [data.Scene(objects=(n,), count=count) for count in (2, 3)] for n in names}
    never_counted = [n for n, two in scenes.items() if all(map(data.is_hidden, two))]
    assert never_counted
    rng = np.random.default_rng(3)
    for name in never_counted:
        single = data.Scene(objects=(name,))
        assert any(captions.plural(name) in data.caption(single, rng) for _ in range(200))


def test_the_committed_prompts_are_the_ones_that_the_script_makes(tmp_path: Path) -> None:
    from models.training import prompts

    prompts.write(tmp_path)
    committed = Path(prompts.__file__).parent.parent / "prompts"
    for path in tmp_path.iterdir():
        assert path.read_text() == (committed / path.name).read_text()
    unseen = json.loads((committed / "unseen.json").read_text())
    assert all(data.is_hidden(data.scene_from_dict(item["scene"])) for item in unseen)
    seen = json.loads((committed / "seen.json").read_text())
    assert not any(data.is_hidden(data.scene_from_dict(item["scene"])) for item in seen)


def test_npm_packages_become_the_artwork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(icons, "SIDE", 16)
    slugs = [concept.icon for concept in icons.concepts()]
    body = '<path d="M0 0h16v16H0z" fill="#00f"/>'
    for name in icons.STYLES.values():
        folder = tmp_path / "node_modules" / "@iconify-json" / name
        folder.mkdir(parents=True)
        drawn = {slug: {"body": body} for slug in (*slugs, "stranger")}
        (folder / "icons.json").write_text(json.dumps({"icons": drawn}))
        (folder / "chars.json").write_text(json.dumps({"1f97f": "stranger"}))
    packages = ("--packages", str(tmp_path / "node_modules"))
    stage(monkeypatch, icons, tmp_path, *packages)
    atlas = data.Atlas(tmp_path)
    assert tuple(atlas.icon("glossy", len(slugs) - 1)[8, 8]) == (0, 0, 255, 255)
    assert len(atlas.extra()) == 2

    (tmp_path / "icons" / "twemoji.npy").unlink()
    lacking = tmp_path / "node_modules" / "@iconify-json" / "twemoji" / "icons.json"
    lacking.write_text(json.dumps({"icons": {}}))
    with pytest.raises(KeyError, match="twemoji has no icons named"):
        stage(monkeypatch, icons, tmp_path, *packages)


def test_an_icon_is_rendered_with_premultiplied_alpha() -> None:
    body = '<circle cx="8" cy="8" r="4" fill="#f00" fill-opacity="0.5"/>'
    picture = icons.render(body, 16, 16)
    assert picture.shape == (icons.SIDE, icons.SIDE, 4)
    assert tuple(picture[128, 128]) in {(127, 0, 0, 127), (128, 0, 0, 128)}
    assert not picture[0, 0].any()
