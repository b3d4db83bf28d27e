"""The plan store: addressed by what went in, verified, atomic, built once. On torch plans."""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Checkpoint
from engine.compile import build as build_module
from engine.compile.build import Ingredients
from engine.compile.manifest import PlanManifest, Tap
from engine.compile.plan import Plan, PlanStore, Progress
from engine.compile.plan_files import MANIFEST
from engine.errors import PlanCorruptError, PlanError, PlanStorageError, UnsupportedError


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint("sd15"))


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


@pytest.fixture
def plan(store: PlanStore, checkpoint: Checkpoint) -> Plan:
    return store.build(checkpoint, backend="torch")


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.glob(".building-*")]


def test_a_plan_stands_alone(plan: Plan, store: PlanStore) -> None:
    assert plan.folder.name == plan.digest == store.digests()[0]
    assert (plan.folder / "tokenizer" / "tokenizer_config.json").is_file()
    listed = {*plan.manifest.files, MANIFEST, "plan.sha256"}
    present = {p.relative_to(plan.folder).as_posix() for p in plan.folder.rglob("*") if p.is_file()}
    assert listed == present
    assert store.open(plan.digest[:8]).manifest == plan.manifest
    assert store.open(plan.folder).manifest == plan.manifest
    assert not leftovers(plan.folder.parent)
    assert plan.timings_folder.parent == plan.folder.parent


def test_it_is_built_once(store: PlanStore, plan: Plan, checkpoint: Checkpoint) -> None:
    stages: list[str] = []
    again = store.build(
        checkpoint, backend="torch", progress=lambda stage, *_: stages.append(stage)
    )
    assert again == plan
    assert not stages


def test_progress_is_told(store: PlanStore, checkpoint: Checkpoint) -> None:
    stages: list[str] = []
    store.build(checkpoint, backend="torch", progress=lambda stage, *_: stages.append(stage))
    assert stages[0] == "reading the checkpoint"


