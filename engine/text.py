"""Prompts become conditioning, as Diffusers' ``encode_prompt`` makes it.

Stable Diffusion 1 and 2 take the last hidden state of one encoder; SDXL takes the penultimate
states of two, side by side, and the pooled vector of the second; ``clip_skip`` takes those of so
many layers earlier. Each prompt is encoded alone, in a batch of one: a picture must not depend on
who asked at the same moment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ExecutionError, InvalidRequestError
from engine.types import Conditioning

if TYPE_CHECKING:
    from engine.compile.manifest import ModelSpec, SegmentSpec, TextEncoderSpec
    from engine.runtime.base import Graph

DEFAULT_CACHE_BYTES = 64 * 2**20
DEFAULT_CACHE_ENTRIES = 256
"""What the bytes hold of SD 1.5's prompts. Of a small model they would hold thousands, each worth a
millisecond or two of encoding, and a worker would grow for hours until they are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """What one trajectory wants to be told by.

    Attributes:
        negative_prompt: None where guidance is off, and no second row is needed.
        width_px, height_px: of the picture; SDXL is told them.
        guidance: the scale; embedded for models that take it so, else without effect here.
        clip_skip: layers of the text encoders to leave out for the prompt, from the last one. As in
            Diffusers, the negative prompt is encoded with all of them.
    """

    prompt: str
    negative_prompt: str | None
    width_px: int
    height_px: int
    guidance: float = 1.0
    clip_skip: int = 0


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Conditioning, and what the encoders could not read of the texts.

    Attributes:
        dropped_tokens: tokens at the end of the prompt that did not fit and had no effect.
        negative_dropped_tokens: the same of the negative prompt.
    """

    conditioning: Conditioning
    dropped_tokens: int
    negative_dropped_tokens: int


class PromptEncoder:
    """Encodes prompts with the text encoders of one plan. Safe to call from several threads.

    Args:
        model: of the plan.
        specs: text encoders of the plan, in order.
        graphs: the same encoders, opened; the caller closes them.
        folder: of the plan; tokenizers are inside it.
        device: where the graphs take their inputs.
        cache_bytes: bound on the memory of remembered prompts; 0 remembers none.
        cache_entries: bound on their number.
    """

    def __init__(
        self,
        model: ModelSpec,
        specs: Sequence[TextEncoderSpec],
        graphs: Sequence[Graph],
        folder: Path,
        *,
        device: torch.device,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        cache_entries: int = DEFAULT_CACHE_ENTRIES,
    ) -> None:
        self._model = model
        self._encoders = [
            _Encoder(spec, graph, Tokenizer(folder / spec.tokenizer, spec.max_tokens), device)
            for spec, graph in zip(specs, graphs, strict=True)
        ]
        self._digest = "+".join(spec.segment.sha256 for spec in specs)
        self.cache = PromptCache(cache_bytes, cache_entries)

    def encode(self, requests: Sequence[TextRequest]) -> list[EncodedText]:
        """Conditioning for each request, on the CPU in float32.

        Raises:
            InvalidRequestError: a text is not valid Unicode, or ``clip_skip`` leaves no layer.
            ExecutionError: an encoder failed or gave NaN.
        """
        return [self._encode(request) for request in requests]

    def _encode(self, request: TextRequest) -> EncodedText:
        rows = [self._prompt(request.prompt, "prompt", request.clip_skip)]
        if request.negative_prompt is not None:
            if request.negative_prompt == "" and self._model.zero_empty_negative:
                rows.append(rows[0].zeros())
            else:
                rows.append(self._prompt(request.negative_prompt, "negative_prompt"))

        added: dict[str, torch.Tensor] = {}
        if self._model.addition_embed_type == "text_time":
            added["text_embeds"] = torch.stack([row.pooled for row in rows])
            size = (request.height_px, request.width_px)
            # original size, top left corner of the crop, target size
            added["time_ids"] = torch.tensor([[*size, 0, 0, *size]] * len(rows)).float()
        if self._model.guidance_embedding_size is not None:
            row = guidance_embedding(request.guidance, self._model.guidance_embedding_size)
            added["timestep_cond"] = row.expand(len(rows), -1).clone()
        return EncodedText(
            Conditioning(torch.stack([row.hidden for row in rows]), added),
            dropped_tokens=rows[0].dropped,
            negative_dropped_tokens=rows[1].dropped if len(rows) > 1 else 0,
        )

    def _prompt(self, prompt: str, field: str, clip_skip: int = 0) -> _Encoded:
        key = (f"{self._digest}-{clip_skip}", prompt)
        if (known := self.cache.get(key)) is not None:
            return known
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError(f"{field} is not valid Unicode", field=field) from None
        parts = [
            encoder.encode(prompt, self._model.text_conditioning, clip_skip)
            for encoder in self._encoders
        ]
        encoded = _Encoded(
            hidden=torch.cat([part.hidden for part in parts], dim=-1),
            pooled=parts[-1].pooled,
            dropped=max(part.dropped for part in parts),
        )
        self.cache.put(key, encoded)
        return encoded


def guidance_embedding(guidance: float, size: int) -> torch.Tensor:
    """Sines and cosines of w = guidance − 1, (1, size), for guidance-distilled UNets.

    Meng et al., "On Distillation of Guided Diffusion Models" (2023), as Diffusers'
    ``get_guidance_scale_embedding`` computes it in float32.
    """
    half = size // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    phases = torch.tensor(guidance - 1.0) * 1000.0 * frequencies
    waves = torch.cat([phases.sin(), phases.cos()])
    return torch.nn.functional.pad(waves, (0, size - 2 * half))[None]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One prompt: (tokens, width) hidden states, (width,) pooled vector, tokens left out."""

    hidden: torch.Tensor
    pooled: torch.Tensor
    dropped: int

    @property
    def size_bytes(self) -> int:
        return self.hidden.nbytes + self.pooled.nbytes

    def zeros(self) -> _Encoded:
        return _Encoded(torch.zeros_like(self.hidden), torch.zeros_like(self.pooled), 0)


