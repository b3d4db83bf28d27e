"""The evaluator trains, writes what its reader reads, and judges by the truth of a scene."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.loupe import Attributes, Loupe
from models.loupe.network import LoupeConfig, LoupeNetwork, encode_words, words_of
from models.training import data, evaluator
from models.training.evaluator_data import Batches, augment, labels_of, sibling, truth
from models.training.measure import compare, frechet, near_duplicates, share_right
from models.training.styles import ALL_STYLES, NIGHT, WideAtlas, caption_without_style, restyle
from tests.models.tiny_base import write_icons

PAIR = data.Scene(("cat", "dog"), background="blue", relation="next to")
CONFIG = LoupeConfig(
    concepts=tuple(c.name for c in data.concepts()),
    styles=ALL_STYLES,
    backgrounds=tuple(data.BACKGROUNDS),
    places=tuple(data.PLACES),
    words=("a", "cat", "dog"),
    widths=(8, 8, 16),
    width=16,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("world")
    write_icons(work)
    return work


def small_loupe() -> Loupe:
    torch.manual_seed(0)
    return Loupe(LoupeNetwork(CONFIG))


def seen(scene: data.Scene) -> Attributes:
    """What a faultless judge says of a scene."""
    number = len(scene.objects) if len(scene.objects) > 1 else scene.count
    return Attributes(
        objects=scene.objects,
        count=number,
        relation=scene.relation,
        style=scene.style,
        background=scene.background,
        size=scene.size if number == 1 else None,
        place=scene.place if number == 1 else None,
        present=dict.fromkeys(scene.objects, 1.0),
    )


def test_it_trains_and_its_weights_read_back(
    world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ["--work", str(world), "--out", str(tmp_path), "--device", "cpu"]
    short = ["--smoke", "--batch", "8", "--held-out", "6", "--report", "2"]
    monkeypatch.setattr(sys, "argv", ["evaluator", *options, *short])
    evaluator.main()
    assert (tmp_path / "accuracy.json").exists()
    assert (tmp_path / "loupe.safetensors").stat().st_size < 5e6
    loupe = Loupe.load(tmp_path)
    picture = np.full((128, 128, 3), 255, np.uint8)
    assert -1.0 <= loupe.score(picture, "a cat on a blue background") <= 1.0
    assert loupe.attributes(Image.fromarray(picture)).objects[0] in loupe.config.concepts
    assert len((world / "loupe.jsonl").read_text().splitlines()) == 3


def test_it_begins_with_a_finished_evaluator_whose_words_were_others(tmp_path: Path) -> None:
    small_loupe().save(tmp_path)
    grown = LoupeNetwork(replace(CONFIG, words=("a", "bucket", "dog")))
    random = grown.text.words.weight[3].detach().clone()
    evaluator.start(grown, tmp_path)
    before, after = Loupe.load(tmp_path).state_dict(), grown.state_dict()
    rows = before.pop("text.words.weight"), after.pop("text.words.weight")
    assert torch.equal(rows[1][[0, 1, 2, 4]], rows[0][[0, 1, 2, 4]])  # padding, unknown, a, dog
    assert torch.equal(rows[1][3], random)
    assert all(torch.equal(before[name], after[name]) for name in before)

    other = LoupeNetwork(replace(CONFIG, concepts=CONFIG.concepts[1:]))
    with pytest.raises(ValueError, match="labels differ"):
        evaluator.start(other, tmp_path)


def test_a_picture_is_judged_alike_alone_and_in_a_batch(tmp_path: Path) -> None:
    small_loupe().save(tmp_path)
    loupe = Loupe.load(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (96, 128, 3)).astype(np.uint8) for _ in range(3)]
    together = loupe.features(pictures)
    np.testing.assert_allclose(loupe.features(pictures[:1])[0], together[0], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-4


def test_words_beyond_the_vocabulary_are_one() -> None:
    rows = encode_words(CONFIG, ["A cat, zebra!", "a cat quark", "a dog"])
    assert words_of("A cat, T-shirt!") == ["a", "cat", "t-shirt"]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_labels_leave_undefined_parts_out() -> None:
    single = data.Scene(("cat",), size="small", place="top")
    labels, present = labels_of([PAIR, single, replace(single, count=3, size="normal")], CONFIG)
    assert labels["count"].tolist() == [1, 0, 2]
    assert labels["size"].tolist() == [-100, 1, -100]
    assert labels["relation"].tolist() == [0, -100, -100]
    names = [CONFIG.concepts.index(n) for n in ("cat", "dog")]
    assert labels["first"].tolist() == [names[0]] * 3
    assert labels["second"].tolist() == [names[1], len(CONFIG.concepts), names[0]]
    assert present.sum(1).tolist() == [2, 1, 1]


def test_siblings_differ_and_are_never_hidden() -> None:
    rng = np.random.default_rng(5)
    scenes = [data.sample_scene(rng) for _ in range(300)]
    changed = [sibling(scene, rng) for scene in scenes]
    assert not any(data.is_hidden(scene) for scene in changed)
    differing = [truth(a) != truth(b) for a, b in zip(scenes, changed, strict=True)]
    assert np.mean(differing) > 0.7


def test_matching_targets_share_weight_between_equal_truths(world: Path) -> None:
    batch = Batches(WideAtlas(world), CONFIG, seed=1, device="cpu").next(16)
    torch.testing.assert_close(batch.same.sum(1), torch.ones(len(batch.same)))
    assert (batch.same.diagonal() > 0).all()
    assert batch.pictures.shape[0] == batch.words.shape[0] == batch.present.shape[0]


def test_augmentation_keeps_plain_backgrounds() -> None:
    pictures = torch.zeros(6, 3, 64, 64)
    changed = augment(pictures, np.random.default_rng(1))
    assert changed.shape == pictures.shape
    assert changed.mean().abs() < 0.06


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, set()),
        ({"objects": ("dog", "cat")}, {"order", "parts"}),
        ({"objects": ("cat", "bat")}, {"concept", "order", "parts"}),
        ({"relation": "above"}, {"relation", "parts"}),
        ({"background": "red"}, {"background", "parts"}),
        ({"style": "flat"}, {"style", "parts"}),
        ({"count": 3}, {"count", "parts"}),
    ],
)
def test_every_wrong_part_is_noticed(change: dict[str, Any], wrong: set[str]) -> None:
    right = compare(replace(seen(PAIR), **change), PAIR, CONFIG)
    assert {name for name, good in right.items() if not good} == wrong


def test_merged_concepts_count_as_one() -> None:
    config = replace(CONFIG, merged={"kitten": "cat"})
    assert compare(seen(PAIR), replace(PAIR, objects=("kitten", "dog")), config)["concept"]


def test_a_large_object_is_not_asked_for_its_place() -> None:
    scene = data.Scene(("cat",))
    right = compare(replace(seen(scene), place="left"), scene, CONFIG)
    assert right["parts"]
    assert not right["place"]


def test_shares_count_only_what_is_defined() -> None:
    assert share_right([{"a": True}, {"a": False, "b": True}]) == {"a": 0.5, "b": 1.0}


def test_frechet_distance_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20_000, 3))
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    # Means 2 apart in one direction, and deviations 1 and 3 in another: 4 + (3 - 1)^2.
    b = rng.normal(size=(20_000, 3)) * [1, 3, 1] + [2, 0, 0]
    assert frechet(a, b) == pytest.approx(8.0, rel=0.05)


def test_night_is_dark_and_unnamed_in_its_captions(world: Path) -> None:
    rng = np.random.default_rng(0)
    scene = restyle(data.Scene(("cat",)), NIGHT)
    picture = data.compose(scene, WideAtlas(world))
    assert picture[:4].mean() < 60
    texts = [caption_without_style(scene, rng) for _ in range(40)]
    assert not any(word in text for text in texts for word in ("night", "black", "noto"))


def test_near_duplicates_are_merged_into_the_earlier() -> None:
    drawn = np.random.default_rng(0).normal(size=(3, 5, 30)).astype(np.float32)
    drawn[:2, 3] = drawn[:2, 1]  # alike in two of three styles
    drawn[0, 4] = drawn[0, 2]  # alike in one
    assert near_duplicates(drawn, "abcde") == {"d": "b"}
