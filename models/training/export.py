"""Write a trained run as a Diffusers folder: ``python -m models.training.export --work WORK --out
models/tintype``.

Takes the averaged weights of ``WORK/base.pt``, the autoencoder of ``WORK/vae`` and the tokenizer,
in half precision. The folder loads offline with ``DiffusionPipeline.from_pretrained``. The card
beside it (``README.md``) is written by hand and left alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.base import NOISE
from models.training.common import Ema, load_checkpoint, log


def assemble(work: Path, dtype: torch.dtype = torch.float16) -> StableDiffusionPipeline:
    """The pipeline with averaged weights."""
    state = load_checkpoint(work / "base.pt")
    if state is None:
        raise FileNotFoundError(f"no checkpoint {work / 'base.pt'}: run models.training.base first")
    unet = UNet2DConditionModel.from_config(json.loads(state["unet_config"]))
    text = CLIPTextModel.from_pretrained(work / "text_encoder")
    for module, average in ((unet, state["ema_unet"]), (text, state["ema_text"])):
        ema = Ema(module, 0.0)
        ema.load_state_dict(average)
        ema.copy_to(module)
    tuned = work / "vae-tuned"  # the same encoder with a better decoder, where there is one
    scheduler = DPMSolverMultistepScheduler(
        **NOISE, algorithm_type="dpmsolver++", timestep_spacing="trailing", steps_offset=1
    )
    log("assembled", step=state["step"], samples=state["samples"])
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(tuned if tuned.exists() else work / "vae").to(dtype),
        text_encoder=text.to(dtype),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet.to(dtype),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_slow_tokenizer(folder: Path) -> None:
    """Add ``vocab.json`` and ``merges.txt``, for readers other than recent Transformers."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = model["model"]["vocab"] | {
        token["content"]: token["id"] for token in model["added_tokens"]
    }
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in model["model"]["merges"]
    ]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )


def tidy_configs(folder: Path) -> None:
    """Drop ``_name_or_path``, and have the text encoder load in float32 like the other parts.

    Without the latter Transformers follows the stored half precision, Diffusers does not, and a
    pipeline that is loaded without a dtype mixes the two.
    """
    for path in folder.rglob("*.json"):
        if path.name in ("config.json", "model_index.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            if "dtype" in config:
                config["dtype"] = "float32"
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tintype")
    options = parser.parse_args()
    assemble(options.work).save_pretrained(options.out, safe_serialization=True)
    write_slow_tokenizer(options.out / "tokenizer")
    tidy_configs(options.out)
    for path in options.out.rglob("*.safetensors"):
        path.chmod(0o644)  # the writer makes them readable by their owner only
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    log(f"wrote {options.out}", megabytes=size / 1e6)


if __name__ == "__main__":
    main()
