"""Layouts of files in the wild: scaled fp8, other tools, folders."""

import json
import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from realera.checkpoints.families import FAMILIES, family_of, open_network
from realera.checkpoints.fp8_scales import weight_of
from realera.checkpoints.loading import load_model, load_text
from realera.checkpoints.writing import write_checkpoint, write_lora
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.pipelines.unet import DiffusersModel
from realera.storage.safetensors_file import (
    Entry,
    header_bytes,
    open_tensors,
    raw_bytes,
    write_tensors,
)
from realera.text.encoding import CONTEXT

UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
TO_K = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k"
DIM = {"sd1": 32, "sd1 one layer": 32, "sdxl": 96}


def make_erasure(name="sd1", size=1.0):
    """T = size (I + noise), with a LoRA on one layer."""
    g = torch.Generator().manual_seed(3)
    dim = DIM[name]
    edit = Edit.from_matrix(size * (torch.eye(dim) + torch.randn(dim, dim, generator=g) / dim))
    lora = (torch.randn(2, dim, generator=g), size * torch.randn(32, 2, generator=g) / 10)
    return Erasure({CONTEXT: edit}, {TO_K.removeprefix(UNET): lora}, provenance={"seed": 7})


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def state_of(model):
    """Every weight of a loaded model."""
    parts = {"unet": model.network, "vae": model.vae}
    parts |= {f"text {n}": encoder for n, encoder in enumerate(model.text.encoders)}
    return {f"{p} {k}": t for p, part in parts.items() for k, t in part.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


# --- scaled fp8 ----------------------------------------------------------------------------------


SCALES = {  # of a weight's key -> the keys beside it; the first is its scale
    "scale_weight": ("scale_weight", "scale_input"),
    "weight_scale": ("weight_scale", "input_scale", "comfy_quant"),
}


def scaled(source, folder, names, fp8=torch.float8_e4m3fn, rows=False, scale_dtype=torch.float32):
    """The file in scaled fp8, and what it holds written out in float32.

    names: of what lies beside a weight; rows: one scale a row; half of the scales come before their
    weights and half after.
    """
    small, plain = {}, {}
    largest = torch.finfo(fp8).max
    for n, (key, tensor) in enumerate(load_file(source).items()):
        plain[key] = tensor
        if tensor.ndim != 2 or not key.endswith((".to_k.weight", ".to_v.weight", "fc1.weight")):
            small[key] = tensor
            continue
        peak = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().amax()
        scale = (peak / largest).to(scale_dtype)
        stored = (tensor / scale.float()).clamp(-largest, largest).to(fp8)
        plain[key] = stored.float() * scale.float()
        beside = dict.fromkeys(names, torch.tensor(1.0)) | {names[0]: scale}
        if "comfy_quant" in names:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            beside["comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        module = key.removesuffix("weight")
        pairs = [(key, stored), *((module + name, value) for name, value in beside.items())]
        small |= dict(pairs[:: -1 if n % 2 else 1])
    if "scale_weight" in names:
        small[UNET + "scaled_fp8"] = torch.zeros(0, dtype=fp8)
    metadata = metadata_of(source)
    write_tensors(folder / "scaled.safetensors", small, metadata)
    write_tensors(folder / "plain.safetensors", plain, metadata)
    return folder / "scaled.safetensors", folder / "plain.safetensors"


MAKES = [
    ("sd1 one layer", SCALES["scale_weight"], {}),
    ("sd1 one layer", SCALES["weight_scale"], {"fp8": torch.float8_e5m2}),
    ("sd1 one layer", ("weight_scale",), {"rows": True}),
    ("sdxl", SCALES["scale_weight"], {"scale_dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("name", "names", "make"), MAKES)
def test_a_scaled_file_loads_as_what_file_and_scale_say_together(
    tmp_path, singles, name, names, make
):
    small, plain = scaled(singles[name], tmp_path, names, **make)
    assert_same(state_of(load_model(small)), state_of(load_model(plain)))
    assert load_text(small).fingerprint == load_text(plain).fingerprint
    assert family_of(small).dtype == make.get("fp8", torch.float8_e4m3fn)


@pytest.mark.parametrize(("name", "names", "make"), MAKES)
def test_the_lora_of_a_scaled_file_is_that_of_its_weights(tmp_path, singles, name, names, make):
    small, plain = scaled(singles[name], tmp_path, names, **make)
    loras = []
    for source in (small, plain):
        write_lora(source, make_erasure(name), tmp_path / "x", overwrite=True)
        loras.append(load_file(tmp_path / "x"))
    assert loras[0].keys() == loras[1].keys()
    for key in loras[0]:
        if key.endswith("up.weight"):
            assert loras[0][key].dtype == torch.float16
            down = key.replace("lora_up", "lora_down")
            ours, theirs = (lora[key].float() @ lora[down].float() for lora in loras)
            assert (ours - theirs).norm() < 2e-3 * theirs.norm()


@pytest.mark.parametrize(("name", "names", "make"), MAKES)
@pytest.mark.parametrize("size", [0.3, 30.0])
def test_a_scaled_file_is_erased_in_its_layout_to_the_rounding_of_fp8(
    tmp_path, singles, name, names, make, size
):
    small, plain = scaled(singles[name], tmp_path, names, **make)
    erasure = make_erasure(name, size)
    write_checkpoint(small, erasure, tmp_path / "out.safetensors")
    ours, theirs = open_tensors(tmp_path / "out.safetensors"), open_tensors(small)
    assert list(ours.entries.items()) == list(theirs.entries.items())  # order, dtypes, places
    fp8 = torch.finfo(make.get("fp8", torch.float8_e4m3fn))
    erased, kept, renewed = set(), 0, 0
    _, ((_, keys),) = open_network(small)
    for key, layer in keys.items():
        expected = erasure.erased_weight(layer, open_tensors(plain).read(key))
        if key.endswith("label_emb.0.0.weight"):
            continue  # which is not scaled, and not erased either
        scale = key.removesuffix("weight") + names[0]
        before, after = theirs.read(scale).float(), ours.read(scale).float()
        fits = expected.abs().amax(dim=1, keepdim=True).reshape(-1)[: before.numel()]
        if before.numel() == 1:
            fits = expected.abs().amax().reshape(1)
        fits = (fits <= before.reshape(-1) * fp8.max).reshape(before.shape)
        assert torch.equal(after[fits], before[fits]) and (after[~fits] > before[~fits]).all()
        kept, renewed = kept + int(fits.sum()), renewed + int((~fits).sum())
        error = (weight_of(ours, key) - expected).abs()
        # Half a step, which is `eps` of the number, and of the smallest one near zero; a scale in
        # bfloat16 may lie half a step of its own below the one that the largest number needs.
        edge = 1.01 if "scale_dtype" in make else 1.0001
        bound = torch.maximum(expected.abs() * fp8.eps / 2, after * fp8.tiny * fp8.eps / 2)
        assert (error <= bound * edge).all()
        erased |= {key, scale}
    assert erased and (renewed if size > 1 else kept)
    for key in theirs.entries.keys() - erased:
        assert raw_bytes(ours.read(key)) == raw_bytes(theirs.read(key))


@pytest.mark.parametrize(
    ("beside", "value"),
    [
        ("weight_scale_2", torch.tensor(1.0)),  # nvfp4
        ("weight_scale_inv", torch.ones(1, 1)),  # blocks, as DeepSeek has it
        ("pre_quant_scale", torch.ones(32)),
        ("weight_s_rel", torch.ones(32, 2)),
        ("weight_zero_point", torch.tensor(0.0)),
        ("weight.absmax", torch.ones(4)),  # bitsandbytes
        ("scales", torch.ones(4)),
        ("weight_scale", torch.ones(2, 2)),  # of blocks
        ("weight_scale", torch.ones(32)),  # of rows or of columns?
        ("weight_scale", torch.ones(32, 1, dtype=torch.uint8)),  # mxfp8
    ],
)
def test_scales_that_are_not_understood_are_refused_by_name(tmp_path, singles, beside, value):
    state = load_file(singles["sd1 one layer"])
    source = tmp_path / "in.safetensors"
    save_file(state | {f"{TO_K}.{beside}": value}, source, metadata_of(singles["sd1 one layer"]))
    name = re.escape(beside)
    for act in (
        lambda: write_checkpoint(source, make_erasure(), tmp_path / "out"),
        lambda: write_lora(source, make_erasure(), tmp_path / "out"),
        lambda: load_model(source),
    ):
        with pytest.raises(ValueError, match=rf"in\.safetensors.*{name}"):
            act()
    # Beside a weight of another part too.
    layer = TEXT + "encoder.layers.0.mlp.fc1"
    save_file(state | {f"{layer}.{beside}": value}, source, metadata_of(singles["sd1 one layer"]))
    with pytest.raises(ValueError, match=rf"in\.safetensors.*{name}"):
        load_text(source)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("other", ["weight._data", "qweight", "base_layer.weight"])
def test_one_layer_under_other_names_is_refused_and_never_left_unerased(tmp_path, singles, other):
    state, source = load_file(singles["sd1 one layer"]), tmp_path / "in.safetensors"
    weight = state.pop(f"{TO_K}.weight")
    save_file(
        state | {f"{TO_K}.{other}": weight.to(torch.int8)},
        source,
        metadata_of(singles["sd1 one layer"]),
    )
    for act in (
        lambda: write_checkpoint(source, make_erasure(), tmp_path / "out"),
        lambda: write_lora(source, make_erasure(), tmp_path / "out"),
        lambda: family_of(source),
    ):
        with pytest.raises(ValueError, match=rf"attn2\.to_k reads the text and has .*{other}'"):
            act()


def test_attention_by_convolutions_is_called_that_and_not_quantised(tmp_path, singles):
    state, source = load_file(singles["sd1 one layer"]), tmp_path / "in.safetensors"
    state[f"{TO_K}.weight"] = state[f"{TO_K}.weight"][..., None, None].clone()
    save_file(state, source, metadata_of(singles["sd1 one layer"]))
    with pytest.raises(ValueError, match=r", 1, 1\], a convolution") as refusal:
        family_of(source)
    assert "quantised" not in str(refusal.value)


def test_two_scales_of_one_weight_and_scales_of_nothing_are_refused(tmp_path, singles):
    state, source = load_file(singles["sd1 one layer"]), tmp_path / "in"
    metadata = metadata_of(singles["sd1 one layer"])
    save_file(state | {f"{TO_K}.{s}": torch.tensor(1.0) for s in SCALES}, source, metadata)
    with pytest.raises(ValueError, match=r"'(scale_weight|weight_scale)'"):
        write_checkpoint(source, make_erasure(), tmp_path / "out")
    for value in (0.0, -1.0, float("nan")):
        save_file(state | {TO_K + ".weight_scale": torch.tensor(value)}, source, metadata)
        with pytest.raises(ValueError, match=r"to_k\.weight_scale' holds .* not positive"):
            write_checkpoint(source, make_erasure(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- numbers that cannot be computed with --------------------------------------------------------


def with_raw(source, path, dtype, key, shape):
    """The file with one more tensor, or another in a key's place, of any data type: zeros."""
    file, entries, position, data = open_tensors(source), {}, 0, []
    size = 2 * shape[0] * shape[1] if dtype == "U16" else shape[0] * shape[1] // 2
    for name in {**file.entries, key: None}:
        if name == key:
            chunk, kind = bytes(size), (dtype, tuple(shape))
        else:
            tensor = file.read(name).contiguous()
            chunk = tensor.flatten().view(torch.uint8).numpy().tobytes()
            kind = (file.entries[name].dtype, file.entries[name].shape)
        entries[name] = Entry(*kind, position, position + len(chunk))
        position += len(chunk)
        data.append(chunk)
    path.write_bytes(header_bytes(file.metadata, entries) + b"".join(data))
    return path


@pytest.mark.parametrize("dtype", ["U16", "F4"])
def test_a_type_that_nobody_edits_is_copied_and_one_that_is_edited_refused(
    tmp_path, singles, dtype
):
    source = singles["sd1 one layer"]
    for extra in ("histogram", "cond_stage_model.histogram"):
        path = with_raw(source, tmp_path / "in.safetensors", dtype, extra, [8, 4])
        write_checkpoint(path, make_erasure(), tmp_path / "out", overwrite=True)
        entry = open_tensors(tmp_path / "out").entries[extra]
        assert (entry.dtype, entry.shape) == (dtype, (8, 4))
        assert_same(state_of(load_model(path)), state_of(load_model(source)))
    path = with_raw(source, tmp_path / "in.safetensors", dtype, TO_K + ".weight", [32, 32])
    for act in (write_checkpoint, write_lora):
        with pytest.raises(ValueError, match=rf"to_k\.weight' in .*in\.safetensors is {dtype}"):
            act(path, make_erasure(), tmp_path / "new")
    key = TEXT + "encoder.layers.0.mlp.fc1.weight"
    path = with_raw(source, tmp_path / "in.safetensors", dtype, key, [64, 32])
    with pytest.raises(ValueError, match=rf"in\.safetensors: tensor '{key}' is {dtype}"):
        load_text(path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_blamed_on_the_checkpoint_by_tensor(
    tmp_path, singles, folders, bad
):
    state = load_file(singles["sd1"])
    state[TO_K + ".weight"][3, 5] = bad
    source = tmp_path / "in.safetensors"
    save_file(state, source, metadata_of(singles["sd1"]))
    message = rf"in\.safetensors: tensor '{TO_K}.weight' holds numbers that are not finite"
    with pytest.raises(ValueError, match=message):
        write_checkpoint(source, make_erasure(), tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        write_lora(source, make_erasure(), tmp_path / "out")
    with pytest.raises(ValueError, match=rf"^\S*{message}"):
        load_model(source)
    shutil.copytree(folders["sd1"], tmp_path / "folder")
    weights = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    state[key][0, 0] = bad
    save_file(state, weights)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{key}' holds"):
        write_checkpoint(tmp_path / "folder", make_erasure(), tmp_path / "out")
    with pytest.raises(ValueError, match=rf"unet: tensor '{key}' holds"):
        load_model(tmp_path / "folder")
    assert not (tmp_path / "out").exists()


def test_a_model_that_predicts_by_another_rule_is_refused_and_still_edited(
    tmp_path, singles, folders
):
    state = load_file(singles["sdxl"])
    for marker in ("edm_mean", "edm_vpred.sigma_max"):
        source = tmp_path / f"{marker}.safetensors"
        save_file(state | {marker: torch.zeros(1)}, source, metadata_of(singles["sdxl"]))
        with pytest.raises(ValueError, match=rf"{marker}.* predicts by the EDM rule"):
            load_model(source)
        write_checkpoint(source, make_erasure("sdxl"), tmp_path / f"out {marker}")
    shutil.copytree(folders["sdxl"], tmp_path / "folder")
    scheduler = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    with pytest.raises(ValueError, match="folder predicts by the EDM rule"):
        load_model(tmp_path / "folder")


def test_an_overflow_of_float16_names_the_tensor_and_what_would_work(tmp_path, singles):
    half = {
        key: t.half() if t.is_floating_point() else t
        for key, t in load_file(singles["sd1"]).items()
    }
    save_file(half, tmp_path / "in", metadata_of(singles["sd1"]))
    with pytest.raises(ValueError, match=r"in: tensor .*attn2.* beyond F16 .* float32"):
        write_checkpoint(tmp_path / "in", make_erasure(size=1e7), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- text encoders -------------------------------------------------------------------------------


def renamed(state, old, new):
    return {re.sub(old, new, key): tensor for key, tensor in state.items()}


def clip_names(state, encoder, home):
    """OpenCLIP's text encoder in a file, under transformers' names instead."""
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(home)}
    theirs = {
        home + "transformer.text_model." + name.removeprefix("text_model."): tensor.clone()
        for name, tensor in encoder.state_dict().items()
        if not name.startswith("text_projection")
    }
    return kept | theirs


def layouts(name, state, pipeline):
    """What ComfyUI's loader reads for the family (comfy/supported_models.py), by a word for it."""
    if name == "sd1":
        yield "no text_model", renamed(state, r"(transformer\.)text_model\.", r"\1")
        positions = TEXT + "embeddings.position_ids"
        yield "fractions", state | {positions: torch.arange(77)[None] - 0.01}
        yield "half", state | {positions: torch.arange(77)[None].half()}
        yield "no positions", {key: t for key, t in state.items() if key != positions}
        projection = {"cond_stage_model.transformer.text_projection.weight": torch.eye(32)}
        yield "projection", state | projection | {"cond_stage_model.logit_scale": torch.tensor(4.6)}
    elif name == "sd2":
        yield "sgm", renamed(state, r"^cond_stage_model\.model", "conditioner.embedders.0.model")
        yield "names", clip_names(state, pipeline.text_encoder, "cond_stage_model.model.")
        mask = {"cond_stage_model.model.attn_mask": torch.full((77, 77), -torch.inf).triu(1)}
        yield "mask", state | mask
    else:
        home = "conditioner.embedders.1.model."
        projection = state[home + "text_projection"]
        rest = {key: t for key, t in state.items() if key != home + "text_projection"}
        weight = projection.T.contiguous()
        yield "projection", rest | {home + "text_projection.weight": weight}
        names = clip_names(state, pipeline.text_encoder_2, home)
        yield "names", names | {home + "transformer.text_projection.weight": weight}
        yield "names, OpenCLIP's projection", names | {home + "text_projection": projection}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_layout_of_a_text_encoder_that_comfyui_reads_is_read(
    tmp_path, pipelines, singles, name
):
    theirs = DiffusersModel(pipelines[name]).text.fingerprint
    found = list(layouts(name, load_file(singles[name]), pipelines[name]))
    for word, state in found:
        save_file(state, tmp_path / "x", metadata_of(singles[name]))
        assert load_text(tmp_path / "x").fingerprint == theirs, word


# --- folders -------------------------------------------------------------------------------------


def pickled(folder, name):
    """A part's weights as a pickle, as they were before safetensors."""
    (path,) = folder.glob("*.safetensors")
    torch.save(load_file(path), folder / name)
    path.unlink()


def with_pickled_parts(source, target):
    shutil.copytree(source, target)
    pickled(target / "vae", "diffusion_pytorch_model.bin")
    pickled(target / "text_encoder", "pytorch_model.bin")
    return target


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_parts_that_are_not_edited_travel_as_they_are_and_the_unerased_unet_never(
    tmp_path, pipelines, folders
):
    source = with_pickled_parts(folders["sd1"], tmp_path / "in")
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "model.onnx").write_bytes(b"not ours to judge")
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    shared = files_in(source) - {"unet/diffusion_pytorch_model.safetensors"}
    harmless = {"unet/README.md", "LICENSE", "samples/cat.png", "unet/notes.txt", ".gitattributes"}
    original = {"README.md"}  # describes it
    unerased = {
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "model.gguf",
        "all.zip",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model-00001-of-00002.bin",
        "unet/diffusion_pytorch_model.bin.index.json",
        "unet/diffusion_flax_model.msgpack",
        "unet/model.onnx",
        "unet/model.onnx_data",
        "unet/openvino_model.xml",
        "unet/old/weights.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
        "original/weights.pth",
        ".git/lfs/objects/ab/cd/abcd",
        ".cache/huggingface/blob",
    }
    for name in harmless | unerased | original:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")
    write_checkpoint(source, make_erasure(), tmp_path / "out")
    out = tmp_path / "out"
    assert files_in(out) == shared | harmless | {"unet/diffusion_pytorch_model.safetensors"}
    for name in shared | harmless:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    # diffusers, which opens such pickles, loads the copy.
    write_checkpoint(folders["sd1"], make_erasure(), tmp_path / "expected")
    theirs = load_model(tmp_path / "expected")
    loaded = StableDiffusionPipeline.from_pretrained(
        out, local_files_only=True, safety_checker=None, feature_extractor=None
    )
    assert_same(state_of(DiffusersModel(loaded)), state_of(theirs))
    # We open none, and say how to get rid of them.
    for load in (load_text, load_model):
        with pytest.raises(ValueError, match=r"text_encoder.*\.bin is a pickle.*save_pretrained"):
            load(out)
    shutil.rmtree(out / "text_encoder")
    shutil.copytree(folders["sd1"] / "text_encoder", out / "text_encoder")
    with pytest.raises(ValueError, match=r"vae.*\.bin is a pickle.*save_pretrained"):
        load_model(out)


def test_a_linked_part_is_copied_with_its_content(tmp_path, folders):
    shutil.copytree(folders["sd1"], tmp_path / "in")
    shutil.move(tmp_path / "in" / "vae", tmp_path / "shared")
    (tmp_path / "in" / "vae").symlink_to(tmp_path / "shared")
    write_checkpoint(tmp_path / "in", make_erasure(), tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(folders["sd1"])
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("model_index.json", r"lacks model_index\.json"),
        ("vae", "lacks vae/"),
        ("tokenizer", "lacks tokenizer/"),
        ("unet/diffusion_pytorch_model-00002-of-*.safetensors", "lacks shard 2 of"),
    ],
)
def test_a_folder_whose_copy_could_not_be_loaded_is_refused_before_writing(
    tmp_path, pipelines, folders, lost, named
):
    source = tmp_path / "in"
    shutil.copytree(folders["sd1"], source)
    shutil.rmtree(source / "unet")
    pipelines["sd1"].unet.save_pretrained(source / "unet", max_shard_size="400KB")
    for path in source.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=rf"in.* {named}"):
        write_checkpoint(source, make_erasure(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_space_for_a_folder_counts_all_that_is_written(tmp_path, folders, monkeypatch):
    source = with_pickled_parts(folders["sd1"], tmp_path / "in")
    total = sum((source / name).stat().st_size for name in files_in(source))
    unet = (source / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert total > 2 * unet
    for free, enough in ((unet + 1000, False), (total - 1, False), (total, True)):
        usage = shutil._ntuple_diskusage(10**9, 10**9, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if enough:
            write_checkpoint(source, make_erasure(), tmp_path / "out")
        else:
            with pytest.raises(OSError, match="are to be written"):
                write_checkpoint(source, make_erasure(), tmp_path / "out")
            assert not (tmp_path / "out").exists()


def older_names(folder):
    """model.fp16-00001-of-00003.safetensors -> model-00001-of-00003.fp16.safetensors."""
    for path in sorted(folder.glob("*.safetensors")):
        path.rename(folder / re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", path.name))
    (index,) = folder.glob("*.index*.json")
    text = re.sub(r"\.fp16(-\d+-of-\d+)", r"\1.fp16", index.read_text())
    index.unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(text)


def test_shards_in_the_older_naming_are_read_as_diffusers_reads_them(tmp_path, pipelines):
    pipeline, source = pipelines["sd1"], tmp_path / "in"
    pipeline.save_pretrained(source, variant="fp16")
    shutil.rmtree(source / "unet")
    pipeline.unet.save_pretrained(source / "unet", max_shard_size="400KB", variant="fp16")
    older_names(source / "unet")
    shards = list((source / "unet").glob("diffusion_pytorch_model-*-of-*.fp16.safetensors"))
    assert len(shards) > 2
    theirs = StableDiffusionPipeline.from_pretrained(
        source, variant="fp16", local_files_only=True, safety_checker=None, feature_extractor=None
    )
    assert_same(state_of(load_model(source)), state_of(DiffusersModel(theirs)))
    write_checkpoint(source, make_erasure(), tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(source)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    before, after = (
        load_model(p).network.get_submodule(layer).weight for p in (source, tmp_path / "out")
    )
    expected = make_erasure().erased_weight(
        "middle_block.1.transformer_blocks.0.attn2.to_v", before
    )
    torch.testing.assert_close(after, expected)
    write_lora(source, make_erasure(), tmp_path / "lora.safetensors")


@pytest.mark.parametrize("variants", [("vae",), ("unet",), ("unet", "text_encoder_2"), ()])
def test_each_part_is_read_in_the_variant_that_it_has(tmp_path, pipelines, folders, variants):
    shutil.copytree(folders["sdxl"], tmp_path / "in")
    for part in variants:
        shutil.rmtree(tmp_path / "in" / part)
        getattr(pipelines["sdxl"], part).save_pretrained(tmp_path / "in" / part, variant="fp16")
    if not variants:  # variants beside the full ones are not what is loaded
        junk = pipelines["sdxl"].unet.state_dict()
        junk = {key: torch.zeros_like(tensor) for key, tensor in junk.items()}
        for variant in ("fp16", "non_ema"):
            path = tmp_path / "in" / "unet" / f"diffusion_pytorch_model.{variant}.safetensors"
            save_file(junk, path)
    theirs = load_model(folders["sdxl"])
    assert_same(state_of(load_model(tmp_path / "in")), state_of(theirs))
    assert load_text(tmp_path / "in").fingerprint == theirs.text.fingerprint
    for source, name in ((folders["sdxl"], "a"), (tmp_path / "in", "b")):
        write_lora(source, Erasure(make_erasure("sdxl").edits), tmp_path / name)
    assert_same(load_file(tmp_path / "a"), load_file(tmp_path / "b"))


def test_a_folder_keeps_its_scheduler_and_needs_no_safety_checker(tmp_path, folders):
    ours = load_model(folders["sdxl"]).pipeline
    theirs = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"], local_files_only=True)
    assert type(ours.scheduler) is type(theirs.scheduler)
    assert dict(ours.scheduler.config) == dict(theirs.scheduler.config)


def test_a_folder_with_scales_that_diffusers_would_leave_out_does_not_load(tmp_path, folders):
    shutil.copytree(folders["sd1"], tmp_path / "in")
    weights = tmp_path / "in" / "unet" / "diffusion_pytorch_model.safetensors"
    scale = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight_scale"
    save_file(load_file(weights) | {scale: torch.tensor(2.0)}, weights)
    with pytest.raises(ValueError, match=rf"{scale}.* diffusers would leave out"):
        load_model(tmp_path / "in")


def without(folder, destination, part, change):
    """A copy of a folder in which the tensors of one part are changed."""
    shutil.copytree(folder, destination)
    (weights,) = (destination / part).glob("*.safetensors")
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    return destination


LACKING = {
    "text_encoder": r"(?:text_model\.)?encoder\.layers\.1\.mlp\.fc1\.weight",
    "text_encoder_2": r"text_projection\.weight",
    "unet": r"mid_block\.resnets\.0\.conv1\.weight",
    "vae": r"decoder\.conv_in\.bias",
}


@pytest.mark.parametrize("part", LACKING)
def test_a_folder_that_lacks_a_tensor_is_refused_by_the_tensor(tmp_path, folders, part):
    def less(state):
        (key,) = (key for key in state if re.fullmatch(LACKING[part], key))
        return {name: tensor for name, tensor in state.items() if name != key}

    folder = without(folders["sdxl"], tmp_path / "in", part, less)
    with pytest.raises(ValueError, match=rf"{part} lacks 1 of the \d+ .*'({LACKING[part]})'"):
        load_model(folder)
    if part.startswith("text_encoder"):
        with pytest.raises(ValueError, match=rf"{part} lacks 1 of the"):
            load_text(folder)


def test_a_text_encoder_under_other_names_is_refused_with_one_of_them(tmp_path, folders):
    def renamed(state):
        return {f"inner.{name}": tensor for name, tensor in state.items()}

    folder = without(folders["sd1"], tmp_path / "in", "text_encoder", renamed)
    with pytest.raises(ValueError, match=r"lacks (\d+) of the \1 tensors .*'inner\..*not known"):
        load_text(folder)


def test_a_buffer_that_every_loader_makes_may_be_in_a_folder_or_not(tmp_path, folders):
    expected = load_text(folders["sd1"])
    key, places = "text_model.embeddings.position_ids", torch.arange(77)[None]
    for number, change in enumerate(
        (
            lambda state: state | {key: places},
            lambda state: {k: state[k] for k in state if k != key},
        )
    ):
        folder = without(folders["sd1"], tmp_path / str(number), "text_encoder", change)
        assert torch.equal(load_text(folder).summary(["a cat"]), expected.summary(["a cat"]))


def test_a_folder_that_reads_by_bert_is_refused_as_no_clip(tmp_path, folders):
    shutil.copytree(folders["sd1"], tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / "text_encoder")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=99, hidden_size=32, **sizes))
    bert.save_pretrained(tmp_path / "in" / "text_encoder")
    for load in (load_text, load_model):
        with pytest.raises(ValueError, match=r"text_encoder is .* type 'bert' and no CLIP"):
            load(tmp_path / "in")


# --- LoRA files ----------------------------------------------------------------------------------


def full_width(path, name, kind):
    """The few tensors that tell a family, in its own widths, as a file or a folder."""
    dim = FAMILIES[name]["unet"]["cross_attention_dim"]
    state = {
        "conv_in.weight": torch.zeros(320, 4, 3, 3),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(640, dim),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight": torch.ones(1280, dim),
    }
    if name == "sdxl":
        state["add_embedding.linear_1.weight"] = torch.zeros(1280, 2816)
    if kind == "folder":
        for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
            if part in FAMILIES[name]:
                (path / part).mkdir(parents=True)
                (path / part / "config.json").write_text(json.dumps(FAMILIES[name][part]))
        save_file(state, path / "unet" / "diffusion_pytorch_model.safetensors")
    else:
        own = {k: v for k, v in FAMILIES[name].items() if k not in ("title", "lora_base")}
        metadata = {"config": json.dumps(own)} if kind == "own configuration" else None
        save_file(state, path, metadata)
    return path


@pytest.mark.parametrize("kind", ["file", "own configuration", "folder"])
@pytest.mark.parametrize(
    ("name", "base", "v2"),
    [("sd1", "sd_v1", "False"), ("sd2", "sd_v2", "True"), ("sdxl", "sdxl_base_v1-0", "False")],
)
def test_a_lora_names_the_family_of_the_model_however_it_is_stored(tmp_path, kind, name, base, v2):
    source = full_width(tmp_path / "in", name, kind)
    dim = FAMILIES[name]["unet"]["cross_attention_dim"]
    edit = torch.eye(dim)
    edit[0, 1] = 1
    write_lora(source, Erasure({CONTEXT: Edit.from_matrix(edit)}), tmp_path / "lora")
    metadata = metadata_of(tmp_path / "lora")
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (base, v2)
    assert metadata["ss_network_module"] == "networks.lora"
    assert family_of(source).name == name
