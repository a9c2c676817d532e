"""Loading a model from a single file or a diffusers folder, without the internet.

This is a separate module, since importing diffusers takes seconds and no other module needs it.
"""

import gzip
import inspect
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModularPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    create_diffusers_clip_model_from_ldm,
)
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from ..edit.text_layers import TRANSFORMERS
from ..miniature import T5
from ..miniature.language import LOADERS, LanguageText
from ..miniature.transformer_text import MiniatureTransformerText, load_t5
from ..pipelines.interface import Diffusion
from ..pipelines.modular import BLOCKS
from ..pipelines.transformer import TransformerModel, TransformerText
from ..pipelines.unet import DiffusersModel, DiffusersText
from ..storage.safetensors_file import TensorFile, open_tensors
from ..text.encoding import TextEncoder
from .families import FAMILIES, PARTS, Family, family_of
from .fp8_scales import FLOATS, is_companion, weight_of
from .layouts import NETWORK, VAE, locate, read_json, standard_key, weight_files

ENCODERS = "text_encoders."  # prefix of the text encoders of a transformer in a single file
BUFFERS = ("position_ids", "attn_mask")  # set by every loader; merged files hold fractions
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
CLIP_VOCABULARY = 49408
UNetText = TypeVar("UNetText", bound=DiffusersText | LanguageText)
_PLAIN_TEXT = r"(?:model\.)?transformer\.(?!resblocks\.)(?:text_model\.)?(.+)"


