"""The ``darkroom`` command, as a person types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.compile.plan import Plan
from engine.png import read_parameters
from engine.runtime import Runtime, choices, open_runtime
from server.cli import main


@pytest.fixture
def darkroom(
    tiny_plan: Callable[[str], Plan],
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command on tiny checkpoints; returns exit status, output, and errors."""
    plan = tiny_plan("text")
    # The session's store is called "plans", as the command's own is.
    monkeypatch.setenv("DARKROOM_HOME", str(plan.folder.parent.parent))
    home = plan.folder.parent.parent / "plans"
    if not home.exists():
        home.symlink_to(plan.folder.parent)
    monkeypatch.setenv("DARKROOM_MODELS", str(tiny_checkpoint("text").parent))
    monkeypatch.setenv("DARKROOM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["darkroom", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


Command = Callable[..., tuple[int, str, str]]


def test_generate_writes_a_picture_that_carries_its_parameters(
    darkroom: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    words = ["generate", "a red umbrella", "-m", "tiny-text", "-o", str(out), "--steps", "3"]
    status, said, _ = darkroom(*words, "--seed", "7", "--solver", "dpmpp_2m", "--width", "48")
    assert status == 0
    assert "seed 7" in said
    with Image.open(out) as picture:
        assert picture.size == (48, 32)
    parameters = read_parameters(out)
    assert parameters is not None
    assert parameters.prompt == "a red umbrella"
    assert parameters.settings["Seed"] == "7"
    assert parameters.settings["Sampler"] == "DPM++ 2M"


def test_several_pictures_get_names_and_seeds_of_their_own(
    darkroom: Command, tmp_path: Path
) -> None:
    out = str(tmp_path / "a.webp")
    status, _, _ = darkroom(
        "generate", "cat", "-m", "tiny-text", "-o", out, "-n", "2", "--steps", "2", "--seed", "3"
    )
    assert status == 0
    seeds = []
    for i in (1, 2):
        parameters = read_parameters(tmp_path / f"a-{i}.webp")
        assert parameters is not None
        seeds.append(parameters.settings["Seed"])
    assert seeds == ["3", "4"]


def test_generate_starts_from_a_picture_under_a_mask(darkroom: Command, tmp_path: Path) -> None:
    photo, mask, out = (tmp_path / name for name in ("photo.png", "mask.png", "out.jpg"))
    Image.fromarray(np.full((32, 32, 3), 120, np.uint8)).save(photo)
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(mask)
    words = ["generate", "cat", "-m", "tiny-text", "-o", str(out), "--steps", "3"]
    status, _, _ = darkroom(*words, "--image", str(photo), "--mask", str(mask))
    assert status == 0
    assert out.exists()


def test_compile_says_where_the_plan_is_and_inspect_what_is_in_it(darkroom: Command) -> None:
    status, said, _ = darkroom("compile", "tiny-text")
    assert status == 0
    digest, folder = said.split()
    assert (Path(folder) / "plan.json").exists()
    status, said, _ = darkroom("inspect", digest[:12], "--json")
    assert status == 0
    assert json.loads(said)["digest"] == digest
    status, said, _ = darkroom("inspect", digest)
    assert "down.0" in said
    status, said, _ = darkroom("inspect", "tiny-text")
    assert json.loads(said)["name"] == "tiny-text"


def test_models_lists_what_is_there(darkroom: Command) -> None:
    status, said, _ = darkroom("models")
    assert status == 0
    assert "tiny-text" in said


def test_doctor_finds_this_machine_usable(darkroom: Command) -> None:
    status, said, _ = darkroom("doctor")
    assert status == 0
    assert "onnxruntime" in said
    assert "cores" in said
    assert "redis" in said


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("no model 'nothing'", ["generate", "cat", "-m", "nothing"]),
        ("unknown solver", ["generate", "cat", "-m", "tiny-text", "--solver", "magic"]),
        ("at most 150", ["generate", "cat", "-m", "tiny-text", "--steps", "10000"]),
        ("goes with tensorrt", ["compile", "tiny-text", "--gpu", "8.9"]),
        ("goes with int8", ["compile", "tiny-text", "--min-snr-db", "35"]),
        ("no runtime", ["generate", "cat", "-m", "tiny-text", "--backend", "abacus"]),
        ("cannot write", ["generate", "cat", "-m", "tiny-text", "-o", "x.gif", "--steps", "1"]),
        ("cannot be read as a picture", ["generate", "cat", "--image", "pyproject.toml"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    darkroom: Command, said: str, words: list[str]
) -> None:
    status, _, err = darkroom(*words)
    assert status == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "mps"), "allowed: cpu, cuda, cuda:N"),
        (("--backend", "torch", "--cuda-graphs"), "cuda_graphs needs device cuda"),
        (("--provider", "tensorrt"), "allowed on cpu: cpu"),
        (("--compile",), "compile goes with backend torch"),
        (("--backend", "tensorrt", "--device", "cpu"), "on cpu run onnxruntime and torch"),
    ],
)
def test_generate_refuses_what_does_not_go_together_before_any_work(
    darkroom: Command, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out.png"
    status, _, errors = darkroom("generate", "a cat", "-m", "nowhere", "-o", str(out), *words)
    assert status == 2
    assert said in errors


def test_generate_runs_where_and_how_it_is_told(
    darkroom: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    really = open_runtime

    def opened(name: str, **config: Any) -> Runtime:
        asked.append((name, config))
        return really("onnxruntime", threads=1)

    monkeypatch.setattr(choices, "open_runtime", opened)
    words = ["generate", "a cat", "-m", "tiny-text", "-o", str(tmp_path / "out.png")]
    assert darkroom(*words, "--steps", "1", "--device", "cpu")[0] == 0
    monkeypatch.setenv("DARKROOM_DEVICE", "cuda:1")
    assert darkroom(*words, "--steps", "1", "--provider", "tensorrt")[0] == 0
    here = {"device": "cpu", "threads": 1, "tensorrt": False}
    there = {"device": "cuda:1", "threads": 1, "tensorrt": True}
    assert asked == [("onnxruntime", here), ("onnxruntime", there)]
