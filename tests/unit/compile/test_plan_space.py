"""What plans take on the disk: who goes first, and who stays because somebody has it open."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.checkpoint import Checkpoint
from engine.compile.manifest import Tap
from engine.compile.plan import PlanStore
from engine.compile.plan_files import MANIFEST, MANIFEST_HASH
from engine.compile.plan_space import Lease, StoredPlan, choose, remove, stored
from engine.errors import PlanError
from server.cli import app
from server.settings import Settings

DAY_S = 86_400.0


def a_plan(digest: str, *, size: int = 100, used: float = 0.0, in_use: bool = False) -> StoredPlan:
    return StoredPlan(
        digest=digest,
        model="m",
        precision="fp32",
        backend="torch",
        size_bytes=size,
        used_at_s=used,
        in_use=in_use,
    )


def a_folder(root: Path, digest: str, *, size: int, used_at_s: float) -> Path:
    folder = root / digest
    folder.mkdir(parents=True)
    manifest = {"model": {"name": "m"}, "precision": "int8", "backend": "onnxruntime"}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "weights").write_bytes(bytes(size))
    (folder / MANIFEST_HASH).write_text("")
    os.utime(folder / MANIFEST_HASH, (used_at_s, used_at_s))
    return folder


def digests(plans: list[StoredPlan]) -> list[str]:
    return [plan.digest for plan in plans]


def test_the_least_recently_used_go_until_the_rest_fits() -> None:
    plans = [a_plan("new", used=3.0), a_plan("old", used=1.0), a_plan("middle", used=2.0)]
    assert digests(choose(plans, max_bytes=300)) == []
    assert digests(choose(plans, max_bytes=299)) == ["old"]
    assert digests(choose(plans, max_bytes=100)) == ["old", "middle"]
    assert digests(choose(plans, max_bytes=0)) == ["old", "middle", "new"]
    assert digests(choose(plans)) == []


def test_what_is_in_use_or_wanted_stays_whatever_the_bound() -> None:
    plans = [a_plan("busy", used=1.0, in_use=True), a_plan("mine", used=2.0), a_plan("x", used=3.0)]
    assert digests(choose(plans, max_bytes=0, keep=("mine",))) == ["x"]


def test_idle_plans_go_although_there_is_room() -> None:
    plans = [a_plan("idle", used=0.0), a_plan("fresh", used=9 * DAY_S)]
    assert digests(choose(plans, idle_s=7 * DAY_S, now_s=10 * DAY_S)) == ["idle"]


def test_what_folders_say_of_themselves(tmp_path: Path) -> None:
    old = a_folder(tmp_path, "aa", size=1000, used_at_s=50.0)
    new = a_folder(tmp_path, "bb", size=10, used_at_s=60.0)
    (timings := tmp_path / "aa.timings").mkdir()
    (timings / "cpu.json").write_bytes(bytes(500))
    (new / MANIFEST).write_text("no json")
    first, second = stored(tmp_path)
    assert (first.digest, first.model, first.precision) == ("aa", "m", "int8")
    assert first.size_bytes == 1500 + (old / MANIFEST).stat().st_size
    assert (first.used_at_s, first.in_use) == (50.0, False)
    assert (second.digest, second.model) == ("bb", "")


def test_removing_takes_the_measurements_along_and_leaves_others(tmp_path: Path) -> None:
    a_folder(tmp_path, "aa", size=1, used_at_s=1.0)
    (tmp_path / "aa.timings").mkdir()
    a_folder(tmp_path, "bb", size=1, used_at_s=1.0)
    assert remove(tmp_path, "aa")
    assert digests(stored(tmp_path)) == ["bb"]
    assert not remove(tmp_path, "aa")
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "bb"]


def test_a_plan_that_another_process_has_open_stays_until_it_dies(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, "aa", size=1, used_at_s=1.0)
    code = (
        "import sys, pathlib; from engine.compile.plan_space import Lease;"
        "lease = Lease(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        (plan,) = stored(tmp_path)
        assert plan.in_use
        assert plan.used_at_s > 1.0
        assert not remove(tmp_path, "aa")
        user.kill()
    assert remove(tmp_path, "aa")


def test_a_lease_needs_no_plan() -> None:
    Lease(Path("/nowhere"))


def test_a_store_makes_room_for_what_it_builds(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("sd15"))
    store = PlanStore(tmp_path, max_bytes=1)
    unused = store.build(checkpoint, backend="torch").digest
    tap = Tap(tensor="conv_in", direction="out")
    held = store.build(checkpoint, backend="torch", taps=(tap,))
    assert digests(store.stored()) == [held.digest]
    with pytest.raises(PlanError, match="no plans match"):
        store.open(unused)

    with caplog.at_level(logging.WARNING):
        last = store.build(checkpoint, backend="torch").digest
    assert {held.digest, last} == set(digests(store.stored()))
    assert "in use" in caplog.text
    del held
    gc.collect()
    assert [plan.in_use for plan in store.stored()] == [False, False]


def test_the_command_lists_and_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path, models=tmp_path, threads=1, plans_max_bytes=1500)
    monkeypatch.setattr(Settings, "from_environment", classmethod(lambda cls: settings))
    a_folder(settings.plans, "a" * 64, size=1000, used_at_s=50.0)
    busy = a_folder(settings.plans, "b" * 64, size=1000, used_at_s=60.0)
    lease = Lease(busy)
    run = CliRunner().invoke
    assert "in use" in (listed := run(app, ["plans"]).output)
    assert listed.index("aaaa") < listed.index("bbbb")
    assert "would be freed" in run(app, ["plans", "prune", "--dry-run"]).output
    assert len(stored(settings.plans)) == 2
    assert "aaaaaaaaaaaa" in run(app, ["plans", "prune"]).output
    assert digests(stored(settings.plans)) == ["b" * 64]
    assert "0.00 GB freed" in run(app, ["plans", "prune", "--max-gb", "0"]).output
    del lease
    assert "bbbb" in run(app, ["plans", "prune", "--idle-days", "0"]).output
    assert not stored(settings.plans)
