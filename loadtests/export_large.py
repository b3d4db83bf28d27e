"""A graph whose weights pass 2 GB, which is what one protobuf file can hold, exported and run.

    python -m loadtests.export_large [--layers 8] [--width 1280]

A UNet of SDXL's shapes (transformer layers 1280 wide, context 2048 wide) with random weights; its
largest segment is written, opened in ONNX Runtime, and held against the torch module. Twelve
gigabytes of memory and three of disk are enough for the defaults.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from engine.compile.export import GraphSource, export_unet
from engine.compile.onnx_graph import write_graphs
from engine.runtime.onnxruntime import OnnxGraph, OnnxRuntime
from loadtests.common import peak_memory_mb

TOLERANCE = 1e-4


def random_unet(width: int, layers: int) -> nn.Module:
    """Two levels, the lower one with transformers of ``layers`` layers.

    Weights are drawn once into memory that nothing was drawn into before: Diffusers' own
    initialisation of a billion of them takes minutes.
    """
    config: dict[str, Any] = {
        "block_out_channels": (width // 4, width),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, layers),
        "attention_head_dim": (5, width // 64),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(**config)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5, generator=generator)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return unet


def weight_bytes(source: GraphSource) -> int:
    """Bytes of the parameters of one segment."""
    return sum(parameter.nbytes for parameter in source.module.parameters())


def main() -> int:
    """Print what was written, and how far its result is from torch's; 1 if too far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1280)
    options = parser.parse_args()
    unet = random_unet(options.width, options.layers)
    total = sum(parameter.nbytes for parameter in unet.parameters())
    source = max(export_unet(unet), key=weight_bytes)
    print(
        f"UNet {total / 1e9:.2f} GB; {source.name} {weight_bytes(source) / 1e9:.2f} GB", flush=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.onnx"
        began_s = time.perf_counter()
        write_graphs(source, path)
        took_s = time.perf_counter() - began_s
        sizes = {file.name: file.stat().st_size for file in sorted(Path(scratch).iterdir())}
        for name, size in sizes.items():
            print(f"{name}: {size / 1e6:.1f} MB")
        print(
            f"written in {took_s:.0f} s, peak memory {peak_memory_mb() / 1000:.1f} GB", flush=True
        )
        with torch.no_grad():
            expected = source.module(source.examples)
        spec = source.segment(path.name, path.with_suffix(".adapters.onnx").name)
        graph = OnnxGraph(OnnxRuntime(threads=1), Path(scratch), spec)
        outputs = graph.run(source.examples)
        graph.close()
    worst = max(
        float((outputs[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items()
    )
    print(f"ONNX Runtime against torch: relative error {worst:.1e}, bound {TOLERANCE:g}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
