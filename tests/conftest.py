"""Tiny random models in the true layouts of every family, as pipelines, single files and folders,
and a running ComfyUI."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from realera.checkpoints.families import FAMILIES
from realera.checkpoints.loading import _tokenizer
from realera.pipelines.unet import DiffusersModel, DiffusersText
from tools import tiny
from tools.comfyui import comfyui
from tools.layout import to_ldm

ROOT = Path(__file__).parent.parent
# The user's cache is neither read nor written. What one test (or xdist worker) encodes, the others
# read back; REALERA_TEST_CACHE names a folder that later runs read back too.
CACHE = tempfile.TemporaryDirectory(prefix="realera-cache-")
if "PYTEST_XDIST_WORKER" not in os.environ:  # else the controller has chosen the folder
    os.environ["REALERA_CACHE"] = os.environ.get("REALERA_TEST_CACHE") or CACHE.name
# Models are so small here that threads would only wait for each other: ten times on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

# Files of the tests that `python -m pytest -m quick` runs: the method's own arithmetic, settings
# and files, on random rows and the smallest encoder.
QUICK = {
    "test_anchor_suggestions.py",
    "test_anchor_warnings.py",
    "test_closed_form.py",
    "test_erasure.py",
    "test_file_names.py",
    "test_house.py",
    "test_mining.py",
    "test_packaging.py",
    "test_plots.py",
    "test_safetensors_file.py",
    "test_sampling.py",
    "test_scope.py",
    "test_settings.py",
    "test_token_alignment.py",
}

# Files that take a minute or more: the first that xdist gives out, so that no worker ends long
# after the others.
LONG = {
    "test_page.py",
    "test_comfyui_inside.py",
    "test_comfyui.py",
    "test_comfyui_families.py",
    "test_language.py",
    "test_transformers.py",
    "test_layouts.py",
    "test_alignment.py",
    "test_faults.py",
}

UNETS = {
    "sd1": {"block_out_channels": [32] * 4, "cross_attention_dim": 32, "attention_head_dim": 4},
    "sd2": {
        "block_out_channels": [32] * 4,
        "cross_attention_dim": 64,
        "attention_head_dim": [2, 2, 4, 4],
    },
    "sdxl": {
        "block_out_channels": [32] * 3,
        "cross_attention_dim": 96,
        "attention_head_dim": [2, 2, 4],
        "transformer_layers_per_block": [1, 2, 3],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    },
}
TEXTS = {"sd1": [32], "sd2": [64], "sdxl": [32, 64]}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if item.path.name in QUICK:
            item.add_marker("quick")


def tiny_pipeline(name, in_channels=4, layers=2, prediction="epsilon"):
    """A random pipeline of the family, small enough to sample from in a second."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    unet = family["unet"] | UNETS[name] | {"sample_size": 8, "layers_per_block": layers}
    vae = family["vae"] | {"block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 64}
    parts = {
        "unet": UNet2DConditionModel(**unet | {"in_channels": in_channels}),
        "vae": AutoencoderKL(**vae),
        "scheduler": DDIMScheduler(**family["scheduler"] | {"prediction_type": prediction}),
    }
    for suffix, width in zip(("", "_2"), TEXTS[name], strict=False):
        config = family["text_encoder" + suffix] | {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "projection_dim": width,
        }
        text_class = CLIPTextModelWithProjection if suffix else CLIPTextModel
        parts["text_encoder" + suffix] = text_class(CLIPTextConfig(**config))
        parts["tokenizer" + suffix] = _tokenizer(config["vocab_size"], config["pad_token_id"])
    if name == "sdxl":
        return StableDiffusionXLPipeline(**parts)
    pipeline = StableDiffusionInpaintPipeline if in_channels == 9 else StableDiffusionPipeline
    return pipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def single_file(pipeline, path, dtype=torch.float32, extra=None, metadata=None):
    """The pipeline as a single file that carries its own configuration."""
    names = [n for n in ("unet", "vae", "text_encoder", "text_encoder_2") if hasattr(pipeline, n)]
    state = to_ldm({name: getattr(pipeline, name).state_dict() for name in names}) | (extra or {})
    config = {
        name: json.loads(getattr(pipeline, name).config.to_json_string())
        for name in names
        if name.startswith("text_encoder")
    }
    for name in ("unet", "vae", "scheduler"):
        config[name] = dict(getattr(pipeline, name).config)
    tensors = {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().clone()
        for key, tensor in state.items()
    }
    save_file(tensors, path, {"config": json.dumps(config), "format": "pt"} | (metadata or {}))
    return Path(path)


@pytest.fixture(scope="session")
def make_pipeline():
    return tiny_pipeline


@pytest.fixture(scope="session")
def make_single():
    return single_file


@pytest.fixture(scope="session")
def pipelines():
    """name -> tiny pipeline, float32; built once, so never change their weights."""
    return {
        "sd1": tiny_pipeline("sd1"),
        "sd1 one layer": tiny_pipeline("sd1", layers=1),
        "sd1 inpainting": tiny_pipeline("sd1", in_channels=9),
        "sd2": tiny_pipeline("sd2", prediction="v_prediction"),
        "sdxl": tiny_pipeline("sdxl"),
    }


@pytest.fixture(scope="session")
def singles(pipelines, tmp_path_factory):
    """name -> the same pipeline as a single file."""
    folder = tmp_path_factory.mktemp("singles")
    return {
        name: single_file(pipeline, folder / f"{name.replace(' ', '-')}.safetensors")
        for name, pipeline in pipelines.items()
    }


@pytest.fixture(scope="session")
def folders(pipelines, tmp_path_factory):
    """name -> the same pipeline as a diffusers folder."""
    folder = tmp_path_factory.mktemp("folders")
    for name in ("sd1", "sdxl"):
        pipelines[name].save_pretrained(folder / name)
    return {name: folder / name for name in ("sd1", "sdxl")}


@pytest.fixture(scope="session")
def tiny_text() -> DiffusersText:
    """A text encoder alone, 64 wide; built once, so never change its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, encoder = tiny.text_encoder(64, layers=2, heads=4)
    return DiffusersText([tokenizer], [encoder])


@pytest.fixture(scope="session")
def tiny_model() -> DiffusersModel:
    """A whole model that trains in seconds; built once, so leave its weights as they are."""
    return DiffusersModel(tiny.pipeline())


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A transformers CLIPModel as it lies on disk, only small."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPVisionConfig,
    )

    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokens), bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, **sizes
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pretend() -> torch.device:
    """A device of its own in host memory; skips where its extension cannot be built."""
    from tests import pretend_device

    try:
        return pretend_device.install()
    except (RuntimeError, OSError) as error:  # no compiler, no ninja
        pytest.skip(f"no pretend device: {error}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ComfyUI with our pack alone; skips where COMFYUI_DIR is not set."""
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("COMFYUI_DIR is not set: no ComfyUI to test against")
    home = tmp_path_factory.mktemp("comfyui")
    (home / "custom_nodes").mkdir()
    (home / "custom_nodes" / "RealEra").symlink_to(ROOT)
    with comfyui(home, OMP_NUM_THREADS="1") as made:
        yield made
