"""Benchmark prompts are drawn from their own seeds, survive an interruption, and end in tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from models.loupe import Loupe
from models.loupe.network import LoupeConfig, LoupeNetwork
from models.training import controlnet, data, drawing, evaluate, sheets, tables
from models.training.adapters import load_parts
from models.training.styles import ALL_STYLES
from tests.models.tiny_base import write_base, write_icons

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with artwork, and a tiny base model, ControlNet and evaluator, untrained."""
    folder = tmp_path_factory.mktemp("models")
    write_icons(folder)
    write_base(folder / "tintype")
    torch.manual_seed(0)
    config = LoupeConfig(
        concepts=tuple(c.name for c in data.concepts()),
        styles=ALL_STYLES,
        backgrounds=tuple(data.BACKGROUNDS),
        places=tuple(data.PLACES),
        words=("a", "happy", "face"),
        widths=(8, 8, 16),
        width=16,
    )
    Loupe(LoupeNetwork(config)).save(folder / "loupe")
    control = controlnet.build(load_parts(folder / "tintype", "cpu"))
    control.save_pretrained(folder / "controlnet-outline")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, stage: ModuleType, models: Path, *options: str) -> None:
    arguments = ["stage", "--work", str(models), "--models", str(models), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    stage.main()


def test_prompts_become_pictures_and_figures(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw = ["--variant", "steps-20", "outline", "outline-wordless", "--smoke", "--device", "cpu"]
    run(monkeypatch, drawing, models, *draw)
    path = drawing.chunk_path(models, "steps-20", 0)
    first = path.stat().st_mtime_ns
    run(monkeypatch, drawing, models, *draw)  # nothing left to draw
    assert path.stat().st_mtime_ns == first

    run(monkeypatch, evaluate, models, "--out", str(tmp_path), "--time-runs", "1")
    report = json.loads((tmp_path / "evaluation.json").read_text())
    figures = report["variants"]["steps-20"]
    assert figures["pictures"] == 2
    assert 0.0 <= figures["drawn"]["seen"]["concept"] <= 1.0
    assert figures["frechet"] > 0
    assert report["outlines"]["pictures"] == 2
    assert 0.0 <= report["outlines"]["wordless_others"] <= 1.0
    assert report["seconds"]["steps-20"] > 0
    page = (tmp_path / "EVALUATION.md").read_text()
    assert "| real | seen | 2 |" in page


def test_a_picture_comes_from_its_own_seed(models: Path) -> None:
    variant = drawing.Variant(steps=2)
    pipe = drawing.open_pipeline(models, variant, "cpu")
    items = [drawing.Item("a cat", seed, data.Scene(("cat",)), "seen") for seed in (1, 2)]
    both = drawing.draw(pipe, items, variant).astype(int)
    alone = drawing.draw(pipe, items[1:], variant).astype(int)
    assert np.abs(both[1] - alone[0]).max() <= 1
    assert np.abs(both[0] - both[1]).max() > 1


def test_edges_agree_with_themselves_and_not_with_others() -> None:
    picture = np.full((1, 64, 64, 3), 255, np.uint8)
    picture[:, 20:40, 20:40] = 0
    asked = controlnet.outline_pictures(picture)
    assert evaluate.outline_agreement(picture, asked) == pytest.approx(1.0)
    assert evaluate.outline_agreement(np.roll(picture, 12, axis=2), asked) < 0.8
    assert evaluate.outline_agreement(np.full_like(picture, 9), asked) == 0.0


def test_only_the_generated_part_of_a_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    tables.write_page(page, "one")
    page.write_text(page.read_text() + "by hand\n")
    tables.write_page(page, "two")
    text = page.read_text()
    assert "two" in text
    assert "one" not in text
    assert text.endswith("by hand\n")


def test_every_benchmark_set_is_drawn_by_the_main_variants() -> None:
    items = drawing.benchmark(drawing.VARIANTS["steps-20"])
    groups = {evaluate.group_of(item) for item in items}
    assert groups == set(evaluate.GROUPS)
    assert {i.scene.objects[0] for i in items if i.source == "seen"} == {
        c.name for c in data.concepts()
    }


def test_sheets_put_words_under_pictures(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dict.fromkeys(drawing.VARIANTS, drawing.Variant(steps=1))
    monkeypatch.setattr(sheets, "VARIANTS", short)
    monkeypatch.setattr(sheets, "COMPOSITIONS", ("a cat", "two dogs", "an owl"))
    sheet = sheets.compositions_sheet(models, models, "cpu")
    assert sheet.size == (6 * 132, 128 + sheets.CAPTION_PX + 4)
    words = np.asarray(sheet)[129:145, :132]
    assert words.min() < 128
    wide = sheets.Cell(Image.new("RGB", (128, 128)), "a very long caption " * 9)
    assert sheets.assemble([wide] * 2, 2).width == 264
