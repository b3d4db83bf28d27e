"""Checkpoints: what is served loads as Diffusers loads it; all else is refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from engine.checkpoint import Checkpoint
from engine.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedError,
)
from tests.tiny import FAMILIES

Tiny = Callable[[str], Path]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint: Tiny, tmp_path: Path) -> Tiny:
    """A private copy of a tiny checkpoint, to be spoilt."""

    def copy_of(family: str) -> Path:
        return shutil.copytree(tiny_checkpoint(family), tmp_path / family)

    return copy_of


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ------------------------------------------------------------------------------ what is served


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_those_of_diffusers(family: str, tiny_checkpoint: Tiny) -> None:
    from diffusers import DiffusionPipeline

    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    pipeline = DiffusionPipeline.from_pretrained(checkpoint.path)
    pairs = [(checkpoint.load_unet(), pipeline.unet), (checkpoint.load_vae(), pipeline.vae)]
    theirs = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    pairs += zip(checkpoint.load_text_encoders(), filter(None, theirs), strict=True)
    for our_module, their_module in pairs:
        assert type(our_module) is type(their_module)
        assert not our_module.training
        ours, expected = our_module.state_dict(), their_module.state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
        assert not any(t.is_meta for t in (*our_module.parameters(), *our_module.buffers()))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd15", ("sd1", "epsilon", 4, None, None, 7.5, "clip")),
        ("sd21-v", ("sd2", "v_prediction", 4, None, None, 7.5, "clip")),
        ("sdxl", ("sdxl", "epsilon", 4, "text_time", None, 5.0, "sdxl")),
        ("lcm", ("sd1", "epsilon", 4, None, 16, 8.5, "clip")),
        ("inpaint9", ("sd1", "epsilon", 9, None, None, 7.5, "clip")),
        ("text", ("custom", "v_prediction", 4, "text", None, 4.0, "clip")),
    ],
)
def test_spec_tells_the_families_apart(
    family: str, expected: tuple[object, ...], tiny_checkpoint: Tiny
) -> None:
    spec = Checkpoint.open(tiny_checkpoint(family)).model_spec()
    assert expected == (
        spec.family,
        spec.prediction_type,
        spec.in_channels,
        spec.addition_embed_type,
        spec.guidance_embedding_size,
        spec.guidance_default,
        spec.text_conditioning,
    )
    assert spec.zero_empty_negative == (family == "sdxl")
    assert spec.latent.factor_px == 4
    assert spec.latent.size_multiple_px == 8
    assert spec.latent.native_px == 32


@pytest.mark.parametrize(
    ("scheduler", "guidance"),
    [
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, 1.0),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, 1.0),
        ({"_class_name": "LCMScheduler"}, 1.0),
        ({"_class_name": "TCDScheduler"}, 1.0),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, 5.0),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
            },
            5.0,
        ),
    ],
    ids=["sdxl-turbo", "lightning", "lcm", "tcd", "sdxl", "zero-snr-v"],
)
def test_distilled_checkpoints_default_to_no_guidance(
    scheduler: dict[str, Any], guidance: float, copy: Tiny
) -> None:
    folder = copy("sdxl")
    edit(folder / "scheduler/scheduler_config.json", **scheduler)
    assert Checkpoint.open(folder).model_spec().guidance_default == guidance


def test_half_precision_variant_loads_as_float32(copy: Tiny) -> None:
    folder = copy("sd15")
    halves = {k: v.half() for k, v in safetensors.torch.load_file(folder / UNET).items()}
    (folder / UNET).unlink()
    safetensors.torch.save_file(halves, folder / UNET.replace("model.", "model.fp16."))
    state = Checkpoint.open(folder).load_unet().state_dict()
    assert all(torch.equal(state[name], halves[name].float()) for name in halves)


def shard(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    """Split the weights in ``folder`` into two files and an index; returns the index."""
    tensors = safetensors.torch.load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    files = [f"{stem}-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    names = sorted(tensors)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        safetensors.torch.save_file(part, folder / file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_weights_load_whole(copy: Tiny, tiny_checkpoint: Tiny) -> None:
    folder = copy("sd15")
    shard(folder / "unet")
    shard(folder / "text_encoder", "model")
    split = Checkpoint.open(folder)
    whole = Checkpoint.open(tiny_checkpoint("sd15"))
    for ours, expected in (
        (split.load_unet(), whole.load_unet()),
        (split.load_text_encoders()[0], whole.load_text_encoders()[0]),
    ):
        state = expected.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in ours.state_dict().items())


def test_names_of_older_files_are_read(copy: Tiny, tiny_checkpoint: Tiny) -> None:
    """Stable Diffusion 1.5's own text encoder has a prefix and saved its position numbers."""
    folder = copy("sd15")
    file = folder / "text_encoder/model.safetensors"
    old = {f"text_model.{k}": v for k, v in safetensors.torch.load_file(file).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    safetensors.torch.save_file(old, file)
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.torch.load_file(file)
    for new_name, old_name in renames.items():
        tensors = {k.replace(f".{new_name}.", f".{old_name}."): v for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, file)
    ours, expected = Checkpoint.open(folder), Checkpoint.open(tiny_checkpoint("sd15"))
    vae = expected.load_vae().state_dict()
    assert all(torch.equal(t, vae[k]) for k, t in ours.load_vae().state_dict().items())
    ids = torch.arange(16)[None]
    with torch.no_grad():
        states = [c.load_text_encoders()[0](ids)[0] for c in (ours, expected)]
    assert torch.equal(*states)


def test_fingerprint_is_of_the_content(copy: Tiny, tiny_checkpoint: Tiny) -> None:
    original = Checkpoint.open(tiny_checkpoint("sd15"))
    folder = copy("sd15")
    edit(folder / "unet/config.json", _name_or_path="elsewhere", _diffusers_version="9")
    assert Checkpoint.open(folder).fingerprint == original.fingerprint

    edit(folder / "scheduler/scheduler_config.json", beta_end=0.013)
    changed_config = Checkpoint.open(folder).fingerprint
    tensors = safetensors.torch.load_file(folder / UNET)
    tensors["conv_out.bias"] += 1e-3
    safetensors.torch.save_file(tensors, folder / UNET)
    changed_weight = Checkpoint.open(folder).fingerprint
    assert len({original.fingerprint, changed_config, changed_weight}) == 3


def test_name_is_an_id(copy: Tiny, tmp_path: Path) -> None:
    folder = copy("sd15").rename(tmp_path / "My Model (v2)")
    assert Checkpoint.open(folder).name == "my-model-v2"
    snapshot = tmp_path / "models--someone--Sd-Turbo" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    assert Checkpoint.open(folder.rename(snapshot)).name == "sd-turbo"


def test_opening_imports_no_torch(tiny_checkpoint: Tiny) -> None:
    code = (
        "import sys, pathlib; from engine.checkpoint import Checkpoint; "
        "Checkpoint.open(pathlib.Path(sys.argv[1])).model_spec(); "
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_checkpoint("sd15"))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet", {"class_embed_type": "projection"}, "class_embed_type='projection'"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj'"),
        ("unet", {"dual_cross_attention": True}, "dual_cross_attention=True"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ("unet", {"attention_type": "gated"}, "attention_type='gated'"),
        ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ("unet", {"in_channels": 8}, "in_channels=8"),
        ("unet", {"num_frames": 16}, "num_frames=16"),
        ("unet", {"mid_block_type": None}, "mid_block_type=None"),
        ("unet", {"transformer_layers_per_block": [[1], [2]]}, "nested lists"),
        (
            "unet",
            {"down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"]},
            "'CrossAttnDownBlock3D' is not supported",
        ),
        ("unet", {"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "'KUpBlock2D'"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean=[0.0, 0.0, 0.0, 0.0]"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "AttnDownEncoderBlock2D"),
        ("text_encoder", {"model_type": "t5"}, "model_type='t5'"),
        ("text_encoder", {"use_attention_mask": True}, "use_attention_mask=True"),
        ("text_encoder", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ("scheduler", {"_class_name": "EDMEulerScheduler"}, "_class_name='EDMEulerScheduler'"),
        ("scheduler", {"thresholding": True}, "thresholding=True"),
        ("scheduler", {"skip_prk_steps": False}, "skip_prk_steps=False"),
        ("scheduler", {"timestep_spacing": "fancy"}, "spacing='fancy'"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        (
            "scheduler",
            {"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True},
            "zero terminal SNR",
        ),
        (
            "scheduler",
            {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"},
            "solver_type 'bh1'",
        ),
    ],
)
def test_unsupported_configs_are_refused_by_name(
    file: str, change: dict[str, Any], message: str, copy: Tiny
) -> None:
    folder = copy("sd15")
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    edit(folder / file / name, **change)
    with pytest.raises(UnsupportedError) as caught:
        Checkpoint.open(folder)
    assert f"{file}/{name}: " in str(caught.value)
    assert message in str(caught.value)


def test_all_problems_are_told_at_once(copy: Tiny) -> None:
    folder = copy("sd15")
    edit(folder / "unet/config.json", class_embed_type="timestep", dual_cross_attention=True)
    edit(folder / "vae/config.json", latents_std=[1.0] * 4)
    edit(folder / "scheduler/scheduler_config.json", use_lu_lambdas=True)
    edit(folder / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(UnsupportedError) as caught:
        Checkpoint.open(folder)
    parts = ("class_embed_type", "dual_cross_attention", "latents_std", "use_lu_lambdas")
    for part in (*parts, "T5EncoderModel"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxPipeline"}, "'FluxPipeline'"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ({"transformer": ["diffusers", "SD3Transformer2DModel"]}, "SD3Transformer2DModel"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "ControlNetModel"),
        ({"unet": [{}, []]}, "code of the checkpoint's own"),
        ({"unet": ["my_unet", "MyUNet"]}, "code of the checkpoint's own"),
        ({"scheduler": ["my_scheduler", "Mine"]}, "code of the checkpoint's own"),
        ({"text_encoder": [None, None]}, "'text_encoder' is missing"),
        ({"requires_aesthetics_score": True}, "requires_aesthetics_score"),
    ],
)
def test_foreign_pipelines_are_refused_by_name(
    change: dict[str, Any], message: str, copy: Tiny
) -> None:
    folder = copy("sd15")
    edit(folder / "model_index.json", **change)
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint.open(folder)


def test_a_transformer_pipeline_is_refused_by_its_class_and_not_for_missing_files(
    tmp_path: Path,
) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match="FluxTransformer2DModel"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "alone"])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickles_are_refused(suffix: str, beside: bool, copy: Tiny) -> None:
    folder = copy("sd15")
    (folder / "unet" / f"diffusion_pytorch_model{suffix}").write_bytes(b"\x80\x04.")
    if not beside:
        (folder / UNET).unlink()
    with pytest.raises(UnsafeCheckpointError, match=r"pickled.*safetensors") as caught:
        Checkpoint.open(folder)
    assert ("delete" if beside else "safe_serialization=True") in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet", {"block_out_channels": "wide"}, "block_out_channels"),
        ("unet", {"block_out_channels": [16]}, "block_out_channels"),
        ("unet", {"block_out_channels": [16, -32]}, "block_out_channels"),
        ("unet", {"up_block_types": ["UpBlock2D"]}, "up_block_types"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64; expected 32"),
        ("unet", {"out_channels": 5}, "out_channels"),
        ("unet", {"layers_per_block": 10**6}, "layers_per_block"),
        ("text_encoder", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ("vae", {"latent_channels": 10**9}, "latent_channels"),
        ("vae", {"scaling_factor": "big"}, "scaling_factor"),
        ("text_encoder", {"hidden_size": 31.5}, "hidden_size"),
    ],
)
def test_wrong_configs_name_their_key(
    file: str, change: dict[str, Any], message: str, copy: Tiny
) -> None:
    folder = copy("sd15")
    edit(folder / file / "config.json", **change)
    with pytest.raises(CorruptCheckpointError, match=message):
        Checkpoint.open(folder).model_spec()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1', "\x00", "[" * 100_000])
def test_bad_json_is_named(text: str, copy: Tiny) -> None:
    folder = copy("sd15")
    (folder / "vae/config.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"vae/config\.json"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "missing",
    [
        *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", UNET),
        *("text_encoder/model.safetensors", "tokenizer/tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(missing: str, copy: Tiny) -> None:
    folder = copy("sd15")
    (folder / missing).unlink()
    with pytest.raises(CorruptCheckpointError) as caught:
        Checkpoint.open(folder)
    assert missing.split("/")[0] in str(caught.value)


def test_paths_and_links_out_of_the_folder_are_refused(copy: Tiny, tiny_checkpoint: Tiny) -> None:
    folder = copy("sd15")
    edit(folder / "model_index.json", **{"../evil": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(CorruptCheckpointError, match="not a plain folder name"):
        Checkpoint.open(folder)

    folder = folder.rename(folder.with_name("again"))
    shutil.copy(tiny_checkpoint("sd15") / "model_index.json", folder)
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(tiny_checkpoint("sd15") / UNET)
    with pytest.raises(CorruptCheckpointError, match="leads out of the model folder"):
        Checkpoint.open(folder)


def test_links_of_the_hub_cache_are_followed(copy: Tiny, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    folder = copy("sd15").rename(repository / "snapshots" / "0123abc")
    (folder / UNET).rename(repository / "blobs" / "feed")
    (folder / UNET).symlink_to("../../../blobs/feed")
    assert Checkpoint.open(folder).name == "model"


# -------------------------------------------------------------------------- tampered weight files


def reheader(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file, leaving its data as they are."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.999])
def test_truncated_weights_are_found_before_loading(keep: float, copy: Tiny) -> None:
    folder = copy("sd15")
    raw = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptCheckpointError, match=UNET):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [-4, 4]},
        {"data_offsets": [0]},
        {"data_offsets": "here"},
        {"shape": [2**40, 2**40]},
        {"shape": [-1, -4]},
        {"shape": [1.5]},
        {"dtype": "F8_E4M3"},
        {"dtype": ["F32"]},
    ],
)
def test_tampered_tensor_entries_name_the_tensor(entry: dict[str, Any], copy: Tiny) -> None:
    folder = copy("sd15")
    reheader(folder / UNET, lambda header: header["conv_out.bias"].update(entry))
    with pytest.raises(CorruptCheckpointError, match=r"conv_out\.bias"):
        Checkpoint.open(folder)


def test_bytes_that_belong_to_no_tensor_are_refused(copy: Tiny) -> None:
    folder = copy("sd15")
    with (folder / UNET).open("ab") as file:
        file.write(b"hidden payload")
    with pytest.raises(CorruptCheckpointError, match="14 bytes belong to no tensor"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_header_bytes_never_escape_as_other_errors(seed: int, copy: Tiny) -> None:
    folder = copy("sd15")
    raw = bytearray((folder / UNET).read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    generator = torch.Generator().manual_seed(seed)
    for at in torch.randint(0, 8 + length, (5,), generator=generator).tolist():
        raw[at] = int(torch.randint(0, 256, (1,), generator=generator))
    (folder / UNET).write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        Checkpoint.open(folder).load_unet()


def test_shards_and_index_must_agree(copy: Tiny) -> None:
    folder = copy("sd15")
    index = shard(folder / "unet")
    original = json.loads(index.read_text())["weight_map"]
    for weight_map, message in (
        ({**original, "ghost": original["conv_in.bias"]}, "lacks ghost"),
        ({k: v for k, v in original.items() if k != "conv_in.bias"}, "conv_in.bias is not listed"),
        ({**original, "conv_in.bias": "../../x.safetensors"}, "not the name of a safetensors"),
        (dict.fromkeys(original, "gone.safetensors"), "gone.safetensors: cannot be read"),
        ({}, "no weight_map"),
    ):
        edit(index, weight_map=weight_map)
        with pytest.raises(CorruptCheckpointError, match=message):
            Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("conv_out.bias"), r"conv_out\.bias is missing"),
        (lambda t: t.update(ghost=torch.zeros(1)), "ghost belongs to no layer"),
        (
            lambda t: t.update({"conv_out.bias": torch.zeros(5)}),
            r"conv_out\.bias has shape \(5,\), expected \(4,\)",
        ),
        (lambda t: t["conv_out.bias"].fill_(float("nan")), r"conv_out\.bias holds NaN"),
        (lambda t: t["conv_in.weight"].fill_(float("inf")), r"conv_in\.weight holds NaN"),
    ],
)
def test_weights_are_held_against_the_config(
    spoil: Callable[[dict[str, torch.Tensor]], object], message: str, copy: Tiny
) -> None:
    folder = copy("sd15")
    tensors = safetensors.torch.load_file(folder / UNET)
    spoil(tensors)
    safetensors.torch.save_file(tensors, folder / UNET)
    with pytest.raises(CorruptCheckpointError, match=message):
        Checkpoint.open(folder).load_unet()


def test_a_config_that_contradicts_itself_is_an_error_of_the_checkpoint(copy: Tiny) -> None:
    folder = copy("sd15")
    edit(folder / "unet/config.json", norm_num_groups=7)
    edit(folder / "text_encoder/config.json", num_attention_heads=5)
    with pytest.raises(CorruptCheckpointError, match=r"unet/config\.json"):
        Checkpoint.open(folder).load_unet()
    with pytest.raises(CorruptCheckpointError, match=r"text_encoder/config\.json"):
        Checkpoint.open(folder).load_text_encoders()
