"""Model families: which one a file is of, and loading it with no hub and no network.

A family is data: the JSON files beside this one hold the configurations of its parts in diffusers'
terms. A checkpoint may carry its own instead, as JSON in its metadata under "config".
"""

import gzip
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

from ..diffusion import DiffusersModel, DiffusersText
from ..erasure import POOLED, canonical
from ..files import DTYPES, PICKLES, TensorFile, open_tensors

UNET, VAE, TEXT = (
    "model.diffusion_model.",
    "first_stage_model.",
    ("cond_stage_model.", "conditioner."),
)
FAMILIES = {
    path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).parent.glob("*.json"))
}
SUPPORTED = ", ".join(family["title"] for family in FAMILIES.values())
PARTS = ("unet", "vae", "text_encoder", "scheduler")  # and SDXL's text_encoder_2
CLIP_VOCABULARY = 49408
_ERASABLE = re.compile(
    r"(?:model\.diffusion_model\.)?("
    r"(?:input_blocks|middle_block|output_blocks|down_blocks|mid_block|up_blocks)\..+\.attn2\.to_[kv]"
    r"|label_emb\.0\.0|add_embedding\.linear_1)\.weight"
)


@dataclass(frozen=True)
class Family:
    """What kind of model a file holds.

    name, title: of the family; dim: of the context; pooled: of SDXL's pooled embedding, else None
    in_channels: 4, or 9 for inpainting; dtype: in which the file stores the projections
    config: the parts' configurations in diffusers' terms
    """

    name: str
    title: str
    dim: int
    pooled: int | None
    in_channels: int
    dtype: torch.dtype
    config: Mapping[str, Any]


def family_of(source: str | os.PathLike[str]) -> Family:
    """The family of a single file or diffusers folder, from headers alone.

    Raises ValueError that names the families that work when it is of none of them.
    """
    path = locate(source)
    files = unet_files(path)
    entries = {name: file.entries[key] for file, keys in files for key, name in keys.items()}
    projection = next(entry for name, entry in entries.items() if name != POOLED)
    dim, pooled = projection.shape[1], POOLED in entries
    name = next(
        (
            name
            for name, known in FAMILIES.items()
            if known["unet"]["cross_attention_dim"] == dim and ("text_encoder_2" in known) == pooled
        ),
        None,
    )
    if path.is_dir():
        config = {
            part.parent.name: _json(part.read_text(), part) for part in path.glob("*/config.json")
        }
    elif own := _own_configuration(files[0][0], pooled):
        config = own
    elif name is not None:
        config = FAMILIES[name]
    else:
        raise ValueError(
            f"{path} has cross-attention over embeddings of {dim} numbers"
            f"{' and pooled ones' if pooled else ''}, which fits none of {SUPPORTED}"
        )
    first = next(
        (
            file.entries[key]
            for file, _ in files
            for key in (
                UNET + "input_blocks.0.0.weight",
                "input_blocks.0.0.weight",
                "conv_in.weight",
            )
            if key in file.entries
        ),
        None,
    )
    if first is None or len(first.shape) != 4:
        raise ValueError(f"{path} lacks the U-Net's first convolution: it is not a whole U-Net")
    return Family(
        name or "own",
        FAMILIES[name]["title"] if name else "a model with a configuration of its own",
        dim,
        config["text_encoder_2"]["projection_dim"] if pooled else None,
        first.shape[1],
        DTYPES[projection.dtype],
        config,
    )


def _own_configuration(file: TensorFile, pooled: bool) -> dict[str, Any]:
    """The configuration that a file carries, empty when there is none of every part."""
    config = _json(file.metadata.get("config", "{}"), file.path)
    needed = (*PARTS, "text_encoder_2") if pooled else PARTS
    return config if all(isinstance(config.get(part), dict) for part in needed) else {}


def locate(source: str | os.PathLike[str]) -> Path:
    """The path of a model; "miniature" is the bundled one."""
    if source == "miniature":
        from ..miniature import CHECKPOINT

        return CHECKPOINT
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a checkpoint file or a diffusers folder"
        )
    return path


def unet_files(path: Path) -> list[tuple[TensorFile, dict[str, str]]]:
    """The files of the U-Net, each with key -> canonical name of what an erasure may change."""
    paths = [path]
    if path.is_dir():
        paths = sorted((path / "unet").glob("*.safetensors"))
        if not paths:
            pickled = [p for p in (path / "unet").glob("*") if p.suffix in PICKLES]
            raise ValueError(
                f"{pickled[0]} is a pickle and is refused: load the pipeline where you trust it "
                "and save it again with save_pretrained(folder, safe_serialization=True)"
                if pickled
                else f"{path} is no diffusers pipeline folder: it has no unet/*.safetensors"
            )
    files = [open_tensors(p) for p in paths]
    layers = {
        (n, key): match[1]
        for n, file in enumerate(files)
        for key in file.entries
        if (match := _ERASABLE.fullmatch(key))
    }
    names = canonical(layers.values())
    if all(name == POOLED for name in names.values()):
        raise ValueError(
            f"{path} has no cross-attention K/V projections of a U-Net (attn2.to_k, attn2.to_v): "
            f"RealEra works on {SUPPORTED}"
        )
    erasable: list[dict[str, str]] = [{} for _ in files]
    for (n, key), layer in layers.items():
        entry = files[n].entries[key]
        if len(entry.shape) != 2 or not DTYPES[entry.dtype].is_floating_point:
            raise ValueError(
                f"{key!r} in {path} is {entry.dtype} {list(entry.shape)}: quantised checkpoints "
                "cannot be erased, use the float16 or float32 one"
            )
        erasable[n][key] = names[layer]
        # Some checkpoints hold a second U-Net, the running average; dots are left out of its names.
        average = "model_ema.diffusion_model" + f"{names[layer]}.weight".replace(".", "")
        if average in files[n].entries:
            erasable[n][average] = names[layer]
    return list(zip(files, erasable, strict=True))


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


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds a configuration that is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a configuration that is not a JSON object")
    return content
