"""Cross-attention in two halves: what depends on the prompt alone, and what every step repeats.

The keys and values of a text are the same at every step of a picture. ``split`` takes them out of
a Diffusers transformer: one module projects them for all of its layers, and a twin of the
transformer attends to them. The twin shares every layer; the transformer itself is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from engine.errors import UnsupportedError

_ABSENT = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
"""Layers that Diffusers' attention may have, and that of no served UNet has."""


def split(transformer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The projections of a transformer's cross-attentions, and the transformer without them.

    Returns:
        A module from context (batch, tokens, context width) to the keys and values of every layer
        side by side (batch, tokens, sum of widths), and a twin of ``transformer`` that takes
        these as its ``encoder_hidden_states``.

    Raises:
        UnsupportedError: naming a kind of transformer or attention that is not reproduced.
    """
    if not isinstance(transformer, Transformer2DModel):
        raise UnsupportedError(f"attention of {type(transformer).__name__} is not supported")
    projections: list[nn.Module] = []
    begins = 0

    def without_projections(attention: Any) -> nn.Module:
        nonlocal begins
        _refuse_unknown(attention)
        result = _CrossAttention(attention, begins)
        projections.extend([attention.to_k, attention.to_v])
        begins = result.ends
        return result

    blocks = []
    for block in cast(nn.ModuleList, transformer.transformer_blocks):
        names = ("attn1", "attn2") if block.only_cross_attention else ("attn2",)
        parts = {name: without_projections(getattr(block, name)) for name in names}
        blocks.append(_twin(block, **parts))
    twin = _twin(transformer, transformer_blocks=nn.ModuleList(blocks))
    return _Projections(projections), twin


def _twin(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """A module like ``module`` and with its very layers, but with some of its own."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **parts}
    return twin


def _refuse_unknown(attention: Any) -> None:
    """Whatever makes Diffusers compute anything else than :class:`_CrossAttention` does."""
    if attention is None:
        raise UnsupportedError("a transformer without cross-attention is not supported")
    if type(attention.processor) is not AttnProcessor2_0:
        kind = type(attention.processor).__name__
        raise UnsupportedError(f"cross-attention by {kind} is not supported: AttnProcessor2_0 is")
    for name in _ABSENT:
        if getattr(attention, name) is not None:
            raise UnsupportedError(f"cross-attention with {name} is not supported")
    if attention.residual_connection or attention.rescale_output_factor != 1:
        raise UnsupportedError("cross-attention with a residual or a scale is not supported")


class _Projections(nn.Module):
    """Keys and values of every layer of one transformer, side by side."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, context: Tensor) -> Tensor:
        return torch.cat([layer(context) for layer in self.layers], dim=-1)


class _CrossAttention(nn.Module):
    """Attention to keys and values that lie at ``begins`` to ``ends`` of what it is given.

    The operations of Diffusers' ``AttnProcessor2_0`` after its projections, in their order. As
    there, ``upcast_attention`` is ignored, and the scale is that of the head's width.
    """

    def __init__(self, attention: Any, begins: int) -> None:
        super().__init__()
        self.to_q, self.to_out = attention.to_q, attention.to_out
        self.heads = int(attention.heads)
        self.width = int(attention.to_k.out_features)
        self.begins, self.ends = begins, begins + 2 * self.width

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,  # noqa: ARG002 - Diffusers' block passes it on; none is served
    ) -> Tensor:
        batch = hidden_states.shape[0]

        def by_head(tensor: Tensor) -> Tensor:
            heads = tensor.view(batch, -1, self.heads, self.width // self.heads)
            return heads.transpose(1, 2)

        middle = self.begins + self.width
        hidden: Tensor = nn.functional.scaled_dot_product_attention(
            by_head(self.to_q(hidden_states)),
            by_head(encoder_hidden_states[..., self.begins : middle]),
            by_head(encoder_hidden_states[..., middle : self.ends]),
            dropout_p=0.0,
            is_causal=False,
        )
        hidden = hidden.transpose(1, 2).reshape(batch, -1, self.width)
        for layer in self.to_out:  # a linear, and a dropout that does nothing in eval mode
            hidden = layer(hidden)
        return hidden
