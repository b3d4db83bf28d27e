"""``darkroom cache calibrate`` and ``replay``, from the prompt files to the measured profile."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cache.calibration import SHARES
from cache.profiles import FILE_NAME, read_profile, write_profile
from engine.compile.plan import Plan
from engine.ports import JumpTable, ReuseProfile, StateKind
from server.cli import main

MODEL = "tiny-text"
SUBJECTS = ("a red cat", "a blue dog", "the green house", "a photo of the umbrella")
SHORT = ("--steps", "10", "--solver", "ddim", "--pairs", "2", "--seeds", "2")
Pictures = list[np.ndarray[Any, np.dtype[np.uint8]]]


class Likes:
    """An evaluator to which all pictures are as good, and as different as their pixels are."""

    @classmethod
    def load(cls, folder: Path) -> Likes:
        assert folder.name == "loupe"
        return cls()

    def score(self, picture: np.ndarray[Any, Any], prompt: str) -> float:
        assert picture.shape == (32, 32, 3)
        assert prompt
        return 0.5

    def features(self, pictures: Pictures) -> np.ndarray[Any, np.dtype[np.float64]]:
        # Few of the pixels, so that the Fréchet distance's matrices stay small.
        return np.stack([picture[::8, ::8].reshape(-1) for picture in pictures]).astype(np.float64)


class DislikesHits(Likes):
    """One to which what is drawn later is worse: hits are drawn after pictures with all steps."""

    def __init__(self) -> None:
        self.scored = 0

    def score(self, picture: np.ndarray[Any, Any], prompt: str) -> float:
        self.scored += 1
        return super().score(picture, prompt) / self.scored


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder of models with the prompts of a small world."""
    root = tmp_path / "models"
    (root / "prompts").mkdir(parents=True)
    shutil.copytree(tiny_checkpoint("text"), root / MODEL)

    def item(prompt: str, background: str = "white") -> dict[str, Any]:
        scene = {"objects": [prompt], "style": "default", "background": background}
        return {"prompt": prompt, "scene": scene}

    seen = [item(subject) for subject in SUBJECTS]
    seen += [item(f"{s} on a {c} background", c) for s in SUBJECTS for c in ("red", "blue")]
    sessions = [
        {"steps": [item(s), item(f"{s} on a red background", "red"), item(f"{s}, flat style")]}
        for s in SUBJECTS
    ]
    (root / "prompts/seen.json").write_text(json.dumps(seen))
    (root / "prompts/editing.json").write_text(json.dumps(sessions))
    return root