def load_model(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Diffusion:
    """Loads a whole model, without the internet.

    source: checkpoint file, diffusers folder or name of a bundled model
    dtype: data type to compute in; None: float32 on the CPU, elsewhere bfloat16 for a transformer
        and the data type of the file for a U-Net (float16 for fp8)
    device: device to load the model on

    Raises FileNotFoundError, ValueError when the model is incomplete or of no supported family, and
    what `Package.path` of a language model raises.
    """
    path, family = locate(source), family_of(source)
    if family.name in TRANSFORMERS:
        return _transformer_model(source, family, dtype, device)
    if family.in_channels not in (4, 9):
        raise ValueError(
            f"the U-Net of {path} reads {family.in_channels} channels; RealEra runs text-to-image "
            "models (4) and inpainting ones (9)"
        )
    dtype = _dtype(family, dtype, device)
    xl, inpainting = family.pooled is not None, family.in_channels == 9
    pipeline_class: Any = {
        (False, False): StableDiffusionPipeline,
        (False, True): StableDiffusionInpaintPipeline,
        (True, False): StableDiffusionXLPipeline,
        (True, True): StableDiffusionXLInpaintPipeline,
    }[xl, inpainting]
    unused: dict[str, Any] = {"image_encoder": None, "feature_extractor": None}
    if not xl:
        unused |= {"safety_checker": None, "requires_safety_checker": False}
    _refuse_edm(path)
    if path.is_dir():
        parts = {
            **_text_parts(_folder_text(path, dtype)),
            "unet": _folder_part(UNet2DConditionModel, path / "unet", dtype),
            "vae": _folder_part(AutoencoderKL, path / "vae", dtype),
        }
        pipeline = pipeline_class.from_pretrained(path, local_files_only=True, **parts, **unused)
        return DiffusersModel(pipeline.to(device))

    file = open_tensors(path)
    text = _text(file, family, dtype)
    unet = _file_part(UNet2DConditionModel, file, NETWORK, family, "unet", dtype)
    vae = _file_part(AutoencoderKL, _vae_file(file, text), VAE, family, "vae", dtype)
    with _explained(file, family):
        scheduler, sample_size = _prediction(file, family)
    unet.register_to_config(sample_size=sample_size)
    parts = {"unet": unet, "vae": vae, "scheduler": DDIMScheduler.from_config(scheduler)}
    pipeline = pipeline_class(**parts, **_text_parts(text), **unused).to(device)
    return DiffusersModel(pipeline, _on(text, device))


def load_text(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> TextEncoder:
    """Loads the text encoder alone, which is all that the closed form needs.

    Parameters and errors as for `load_model`.
    """
    path, family = locate(source), family_of(source)
    dtype = _dtype(family, dtype, device)
    if family.name in TRANSFORMERS:
        return _transformer_text(source, family, dtype, device)
    text = _folder_text(path, dtype) if path.is_dir() else _text(open_tensors(path), family, dtype)
    return _on(text, device)


def _dtype(family: Family, dtype: torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """The data type to compute in, as `load_model` says."""
    if dtype is not None:
        return dtype
    if torch.device(device).type == "cpu":
        return torch.float32
    if family.name in TRANSFORMERS:
        return torch.bfloat16
    return torch.float16 if family.dtype.itemsize == 1 else family.dtype


def _on(text: UNetText, device: str | torch.device) -> UNetText:
    for encoder in [text.network] if isinstance(text, LanguageText) else text.encoders:
        encoder.to(device)
    return text


def _transformer_model(
    source: str | os.PathLike[str],
    family: Family,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> TransformerModel:
    path, dtype = locate(source), _dtype(family, dtype, device)
    if path.is_dir() and "pipeline" in FAMILIES[family.name]:
        return TransformerModel(_transformer_pipeline(path, family, dtype).to(device))
    text, config = _transformer_text(source, family, dtype, device), family.config
    file = open_tensors(path)
    transformer_class = getattr(diffusers, family.pipeline["transformer"])
    transformer = _file_part(transformer_class, file, NETWORK, family, "transformer", dtype)
    vae = _file_part(AutoencoderKL, _vae_file(file, text), VAE, family, "vae", dtype)
    pipeline_class = getattr(diffusers, family.pipeline["class"])
    takes = inspect.signature(pipeline_class).parameters
    pipeline = pipeline_class(
        **{name: None for name in takes if name.startswith(("text_encoder", "tokenizer"))},
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(**config["scheduler"]),
    )
    return TransformerModel(pipeline.to(device), text)


def _transformer_text(
    source: str | os.PathLike[str],
    family: Family,
    dtype: torch.dtype,
    device: str | torch.device,
) -> TransformerText | MiniatureTransformerText | LanguageText:
    path, in_diffusers = locate(source), "pipeline" in FAMILIES[family.name]
    if path.is_dir() and in_diffusers:
        pipeline = _transformer_pipeline(path, family, dtype, transformer=None, vae=None)
        front = _front(path, family, dtype)
        return TransformerText(pipeline.to(device), family.name, front and front.to(device))
    if not {"transformer", "vae", "text_encoder", "scheduler"} <= family.config.keys():
        inside = sorted(
            {key.split(".")[1] for key in open_tensors(path).entries if key.startswith(ENCODERS)}
        )
        encoders = (
            f"file whose text encoders ({', '.join(inside)}) RealEra reads in ComfyUI"
            f"{' and in a diffusers folder' * in_diffusers} only"
            if inside
            else "transformer without its text encoders"
        )
        raise ValueError(
            f"{path} is a {family.title} {encoders}: make the erasure in ComfyUI"
            f"{', or from the diffusers folder of the model' * in_diffusers}; `realera apply` "
            "writes it into this file"
        )
    if family.config["text_encoder"].get("bundled") in LOADERS:
        text: Any = _text(open_tensors(path), family, dtype)
        return _on(text, device)
    # The bundled transformer has the text encoder of the miniature, which its file leaves out.
    clip: Any = _text(open_tensors(locate("miniature")), family_of("miniature"), dtype)
    second = load_t5(T5).to(device, dtype) if source == "miniature-dit-t5" else None
    return MiniatureTransformerText(_on(clip, device), second)


def _vae_file(file: TensorFile, text: TextEncoder) -> TensorFile:
    """The file with the autoencoder: of a bundled network that reads a language model, the
    miniature's."""
    return open_tensors(locate("miniature")) if isinstance(text, LanguageText) else file


def _front(path: Path, family: Family, dtype: torch.dtype) -> nn.Module | None:
    """The part of a folder's network that makes the rows of the text, without the rest of it; None
    where the family has none.

    Raises ValueError when the folder lacks a tensor of it.
    """
    name = family.pipeline.get("front")
    if name is None:
        return None
    folder = path / "transformer"
    config = read_json((folder / "config.json").read_bytes(), folder / "config.json")
    with torch.device("meta"):
        front: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        front = front.get_submodule(name)
    state = {
        key.removeprefix(f"{name}."): file.read(key).to(dtype)
        for file in map(open_tensors, weight_files(folder)[0])
        for key in file.entries
        if key.startswith(f"{name}.")
    }
    if missing := sorted(front.state_dict().keys() - state.keys()):
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors of {name}, {missing[0]!r} among them, without "
            "which its text cannot be read: get the folder again"
        )
    front.load_state_dict(state, assign=True)
    return front.eval()


def _transformer_pipeline(path: Path, family: Family, dtype: torch.dtype, **parts: Any) -> Any:
    """The pipeline of a folder.

    parts: name -> part that is there already, or None to leave it out
    """
    pipeline_class = getattr(diffusers, family.pipeline["class"])
    if issubclass(pipeline_class, ModularPipeline):
        return _modular_pipeline(path, pipeline_class, dtype, parts)
    index = read_json((path / "model_index.json").read_bytes(), path / "model_index.json")
    named = str(index.get("_class_name"))
    if _reads_images(getattr(diffusers, named, None)) and not _reads_images(pipeline_class):
        raise ValueError(
            f"{path} is a {named}, whose prompts hold the tokens of an image: make the erasure "
            f"from the {pipeline_class.__name__} of {family.title}; `realera apply` writes it into "
            "this folder, where it erases the words of a prompt and nothing that an image shows"
        )
    for name, entry in index.items():
        if name not in parts and name.startswith(("text_encoder", "transformer", "vae")):
            library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            if library in _LIBRARIES:  # null for a part that the pipeline lacks
                part_class = getattr(_LIBRARIES[library], str(kind), None)
                if part_class is None:
                    raise ValueError(
                        f"{path / name} is a {kind}, which the installed {library} lacks: update "
                        f"{library}"
                    )
                parts[name] = _folder_part(part_class, path / name, dtype)
    return pipeline_class.from_pretrained(path, torch_dtype=dtype, local_files_only=True, **parts)


def _reads_images(pipeline_class: Any) -> bool:
    """Whether a pipeline encodes an image with the prompt."""
    encode = getattr(pipeline_class, "encode_prompt", None)
    return encode is not None and "image" in inspect.signature(encode).parameters


def _modular_pipeline(
    path: Path, pipeline_class: Any, dtype: torch.dtype, parts: dict[str, Any]
) -> Any:
    """The pipeline of a folder, of the blocks that RealEra runs.

    pipeline_class: class of the family; a subclass that the folder names takes precedence
    parts: as in `_transformer_pipeline`
    """
    index = path / pipeline_class.config_name
    named = getattr(diffusers, str(read_json(index.read_bytes(), index).get("_class_name")), None)
    if isinstance(named, type) and issubclass(named, pipeline_class):
        pipeline_class = named
    blocks = pipeline_class().blocks
    for name in blocks.sub_blocks.keys() - BLOCKS:
        del blocks.sub_blocks[name]
    pipeline = pipeline_class(blocks)
    for name in pipeline.component_names:
        spec = pipeline.get_component_spec(name)
        created = spec.default_creation_method == "from_config" and not (path / name).is_dir()
        if name not in parts and not created:
            parts[name] = (
                _folder_part(spec.type_hint, path / name, dtype)
                if issubclass(spec.type_hint, nn.Module)
                else _text_processor(path / name)
                if spec.type_hint is AutoProcessor
                else spec.type_hint.from_pretrained(path / name, local_files_only=True)
            )
    pipeline.update_components(**{name: part for name, part in parts.items() if part is not None})
    return pipeline


def _text_processor(folder: Path) -> Any:
    """The tokenizer of a processor in place of it: a processor of images needs torchvision."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.tokenizer = tokenizer
    return tokenizer


def _file_part(
    part_class: Any,
    file: TensorFile,
    prefix: str,
    family: Family,
    name: str,
    dtype: torch.dtype,
) -> Any:
    """A part of a single file.

    prefix: beginning of the keys of the part; name: name of the part in a pipeline

    Raises ValueError when the file lacks a tensor of the part.
    """
    state = _state(file, prefix, dtype)
    if not state:
        raise _lacking(file, name, prefix)
    with _configuration_folder(family) as folder, _explained(file, family):
        options: dict[str, Any] = {"config": folder, "subfolder": name, "local_files_only": True}
        if dtype != torch.float32:  # the converters' default, and they warn of a needless cast
            options["torch_dtype"] = dtype
        try:
            part = part_class.from_single_file(dict(state), **options)
        except NotImplementedError:  # diffusers moves tensors that it left on the meta device
            with torch.device("meta"):
                part = part_class.from_config(part_class.load_config(folder, subfolder=name))
            loadable: Any = SINGLE_FILE_LOADABLE_CLASSES[part_class.__name__]
            tensors = loadable["checkpoint_mapping_fn"](checkpoint=dict(state), config=part.config)
            _refuse_incomplete(part, file, part.state_dict().keys() - tensors.keys())
            raise
    _refuse_incomplete(part, file, [n for n, t in part.named_parameters() if t.is_meta])
    return part


def _folder_part(part_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A part of a pipeline folder, in the variant that the folder has.

    Raises ValueError when the folder lacks a tensor of the part. transformers would fill it with
    random numbers, diffusers would leave it empty.
    """
    paths, variant = weight_files(folder)
    for file in map(open_tensors, paths):
        for key in file.entries:
            if is_companion(key):
                raise ValueError(
                    f"{file.path} holds the scale {key!r}, which diffusers would leave out: use "
                    "the single file, or the folder in float16 or float32"
                )
    of_transformers = issubclass(part_class, PreTrainedModel)
    part, loaded = part_class.from_pretrained(
        folder,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **{"dtype" if of_transformers else "torch_dtype": dtype},
    )
    # Buffers are set by the class, and of tied weights one is enough.
    parameters = dict(part.named_parameters())
    missing = sorted(set(loaded["missing_keys"]) & parameters.keys())
    if missing:
        others = sorted(loaded["unexpected_keys"])
        named = f"; its {others[0]!r} is under a name that is not known" if others else ""
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(parameters)} tensors of a "
            f"{part_class.__name__}, {missing[0]!r} among them{named}: get the folder again"
        )
    for name, tensor in parameters.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{folder}: tensor {name!r} holds numbers that are not finite: the checkpoint is "
                "damaged, use another copy of it"
            )
    return part


