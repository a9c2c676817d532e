"""A model of another family is never erased: each is known by its layers and called by its name."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from realera.checkpoints.families import family_of
from realera.checkpoints.loading import load_model, load_text
from realera.checkpoints.writing import write_checkpoint, write_lora
from realera.cli import main
from realera.edit.closed_form import Edit, Sums
from realera.edit.erasure import UNET, Erasure, affected_layers
from realera.edit.erasure_file import load_erasure, save_erasure
from realera.edit.text_layers import UNCOVERED, family_in, text_layers, trained_layers
from realera.text.encoding import CONTEXT
from realera.training.lora import with_lora

HERE = Path(__file__).parent
LISTED = json.loads((HERE / "comfyui_layers.json").read_text("utf-8"))
SD1, SD2, SDXL = (f"Stable Diffusion {name}" for name in ("1.x", "2.x", "XL"))
TITLES = {  # of the classes that ComfyUI 0.33.0 lists, those of a U-Net by their rows
    "LotusD": "Lotus",
    "Stable_Zero123": "Stable Zero123",
    "SD15_instructpix2pix": SD1,
    "SD15": SD1,
    "SD20": SD2,
    **dict.fromkeys(("SDXL_instructpix2pix", "SDXL", "SSD1B", "KOALA_700M", "KOALA_1B"), SDXL),
    "Segmind_Vega": SDXL,
}


def sample(layers):
    """Tensors with the names and the columns of some layers."""
    shapes = {name: (2, 4, 1, 1) if columns is None else (2, columns) for name, columns in layers}
    return {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


def erasure_for(dim, family=None):
    factors = torch.ones(dim, 1), torch.ones(1, dim)
    return Erasure(
        {CONTEXT: Edit(*factors)}, provenance={} if family is None else {"family": family}
    )


@pytest.mark.parametrize("kind", LISTED)
def test_info_names_the_family_of_every_model_that_comfyui_lists(kind, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file(sample(LISTED[kind]["layers"].items()), path)
    title = TITLES.get(kind, LISTED[kind]["said"])
    code = main(["info", str(path)])
    said = "".join(capsys.readouterr())
    refused = {known["title"]: known["reason"] for known in UNCOVERED}
    if title in refused:
        assert code != 0 and f"is {title}: {refused[title]}" in said
    else:
        assert code == 0 and said.startswith(f"{title}, ")


@pytest.mark.parametrize("kind", LISTED)
def test_apply_refuses_what_info_refuses_and_writes_nothing(kind, tmp_path):
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(sample(LISTED[kind]["layers"].items()), path)
    try:
        family_of(path)
    except ValueError as error:
        for dim in {columns for columns in LISTED[kind]["layers"].values() if columns}:
            for write in (write_checkpoint, write_lora):
                with pytest.raises(ValueError) as refused:
                    write(path, erasure_for(dim), out)
                assert str(refused.value) == str(error)
        assert [*tmp_path.iterdir()] == [path]


VERSION = Path(os.environ.get("COMFYUI_DIR", ""), "comfyui_version.py")


@pytest.mark.skipif(
    not (VERSION.is_file() and '"0.33.0"' in VERSION.read_text("utf-8")),
    reason="COMFYUI_DIR names no ComfyUI 0.33.0, of which the record is",
)
def test_the_record_is_of_the_models_that_comfyui_lists():
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    script = HERE / "comfyui_layers.py"
    ran = subprocess.run([python, script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout) == LISTED


class Reader(nn.Module):
    """A network with a layer of each name, which reads `columns` numbers."""

    def __init__(self, names, columns):
        super().__init__()
        for name in names:
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.add_module(last, nn.Linear(columns, 2, bias=False))


CHROMA = ("double_blocks.0.img_attn.qkv", "distilled_guidance_layer.in_proj", "txt_in")


def test_an_erasure_is_applied_to_its_own_family_alone(tmp_path):
    """A Chroma erasure and T5's rows in FLUX.1 have the same 4,096 numbers (W5)."""
    network, path = Reader(CHROMA, 64), tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    own, older, other, unet = (erasure_for(64, name) for name in ("chroma", None, "sd3", UNET))
    for fits in (own, older):
        write_checkpoint(path, fits, tmp_path / "erased.safetensors", overwrite=True)
        write_lora(path, fits, tmp_path / "lora.safetensors", overwrite=True)
        assert [*affected_layers(fits, network)] == ["txt_in"]
    for wrong, title in ((other, "Stable Diffusion 3 and 3.5"), (unet, "a U-Net")):
        match = f"made for {title} and the model is Chroma"
        with pytest.raises(ValueError, match=match):
            write_checkpoint(path, wrong, tmp_path / "out.safetensors")
        with pytest.raises(ValueError, match=match):
            write_lora(path, wrong, tmp_path / "out.safetensors")
        with pytest.raises(ValueError, match=match):
            affected_layers(wrong, network)
    assert not (tmp_path / "out.safetensors").exists()


