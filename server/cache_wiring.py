"""What measuring the noise cache needs: an open model, an evaluator, prompts of its world."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache.calibration import Pair, choose_pairs
from cache.distances import FloatArray
from cache.traces import Arrival, TraceConfig, Vocabulary, make_trace
from engine.errors import InvalidRequestError
from server.settings import Settings

if TYPE_CHECKING:
    from engine.model import Model

MAX_PROMPTS = 5000
"""Of a file of one's own: every prompt is compared with every other."""
_GAP_S = 30.0


def vocabulary(settings: Settings) -> Vocabulary:
    """The words of the default model's world, from the prompts that ship with it."""
    scenes = [
        item["scene"] for item in json.loads((settings.models / "prompts/seen.json").read_text())
    ]
    prompts = [item["prompt"] for item in _seen(settings)]
    plain = [
        prompt
        for prompt, scene in zip(prompts, scenes, strict=True)
        if scene["background"] == "white" and scene["style"] == "default"
    ]
    backgrounds = sorted({scene["background"] for scene in scenes} - {"white"})
    return Vocabulary(tuple(dict.fromkeys(plain)), tuple(backgrounds), ("flat", "glossy"))


class Judge:
    """An evaluator as a calibration takes it."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def score(self, pictures: Sequence[Any], prompts: Sequence[str]) -> FloatArray:
        """How well each picture fits its prompt."""
        pairs = zip(pictures, prompts, strict=True)
        return np.asarray([self._loaded.score(picture, prompt) for picture, prompt in pairs])

    def features(self, pictures: Sequence[Any]) -> FloatArray:
        """(pictures, width)."""
        return np.asarray(self._loaded.features(list(pictures)), dtype=np.float64)


def evaluator(named: str, settings: Settings, folder: Path | None = None) -> Judge:
    """The evaluator ``module:class``, loaded from ``folder``, else the models folder's ``loupe``.

    Raises:
        InvalidRequestError: it cannot be imported.
    """
    module, _, name = named.partition(":")
    beside = str(settings.models.parent)  # the bundled one is a package of the models folder
    if beside not in sys.path:
        sys.path.append(beside)
    try:
        loader = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidRequestError(
            f"the evaluator {named!r} cannot be imported; name one as module:class that Python"
            " finds (PYTHONPATH)",
            field="evaluator",
        ) from error
    return Judge(loader.load(folder or settings.models / "loupe"))


def prompts_in(file: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        InvalidRequestError: it cannot be read as UTF-8, or holds none, or too many.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"{file} cannot be read as text: {type(error).__name__}", field="prompts"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidRequestError(
            f"{file} holds {len(prompts)} prompts; 1 to {MAX_PROMPTS} are allowed, one a line",
            field="prompts",
        )
    return prompts


def trace_of(settings: Settings, file: Path | None, config: TraceConfig) -> list[Arrival]:
    """A synthetic trace of the default model's world; of a file, its first prompts as they come.

    A file says nothing of times: its prompts are 30 s apart, and all of one session.
    """
    if file is None:
        return make_trace(vocabulary(settings), config)
    prompts = prompts_in(file)[: config.requests]
    return [Arrival(_GAP_S * i, 0, prompt) for i, prompt in enumerate(prompts)]


def pairs_of_world(
    settings: Settings, model: Model, per_bin: int, own: Path | None = None
) -> list[Pair]:
    """Pairs of prompts over all similarities.

    Args:
        own: a file of prompts; else the default model's editing sessions and plain prompts.
    """
    from server.cache_replay import embed_prompts

    prompts = list(dict.fromkeys(_prompts_of_world(settings) if own is None else prompts_in(own)))
    embeddings = embed_prompts([Arrival(0.0, 0, prompt) for prompt in prompts], model)
    vectors = np.stack([embeddings[prompt] for prompt in prompts])
    return choose_pairs(prompts, vectors, per_bin=per_bin)


def _prompts_of_world(settings: Settings) -> list[str]:
    sessions = json.loads((settings.models / "prompts/editing.json").read_text())
    edited = [step["prompt"] for session in sessions for step in session["steps"]]
    return [*edited, *(item["prompt"] for item in _seen(settings))]


def _seen(settings: Settings) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((settings.models / "prompts/seen.json").read_text())
    return content


def model_folder(settings: Settings, model: str) -> Path:
    """A model's folder, by name or as a path.

    Raises:
        InvalidRequestError: there is none.
    """
    for folder in (Path(model), settings.models / model):
        if (folder / "model_index.json").exists():
            return folder
    raise InvalidRequestError(f"no model {model!r} in {settings.models}", field="model")


@contextmanager
def opened_model(settings: Settings, model: str, precision: str) -> Iterator[Model]:
    """A model on ONNX Runtime, its plan built first where it is not there; closed afterwards."""
    from engine.checkpoint import Checkpoint
    from engine.compile.plan import PlanStore
    from engine.model import Model as OpenModel
    from engine.runtime import open_runtime

    checkpoint = Checkpoint.open(model_folder(settings, model))
    plan = PlanStore(settings.plans).build(checkpoint, precision=precision)
    runtime = open_runtime("onnxruntime", threads=settings.threads)
    try:
        opened = OpenModel.open(plan, runtime)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        runtime.close()
