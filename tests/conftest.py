"""Tiny random models in the true layouts of every family, their export to single files, and a
running ComfyUI."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
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
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from realera.families import FAMILIES
from realera.families.loading import _tokenizer

ROOT = Path(__file__).parent.parent

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


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def ldm_unet(unet):
    stride = unet.config.layers_per_block + 1
    attended = {
        f"up_blocks.{i}" for i, b in enumerate(unet.config.up_block_types) if "CrossAttn" in b
    }

    def rename(name):
        for old, new in UNET.items():
            if name.startswith(old + "."):
                return new + name[len(old) :]
        block, kind, index, rest = re.fullmatch(
            r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(\w+)\.(\d+)\.(.+)", name
        ).groups()
        if kind == "resnets":
            first, _, last = rest.partition(".")
            rest = f"{RESNET[first]}.{last}"
        side, _, number = block.rpartition(".")
        index = int(index)
        if block == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
        number = int(number) * stride
        if side == "down_blocks" and kind == "downsamplers":
            return f"input_blocks.{number + stride}.0.op.{rest.removeprefix('conv.')}"
        if side == "down_blocks":
            return f"input_blocks.{number + index + 1}.{int(kind == 'attentions')}.{rest}"
        if kind == "upsamplers":
            place = 2 if block in attended else 1
            return f"output_blocks.{number + stride - 1}.{place}.{rest}"
        return f"output_blocks.{number + index}.{int(kind == 'attentions')}.{rest}"

    return {
        "model.diffusion_model." + rename(name): tensor
        for name, tensor in unet.state_dict().items()
    }


def ldm_vae(vae):
    last = len(vae.config.block_out_channels) - 1
    state = {}
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{last - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
            name,
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(
                "group_norm", "norm"
            )
            for old, new in {"to_out.0": "proj_out", "to_q": "q", "to_k": "k", "to_v": "v"}.items():
                name = name.replace(old, new)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        state["first_stage_model." + name] = tensor
    return state


def clip_text(encoder, prefix):
    state = {
        prefix + "text_model." + name.removeprefix("text_model."): tensor
        for name, tensor in encoder.state_dict().items()
    }
    positions = torch.arange(77)[None]  # real checkpoints hold this buffer
    return state | {prefix + "text_model.embeddings.position_ids": positions}


def open_clip_text(encoder, prefix):
    state, stacked = {}, {}
    for name, tensor in encoder.state_dict().items():
        name = name.removeprefix("text_model.").removeprefix("embeddings.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            name = {"position_embedding.weight": "positional_embedding"}.get(name, name)
            name = name.replace("final_layer_norm", "ln_final")
            if name == "text_projection.weight":
                name, tensor = "text_projection", tensor.T.contiguous()
            state[prefix + name] = tensor
            continue
        number, part, kind = layer.groups()
        block = f"{prefix}transformer.resblocks.{number}."
        if part.split(".")[-1] in ("q_proj", "k_proj", "v_proj"):
            stacked.setdefault(f"{block}attn.in_proj_{kind}", {})[part[-6]] = tensor
            continue
        part = part.replace("layer_norm", "ln_").replace("self_attn", "attn")
        part = part.replace("fc1", "c_fc").replace("fc2", "c_proj")
        state[f"{block}{part}.{kind}"] = tensor
    for key, parts in stacked.items():
        state[key] = torch.cat([parts[k] for k in "qkv"])
    return state


def single_file(pipeline, path, dtype=torch.float32, extra=None, metadata=None):
    """The pipeline as a single file that carries its own configuration."""
    xl = hasattr(pipeline, "text_encoder_2")
    if xl:
        text = clip_text(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        text |= open_clip_text(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.unet.config.use_linear_projection:
        text = open_clip_text(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        text = clip_text(pipeline.text_encoder, "cond_stage_model.transformer.")
    state = text | ldm_unet(pipeline.unet) | ldm_vae(pipeline.vae) | (extra or {})
    config = {
        name: json.loads(getattr(pipeline, name).config.to_json_string())
        for name in ("text_encoder", "text_encoder_2")
        if hasattr(pipeline, name)
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
def clip_folder(tmp_path_factory) -> Path:
    """A transformers CLIPModel as it lies on disk, only small."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPTokenizer,
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


class Server:
    """A running ComfyUI."""

    def __init__(self, port, home, process):
        self.address, self.home, self.process = f"http://127.0.0.1:{port}", home, process

    @property
    def output(self):
        return self.home / "output"

    def get(self, path):
        with urllib.request.urlopen(self.address + path) as answer:
            return answer.read()

    def post(self, path, body=None):
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def queue(self, graph):
        return self.post("/prompt", {"prompt": graph})["prompt_id"]

    def wait(self, prompt, seconds=900):
        """The history entry of a prompt that has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = json.loads(self.get(f"/history/{prompt}"))
            if prompt in history:
                return history[prompt]
            assert self.process.poll() is None, "the server has died"
            time.sleep(0.05)
        raise TimeoutError(f"a prompt ran longer than {seconds} s")

    def run(self, graph, seconds=900):
        """The outputs of a graph that must succeed, and the nodes taken from the cache."""
        entry = self.wait(self.queue(graph), seconds)
        assert entry["status"]["status_str"] == "success", self.error(entry)
        messages = dict(entry["status"]["messages"])
        return entry["outputs"], set(messages["execution_cached"]["nodes"])

    @staticmethod
    def error(entry):
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                return message["exception_message"]
        return ""

    def pixels(self, file):
        query = urllib.parse.urlencode({k: file[k] for k in ("filename", "subfolder", "type")})
        image = Image.open(io.BytesIO(self.get(f"/view?{query}"))).convert("RGB")
        return np.asarray(image, dtype=np.int16)


@contextmanager
def comfyui(home, *arguments, **environment):
    """A ComfyUI that runs on the CPU with the packs in home/custom_nodes and folders of its own.

    COMFYUI_FRONTEND may name a folder with another frontend than the one that it brings.
    """
    for folder in ("custom_nodes", "models/checkpoints", "input", "output", "user"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu", *arguments]
    if os.environ.get("COMFYUI_FRONTEND"):
        command += ["--front-end-root", os.environ["COMFYUI_FRONTEND"]]
    command += ["--port", str(port), "--base-directory", str(home), "--disable-auto-launch"]
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=os.environ["COMFYUI_DIR"],
            env={**os.environ, "REALERA_CACHE": str(home / "cache"), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    made = Server(port, home, process)
    try:
        for _ in range(600):
            assert process.poll() is None, (home / "log.txt").read_text()[-3000:]
            try:
                made.get("/system_stats")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield made
    finally:
        process.terminate()
        process.wait(30)


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