KLEIN = "double_stream_modulation_img.lin"
WRONG = {  # layers of a file, made for, width of the erasure -> what is wrong
    "klein erasure on dev": (
        [KLEIN, "txt_in", "guidance_in.in_layer"],
        ("flux2_klein", 8),
        r"made for FLUX\.2 klein and the model is FLUX\.2 dev",
    ),
    "klein 4B erasure on 9B": (
        [KLEIN, "txt_in"],
        ("flux2_klein", 4),
        r"embeddings of 4 numbers and txt_in reads 8: .* the size that its text encoder is for",
    ),
    "Krea 2 without its fusion": (
        ["txtmlp.0", "txtmlp.1"],
        ("krea2", 8),
        r"is a Krea 2 without its text fusion: it lacks txtfusion .*: get the whole checkpoint",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_an_erasure_is_not_for_is_refused_and_nothing_written(case, tmp_path):
    layers, (made_for, dim), match = WRONG[case]
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(sample((name, 8) for name in layers), path)
    for write in (write_checkpoint, write_lora):
        with pytest.raises(ValueError, match=match):
            write(path, erasure_for(dim, made_for), out)
    assert [*tmp_path.iterdir()] == [path]


def test_no_erasure_is_made_of_prompts_that_hold_the_tokens_of_an_image(tmp_path):
    (tmp_path / "transformer").mkdir()
    layers = ["transformer_blocks.0.img_mod.1", "txt_norm", "txt_in", "img_in"]
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(sample((name, 64) for name in layers), weights)
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    for load in (load_model, load_text):
        with pytest.raises(ValueError, match=r"tokens of an image: .* QwenImagePipeline of Qwen"):
            load(tmp_path)


def test_the_index_of_an_erased_folder_does_not_lead_to_the_network_that_was_not_erased(tmp_path):
    """That of a modular pipeline says where every part was loaded from."""
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "transformer").mkdir(parents=True)
    weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
    layers = ("early_stream_modulations.image.linear", "context_embedder")
    save_file(sample((name, 8) for name in layers), weights)
    place = {"pretrained_model_name_or_path": "someone/original", "subfolder": ""}
    index = {name: [None, None, place] for name in ("transformer", "vae")}
    (source / "modular_model_index.json").write_text(json.dumps(index))
    write_checkpoint(source, erasure_for(8, "flux3_klein"), out)
    copied = json.loads((out / "modular_model_index.json").read_text())
    here = {"pretrained_model_name_or_path": None, "subfolder": "transformer"}
    assert copied == {**index, "transformer": [None, None, here]}


ANIMA = [f"blocks.{n}.cross_attn.{part}_proj" for n in (0, 1, 10) for part in "kv"]


def test_the_layers_of_every_block_are_erased_and_those_of_the_part_in_front_are_not(tmp_path):
    """Anima's, whose keys begin with "net."; llm_adapter has layers of the same names."""
    others = ("llm_adapter.embed", "llm_adapter.blocks.0.cross_attn.k_proj", "blocks.0.mlp.layer1")
    network, path = Reader([*ANIMA, *others], 8), tmp_path / "anima.safetensors"
    assert [*text_layers(network)] == ANIMA and [*trained_layers(network)] == ANIMA
    state = {f"net.{key}": tensor for key, tensor in network.state_dict().items()}
    save_file(state, path)
    erasure = erasure_for(8, "anima")
    write_checkpoint(path, erasure, tmp_path / "erased.safetensors")
    erased = load_file(tmp_path / "erased.safetensors")
    changed = [key for key in state if not torch.equal(state[key], erased[key])]
    assert changed == [f"net.{name}.weight" for name in ANIMA]
    write_lora(path, erasure, tmp_path / "lora.safetensors")
    lora = load_file(tmp_path / "lora.safetensors")
    assert {key.partition(".lora_")[0] for key in lora} == {f"diffusion_model.{n}" for n in ANIMA}
    with with_lora(network, 1, 0) as trained:
        assert [*trained] == ANIMA
    for load in (load_model, load_text):
        with pytest.raises(ValueError, match=r"make the erasure in ComfyUI; `realera apply`"):
            load(path)


def test_an_erasure_file_keeps_the_family_and_a_merge_refuses_two(tmp_path):
    save_erasure(erasure_for(8, "chroma"), tmp_path / "erasure.safetensors")
    loaded = load_erasure(tmp_path / "erasure.safetensors")
    assert loaded.family == "chroma"
    merged = replace(loaded, provenance={"merged": [loaded.provenance, {}]})
    assert merged.family == "chroma"
    assert erasure_for(8).family is None
    sums = Sums.zeros(8).add_erased(torch.eye(8), torch.zeros(8, 8))
    one, other = (
        Erasure.fit({CONTEXT: sums}, provenance={"family": name}) for name in ("chroma", "flux1")
    )
    with pytest.raises(ValueError, match="different model families"):
        Erasure.merge([one, other])


def test_a_network_that_no_edit_covers_is_refused_by_its_name():
    """In ComfyUI, where an Ovis-Image MODEL has the txt_in of FLUX.1."""
    names = ("double_blocks.0.img_mlp.gate_proj", "txt_norm", "txt_in")
    with pytest.raises(ValueError, match="is Ovis-Image: "):
        text_layers(Reader(names, 128))


def test_families_of_the_same_layers_are_told_by_what_the_layers_read():
    for columns, family in ((128, "mage_flow"), (64, "qwen_image")):
        names = ("transformer_blocks.0.img_mod.1", "txt_norm", "txt_in", "img_in")
        assert family_in(Reader(names, columns)) == family
    names = ("text_embeddings.in_layer", "pooled_text_embeddings.in_layer")
    names += ("visual_embeddings.in_layer",)
    assert family_in(Reader(names, 64)) == "kandinsky5"
    with pytest.raises(ValueError, match="is Kandinsky 5 Video: "):
        text_layers(Reader(names, 132))


def test_the_reader_of_a_quantised_file_is_erased_where_it_is_not_quantised_itself(tmp_path):
    """FLUX.3 klein as ComfyUI has it, int8 with a rotation in other layers."""
    state = {
        "early_stream_modulations.image.lin.weight": torch.ones(6, 4, dtype=torch.int8),
        "early_stream_modulations.image.lin.weight_scale": torch.ones(6, 1),
        "early_stream_modulations.image.lin.comfy_quant": torch.ones(9, dtype=torch.uint8),
        "txt_in.weight": torch.ones(4, 8, dtype=torch.bfloat16),
    }
    path, out = tmp_path / "model.safetensors", tmp_path / "erased.safetensors"
    save_file(state, path)
    assert family_of(path).name == "flux3_klein"
    write_checkpoint(path, erasure_for(8, "flux3_klein"), out)
    erased = load_file(out)
    assert [key for key in state if not torch.equal(state[key], erased[key])] == ["txt_in.weight"]
    assert all(erased[key].dtype == state[key].dtype for key in state)
    save_file({**state, "txt_in.weight": torch.ones(4, 8, dtype=torch.int8)}, path)
    with pytest.raises(ValueError, match=r"'txt_in.weight' .* is I8 .*: quantised"):
        write_checkpoint(path, erasure_for(8, "flux3_klein"), out, overwrite=True)


@pytest.mark.parametrize("dim", [12288, 15360, 20480])
def test_an_erasure_of_the_widest_family_is_read_again(dim, tmp_path):
    """The context of FLUX.2 klein 9B, FLUX.2 dev and FLUX.3, layers of the encoder side by side."""
    save_erasure(erasure_for(dim), tmp_path / "erasure.safetensors")
    assert load_erasure(tmp_path / "erasure.safetensors").edits[CONTEXT].dim == dim