def test_the_digest_covers_what_went_in(
    checkpoint: Checkpoint,
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def digest(of: Checkpoint = checkpoint, **changes: object) -> str:
        given: dict[str, object] = {
            "backend": "torch",
            "precision": "fp32",
            "cuts": None,
            "taps": (),
            "recipe": {},
        }
        return Ingredients.of(of, **{**given, **changes}).digest  # type: ignore[arg-type]

    variants = [
        digest(),
        digest(Checkpoint.open(tiny_checkpoint("lcm"))),
        digest(backend="onnxruntime"),
        digest(precision="fp16"),
        digest(cuts=()),
        digest(taps=(Tap(tensor="conv_in", direction="out"),)),
        digest(backend="onnxruntime", precision="int8", recipe={"bits": 8}),
        digest(backend="onnxruntime", precision="int8", recipe={"bits": 7}),
    ]
    assert digest() == variants[0]
    monkeypatch.setattr(build_module, "version", lambda package: f"0.0 of {package}")
    variants.append(digest())
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "abacus"}, "there are: onnxruntime, torch"),
        ({"backend": "torch", "precision": "int8"}, "it has: fp32, fp16, bf16"),
        ({"precision": "bf16"}, "it has: fp32, fp16, int8"),
    ],
)
def test_what_cannot_be_built_is_refused(
    store: PlanStore, checkpoint: Checkpoint, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        store.build(checkpoint, **options)  # type: ignore[arg-type]
    assert not store.digests()


def test_unknown_plans_are_named(store: PlanStore, plan: Plan) -> None:
    with pytest.raises(PlanError, match="no plans match"):
        store.open("f" * 64 if not plan.digest.startswith("f") else "0" * 64)


@pytest.mark.parametrize("how", ["changed", "truncated", "removed"])
def test_any_damaged_file_is_found(store: PlanStore, plan: Plan, how: str) -> None:
    for name in (*plan.manifest.files, MANIFEST, "plan.sha256"):
        path = plan.folder / name
        whole = path.read_bytes()
        path.unlink()  # a torn file, not the checkpoint that it may be a link to
        if how != "removed":
            damaged = whole[:-1] + bytes([whole[-1] ^ 1]) if how == "changed" else whole[:-1]
            path.write_bytes(damaged)
        with pytest.raises(PlanError, match=r"build .*again|is missing|no plans"):
            store.open(plan.digest)
        path.write_bytes(whole)
    assert store.open(plan.digest) == plan


def test_a_damaged_plan_is_built_again(
    store: PlanStore, plan: Plan, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    (plan.folder / "tokenizer" / "tokenizer_config.json").unlink()
    assert store.build(checkpoint, backend="torch").manifest == plan.manifest
    assert "building again" in caplog.text


def test_a_plan_of_another_format_is_refused(store: PlanStore, plan: Plan) -> None:
    import hashlib

    manifest = json.loads((plan.folder / MANIFEST).read_text())
    text = json.dumps({**manifest, "format": 999})
    (plan.folder / MANIFEST).write_text(text)
    (plan.folder / "plan.sha256").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    with pytest.raises(PlanError, match="format 999"):
        store.open(plan.folder)


class _Mark:
    """A transform that leaves a file, or fails."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.error = error
        self.recipe: dict[str, object] = {"mark": 1}

    def __call__(
        self, folder: Path, manifest: PlanManifest, checkpoint: Checkpoint, progress: Progress
    ) -> PlanManifest:
        progress("marking", 0, 1)
        (folder / "mark").write_text(checkpoint.name)
        if self.error is not None:
            raise self.error
        return manifest


@pytest.fixture
def quick_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph files that hold their name, so that storage can be tested without an export."""
    from engine.compile import onnx_graph

    monkeypatch.setattr(
        onnx_graph,
        "write_graphs",
        lambda source, path, **_: (path.parent.mkdir(exist_ok=True), path.write_text(source.name)),
    )


@pytest.mark.usefixtures("quick_graphs")
def test_a_transform_is_part_of_the_plan(store: PlanStore, checkpoint: Checkpoint) -> None:
    plan = store.build(checkpoint, precision="int8", transform=_Mark())
    assert plan.manifest.files["mark"]
    assert plan.manifest.recipe == {"mark": 1}
    assert plan.manifest.unet[0].sha256 == plan.manifest.files["graphs/context.onnx"]


@pytest.mark.usefixtures("quick_graphs")
def test_a_failed_build_leaves_nothing(store: PlanStore, checkpoint: Checkpoint) -> None:
    with pytest.raises(ZeroDivisionError):
        store.build(checkpoint, precision="int8", transform=_Mark(error=ZeroDivisionError()))
    assert not store.digests()
    store.build(checkpoint, precision="int8", transform=_Mark())


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Let the system refuse to write more, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("quick_graphs")
def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, store: PlanStore, checkpoint: Checkpoint
) -> None:
    with files_of_at_most(2000), pytest.raises(PlanStorageError, match="free some space"):
        store.build(checkpoint)
    assert not leftovers(tmp_path / "plans")
    assert not store.digests()
    assert store.build(checkpoint).manifest.files


def test_a_folder_that_cannot_be_is_named(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PlanStorageError, match="choose another folder"):
        PlanStore(tmp_path / "file").build(checkpoint, backend="torch")


def test_leftovers_of_dead_builders_go(
    tmp_path: Path, store: PlanStore, checkpoint: Checkpoint
) -> None:
    root = tmp_path / "plans"
    digest = "d" * 64
    (root / f".building-{digest}").mkdir(parents=True)
    (root / f".building-{digest}" / "half").write_text("a plan")
    with store._alone(digest):  # that builder lives
        store.build(checkpoint, backend="torch")
        assert leftovers(root) == [f".building-{digest}"]
    store.build(checkpoint, backend="torch", precision="fp16")
    assert not leftovers(root)


def test_threads_that_ask_at_once_build_once(store: PlanStore, checkpoint: Checkpoint) -> None:
    stages: list[str] = []
    plans: list[Plan] = []

    def ask() -> None:
        plans.append(
            store.build(checkpoint, backend="torch", progress=lambda s, *_: stages.append(s))
        )

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 3
    assert stages.count("copying the checkpoint") == 1


def test_processes_that_ask_at_once_build_once(
    tmp_path: Path, store: PlanStore, checkpoint: Checkpoint
) -> None:
    context = multiprocessing.get_context("fork")
    gate, said = context.Barrier(2), context.SimpleQueue()
    children = [
        context.Process(target=_race, args=(tmp_path / "plans", checkpoint, gate, said))
        for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    (first, one), (second, other) = said.get(), said.get()
    assert first == second == store.digests()[0]
    assert sorted([one, other]) == [0, 1]  # one built, the other waited and found it
    assert not leftovers(tmp_path / "plans")


def _race(root: Path, checkpoint: Checkpoint, gate: Any, said: Any) -> None:
    stages: list[str] = []
    gate.wait(60)
    plan = PlanStore(root).build(
        checkpoint, backend="torch", progress=lambda stage, *_: stages.append(stage)
    )
    said.put((plan.digest, stages.count("copying the checkpoint")))


def test_a_builder_that_is_killed_leaves_no_plan(
    tmp_path: Path, store: PlanStore, checkpoint: Checkpoint
) -> None:
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_build_and_die, args=(tmp_path / "plans", checkpoint))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert leftovers(tmp_path / "plans")
    assert not store.digests()
    assert store.build(checkpoint, backend="torch").manifest.files
    assert not leftovers(tmp_path / "plans")


def _build_and_die(root: Path, checkpoint: Checkpoint) -> None:
    import os

    def die(stage: str, _done: int, _total: int) -> None:
        if stage == "copying the checkpoint":
            os.kill(os.getpid(), signal.SIGKILL)

    PlanStore(root).build(checkpoint, backend="torch", progress=die)


def test_checkpoint_files_are_linked_where_they_can_be(plan: Plan, checkpoint: Checkpoint) -> None:
    weights = "unet/diffusion_pytorch_model.safetensors"
    linked, original = plan.folder / "checkpoint" / weights, checkpoint.path / weights
    assert linked.stat().st_ino == original.stat().st_ino


def test_a_moved_plan_opens(store: PlanStore, plan: Plan, tmp_path: Path) -> None:
    moved = shutil.copytree(plan.folder, tmp_path / "elsewhere")
    assert store.open(moved).manifest == plan.manifest


def test_a_corrupt_manifest_is_a_corrupt_plan(store: PlanStore, plan: Plan) -> None:
    (plan.folder / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(PlanCorruptError, match="cannot be read"):
        store.open(plan.folder)