def _folder_text(path: Path, dtype: torch.dtype) -> DiffusersText:
    encoders, tokenizers = [], []
    for suffix in ("", "_2"):
        folder, words = path / f"text_encoder{suffix}", path / f"tokenizer{suffix}"
        if folder.is_dir():
            if not words.is_dir():
                raise ValueError(f"{path} is no whole pipeline folder: it lacks {words.name}/")
            config = folder / "config.json"
            kind = read_json(config.read_bytes(), config).get("model_type", "clip")
            if not str(kind).startswith("clip"):
                raise ValueError(
                    f"{folder} is a text encoder of type {kind!r} and no CLIP: RealEra cannot "
                    "erase from a U-Net with this encoder"
                )
            encoders.append(_folder_part(_text_class(suffix), folder, dtype))
            tokenizers.append(CLIPTokenizer.from_pretrained(words, local_files_only=True))
    return DiffusersText(tokenizers, encoders)


def _text_parts(text: DiffusersText | LanguageText) -> dict[str, Any]:
    """Name of the part in a pipeline -> tokenizer or text encoder."""
    if isinstance(text, LanguageText):  # which no pipeline with a U-Net knows how to run
        return {"tokenizer": None, "text_encoder": None}
    parts = {}
    for suffix, tokenizer, encoder in zip(("", "_2"), text.tokenizers, text.encoders, strict=False):
        parts["tokenizer" + suffix], parts["text_encoder" + suffix] = tokenizer, encoder
    return parts


