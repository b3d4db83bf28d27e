"""Whole plans of TensorRT engines, built ahead of time for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip(
    "tensorrt_rtx_bindings",
    reason="tensorrt_rtx is not installed: pip install 'darkroom[tensorrt]'",
    exc_type=ImportError,
)

from engine.checkpoint import Checkpoint
from engine.compile.build import Ingredients
from engine.compile.plan import PlanStore
from engine.compile.tensorrt_profile import EngineTarget, Range
from engine.errors import BackendUnavailableError, UnsupportedError


def target_of(checkpoint: Checkpoint, precision: str) -> EngineTarget:
    tokens = max(
        part.config.integer("max_position_embeddings") for part in checkpoint.text_encoders
    )
    return EngineTarget.choose(
        checkpoint.model_spec(), max_tokens=tokens, precision=precision, capability="8.9"
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "precision"), [("sd15", "fp32"), ("sdxl", "fp16"), ("text", "bf16"), ("lcm", "fp16")]
)
def test_a_whole_plan_is_engines_only(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, family: str, precision: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    check_plan(checkpoint, tmp_path, precision)


@pytest.mark.full
def test_the_default_models_plan_is_engines_only(default_model: Path, tmp_path: Path) -> None:
    check_plan(Checkpoint.open(default_model), tmp_path, "fp16")


def check_plan(checkpoint: Checkpoint, root: Path, precision: str) -> None:
    """Build a plan for the GPUs of the tests, and hold its files against its manifest."""
    chosen = target_of(checkpoint, precision)

    plan = PlanStore(root).build(checkpoint, backend="tensorrt", precision=precision, target=chosen)

    manifest = plan.manifest
    assert EngineTarget.model_validate(manifest.target) == chosen
    segments = [*manifest.unet, *(text.segment for text in manifest.text_encoders)]
    segments += [s for s in (manifest.vae_decoder, manifest.vae_encoder) if s is not None]
    expected = {file for s in segments for file in (s.file, s.adapters_file) if file is not None}
    assert {file for file in manifest.files if file.startswith("engines/")} == expected
    assert not [file for file in manifest.files if file.endswith((".onnx", ".weights"))]
    for segment in segments:
        engine = (plan.folder / segment.file).read_bytes()
        for spec in (*segment.inputs, *segment.outputs):
            assert spec.name.encode() in engine
        if segment.adapters_file is not None:
            engine = (plan.folder / segment.adapters_file).read_bytes()
            assert all(factor.name.encode() in engine for factor in segment.factors)


def test_what_engines_are_built_for_is_in_the_digest(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("sd15"))
    first = target_of(checkpoint, "fp32")
    wider = first.unet.model_copy(update={"batch": Range.of(1, 8, 64)})
    targets = [
        first,
        first.model_copy(update={"capability": "12.0"}),
        first.model_copy(update={"version": "1.8"}),
        first.model_copy(update={"unet": wider}),
    ]

    def digest(chosen: EngineTarget, precision: str = "fp32") -> str:
        return Ingredients.of(
            checkpoint,
            backend="tensorrt",
            precision=precision,
            cuts=None,
            taps=(),
            recipe={},
            target=chosen,
        ).digest

    digests = {*map(digest, targets), digest(first, "fp16")}
    assert len(digests) == len(targets) + 1
    assert digest(first) in digests


def test_turing_has_no_bf16(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("sd15"))

    with pytest.raises(UnsupportedError, match=r"no bf16 on compute capability 7\.5 \(RTX 20"):
        EngineTarget.choose(
            checkpoint.model_spec(), max_tokens=16, precision="bf16", capability="7.5"
        )


def test_without_a_gpu_the_target_must_be_named(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checkpoint = Checkpoint.open(tiny_checkpoint("sd15"))

    with pytest.raises(BackendUnavailableError, match="name a compute capability"):
        EngineTarget.choose(checkpoint.model_spec(), max_tokens=16, precision="fp32")


def test_only_engines_have_a_target(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("sd15"))

    with pytest.raises(UnsupportedError, match="onnxruntime plans run everywhere"):
        PlanStore(tmp_path).build(checkpoint, target=target_of(checkpoint, "fp32"))
