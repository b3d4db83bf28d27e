"""Linears and 1x1 convolutions that add low-rank factors per batch row.

A row's adapter enters as ``down`` (rank, in) and ``up`` (out, rank), with its scale and alpha
folded into ``up``; rows of one batch may carry different adapters, stacked, and a row without one
carries zeros. This is LoRA (Hu et al., 2021) with the factors as inputs in place of weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.compile.manifest import AdapterSite, TensorSpec, dtype_name

_UNET_SITES = re.compile(
    r"\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))$"
)
_TEXT_SITES = re.compile(
    r"encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))$"
)


MARKER = "darkroom::LowRank"
"""A node (base(x), x) in a traced graph: where a site's product is to be added."""


class LowRank(nn.Module):
    """``base(x) + up @ (down @ x)``, row by row; exactly ``base(x)`` while ``factors`` is None.

    ``factors`` is (down, up) of shapes (batch or 1, rank, in) and (batch or 1, out, rank). It is
    set around one forward pass, by whoever holds the module for that pass. While ``marker`` is set
    the layer leaves a node of that name in a traced graph instead.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.factors: tuple[Tensor, Tensor] | None = None
        self.marker: str | None = None
        self.is_conv = isinstance(base, nn.Conv2d)
        self.out_features, self.in_features = base.weight.shape[:2]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, in) to (batch, tokens, out), or the same of images for a convolution."""
        y: Tensor = self.base(x)
        if self.marker is not None:
            return torch.onnx.ops.symbolic(
                MARKER, (y, x), {"site": self.marker}, dtype=y.dtype, shape=y.shape, version=1
            )
        if self.factors is None:
            return y
        down, up = self.factors
        if self.is_conv:
            return y + (up @ (down @ x.flatten(2))).view_as(y)
        return y + (x @ down.mT) @ up.mT


@dataclass(frozen=True, slots=True)
class Site:
    """A wrapped layer, under the path by which adapters name it."""

    module: str
    layer: LowRank

    @property
    def down_input(self) -> str:
        """Graph input of the (batch, rank, in) factor."""
        return f"lora.{self.module}.down"

    @property
    def up_input(self) -> str:
        """Graph input of the (batch, out, rank) factor."""
        return f"lora.{self.module}.up"

    def factors(self) -> tuple[TensorSpec, TensorSpec]:
        """Its two inputs, as a manifest lists them."""
        weight = self.layer.base.weight
        return tuple(
            TensorSpec(
                name=name, source=name, dtype=dtype_name(weight.dtype), shape=shape, optional=True
            )
            for name, shape in (
                (self.down_input, ("batch", "rank", self.layer.in_features)),
                (self.up_input, ("batch", self.layer.out_features, "rank")),
            )
        )  # type: ignore[return-value]

    def listed(self, segment: str) -> AdapterSite:
        """As a manifest lists it."""
        return AdapterSite(
            module=self.module,
            segment=segment,
            in_features=self.layer.in_features,
            out_features=self.layer.out_features,
            down_input=self.down_input,
            up_input=self.up_input,
        )


def wrap_unet(unet: nn.Module) -> tuple[Site, ...]:
    """Wrap the linears and 1x1 convolutions of every transformer block, in place."""
    return _wrap(unet, _UNET_SITES)


def wrap_text_encoder(encoder: nn.Module) -> tuple[Site, ...]:
    """Wrap the attention and feed-forward layers of a CLIP text encoder, in place.

    Adapters name them under ``text_model.``, which Transformers 5 dropped from the module tree of
    encoders without a projection.
    """
    return tuple(
        Site("text_model." + site.module.removeprefix("text_model."), site.layer)
        for site in _wrap(encoder, _TEXT_SITES)
    )


def _wrap(model: nn.Module, pattern: re.Pattern[str]) -> tuple[Site, ...]:
    sites = []
    for path, module in list(model.named_modules()):
        if pattern.search(path) is None:
            continue
        layer = module if isinstance(module, LowRank) else None
        if isinstance(module, nn.Linear | nn.Conv2d):
            layer = LowRank(module)
            model.set_submodule(path, layer)
        if layer is not None:
            sites.append(Site(path, layer))
    return tuple(sites)


@contextmanager
def using(sites: Sequence[Site], feeds: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``sites`` add the factors among ``feeds``; not for two threads on the same layers."""
    for site in sites:
        if site.down_input in feeds:
            site.layer.factors = feeds[site.down_input], feeds[site.up_input]
    try:
        yield
    finally:
        for site in sites:
            site.layer.factors = None


@contextmanager
def marking(sites: Sequence[Site]) -> Iterator[None]:
    """Let ``sites`` leave markers in graphs traced inside the block."""
    for site in sites:
        site.layer.marker = site.module
    try:
        yield
    finally:
        for site in sites:
            site.layer.marker = None
