"""Loading a model from a single file or a diffusers folder, with no hub and no network.

Apart from the families, since diffusers takes seconds to import and an erasure needs none of it.
"""

import gzip
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..diffusers_model import DiffusersModel, DiffusersText
from ..files import TensorFile, open_tensors
from . import FAMILIES, PARTS, UNET, Family, family_of, locate

VAE, TEXT = "first_stage_model.", ("cond_stage_model.", "conditioner.")
CLIP_VOCABULARY = 49408


def load_model(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> DiffusersModel:
    """The whole model, with no hub and no network.

    source: a single file, a diffusers folder, or "miniature"; dtype: None is float32 on the CPU and
    the file's own elsewhere. Raises ValueError when the file is incomplete or of no family we know.
    """
    path, family = locate(source), family_of(source)
    if family.in_channels not in (4, 9):
        raise ValueError(
            f"the U-Net of {path} reads {family.in_channels} channels; RealEra runs text-to-image "
            "models (4) and inpainting ones (9)"
        )
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else family.dtype
        dtype = torch.float16 if dtype.itemsize == 1 else dtype
    xl, inpainting = family.pooled is not None, family.in_channels == 9
    pipeline_class: Any = {
        (False, False): StableDiffusionPipeline,
        (False, True): StableDiffusionInpaintPipeline,
        (True, False): StableDiffusionXLPipeline,
        (True, True): StableDiffusionXLInpaintPipeline,
    }[xl, inpainting]
    unchecked: dict[str, Any] = (
        {} if xl else {"safety_checker": None, "feature_extractor": None}
    ) | ({} if xl else {"requires_safety_checker": False})
    if path.is_dir():
        pipeline = pipeline_class.from_pretrained(
            path,
            torch_dtype=dtype,
            variant=_variant(path / "unet"),
            use_safetensors=True,
            local_files_only=True,
            **unchecked,
        )
        return DiffusersModel(pipeline.to(device))

    file, config = open_tensors(path), family.config
    text = _text(file, family, dtype)
    with _configuration_folder(config, family.in_channels) as folder, _explained(file, family):
        options: dict[str, Any] = {"config": folder, "local_files_only": True}
        if dtype != torch.float32:  # the converters' own default, and they warn of a needless cast
            options["torch_dtype"] = dtype
        unet = UNet2DConditionModel.from_single_file(
            _state(file, UNET, dtype), subfolder="unet", **options
        )
        vae = AutoencoderKL.from_single_file(_state(file, VAE, dtype), subfolder="vae", **options)
    for part in (unet, vae):
        _check_complete(part, file)
    scheduler, sample_size = _prediction(file, family)
    unet.register_to_config(sample_size=sample_size)
    parts = {"unet": unet, "vae": vae, "scheduler": DDIMScheduler.from_config(scheduler)}
    for suffix, tokenizer, encoder in zip(("", "_2"), text.tokenizers, text.encoders, strict=False):
        parts["tokenizer" + suffix], parts["text_encoder" + suffix] = tokenizer, encoder
    return DiffusersModel(pipeline_class(**parts, **unchecked).to(device))


def load_text(
    source: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DiffusersText:
    """The text side alone: the closed form needs no more, and no U-Net is ever built."""
    path, family = locate(source), family_of(source)
    if not path.is_dir():
        text = _text(open_tensors(path), family, dtype)
    else:
        encoders, tokenizers = [], []
        for suffix in ("", "_2"):
            folder = path / f"text_encoder{suffix}"
            if folder.is_dir():
                if not list(folder.glob("*.safetensors")):
                    raise ValueError(f"{folder} has no safetensors weights; pickles are not opened")
                encoder = _text_class(suffix).from_pretrained(
                    folder, variant=_variant(folder), use_safetensors=True, local_files_only=True
                )
                words = path / f"tokenizer{suffix}"
                if not words.is_dir():
                    raise ValueError(f"{path} is no whole pipeline folder: it lacks {words.name}/")
                encoders.append(encoder.to(dtype))
                tokenizers.append(CLIPTokenizer.from_pretrained(words, local_files_only=True))
        text = DiffusersText(tokenizers, encoders)
    for encoder in text.encoders:
        encoder.to(device)
    return text


def _text(file: TensorFile, family: Family, dtype: torch.dtype) -> DiffusersText:
    state = {key: value for prefix in TEXT for key, value in _state(file, prefix, dtype).items()}
    encoders, tokenizers = [], []
    with _configuration_folder(family.config) as folder, _explained(file, family):
        for suffix in ("", "_2"):
            config = family.config.get("text_encoder" + suffix)
            if config is not None:
                encoder = create_diffusers_clip_model_from_ldm(
                    _text_class(suffix),
                    state,
                    subfolder="text_encoder" + suffix,
                    config=folder,
                    torch_dtype=dtype,
                    local_files_only=True,
                )
                encoders.append(encoder)
                tokenizers.append(_tokenizer(config["vocab_size"], config["pad_token_id"]))
    for encoder in encoders:
        _check_complete(encoder, file)
    return DiffusersText(tokenizers, encoders)


def _text_class(suffix: str) -> Any:
    return CLIPTextModelWithProjection if suffix else CLIPTextModel


def _tokenizer(vocabulary: int, pad: int) -> Any:
    """CLIP's own tokenizer, from its merges; the miniature has another vocabulary."""
    if vocabulary != CLIP_VOCABULARY:
        from ..miniature import TOKENIZER

        return CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    text = gzip.decompress((Path(__file__).parent / "merges.txt.gz").read_bytes()).decode()
    # Every byte is a printable character: itself, or one from 256 on (as in GPT-2).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(code) for code in (*printable, *range(256, 256 + 256 - len(printable)))]
    tokens = [*characters, *(c + "</w>" for c in characters)]
    tokens += ["".join(line.split()) for line in text.splitlines()]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        ids = {token: number for number, token in enumerate(tokens)}
        (Path(folder) / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(
            folder, model_max_length=77, pad_token=tokens[pad], local_files_only=True
        )


def _prediction(file: TensorFile, family: Family) -> tuple[dict[str, Any], int]:
    """Scheduler configuration and latent size, as far as only the weights can tell them."""
    scheduler, size = dict(family.config["scheduler"]), family.config["unet"]["sample_size"]
    # SD 2.x does not say whether it predicts epsilon or v. As ComfyUI does, we tell the two apart
    # by a norm's bias, which the v-prediction training left far wider.
    bias = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    wide = (
        family.name == "sd2"
        and family.in_channels == 4
        and bias in file.entries
        and float(file.read(bias).float().std(correction=0)) > 0.09
    )
    if wide or "v_pred" in file.entries or file.metadata.get("modelspec.prediction_type") == "v":
        scheduler["prediction_type"] = "v_prediction"
        size = 96 if family.config is FAMILIES["sd2"] else size
    if "ztsnr" in file.entries:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler, size


def _state(file: TensorFile, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {}
    for key in file.entries:
        if key.startswith(prefix):
            tensor = file.read(key)
            state[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state


@contextmanager
def _configuration_folder(
    config: Mapping[str, Any], in_channels: int | None = None
) -> Iterator[str]:
    """The configurations as the folder that diffusers' converters read."""
    with tempfile.TemporaryDirectory() as folder:
        # The names may be a stranger's: only those of parts are written.
        for name in (*PARTS, "text_encoder_2"):
            part = config.get(name)
            if isinstance(part, dict):
                if name == "unet" and in_channels is not None:
                    part = {**part, "in_channels": in_channels}
                if name == "vae" and "scaling_factor" in config:
                    part = {"scaling_factor": config["scaling_factor"], **part}
                if name.startswith("text_encoder"):
                    part = {"model_type": "clip_text_model", **part}
                target = Path(folder) / name / "config.json"
                target.parent.mkdir(exist_ok=True)
                target.write_text(json.dumps(part))
        yield folder


@contextmanager
def _explained(file: TensorFile, family: Family) -> Iterator[None]:
    """What a converter trips over in a file that lacks a part or does not fit its family."""
    try:
        yield
    # Not Exception: no memory, a full disk or a missing package is not the file's fault.
    except (ValueError, LookupError, NotImplementedError, SingleFileComponentError) as error:
        raise ValueError(
            f"{file.path} does not fit {family.title} and cannot be loaded: it may lack its text "
            f"encoder or VAE, or be a variant of another shape ({error})"
        ) from error


def _check_complete(part: nn.Module, file: TensorFile) -> None:
    missing = [name for name, tensor in part.named_parameters() if tensor.is_meta]
    if missing:
        raise ValueError(
            f"{file.path} lacks {len(missing)} tensors of {type(part).__name__}, {missing[0]} "
            "among them: get the full checkpoint"
        )


def _variant(folder: Path) -> str | None:
    """ "fp16" for a part that is there as model.fp16.safetensors only, as the hub names it."""
    names = [path.name for path in folder.glob("*.safetensors")]
    found = [re.fullmatch(r"\w+\.(\w+)(?:-\d+-of-\d+)?\.safetensors", name) for name in names]
    return found[0][1] if found and all(found) and found[0] else None