def _text(file: TensorFile, family: Family, dtype: torch.dtype) -> DiffusersText | LanguageText:
    load = LOADERS.get(family.config["text_encoder"].get("bundled"))
    if load is not None:
        text = load()
        text.network.to(dtype)
        return text
    encoders, tokenizers = [], []
    for suffix in ("", "_2"):
        config = family.config.get("text_encoder" + suffix)
        if config is None:
            continue
        state = _text_state(file, family, suffix, dtype)
        with _configuration_folder(family) as folder, _explained(file, family):
            encoder = create_diffusers_clip_model_from_ldm(
                _text_class(suffix),
                state,
                subfolder="text_encoder" + suffix,
                config=folder,
                torch_dtype=dtype,
                local_files_only=True,
            )
            tokenizers.append(_tokenizer(config["vocab_size"], config["pad_token_id"]))
        missing = [name for name, tensor in encoder.named_parameters() if tensor.is_meta]
        _refuse_incomplete(encoder, file, missing)
        encoders.append(encoder)
    return DiffusersText(tokenizers, encoders)


def _text_state(
    file: TensorFile, family: Family, suffix: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a text encoder, in one of the two layouts that diffusers converts.

    Files come in more layouts, which ComfyUI reads: names of transformers with or without
    "text_model.", or behind "model."; names of OpenCLIP behind "conditioner." in SD 2; the
    projection as it is or transposed.
    """
    prefixes = ["conditioner.embedders.1." if suffix else "conditioner.embedders.0."]
    if family.pooled is None:
        prefixes.append("cond_stage_model.")
    tensors = {
        key.removeprefix(prefix): tensor
        for prefix in prefixes
        for key, tensor in _state(file, prefix, dtype).items()
    }
    if not tensors:
        raise _lacking(file, f"text_encoder{suffix}", prefixes[-1])
    plain, open_clip = "cond_stage_model.transformer.", f"{prefixes[-1]}model."
    state, projection = {}, None  # [width, pooled width]
    for name, tensor in tensors.items():
        if name.endswith(("text_projection", "text_projection.weight")):
            projection = tensor.T if name.endswith("weight") else tensor
        elif match := re.fullmatch(_PLAIN_TEXT, name):
            state[f"{plain}text_model.{match[1]}"] = tensor
        else:
            state[open_clip + name.removeprefix("model.")] = tensor
    if projection is not None:
        if any(key.startswith(plain) for key in state):
            state[plain + "text_projection.weight"] = projection.T.contiguous()
        else:
            state[open_clip + "text_projection"] = projection.contiguous()
    return state


def _text_class(suffix: str) -> Any:
    return CLIPTextModelWithProjection if suffix else CLIPTextModel


def _tokenizer(vocabulary: int, pad: int) -> Any:
    """The tokenizer of CLIP, from its merges; for another vocabulary, that of the miniature."""
    if vocabulary != CLIP_VOCABULARY:
        from ..miniature import TOKENIZER

        return CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    with gzip.open(Path(__file__).parent / "merges.txt.gz", "rt", encoding="utf-8") as merges:
        text = merges.read()
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


def _refuse_edm(path: Path) -> None:
    """Raises ValueError for Playground 2.5 and CosXL, whose U-Nets need the EDM preconditioning."""
    if path.is_dir():
        config = path / "scheduler" / "scheduler_config.json"
        name = read_json(config.read_bytes(), config).get("_class_name") if config.is_file() else ""
        edm = str(name).startswith("EDM")
    else:
        edm = not open_tensors(path).entries.keys().isdisjoint(("edm_mean", "edm_vpred.sigma_max"))
    if edm:
        raise ValueError(
            f"{path} predicts by the EDM rule, which RealEra cannot sample or train with: make the "
            "erasure on another model of its family, without alignment, and apply it to this one"
        )


def _prediction(file: TensorFile, family: Family) -> tuple[dict[str, Any], int]:
    """The configuration of the scheduler and the side of a latent, from family and weights."""
    scheduler, size = dict(family.config["scheduler"]), family.config["unet"]["sample_size"]
    # SD 2.x predicts epsilon or v, and only the weights tell which: a certain bias is far wider in
    # models that predict v (as in ComfyUI).
    bias = NETWORK + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    wide = (
        family.name == "sd2"
        and family.in_channels == 4
        and any(
            float(file.read(key).float().std(correction=0)) > 0.09
            for key in file.entries
            if standard_key(key) == bias
        )
    )
    if wide or "v_pred" in file.entries or file.metadata.get("modelspec.prediction_type") == "v":
        scheduler["prediction_type"] = "v_prediction"
        size = 96 if family.config is FAMILIES["sd2"] else size
    if "ztsnr" in file.entries:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler, size


def _lacking(file: TensorFile, part: str, prefix: str) -> ValueError:
    return ValueError(
        f"{file.path} lacks its {part}: no key begins with {prefix!r}. Make the erasure from the "
        "full checkpoint; `realera apply` writes it into this file"
    )


def _state(file: TensorFile, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Standard key -> tensor, for the keys with a prefix. Raises ValueError as `weight_of`."""
    return {
        standard_key(key): weight_of(file, key).to(dtype)
        for key, entry in file.entries.items()
        if standard_key(key).startswith(prefix)
        and (entry.dtype in FLOATS or key.endswith("weight"))
        and not is_companion(key)
        and not key.endswith(BUFFERS)
    }


@contextmanager
def _configuration_folder(family: Family) -> Iterator[str]:
    """Yields a folder with the configurations of the parts, for the converters of diffusers."""
    with tempfile.TemporaryDirectory() as folder:
        # The configurations may be a stranger's: only known names become folders.
        for name in (*PARTS, "text_encoder_2", "transformer"):
            part = family.config.get(name)
            if isinstance(part, dict):
                if name == "unet":
                    part = {**part, "in_channels": family.in_channels}
                if name == "vae" and "scaling_factor" in family.config:
                    part = {"scaling_factor": family.config["scaling_factor"], **part}
                if name.startswith("text_encoder"):
                    part = {"model_type": "clip_text_model", **part}
                target = Path(folder) / name / "config.json"
                target.parent.mkdir(exist_ok=True)
                target.write_text(json.dumps(part))
        yield folder


@contextmanager
def _explained(file: TensorFile, family: Family) -> Iterator[None]:
    """Turns an error of a converter into one that says what the file may lack."""
    try:
        yield
    # Not Exception: missing memory, disk space or packages are not the fault of the file.
    except (ValueError, LookupError, NotImplementedError, SingleFileComponentError) as error:
        raise ValueError(
            f"{file.path} does not fit {family.title} and cannot be loaded: it may lack its text "
            f"encoder or VAE, or be a variant of another shape ({error})"
        ) from error


def _refuse_incomplete(part: nn.Module, file: TensorFile, missing: Collection[str]) -> None:
    if missing:
        raise ValueError(
            f"{file.path} lacks {len(missing)} tensors of {type(part).__name__}, {min(missing)!r} "
            "among them: get the full checkpoint"
        )
