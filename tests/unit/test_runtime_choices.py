"""What a person may choose of a runtime reaches its constructor; what does not go is refused."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import BackendUnavailableError, InvalidRequestError, UnsupportedError
from engine.runtime import choices as module
from engine.runtime.choices import RuntimeChoices


@pytest.mark.parametrize(
    ("choices", "given"),
    [
        ({}, {"device": "cpu", "tensorrt": False}),
        ({"device": "cuda"}, {"device": "cuda", "tensorrt": False}),
        ({"device": "cuda:1", "provider": "cuda"}, {"device": "cuda:1", "tensorrt": False}),
        ({"device": "cuda", "provider": "tensorrt"}, {"device": "cuda", "tensorrt": True}),
        ({"backend": "torch"}, {"device": "cpu", "compile": False, "cuda_graphs": False}),
        (
            {"backend": "torch", "compile": True},
            {"device": "cpu", "compile": True, "cuda_graphs": False},
        ),
        (
            {"backend": "torch", "device": "cuda"},
            {"device": "cuda", "compile": False, "cuda_graphs": False},
        ),
        (
            {"backend": "torch", "device": "cuda", "cuda_graphs": True},
            {"device": "cuda", "compile": False, "cuda_graphs": True},
        ),
        (
            {"backend": "torch", "device": "cuda:2", "compile": True, "cuda_graphs": False},
            {"device": "cuda:2", "compile": True, "cuda_graphs": False},
        ),
        ({"backend": "tensorrt"}, {"device": "cuda"}),
        ({"backend": "tensorrt", "cuda_graphs": True}, {"device": "cuda"}),
        ({"backend": "tensorrt", "cuda_graphs": False}, {"device": "cuda", "recordings": 0}),
    ],
)
def test_the_constructor_gets_what_was_chosen_and_the_devices_default(
    monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any], given: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {}

    def opened(name: str, **config: Any) -> None:
        asked.update(config, name=name)

    monkeypatch.setattr(module, "open_runtime", opened)
    RuntimeChoices(**choices).open(threads=3)
    assert asked == {"name": choices.get("backend", "onnxruntime"), "threads": 3, **given}


@pytest.mark.parametrize(
    ("choices", "field", "said"),
    [
        ({"device": "mps"}, "device", "'mps'; allowed: cpu, cuda, cuda:N"),
        ({"device": "cuda:x"}, "device", "allowed: cpu, cuda, cuda:N"),
        ({"backend": "tensorrt", "device": "cpu"}, "device", "on cpu run onnxruntime and torch"),
        ({"compile": True}, "compile", "goes with backend torch, not onnxruntime"),
        ({"backend": "tensorrt", "compile": True}, "compile", "goes with backend torch"),
        ({"cuda_graphs": True, "device": "cuda"}, "cuda_graphs", "torch or tensorrt, not onnx"),
        (
            {"backend": "torch", "cuda_graphs": True},
            "cuda_graphs",
            "needs device cuda; on cpu leave it out",
        ),
        ({"backend": "torch", "provider": "cpu"}, "provider", "goes with backend onnxruntime"),
        ({"provider": "tensorrt"}, "provider", "'tensorrt'; allowed on cpu: cpu"),
        ({"provider": "cpu", "device": "cuda"}, "provider", "allowed on cuda: cuda, tensorrt"),
        ({"provider": "rocm", "device": "cuda:0"}, "provider", "allowed on cuda: cuda, tensorrt"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(
    choices: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said) as refused:
        RuntimeChoices(**choices)
    assert refused.value.field == field


def test_what_is_switched_off_goes_with_everything() -> None:
    for backend in ("onnxruntime", "torch"):
        RuntimeChoices(backend=backend, compile=False, cuda_graphs=False)


def test_what_is_not_here_is_told_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="there are: onnxruntime"):
        RuntimeChoices(backend="magic").open(threads=1)
    with pytest.raises(BackendUnavailableError, match="no CUDA device"):
        RuntimeChoices(backend="torch", device="cuda").open(threads=1)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match="no TensorrtExecutionProvider"):
        RuntimeChoices(device="cuda", provider="tensorrt").open(threads=1)


def test_choices_that_run_alike_are_equal() -> None:
    """Models that run alike share a runtime: the choices are its key."""
    assert len({RuntimeChoices(device="cpu"), RuntimeChoices(device="cpu", compile=None)}) == 1