class _Encoder:
    """One text encoder with its tokenizer."""

    def __init__(
        self, spec: TextEncoderSpec, graph: Graph, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self._graph = graph
        self._tokenizer = tokenizer
        self._device = device
        self._ids = next(i for i in spec.segment.inputs if not i.optional)
        self._segment = spec.segment
        self._states = {output.source for output in spec.segment.outputs}

    def encode(self, prompt: str, conditioning: str, clip_skip: int) -> _Encoded:
        state = _state_name(conditioning, clip_skip)
        if state not in self._states:
            most = max_clip_skip(self._segment)
            raise InvalidRequestError(
                f"clip_skip is {clip_skip}; {self._segment.name} allows 0 to {most}",
                field="clip_skip",
            )
        ids, dropped = self._tokenizer.encode(prompt)
        feed = ids.to(self._device, getattr(torch, self._ids.dtype))
        outputs = self._graph.run({self._ids.name: feed})
        # Cloned, so that a remembered prompt does not keep the whole output alive.
        hidden, pooled = (
            outputs[_output_name(self._segment, source)][0].float().cpu().clone()
            for source in (state, "pooled")
        )
        if not bool(torch.isfinite(hidden).all() & torch.isfinite(pooled).all()):
            raise ExecutionError(f"{self._segment.name}: gave NaN or infinite values for a prompt")
        return _Encoded(hidden, pooled, dropped)


def max_clip_skip(segment: SegmentSpec) -> int:
    """The largest ``clip_skip`` for which a text encoder's graph gives a state."""
    layers = sum(output.source.startswith("normed.") for output in segment.outputs)
    return layers - 1  # of SDXL, which begins a layer earlier, that is the token embeddings


def _state_name(conditioning: str, clip_skip: int) -> str:
    return f"hidden.-{clip_skip + 2}" if conditioning == "sdxl" else f"normed.-{clip_skip + 1}"


def _output_name(segment: SegmentSpec, source: str) -> str:
    return next(output.name for output in segment.outputs if output.source == source)


class Tokenizer:
    """A CLIP tokenizer that says how much it left out. Safe to call from several threads.

    Loading is put off to the first prompt: transformers takes seconds to import.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._folder = folder
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._loaded: Any = None

    def encode(self, prompt: str) -> tuple[torch.Tensor, int]:
        """(1, max_tokens) int64 ids, padded as the tokenizer says, and how many did not fit."""
        # The Rust tokenizer keeps truncation and padding as state: one call at a time.
        with self._lock:
            if self._loaded is None:
                from transformers import CLIPTokenizer

                self._loaded = CLIPTokenizer.from_pretrained(self._folder, local_files_only=True)
            length = min(self._max_tokens, int(min(self._loaded.model_max_length, 1e9)))
            kept = self._loaded(
                prompt, padding="max_length", max_length=length, truncation=True
            ).input_ids
            whole = self._loaded(prompt, padding=False, truncation=False, verbose=False).input_ids
        return torch.tensor([kept], dtype=torch.int64), max(0, len(whole) - length)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters of a :class:`PromptCache` since it was made, and what it holds now."""

    hits: int
    misses: int
    entries: int
    size_bytes: int


class PromptCache:
    """Least recently used prompts, bounded in bytes and in number.

    Entries are never written to after ``put``.
    """

    def __init__(self, max_bytes: int, max_entries: int = DEFAULT_CACHE_ENTRIES) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[str, str], _Encoded] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = self._size_bytes = 0

    def get(self, key: tuple[str, str]) -> _Encoded | None:
        """What was put under ``key``, counted as a hit or a miss."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self._misses += 1
                return None
            self._entries.move_to_end(key)
            self._hits += 1
            return found

    def put(self, key: tuple[str, str], value: _Encoded) -> None:
        """Remember ``value``, forgetting the least recently used until it fits."""
        size = _entry_bytes(key, value)
        if size > self._max_bytes:
            return
        with self._lock:
            if (old := self._entries.pop(key, None)) is not None:
                self._size_bytes -= _entry_bytes(key, old)
            self._entries[key] = value
            self._size_bytes += size
            while self._size_bytes > self._max_bytes or len(self._entries) > self._max_entries:
                evicted = self._entries.popitem(last=False)
                self._size_bytes -= _entry_bytes(*evicted)

    @property
    def stats(self) -> CacheStats:
        """Counters at this moment."""
        with self._lock:
            return CacheStats(self._hits, self._misses, len(self._entries), self._size_bytes)


def _entry_bytes(key: tuple[str, str], value: _Encoded) -> int:
    return value.size_bytes + 4 * len(key[1])
