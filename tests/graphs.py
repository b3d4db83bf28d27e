"""Graphs that are plain torch functions, to test what calls a graph rather than a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from engine.checkpoint import Checkpoint
from engine.compile.manifest import SegmentSpec, TensorSpec, TextEncoderSpec
from engine.runtime.base import Graph


class FunctionGraph(Graph):
    """Runs ``function``, which takes the inputs in order and returns the outputs in order."""

    def __init__(self, spec: SegmentSpec, function: Callable[..., Sequence[torch.Tensor]]) -> None:
        super().__init__(spec)
        self.runs = 0
        self._function = function

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.runs += 1
        with torch.no_grad():
            outputs = self._function(*(feeds[i.name] for i in self.spec.inputs))
        return dict(zip((o.name for o in self.spec.outputs), outputs, strict=True))

    def close(self) -> None:
        pass


def segment(name: str, inputs: Mapping[str, Any], outputs: Sequence[str]) -> SegmentSpec:
    """A spec with inputs by name and type; output names differ from their sources on purpose."""
    return SegmentSpec(
        name=name,
        file="",
        sha256=f"sha-of-{name}",
        inputs=tuple(
            TensorSpec(name=n, source=n, dtype=dtype, shape=("batch",))
            for n, dtype in inputs.items()
        ),
        outputs=tuple(
            TensorSpec(name=f"{name}/{source}", source=source, dtype="float32", shape=("batch",))
            for source in outputs
        ),
    )


TEXT_STATES = ("normed.-1", "normed.-2", "hidden.-2", "hidden.-3", "pooled")


def text_graphs(checkpoint: Checkpoint) -> tuple[list[TextEncoderSpec], list[FunctionGraph]]:
    """Specs and graphs of a checkpoint's text encoders; tokenizers are relative to its folder."""
    specs, graphs = [], []
    modules = checkpoint.load_text_encoders()
    for i, (module, tokenizer) in enumerate(zip(modules, checkpoint.tokenizers, strict=True)):
        config: Any = module.config
        spec = TextEncoderSpec(
            segment=segment(f"text.{i}", {"input_ids": "int64"}, TEXT_STATES),
            tokenizer=tokenizer.name,
            max_tokens=config.max_position_embeddings,
            hidden_size=config.hidden_size,
        )

        def encode(ids: torch.Tensor, module: torch.nn.Module = module) -> list[torch.Tensor]:
            out = module(ids, output_hidden_states=True)
            pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
            norm: Any = getattr(module, "text_model", module).final_layer_norm
            states = out.hidden_states
            return [out.last_hidden_state, norm(states[-2]), states[-2], states[-3], pooled]

        specs.append(spec)
        graphs.append(FunctionGraph(spec.segment, encode))
    return specs, graphs
