"""Prompt encoding equals Diffusers' ``encode_prompt``, and its cache is exact and bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.errors import ExecutionError, InvalidRequestError
from engine.text import (
    EncodedText,
    PromptCache,
    PromptEncoder,
    TextRequest,
    Tokenizer,
    guidance_embedding,
)
from tests.graphs import FunctionGraph, text_graphs

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
LONG = "the red cat of the blue house and a green umbrella photo " * 3
PROMPTS = ["a red umbrella", "", LONG, "Ünïcödé 日本 🎨 <|endoftext|> it's 3:4"]


def encoder_of(path: Path, **options: Any) -> tuple[PromptEncoder, list[FunctionGraph], Checkpoint]:
    checkpoint = Checkpoint.open(path)
    specs, graphs = text_graphs(checkpoint)
    encoder = PromptEncoder(
        checkpoint.model_spec(), specs, graphs, checkpoint.path, device=CPU, **options
    )
    return encoder, graphs, checkpoint


def ask(prompt: str, negative: str | None = None, **options: Any) -> TextRequest:
    return TextRequest(
        **{
            "prompt": prompt,
            "negative_prompt": negative,
            "width_px": 48,
            "height_px": 32,
            **options,
        }
    )


def encode(encoder: PromptEncoder, prompt: str, negative: str | None = None) -> EncodedText:
    return encoder.encode([ask(prompt, negative)])[0]


@pytest.mark.parametrize("family", ["sd15", "sd21-v", "text"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_single_encoder_equals_diffusers(family: str, prompt: str, tiny_checkpoint: Tiny) -> None:
    from diffusers import DiffusionPipeline

    encoder, _, checkpoint = encoder_of(tiny_checkpoint(family))
    pipeline = DiffusionPipeline.from_pretrained(checkpoint.path)
    with torch.no_grad():
        expected = torch.cat(pipeline.encode_prompt(prompt, CPU, 1, True, "a blue dog"))
    conditioning = encode(encoder, prompt, "a blue dog").conditioning
    torch.testing.assert_close(conditioning.context, expected, rtol=0, atol=1e-6)
    assert conditioning.rows == 2
    assert not conditioning.added


@pytest.mark.parametrize("negative", ["a blue dog", ""])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_sdxl_equals_diffusers(prompt: str, negative: str, tiny_checkpoint: Tiny) -> None:
    from diffusers import DiffusionPipeline

    encoder, _, checkpoint = encoder_of(tiny_checkpoint("sdxl"))
    pipeline = DiffusionPipeline.from_pretrained(checkpoint.path)
    with torch.no_grad():
        # No negative prompt is None there, and "" here.
        embeds, negatives, pooled, negative_pooled = pipeline.encode_prompt(
            prompt, device=CPU, negative_prompt=negative or None
        )
        time_ids = pipeline._get_add_time_ids((32, 48), (0, 0), (32, 48), torch.float32, 24)
    conditioning = encode(encoder, prompt, negative).conditioning
    for ours, expected in (
        (conditioning.context, torch.cat([embeds, negatives])),
        (conditioning.added["text_embeds"], torch.cat([pooled, negative_pooled])),
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert torch.equal(conditioning.added["time_ids"], time_ids.repeat(2, 1))
    assert negatives.any() == bool(negative)


@pytest.mark.parametrize("family", ["sd15", "sd21-v"])
def test_clip_skip_equals_diffusers(family: str, tiny_checkpoint: Tiny) -> None:
    from diffusers import DiffusionPipeline

    encoder, _, checkpoint = encoder_of(tiny_checkpoint(family))
    pipeline = DiffusionPipeline.from_pretrained(checkpoint.path)
    # Diffusers asks for a module that Transformers 5 dropped; an attribute is no submodule.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    with torch.no_grad():
        expected = pipeline.encode_prompt("a red cat", CPU, 1, True, "a blue dog", clip_skip=1)
    skipped = encoder.encode([ask("a red cat", "a blue dog", clip_skip=1)])[0].conditioning.context
    torch.testing.assert_close(skipped, torch.cat(expected), rtol=0, atol=1e-6)
    whole = encode(encoder, "a red cat", "a blue dog").conditioning.context
    assert (whole[0] - skipped[0]).abs().max() > 1e-2
    assert torch.equal(whole[1], skipped[1])  # the negative prompt, as Diffusers has it


def test_clip_skip_equals_diffusers_for_sdxl(tiny_checkpoint: Tiny) -> None:
    from diffusers import DiffusionPipeline

    encoder, _, checkpoint = encoder_of(tiny_checkpoint("sdxl"))
    pipeline = DiffusionPipeline.from_pretrained(checkpoint.path)
    with torch.no_grad():
        embeds, negatives, *_ = pipeline.encode_prompt(
            "a red cat", device=CPU, negative_prompt="a blue dog", clip_skip=1
        )
    skipped = encoder.encode([ask("a red cat", "a blue dog", clip_skip=1)])[0].conditioning.context
    torch.testing.assert_close(skipped, torch.cat([embeds, negatives]), rtol=0, atol=1e-5)


def test_clip_skip_must_leave_a_layer(tiny_checkpoint: Tiny) -> None:
    encoder, _, _ = encoder_of(tiny_checkpoint("sd15"))
    with pytest.raises(InvalidRequestError, match=r"clip_skip is 2; text\.0 allows 0 to 1"):
        encoder.encode([ask("a cat", clip_skip=2)])


@pytest.mark.parametrize(("guidance", "size"), [(1.0, 16), (8.5, 256), (3.7, 15)])
def test_guidance_embedding_equals_diffusers(guidance: float, size: int) -> None:
    from diffusers import LatentConsistencyModelPipeline

    embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.tensor([guidance - 1]), embedding_dim=size)
    torch.testing.assert_close(guidance_embedding(guidance, size), expected, rtol=0, atol=0)


def test_embedded_guidance_is_given_per_row(tiny_checkpoint: Tiny) -> None:
    encoder, _, _ = encoder_of(tiny_checkpoint("lcm"))
    for guidance in (1.0, 8.5):
        added = encoder.encode([ask("a cat", guidance=guidance)])[0].conditioning.added
        assert torch.equal(added["timestep_cond"], guidance_embedding(guidance, 16))


def test_what_is_left_out_is_counted(tiny_checkpoint: Tiny) -> None:
    encoder, _, _ = encoder_of(tiny_checkpoint("sd15"))
    fits = "red " * 14  # 16 tokens with the first and last
    assert encode(encoder, fits).dropped_tokens == 0
    encoded = encode(encoder, fits + "cat dog", fits + "cat")
    assert (encoded.dropped_tokens, encoded.negative_dropped_tokens) == (2, 1)
    assert torch.equal(encoded.conditioning.context[0], encoded.conditioning.context[1])


def test_guidance_off_costs_one_row(tiny_checkpoint: Tiny) -> None:
    encoder, graphs, _ = encoder_of(tiny_checkpoint("sd15"))
    assert encode(encoder, "a cat").conditioning.rows == 1
    assert graphs[0].runs == 1


def test_a_prompt_is_encoded_once_and_does_not_depend_on_its_batch(tiny_checkpoint: Tiny) -> None:
    encoder, graphs, _ = encoder_of(tiny_checkpoint("sdxl"))
    together = encoder.encode([ask("a cat", "blur"), ask("a dog", "blur"), ask("a cat")])
    assert [graph.runs for graph in graphs] == [3, 3]
    assert (encoder.cache.stats.hits, encoder.cache.stats.misses) == (2, 3)
    alone = encode(encoder_of(tiny_checkpoint("sdxl"))[0], "a dog", "blur")
    assert torch.equal(together[1].conditioning.context, alone.conditioning.context)


def test_callers_cannot_spoil_the_cache(tiny_checkpoint: Tiny) -> None:
    encoder, _, _ = encoder_of(tiny_checkpoint("sd15"))
    first = encode(encoder, "a cat").conditioning.context
    copy = first.clone()
    first.zero_()
    assert torch.equal(encode(encoder, "a cat").conditioning.context, copy)


def test_cache_is_bounded_in_bytes_and_forgets_the_least_recently_used(
    tiny_checkpoint: Tiny,
) -> None:
    entry = 4 * (16 * 32 + 32) + 4  # hidden states, pooled vector, one letter
    encoder, graphs, _ = encoder_of(tiny_checkpoint("sd15"), cache_bytes=2 * entry)
    for prompt in "abacab":  # c puts b out, then b puts c out
        encode(encoder, prompt)
        assert encoder.cache.stats.size_bytes <= 2 * entry
    assert graphs[0].runs == 4
    assert encoder.cache.stats.entries == 2


def test_cache_is_bounded_in_number_too(tiny_checkpoint: Tiny) -> None:
    encoder, graphs, _ = encoder_of(tiny_checkpoint("sd15"), cache_entries=2)
    for prompt in "abacab":  # c puts b out, then b puts c out
        encode(encoder, prompt)
        assert encoder.cache.stats.entries <= 2
    assert graphs[0].runs == 4
    one = 4 * (16 * 32 + 32) + 4  # hidden states, pooled vector, one letter
    assert encoder.cache.stats.size_bytes == 2 * one


@pytest.mark.parametrize("cache_bytes", [0, 100])
def test_what_does_not_fit_is_not_kept(cache_bytes: int, tiny_checkpoint: Tiny) -> None:
    encoder, _, _ = encoder_of(tiny_checkpoint("sd15"), cache_bytes=cache_bytes)
    encode(encoder, "a cat")
    assert encoder.cache.stats.entries == encoder.cache.stats.size_bytes == 0


def test_many_threads_get_what_one_gets(tiny_checkpoint: Tiny) -> None:
    encoder, _, _ = encoder_of(tiny_checkpoint("sd15"), cache_bytes=8000)
    prompts = [f"cat {i}" for i in range(6)]
    expected = {p: encode(encoder, p).conditioning.context for p in prompts}
    wrong: list[str] = []

    def work(offset: int) -> None:
        for i in range(30):
            prompt = prompts[(i * offset) % len(prompts)]
            if not torch.equal(encode(encoder, prompt).conditioning.context, expected[prompt]):
                wrong.append(prompt)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert encoder.cache.stats.size_bytes <= 8000


def test_nan_of_an_encoder_is_an_error_and_not_remembered(tiny_checkpoint: Tiny) -> None:
    encoder, graphs, _ = encoder_of(tiny_checkpoint("sd15"))
    good = graphs[0]._function
    graphs[0]._function = lambda ids: [output * float("nan") for output in good(ids)]
    with pytest.raises(ExecutionError, match=r"text\.0"):
        encode(encoder, "a secret cat")
    graphs[0]._function = good
    assert torch.isfinite(encode(encoder, "a secret cat").conditioning.context).all()


def test_broken_unicode_is_refused(tiny_checkpoint: Tiny) -> None:
    encoder, _, _ = encoder_of(tiny_checkpoint("sd15"))
    with pytest.raises(InvalidRequestError, match="negative_prompt is not valid Unicode"):
        encode(encoder, "a cat", "\ud800")


def test_tokenizer_never_passes_the_encoders_bound(tiny_checkpoint: Tiny) -> None:
    tokenizer = Tokenizer(tiny_checkpoint("sd15") / "tokenizer", max_tokens=8)
    ids, dropped = tokenizer.encode("red " * 20)
    assert ids.shape == (1, 8)
    assert dropped == 22 - 8


def test_an_empty_cache_counts_from_zero() -> None:
    cache = PromptCache(10)
    assert cache.get(("digest", "a")) is None
    assert cache.stats.misses == 1