@pytest.fixture
def darkroom(
    models: Path,
    tiny_plan: Callable[[str], Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Runs the command on the tiny world; returns exit status, output, and errors."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "plans").symlink_to(tiny_plan("text").folder.parent)
    monkeypatch.setenv("DARKROOM_HOME", str(home))
    monkeypatch.setenv("DARKROOM_MODELS", str(models))
    monkeypatch.setenv("DARKROOM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "240")
    judges = ModuleType("cache_cli_judges")
    vars(judges).update(Likes=Likes, DislikesHits=DislikesHits)
    monkeypatch.setitem(sys.modules, judges.__name__, judges)

    def run(*words: str, judge: type[Likes] = Likes) -> tuple[int, str, str]:
        named = f"{judges.__name__}:{judge.__name__}"
        arguments = ["darkroom", "cache", *words, "--model", MODEL, "--evaluator", named]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.mark.parametrize("kind", ["finished", "noisy"])
def test_calibrate_writes_the_profile_that_serving_reads(
    darkroom: Command, models: Path, kind: str
) -> None:
    status, said, errors = darkroom("calibrate", "--kind", kind, *SHORT, "--keep-diversity", "0")
    assert (status, errors) == (0, "")
    written = models / MODEL / FILE_NAME
    assert str(written) in said
    profile = read_profile(written)
    assert profile.kind is (StateKind.NOISY if kind == "noisy" else StateKind.CLEAN)
    # All pictures are equally good, and diversity was not asked for: every bin may jump furthest.
    assert profile.jumps.steps
    deepest = 0.5 if kind == "noisy" else 0.8  # no state is stored beyond
    assert profile.jumps.share(1.0) == max(share for _, share in profile.jumps.steps) == deepest
    measured = json.loads(written.read_text())["measured"]
    assert measured["steps"] == 10
    shares = {row["share"] for row in measured["quality"]}
    assert shares == {share for share in SHARES if share <= deepest}
    assert all(row["score"] == row["score_full"] == 0.5 for row in measured["quality"])
    assert all(row["agreement"] <= 1.0 for row in measured["quality"])
    # From another picture of the same prompt it is not what the seed would have drawn.
    last = {row["low"]: row for row in measured["quality"] if row["share"] == deepest}
    assert last[max(last)]["agreement"] < 1.0


def test_another_world_is_calibrated_on_its_own_prompts(
    darkroom: Command, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(models / "prompts")
    loaded, scored = [], set()

    def load(cls: type[Likes], folder: Path) -> Likes:
        loaded.append(folder)
        return cls()

    def score(self: Likes, picture: np.ndarray[Any, Any], prompt: str) -> float:
        scored.add(prompt)
        return 0.5

    monkeypatch.setattr(Likes, "load", classmethod(load))
    monkeypatch.setattr(Likes, "score", score)
    mine = {"a ship at sea", "a ship at night", "two ships", "a lighthouse"}
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["", *sorted(mine), "a ship at sea", "  "]))
    own = ("--prompts", str(file), "--evaluator-folder", str(tmp_path / "my-judge"))
    status, _, errors = darkroom("calibrate", *SHORT, "--keep-diversity", "0", *own)
    assert (status, errors) == (0, "")
    assert loaded == [tmp_path / "my-judge"]
    assert scored
    assert scored <= mine
    # Finished pictures are what is stored, unless another kind is asked for.
    profile = read_profile(models / MODEL / FILE_NAME)
    assert (profile.kind, profile.fractions) == (StateKind.CLEAN, (1.0,))
    status, said, errors = darkroom("replay", "--no-draw", "--steps", "10", *own)
    assert (status, errors) == (0, "")
    assert f"5 requests of {file}" in said
    assert saved_in(said) > 0


@pytest.mark.parametrize("text", [b"", b"\n \n", b"\xff\xfe", b"a\n" * 5001])
def test_a_file_without_prompts_is_refused(darkroom: Command, tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(text)
    status, _, errors = darkroom("replay", "--no-draw", "--prompts", str(file))
    assert status != 0
    assert str(file) in errors
    assert "one a line" in errors or "cannot be read as text" in errors


def test_what_scores_less_with_the_cache_gets_no_jump(darkroom: Command, models: Path) -> None:
    out = models / "elsewhere.json"
    status, said, _ = darkroom(
        "calibrate", "--kind", "finished", *SHORT, "--out", str(out), judge=DislikesHits
    )
    assert status == 0
    assert "no jump keeps so much" in said
    assert read_profile(out).jumps.steps == ()
    assert not (models / MODEL / FILE_NAME).exists()


def test_replay_draws_the_trace_with_the_profile_and_without(
    darkroom: Command, models: Path
) -> None:
    calibrated = ReuseProfile(
        jumps=JumpTable(((-1.0, 0.5),)), kind=StateKind.CLEAN, fractions=(1.0,)
    )
    path = models / "any.json"
    write_profile(path, calibrated, {})
    words = ("replay", "--profile", str(path), "--requests", "12", "--steps", "10")
    status, said, errors = darkroom(*words)
    assert (status, errors) == (0, "")
    assert "12 requests over" in said
    drawn = saved_in(said)
    # All but the first find something to start from, half of the way; eight are under way at once,
    # so that up to seven more may come before the first one's state is there.
    assert 5 / 120 <= drawn + 1e-3 <= 11 * 5 / 120 + 2e-3
    assert "at 1.0000 of the score" in said
    # The honest baseline: as few steps for everybody.
    assert f"{round(10 * (1 - drawn))} of 10 steps without the cache keep 1.0000" in said
    status, said, _ = darkroom(*words, "--no-draw")
    assert status == 0
    assert saved_in(said) == pytest.approx(11 * 5 / 120, abs=1e-3)


def test_replay_refuses_what_was_measured_on_other_weights(darkroom: Command, models: Path) -> None:
    write_profile(models / MODEL / FILE_NAME, ReuseProfile(checkpoint="0" * 64), {})
    status, _, errors = darkroom("replay", "--requests", "1", "--no-draw")
    assert status != 0
    assert "measured on other weights" in errors
    assert "darkroom cache calibrate" in errors


def saved_in(said: str) -> float:
    """The share of the steps that a replay says it saved."""
    words = said.split()
    return float(words[words.index("saved") + 1].rstrip("%")) / 100
