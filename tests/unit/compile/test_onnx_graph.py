"""Writing ONNX graphs: what cannot be written is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from engine.compile.export import GraphSource
from engine.compile.manifest import TensorSpec
from engine.compile.onnx_graph import write_graphs
from engine.errors import UnsupportedError
from engine.runtime.onnxruntime import set_threads


class Attention(nn.Module):
    """Attention of a tensor to its own first key heads."""

    def __init__(self, *, key_heads: int = 4, **how: float) -> None:
        super().__init__()
        self.key_heads = key_heads
        self.how = how

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = feeds["x"]
        key = x[:, : self.key_heads]
        return {"y": scaled_dot_product_attention(x, key, key, **self.how)}  # type: ignore[arg-type]


def source_of(module: nn.Module) -> GraphSource:
    def spec(name: str) -> TensorSpec:
        return TensorSpec(name=name, source=name, dtype="float32", shape=("batch", 4, "tokens", 8))

    return GraphSource(
        name="down.1",
        module=module,
        inputs=(spec("x"),),
        outputs=(spec("y"),),
        examples={"x": torch.randn(2, 4, 7, 8)},
    )


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (Attention(is_causal=True), "is_causal=True"),
        (Attention(dropout_p=0.5), "dropout_p=0.5"),
        (Attention(key_heads=2, enable_gqa=True), "enable_gqa=True"),
    ],
)
def test_attention_that_no_graph_can_hold_is_refused_by_name(
    tmp_path: Path, module: Attention, named: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"down.1: attention with {named}.* allowed: no"):
        write_graphs(source_of(module), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_plain_attention_is_written_as_torch_computes_it(tmp_path: Path) -> None:
    module = Attention()
    write_graphs(source_of(module), tmp_path / "x.onnx")
    options = onnxruntime.SessionOptions()
    set_threads(options, 1)  # another test of this process may have made the shared pool
    session = onnxruntime.InferenceSession(
        tmp_path / "x.onnx", options, providers=["CPUExecutionProvider"]
    )
    x = torch.randn(3, 4, 11, 8)
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module({"x": x})["y"], rtol=1e-5, atol=1e-6)
