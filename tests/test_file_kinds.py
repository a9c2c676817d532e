"""Kinds of files: every command recognises them alike, and every layout of a model is read."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from realera.checkpoints.families import family_of
from realera.checkpoints.file_kinds import kind_of
from realera.checkpoints.loading import load_model, load_text
from realera.checkpoints.writing import write_checkpoint, write_lora
from realera.cli import main
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.edit.erasure_file import save_erasure
from realera.storage.safetensors_file import open_tensors
from realera.text.encoding import CONTEXT

UNET = "model.diffusion_model."
TO_K = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def edit(dim):
    g = torch.Generator().manual_seed(3)
    return Edit(torch.randn(dim, 8, generator=g) / dim, torch.randn(8, dim, generator=g))


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def network(dim=768):
    """The fewest tensors of a U-Net that make its family known."""
    return {
        "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(64, dim),
    }


FLUX = {
    "double_blocks.0.img_attn.qkv.weight": torch.ones(8, 8),
    "vector_in.in_layer.weight": torch.ones(8, 16),
    "txt_in.weight": torch.ones(8, 32),
}
FLUX_IN_DIFFUSERS = {
    "single_transformer_blocks.0.proj_mlp.weight": torch.ones(8, 8),
    "time_text_embed.text_embedder.linear_1.weight": torch.ones(8, 16),
    "context_embedder.weight": torch.ones(8, 32),
}


def ones(*names):
    return {name: torch.ones(2, 2) for name in names}


OTHERS = {  # name -> what the file is, tensors that make it that
    "kohya LoRA": ("a LoRA", ["lora_unet_mid_block_attn2_to_k.lora_down.weight"]),
    "peft LoRA": (
        "a LoRA",
        ["transformer.txt_in.lora_A.weight", "transformer.txt_in.lora_B.weight"],
    ),
    "Nunchaku": (
        "a network quantised by Nunchaku (SVDQuant)",
        [
            *FLUX_IN_DIFFUSERS,
            *(f"transformer_blocks.0.mlp_fc1.{n}" for n in ("wscales", "lora_down")),
        ],
    ),
    "OFT": ("an OFT", ["lora_unet_mid_block_attn2_to_k.oft_blocks"]),
    "ControlNet of FLUX": ("a ControlNet", [*FLUX_IN_DIFFUSERS, "controlnet_blocks.0.weight"]),
    "union ControlNet": ("a ControlNet", [*FLUX, "controlnet_mode_embedder.weight"]),
    "lllite": ("a ControlNet", ["lllite_unet_input_blocks_4_1_to_k.down.0.weight"]),
    "IP-Adapter": ("an IP-Adapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
    "CLIP": ("a text encoder", ["text_model.encoder.layers.0.self_attn.k_proj.weight"]),
    "OpenCLIP": ("a text encoder", ["transformer.resblocks.0.attn.in_proj_weight"]),
    "T5": ("a text encoder", ["shared.weight", "encoder.block.0.layer.0.SelfAttention.k.weight"]),
    "Qwen": ("a text encoder", ["model.layers.0.self_attn.k_proj.weight"]),
    "VAE": ("a VAE", ["encoder.conv_in.weight", "decoder.conv_in.weight"]),
    "textual inversion": ("a textual inversion", ["clip_l", "clip_g"]),
}


@pytest.fixture(scope="session")
def strangers(tmp_path_factory, pipelines):
    """name -> (a file that is no model, what every command is to call it)."""
    folder = tmp_path_factory.mktemp("strangers")
    files = {}
    for name, (kind, keys) in OTHERS.items():
        save_file(ones(*keys), folder / name)
        files[name] = folder / name, kind
    unet = pipelines["sd1 one layer"].unet
    for name, state in {
        "ControlNet": ControlNetModel.from_unet(unet).state_dict(),
        "ControlNet in LDM's layout": prefixed("control_model.", network()),
    }.items():
        save_file(state, folder / name)
        files[name] = folder / name, "a ControlNet"
    save_file(pipelines["sd1"].vae.state_dict(), folder / "whole VAE")
    files["whole VAE"] = folder / "whole VAE", "a VAE"
    save_erasure(Erasure({CONTEXT: edit(768)}), folder / "erasure")
    files["erasure"] = folder / "erasure", "a RealEra erasure"
    for name, content, kind in [
        ("page", b"<!DOCTYPE html><title>Sign in</title>", "is a web page"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid x", "is a Git LFS pointer"),
        ("empty", b"", "is empty"),
        ("GGUF", b"GGUF" + bytes(40), "GGUF"),
    ]:
        (folder / name).write_bytes(content)
        files[name] = folder / name, kind
    return files


NAMES = (*OTHERS, "ControlNet", "ControlNet in LDM's layout", "whole VAE", "erasure")
BROKEN = ("page", "pointer", "empty", "GGUF")


@pytest.fixture
def commands(tmp_path, capsys):
    """Runs every command on a file as the model; command -> (exit code, what it printed)."""
    erasure, out = tmp_path / "erasure.safetensors", tmp_path / "out"
    save_erasure(Erasure({CONTEXT: edit(768)}), erasure)

    def run(path, names=("info", "apply", "lora", "erase")):
        lines = {
            "info": ["info", str(path)],
            "apply": ["apply", str(path), str(erasure), str(out)],
            "lora": ["apply", str(path), str(erasure), str(out), "--lora"],
            "erase": ["erase", str(path), "-c", "cat -> dog", "-o", str(out)],
        }
        results = {}
        for name in names:
            code = main(lines[name])
            output = capsys.readouterr()
            results[name] = code, output.out + output.err
            out.unlink() if out.is_file() else None
        return results

    return run


@pytest.mark.parametrize("name", [*NAMES, *BROKEN])
def test_every_command_calls_a_file_that_is_no_model_the_same(strangers, commands, name):
    path, kind = strangers[name]
    results = commands(path)
    code, output = results.pop("info")
    assert code == (1 if name in BROKEN else 0)
    assert kind.removeprefix("a ").removeprefix("an ") in output
    for command, (code, output) in results.items():
        assert code == 1 and kind in output, command
        assert (" and no model: give the checkpoint" in output) == (name not in BROKEN), command


MODELS = {  # name -> what `info` calls it, its tensors, its metadata
    "bare": ("Stable Diffusion 1.x", network(), {}),
    "single file": ("Stable Diffusion 2.x", prefixed(UNET, network(1024)), {}),
    "without model.": ("Stable Diffusion 1.x", prefixed("diffusion_model.", network()), {}),
    "unet.": ("Stable Diffusion 1.x", prefixed("unet.", network()), {}),
    "DDP": ("Stable Diffusion 1.x", prefixed("module." + UNET, network()), {}),
    "compiled": ("Stable Diffusion 1.x", prefixed("_orig_mod.", network()), {}),
    "compiled inside": ("Stable Diffusion 1.x", prefixed(UNET + "_orig_mod.", network()), {}),
    "FLUX": ("FLUX.1", FLUX, {}),
    "FLUX behind transformer.": ("FLUX.1", prefixed("transformer.", FLUX_IN_DIFFUSERS), {}),
    **{
        f"config {text!r}": ("Stable Diffusion 1.x", prefixed(UNET, network()), {"config": text})
        for text in ("", "null", "v1-inference.yaml", '"text"', "[1]", '{"unet": {}}')
    },
    "config of FLUX": ("FLUX.1", FLUX, {"config": "flux.yaml"}),
    "realera that is no JSON": ("Stable Diffusion 1.x", network(), {"realera": "by me"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_command_knows_a_model_in_whatever_layout(tmp_path, commands, name):
    title, state, metadata = MODELS[name]
    source = tmp_path / "in.safetensors"
    save_file({key: tensor.clone() for key, tensor in state.items()}, source, metadata)
    width = 32 if "FLUX" in name else 1024 if title.endswith("2.x") else 768
    save_erasure(Erasure({CONTEXT: edit(width)}), tmp_path / "erasure.safetensors", overwrite=True)
    results = commands(source)
    for command in ("info", "apply", "lora"):
        assert results[command][0] == 0, results[command]
    assert results["info"][1].splitlines()[-1].startswith(title)
    # The file has no text encoder to erase by, and `erase` says so and what to do.
    assert results["erase"][0] == 1
    assert re.search(
        r"(lacks its|without its) text.encoder.*`realera\s+apply`", results["erase"][1]
    )


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("prefix", prefixed("teacher.unet.", network()), r"keys begin with 'teacher\.unet\.'"),
        ("FLUX's prefix", prefixed("student.", FLUX), r"keys begin with 'student\.'"),
        ("refiner", network(1280), "cross-attention over embeddings of 1280 numbers"),
        ("FLUX.2", ones("txt_in.weight", "double_blocks.0.x.weight"), "layer 'txt_in' that"),
        ("part", {key: t for key, t in network().items() if "attn2" in key}, "not a whole U-Net"),
        ("upscaler", ones("model.0.weight"), "no cross-attention K/V projections"),
    ],
)
def test_every_command_refuses_a_network_for_the_same_reason(
    tmp_path, commands, name, state, reason
):
    save_file(state, tmp_path / "in.safetensors")
    for command, (code, output) in commands(tmp_path / "in.safetensors").items():
        assert code == 1 and re.search(reason, output), command


WRAPPED = "_checkpoint_wrapped_module."


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(UNET, "diffusion_model."),
        lambda key: "module." + key,
        lambda key: key.replace(UNET, UNET + "_orig_mod.").replace("first_stage_model.", "vae."),
        # Some of the blocks, as trainers wrap them that save memory.
        lambda key: key.replace("1.1.transformer_blocks.0.", "1.1.transformer_blocks.0." + WRAPPED),
        lambda key: key.replace("output_blocks.3.", "output_blocks.3._fsdp_wrapped_module."),
    ],
    ids=["diffusion_model", "module", "_orig_mod", "checkpointed blocks", "sharded blocks"],
)
def test_a_model_behind_other_prefixes_is_loaded_and_erased_as_it_is(
    tmp_path, pipelines, singles, rename
):
    source = tmp_path / "in.safetensors"
    state = {rename(key): tensor for key, tensor in load_file(singles["sd1 one layer"]).items()}
    save_file(state, source, metadata_of(singles["sd1 one layer"]))
    model, plain = load_model(source), load_model(singles["sd1 one layer"])
    for part in ("network", "vae"):
        expected = getattr(plain, part).state_dict()
        found = getattr(model, part).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert model.text.fingerprint == plain.text.fingerprint
    erasure = Erasure({CONTEXT: edit(32)})
    write_checkpoint(source, erasure, tmp_path / "out")
    write_checkpoint(singles["sd1 one layer"], erasure, tmp_path / "plain")
    found, expected = load_file(tmp_path / "out"), load_file(tmp_path / "plain")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[rename(key)], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("model.diffusion_model.time_embed.0.weight", r"lacks 1 tensors of UNet2D.*time_embedding"),
        ("first_stage_model.decoder.conv_in.weight", r"lacks 1 tensors of Auto.*decoder\.conv_in"),
        ("first_stage_model.", "lacks its vae: no key begins with 'first_stage_model.'"),
        ("cond_stage_model.", "lacks its text_encoder: no key begins with 'cond_stage_model.'"),
        ("model.diffusion_model.input_blocks.0.", "lacks the U-Net's first convolution"),
    ],
)
def test_what_a_checkpoint_lacks_is_named(tmp_path, singles, lost, words):
    state = {k: v for k, v in load_file(singles["sd1"]).items() if not k.startswith(lost)}
    save_file(state, tmp_path / "x.safetensors", metadata_of(singles["sd1"]))
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path / "x.safetensors")


def test_a_file_with_text_encoders_is_not_reported_as_one_without(tmp_path):
    sd3 = ones(UNET + "joint_blocks.0.context_block.attn.qkv.weight") | {
        UNET + "context_embedder.weight": torch.ones(8, 32),
        UNET + "y_embedder.mlp.0.weight": torch.ones(8, 16),
    }
    encoders = ones("text_encoders.clip_g.transformer.x", "text_encoders.clip_l.transformer.x")
    save_file(sd3, tmp_path / "alone")
    save_file(sd3 | encoders, tmp_path / "inside")
    with pytest.raises(ValueError, match=r"is a .* transformer without its text encoders"):
        load_text(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"whose text encoders \(clip_g, clip_l\) .*ComfyUI"):
        load_text(tmp_path / "inside")


def test_a_shard_and_the_folder_of_a_part_are_not_taken_for_a_model(tmp_path, pipelines):
    pipelines["sd1"].unet.save_pretrained(tmp_path / "unet", max_shard_size="400KB")
    shard = min((tmp_path / "unet").glob("*-00001-of-*.safetensors"))
    with pytest.raises(ValueError, match=r"is one of \d+ shards of a model: give the folder"):
        family_of(shard)
    with pytest.raises(ValueError, match="is the folder of a UNet2DConditionModel alone"):
        family_of(tmp_path / "unet")


# --- ControlNets beside the U-Net ----------------------------------------------------------------


def test_the_controlnet_of_a_full_file_is_erased_too(tmp_path, singles, capsys):
    """It reads the same text; the LoRA, trained for the U-Net's own layers, stays out of it."""
    state = load_file(singles["sd1 one layer"])
    control = "control_model." + TO_K.removeprefix(UNET)
    state[control] = 2 * state[TO_K]
    state["control_model.input_hint_block.0.weight"] = torch.ones(2)
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(state, source, metadata_of(singles["sd1 one layer"]))
    assert main(["info", str(source)]) == 0
    assert "with a ControlNet, which reads the same text" in capsys.readouterr().out
    layer = TO_K.removeprefix(UNET).removesuffix(".weight")
    erasure = Erasure({CONTEXT: edit(32)}, {layer: (torch.ones(1, 32), torch.ones(32, 1))})
    write_checkpoint(source, erasure, out)
    found, edited = load_file(out), Erasure(erasure.edits)
    assert torch.equal(found[TO_K], erasure.erased_weight(layer, state[TO_K]))
    assert torch.equal(found[control], edited.erased_weight(layer, state[control]))
    write_lora(source, erasure, tmp_path / "lora")
    write_lora(singles["sd1 one layer"], erasure, tmp_path / "plain")
    assert Path(tmp_path / "lora").read_bytes() == Path(tmp_path / "plain").read_bytes()


def test_the_controlnet_of_a_folder_is_erased_too(tmp_path, pipelines):
    parts = pipelines["sd1 one layer"].components
    controlnet = ControlNetModel.from_unet(parts["unet"])
    pipeline = StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet, requires_safety_checker=False
    )
    pipeline.save_pretrained(tmp_path / "in")
    (tmp_path / "in/controlnet/diffusion_pytorch_model.bin").write_bytes(b"the unerased one")
    erasure = Erasure({CONTEXT: edit(32)})
    write_checkpoint(tmp_path / "in", erasure, tmp_path / "out")
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    old, new = load_file(tmp_path / "in" / weights), load_file(tmp_path / "out" / weights)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {key for key in old if re.search(r"attn2\.to_[kv]\.weight", key)}
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    expected = erasure.erased_weight(
        "middle_block.1.transformer_blocks.0.attn2.to_k", old[f"{key}.weight"]
    )
    assert torch.equal(new[f"{key}.weight"], expected)
    assert (tmp_path / "out/controlnet/config.json").is_file()
    assert not list((tmp_path / "out").rglob("*.bin"))
    load_model(tmp_path / "out")


def test_a_model_is_none_of_the_other_kinds(singles):
    for path in singles.values():
        assert kind_of(open_tensors(path)) is None
