"""Writing of erased checkpoints, folders and LoRA files, and loading of models."""

import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from realera.checkpoints import loading
from realera.checkpoints.families import FAMILIES, family_of
from realera.checkpoints.loading import _explained, load_model, load_text
from realera.checkpoints.writing import lora_tensors, write_checkpoint, write_lora
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure, temporarily_erased
from realera.edit.erasure_file import load_erasure, save_erasure
from realera.edit.text_layers import text_layers, trained_layers
from realera.pipelines.unet import DiffusersModel
from realera.storage.safetensors_file import open_tensors, raw_bytes, writing
from realera.text.encoding import CONTEXT, POOLED
from tests.test_disk import files_of_at_most

DIMS = {"sd1": 32, "sd1 one layer": 32, "sd1 inpainting": 32, "sd2": 64, "sdxl": 96}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection fails: nothing here may need a hub."""

    def refuse(*_, **__):
        raise AssertionError("something reached for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def low_rank_edit(dim, rank, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(dim, rank, generator=g), torch.randn(rank, dim, generator=g)
    return Edit.from_matrix(torch.eye(dim) + a @ b / dim**0.5 / rank)


STILL = Erasure({CONTEXT: Edit.from_matrix(torch.eye(32))})


def make_erasure(pipeline, name, lora=True):
    g = torch.Generator().manual_seed(5)
    trained = {
        key: (
            torch.randn(2, reader.layer.in_features, generator=g) / 10,
            torch.randn(reader.layer.out_features, 2, generator=g) / 10,
        )
        for key, reader in trained_layers(pipeline.unet).items()
    }
    edits = {CONTEXT: low_rank_edit(DIMS[name], 3, 1)}
    if name == "sdxl":
        edits[POOLED] = low_rank_edit(64, 2, 2)
    return Erasure(
        edits,
        trained if lora else {},
        provenance={"concepts": ["airplane"], "seed": 7},
    )


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def images(model, seed=0):
    encoding = model.text.encode(["a photo of the airplane", "a dog"])
    negative = model.text.encode([""])
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    latents = model.sample(encoding, negative, noise, 3, 3.0)
    return model.decode(latents)


def assert_same_images(ours, theirs):
    """Equal weights at other addresses round differently in the last bit of a convolution."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --- families and loading ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "parameters"),
    [  # as published for the originals
        ("sd1", "unet", 859_520_964),
        ("sd2", "unet", 865_910_724),
        ("sdxl", "unet", 2_567_463_684),
        ("sd1", "text_encoder", 123_060_480),
        ("sd2", "text_encoder", 340_387_840),
        ("sdxl", "text_encoder", 123_060_480),
        ("sdxl", "text_encoder_2", 694_659_840),
        ("sd1", "vae", 83_653_863),
        ("sdxl", "vae", 83_653_863),
    ],
)
def test_the_bundled_configurations_build_the_published_models(name, part, parameters):
    config = FAMILIES[name][part]
    with torch.device("meta"):
        if part == "unet":
            model = UNet2DConditionModel(**config)
        elif part == "vae":
            model = AutoencoderKL(**config)
        else:
            text_class = CLIPTextModelWithProjection if part[-1] == "2" else CLIPTextModel
            model = text_class(CLIPTextConfig(**config))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_bundled_tokenizer_is_openais():
    for pad in (0, 49407):
        tokenizer = loading._tokenizer(49408, pad)
        cat = [49406, 320, 1125, 539, 320, 2368, 49407]  # as OpenAI's gives it
        assert tokenizer("a photo of a cat").input_ids == cat
        assert tokenizer("cat", padding="max_length").input_ids[3:] == [pad] * 74
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        return
    # Its tokenizer alone: the package wants torchvision.
    path = Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original = module.SimpleTokenizer()
    ours, theirs = tokenizer.get_vocab(), original.encoder  # which names the two ends otherwise
    assert len(ours) == 49408 and all(ours[token] == n for token, n in theirs.items() if n < 49406)
    for words in ["Ethan Hunt's 2nd mission: impossible!?", "naïve café 日本", "re-use  it,  x2"]:
        assert tokenizer(words).input_ids[1:-1] == original.encode(words)


@pytest.mark.parametrize("name", list(DIMS))
def test_a_single_file_loads_as_the_pipeline_it_was_made_of(pipelines, singles, name):
    model = load_model(singles[name])
    assert type(model.pipeline) is type(pipelines[name])
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipelines[name], part):
            ours = getattr(model.pipeline, part).state_dict()
            theirs = getattr(pipelines[name], part).state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [m.scheduler.config for m in (model, DiffusersModel(pipelines[name]))]
    # Saving a pipeline, as other tests do, adds the names of its class and version.
    ours, theirs = ({k: v for k, v in c.items() if not k.startswith("_")} for c in configs)
    assert ours == theirs
    assert_same_images(images(model), images(DiffusersModel(pipelines[name])))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_folder_loads_as_the_pipeline_it_was_made_of(pipelines, folders, name):
    assert_same_images(images(load_model(folders[name])), images(DiffusersModel(pipelines[name])))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_text_side_loads_without_a_unet(pipelines, singles, folders, name, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "__init__", lambda *_, **__: 1 / 0)
    theirs = DiffusersModel(pipelines[name]).text
    for source in (singles[name], folders.get(name, singles[name])):
        text = load_text(source)
        assert text.fingerprint == theirs.fingerprint
        ours, original = text.encode(["a dog"]), theirs.encode(["a dog"])
        assert all(torch.equal(rows, original[stream]) for stream, rows in ours.items())
        assert set(ours) == ({CONTEXT, POOLED} if name == "sdxl" else {CONTEXT})


def full_size(path, name, extra=None, in_channels=4, metadata=None):
    """A file with the keys and shapes that tell a family, in its full widths, and nothing else."""
    dim = FAMILIES[name]["unet"]["cross_attention_dim"]
    unet = "model.diffusion_model."
    state = {
        unet + "input_blocks.0.0.weight": torch.zeros(320, in_channels, 3, 3),
        unet + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(640, dim),
        unet + "middle_block.1.transformer_blocks.0.attn2.to_v.weight": torch.zeros(1280, dim),
    }
    if name == "sdxl":
        state[unet + "label_emb.0.0.weight"] = torch.zeros(1280, 2816)
    save_file(state | (extra or {}), path, metadata)
    return path


@pytest.mark.parametrize(
    ("name", "dim", "pooled"), [("sd1", 768, None), ("sd2", 1024, None), ("sdxl", 2048, 1280)]
)
@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_family_is_recognised_by_the_header_alone(
    tmp_path, monkeypatch, name, dim, pooled, in_channels
):
    path = full_size(tmp_path / "x.safetensors", name, in_channels=in_channels)
    monkeypatch.setattr(loading.TensorFile, "read", lambda *_: 1 / 0)
    family = family_of(path)
    assert (family.name, family.dim, family.pooled) == (name, dim, pooled)
    assert family.in_channels == in_channels and family.config is FAMILIES[name]


@pytest.mark.parametrize(
    ("name", "width", "metadata", "markers", "prediction", "size"),
    [
        ("sd2", 0.2, {}, [], "v_prediction", 96),
        ("sd2", 0.01, {}, [], "epsilon", 64),
        ("sd1", 0.2, {}, [], "epsilon", 64),
        ("sd1", 0.01, {"modelspec.prediction_type": "v"}, [], "v_prediction", 64),
        ("sdxl", 0.01, {}, ["v_pred", "ztsnr"], "v_prediction", 128),
    ],
)
def test_v_prediction_is_recognised_by_weights_and_markers(
    tmp_path, name, width, metadata, markers, prediction, size
):
    bias = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    extra = {bias: width * torch.randn(320, generator=torch.Generator().manual_seed(0))}
    extra |= {marker: torch.zeros(0) for marker in markers}
    path = full_size(tmp_path / "x.safetensors", name, extra, metadata=metadata)
    scheduler, sample_size = loading._prediction(open_tensors(path), family_of(path))
    assert (scheduler["prediction_type"], sample_size) == (prediction, size)
    assert scheduler.get("rescale_betas_zero_snr", False) == ("ztsnr" in markers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_and_fp8_files_load(tmp_path, pipelines, make_single, dtype):
    path = make_single(pipelines["sd1 one layer"], tmp_path / "x.safetensors", dtype)
    assert family_of(path).dtype == dtype
    model = load_model(path)
    weight = pipelines["sd1 one layer"].unet.conv_in.weight
    assert torch.equal(model.network.conv_in.weight, weight.to(dtype).float())
    half = load_model(path, dtype=torch.float16)
    assert half.network.dtype == torch.float16
    assert torch.equal(half.network.conv_in.weight, weight.to(dtype).half())


# --- bad input -----------------------------------------------------------------------------------


def test_pickles_are_refused_unopened_and_the_suggested_command_works(tmp_path, pipelines, folders):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    for name in ("x.ckpt", "x.pt", "x.bin", "disguised.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(), protocol=2))
        with pytest.raises(ValueError, match=r"is a pickle.*Convert it.*weights_only=True"):
            load_model(tmp_path / name)
    torch.save({"state_dict": {"w": torch.ones(3)}}, tmp_path / "in.ckpt")
    with pytest.raises(ValueError, match="is a pickle") as refusal:
        family_of(tmp_path / "in.ckpt")
    advice = re.search(r'python -c "(.+)"', str(refusal.value))[1]
    subprocess.run([sys.executable, "-c", advice], cwd=tmp_path, check=True)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.ones(3))

    folder = tmp_path / "folder"
    shutil.copytree(folders["sd1"], folder)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\.bin is a pickle and is refused.*save_pretrained"):
        load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_header_as_long_as_a_pickles_first_bytes_is_no_pickle(tmp_path):
    for length in (0x0280, 0x0480):  # what protocols 2 and 4 begin with
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
        assert open_tensors(path).entries == {}


def test_safetensors_under_a_pickles_name_are_read(tmp_path, pipelines, singles):
    shutil.copy(singles["sd1"], tmp_path / "renamed.ckpt")
    assert family_of(tmp_path / "renamed.ckpt") == family_of(singles["sd1"])
    write_checkpoint(
        tmp_path / "renamed.ckpt", make_erasure(pipelines["sd1"], "sd1"), tmp_path / "x.safetensors"
    )
    assert load_file(tmp_path / "x.safetensors").keys() == load_file(singles["sd1"]).keys()


def test_a_configuration_in_a_file_writes_nothing_but_parts(tmp_path, singles, monkeypatch):
    source, folder = singles["sd1 one layer"], tmp_path / "in/tmp"
    config = json.loads(metadata_of(source)["config"]) | {"..": {"a": 1}, "../..": {"a": 1}}
    save_file(load_file(source), tmp_path / "x", {"config": json.dumps(config)})
    folder.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    load_model(tmp_path / "x")
    assert not list(folder.rglob("*")) and [p.name for p in folder.parent.iterdir()] == ["tmp"]


def test_a_folder_without_a_tokenizer_is_refused_without_contacting_the_hub(tmp_path, folders):
    shutil.copytree(folders["sd1"], tmp_path / "x", ignore=lambda *_: ["tokenizer"])
    with pytest.raises(ValueError, match="lacks tokenizer/"):
        load_text(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 7, 1000, 100_000, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, singles, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(singles["sd1"].read_bytes()[:size])
    with pytest.raises(ValueError, match="cut off"):
        load_model(path)


def test_other_models_are_refused_with_the_families_that_work(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"model.diffusion_model.joint_blocks.0.attn.qkv.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"no cross-attention K/V.*1\.x.*2\.x.*XL"):
        family_of(path)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.zeros(8, 1280)}, path)  # the SDXL refiner
    with pytest.raises(ValueError, match="embeddings of 1280 numbers"):
        family_of(path)
    save_file({key: torch.zeros(8, 768, dtype=torch.int8)}, path)
    with pytest.raises(ValueError, match=r"is I8 \[8, 768\]: quantised"):
        family_of(path)
    with pytest.raises(ValueError, match="reads 8 channels"):
        load_model(full_size(path, "sd1", in_channels=8))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="no diffusers pipeline folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "lost", ["model.diffusion_model.time_embed.0.weight", "first_stage_model.", "cond_stage_model."]
)
def test_a_checkpoint_without_a_part_is_refused(tmp_path, singles, lost):
    state = {k: v for k, v in load_file(singles["sd1"]).items() if not k.startswith(lost)}
    save_file(state, tmp_path / "x.safetensors", metadata_of(singles["sd1"]))
    with pytest.raises(ValueError, match=r"lacks|cannot be loaded: it may lack"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("error", [MemoryError, OSError, ImportError, torch.OutOfMemoryError])
def test_what_is_not_the_files_fault_is_not_blamed_on_it(singles, error):
    path = singles["sd1"]
    with pytest.raises(error, match="elsewhere"), _explained(open_tensors(path), family_of(path)):
        raise error("elsewhere")


# --- erased checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sd1", torch.float32),
        ("sd1 one layer", torch.float8_e4m3fn),
        ("sd1 inpainting", torch.float16),
        ("sd2", torch.bfloat16),
        ("sdxl", torch.float16),
    ],
)
def test_an_erased_checkpoint_differs_in_the_erased_tensors_alone(
    tmp_path, pipelines, make_single, name, dtype
):
    layer = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    average = "model_ema." + layer.removeprefix("model.").replace(".", "")
    reader = text_layers(pipelines[name].unet)["middle_block.1.transformer_blocks.0.attn2.to_k"]
    extra = {average: reader.layer.weight * 2, "step": torch.tensor(3), "none": torch.zeros(0, 4)}
    source = make_single(
        pipelines[name], tmp_path / "in.safetensors", dtype, extra, {"by": "a person, café"}
    )
    before = source.read_bytes()
    erasure = make_erasure(pipelines[name], name)
    write_checkpoint(source, erasure, tmp_path / "out.safetensors", edit_strength=0.9)

    ours, theirs = open_tensors(tmp_path / "out.safetensors"), open_tensors(source)
    assert list(ours.entries.items()) == list(theirs.entries.items())  # order, dtypes, places
    old, new = load_file(source), load_file(tmp_path / "out.safetensors")
    erased = {average} | {k for k in old if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    erased |= {"model.diffusion_model.label_emb.0.0.weight"} & old.keys()
    for key in old:
        if key in erased:
            canonical_name = key.removeprefix("model.diffusion_model.").removesuffix(".weight")
            if key == average:
                canonical_name = "middle_block.1.transformer_blocks.0.attn2.to_k"
            expected = erasure.erased_weight(canonical_name, old[key], 0.9)
            assert torch.equal(new[key].float(), expected.float()), key
            assert not torch.equal(new[key].float(), old[key].float()), key
        else:
            assert raw_bytes(new[key]) == raw_bytes(old[key]), key
    assert source.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.safetensors"]

    kept = metadata_of(tmp_path / "out.safetensors")
    note = json.loads(kept.pop("realera"))
    assert kept == metadata_of(source)
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True)
    assert note == [
        {
            **erasure.provenance,
            "edit_strength": 0.9,
            "lora_strength": 1.0,
            "from": {"file": "in.safetensors", "sha256": digest.stdout.split()[0]},
        }
    ]


def test_erasing_twice_keeps_both_notes(tmp_path, pipelines, singles):
    erasure = make_erasure(pipelines["sd1"], "sd1", lora=False)
    write_checkpoint(singles["sd1"], erasure, tmp_path / "one.safetensors")
    write_checkpoint(tmp_path / "one.safetensors", erasure, tmp_path / "two.safetensors")
    notes = json.loads(metadata_of(tmp_path / "two.safetensors")["realera"])
    assert [note["from"]["file"] for note in notes] == ["sd1.safetensors", "one.safetensors"]
    # Text of another tool under our key is not lost either.
    metadata = metadata_of(singles["sd1"]) | {"realera": "not JSON"}
    save_file(load_file(singles["sd1"]), tmp_path / "in", metadata)
    write_checkpoint(tmp_path / "in", erasure, tmp_path / "out")
    assert json.loads(metadata_of(tmp_path / "out")["realera"])[0] == "not JSON"


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_checkpoint_and_erasure_both_give_the_images_of_the_model_in_memory(
    tmp_path, pipelines, singles, name
):
    model, erasure = DiffusersModel(pipelines[name]), make_erasure(pipelines[name], name)
    original = images(model)
    with temporarily_erased(erasure, model.network):
        expected = images(model)
    assert (expected - original).abs().max() > 0.01
    write_checkpoint(singles[name], erasure, tmp_path / "out.safetensors")
    assert_same_images(images(load_model(tmp_path / "out.safetensors")), expected)
    save_erasure(erasure, tmp_path / "erasure.safetensors")
    with temporarily_erased(load_erasure(tmp_path / "erasure.safetensors"), model.network):
        assert_same_images(images(model), expected)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_folder_gives_a_folder(tmp_path, pipelines, folders, name):
    model, erasure = DiffusersModel(pipelines[name]), make_erasure(pipelines[name], name)
    with temporarily_erased(erasure, model.network):
        expected = images(model)
    source = tmp_path / "in"
    shutil.copytree(folders[name], source)
    # Weights of the unerased model in other wrappings must not travel along.
    (source / "whole.safetensors").write_bytes(b"the original")
    (source / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the original")
    write_checkpoint(source, erasure, tmp_path / "out")
    assert_same_images(images(load_model(tmp_path / "out")), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    for path in folders[name].rglob("*"):
        copy = tmp_path / "out" / path.relative_to(folders[name])
        if path.is_file() and path.relative_to(folders[name]).as_posix() != weights:
            assert copy.read_bytes() == path.read_bytes()
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert not (tmp_path / "out" / "whole.safetensors").exists()
    assert "airplane" in metadata_of(tmp_path / "out" / weights)["realera"]


def test_a_sharded_half_precision_folder_is_erased_in_every_shard(tmp_path, pipelines):
    pipeline = pipelines["sd1"]
    pipeline.save_pretrained(tmp_path / "in", variant="fp16")
    shutil.rmtree(tmp_path / "in" / "unet")
    pipeline.unet.save_pretrained(tmp_path / "in" / "unet", max_shard_size="400KB", variant="fp16")
    assert len(list((tmp_path / "in" / "unet").glob("*.safetensors"))) > 2
    model, erasure = DiffusersModel(pipeline), make_erasure(pipeline, "sd1")
    with temporarily_erased(erasure, model.network):
        expected = images(model)
    write_checkpoint(tmp_path / "in", erasure, tmp_path / "out")
    assert_same_images(images(load_model(tmp_path / "out")), expected)
    assert load_text(tmp_path / "out").fingerprint == model.text.fingerprint


def test_the_source_and_what_exists_are_never_overwritten_unasked(
    tmp_path, pipelines, singles, folders
):
    erasure = make_erasure(pipelines["sd1"], "sd1")
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    shutil.copy(singles["sd1"], source)
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"out\.safetensors exists"):
        write_checkpoint(source, erasure, target)
    with pytest.raises(FileExistsError, match=r"out\.safetensors exists"):
        write_lora(source, erasure, target)
    assert target.read_bytes() == b"mine"
    for destination in (source, tmp_path / "." / "in.safetensors"):
        with pytest.raises(ValueError, match="is the source"):
            write_checkpoint(source, erasure, destination, overwrite=True)
    with pytest.raises(ValueError, match="one is inside the other"):
        write_checkpoint(folders["sd1"], erasure, folders["sd1"] / "unet" / "x")
    assert source.read_bytes() == singles["sd1"].read_bytes()
    write_checkpoint(source, erasure, target, overwrite=True)
    assert "realera" in metadata_of(target)

    write_checkpoint(folders["sd1"], erasure, tmp_path / "out")
    with pytest.raises(FileExistsError, match="ask to overwrite"):
        write_checkpoint(folders["sd1"], erasure, tmp_path / "out")
    write_checkpoint(folders["sd1"], erasure, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out", "out.safetensors"]


@pytest.mark.parametrize("name", ["thesis.txt", "unet/mine.safetensors", "samples/cat.png"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_folder_that_holds_files_of_other_names_is_never_replaced(
    tmp_path, pipelines, folders, monkeypatch, name, when
):
    erasure, out = make_erasure(pipelines["sd1"], "sd1"), tmp_path / "out"
    write_checkpoint(folders["sd1"], erasure, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    precious, space = out / name, "realera.checkpoints.writing._check_space"
    precious.parent.mkdir(exist_ok=True)
    if when == "before":
        precious.write_text("years of work")
        monkeypatch.setattr(space, lambda *_: pytest.fail("too late"))
    else:
        monkeypatch.setattr(space, lambda *_: precious.write_text("years of work"))
    with pytest.raises(FileExistsError, match=f"out holds {re.escape(name)}, which an erased"):
        write_checkpoint(folders["sd1"], erasure, out, overwrite=True)
    assert {path: path.read_bytes() for path in before} == before
    assert precious.read_text() == "years of work" and os.listdir(tmp_path) == ["out"]


def test_an_erasure_of_another_family_leaves_nothing(tmp_path, pipelines, singles, folders):
    for name, source in [
        ("sd2", singles["sd1"]),
        ("sdxl", singles["sd1"]),
        ("sd2", folders["sd1"]),
    ]:
        erasure = make_erasure(pipelines[name], name, lora=False)
        with pytest.raises(ValueError, match="family"):
            write_checkpoint(source, erasure, tmp_path / "out")
    lora = {"input_blocks.99.1.transformer_blocks.0.attn2.to_k": (torch.ones(1, 32),) * 2}
    with pytest.raises(ValueError, match=r"input_blocks\.99"):
        write_lora(
            singles["sd1"],
            replace(STILL, lora=lora),
            tmp_path / "x",
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, singles, folders):
    erasure = STILL
    for source in (singles["sd1"], folders["sd1"]):
        with files_of_at_most(1_000_000), pytest.raises(OSError, match="File too large"):
            write_checkpoint(source, erasure, tmp_path / "out")
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        save_erasure(erasure, tmp_path / "out")
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        write_lora(singles["sd1"], erasure, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_an_error_before_writing(tmp_path, singles, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(OSError, match=r"1\.00 kB left and [\d.]+ MB are .* at least [\d.]+ MB"):
        write_checkpoint(singles["sd1"], STILL, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_at_any_tensor_leaves_nothing(tmp_path, singles, folders, monkeypatch):
    for source in (singles["sd1"], folders["sd1"]):
        for moment in (0, 1, 31):
            calls = iter(range(100))

            def interrupted(self, name, weight, *_, calls=calls, moment=moment):
                if next(calls) == moment:
                    raise KeyboardInterrupt
                return weight

            monkeypatch.setattr(Erasure, "erased_weight", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_checkpoint(source, STILL, tmp_path / "out")
            assert not list(tmp_path.iterdir())


def test_a_file_appears_only_when_complete(tmp_path):
    target = tmp_path / "x"
    with writing(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
    assert target.read_bytes() == b"half"
    with pytest.raises(RuntimeError), writing(target, overwrite=True) as temporary:
        temporary.write_bytes(b"other half")
        raise RuntimeError
    assert target.read_bytes() == b"half" and os.listdir(tmp_path) == ["x"]


def test_writing_keeps_one_tensor_in_memory(tmp_path):
    """Peak memory stays far below the size of the file."""
    key = "model.diffusion_model.{}.transformer_blocks.0.attn2.to_k.weight"
    source = full_size(
        tmp_path / "in.safetensors",
        "sd1",
        {"filler": torch.zeros(50 << 20)}
        | {key.format(f"output_blocks.{n}.1"): torch.ones(6144, 768) for n in range(3, 12)},
    )
    code = (
        f"import sys; sys.path.insert(0, {os.getcwd()!r}); import resource, torch\n"
        "from realera.checkpoints.writing import write_checkpoint\n"
        "from realera.edit.closed_form import Edit\nfrom realera.edit.erasure import Erasure\n"
        "erasure = Erasure({'context': Edit.from_matrix(torch.eye(768))})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"write_checkpoint({str(source)!r}, erasure, "
        f"{str(tmp_path / 'out')!r})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert source.stat().st_size > 350e6
    assert int(result.stdout) * 1024 < 130e6


# --- LoRA files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sd1 one layer", "sd2", "sdxl"])
def test_the_lora_file_does_in_diffusers_what_the_erased_checkpoint_does(
    tmp_path, singles, pipelines, name
):
    erasure = make_erasure(pipelines[name], name)
    cuts = write_lora(singles[name], erasure, tmp_path / "lora.safetensors", tolerance=1e-5)
    ranks = {CONTEXT: 3, POOLED: 2} if name == "sdxl" else {CONTEXT: 3}
    assert {stream: cut.rank for stream, cut in cuts.items()} == ranks
    assert all(cut.error < 1e-5 for cut in cuts.values())
    write_checkpoint(singles[name], erasure, tmp_path / "out.safetensors")
    original, erased = load_model(singles[name]), load_model(tmp_path / "out.safetensors")

    def predict(model):
        g = torch.Generator().manual_seed(0)
        latents, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([900, 20])
        with torch.no_grad():
            return model.predict(latents, t, model.text.encode(["airplane", "dog"]))

    before, expected = predict(original), predict(erased)
    original.pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    got = predict(original)
    change = (expected - before).norm()
    assert change > 1e-3
    assert (got - expected).norm() < 1e-4 * change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-3])
def test_the_stated_error_of_a_lora_file_is_its_true_error(pipelines, dtype, trained, tolerance):
    dim = DIMS["sdxl"]
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    edit = Edit.from_matrix(torch.eye(dim) + u @ torch.diag(0.5 ** torch.arange(dim)) @ u.T.flip(0))
    layers = text_layers(pipelines["sdxl"].unet)
    weights = {name: of.layer.weight.detach().to(dtype) for name, of in layers.items()}
    lora = make_erasure(pipelines["sdxl"], "sdxl").lora if trained else {}
    tensors, cuts = lora_tensors(weights, Erasure({CONTEXT: edit}, lora), tolerance)
    lacking = change = 0.0
    for name in trained_layers(pipelines["sdxl"].unet):
        key, weight = "lora_unet_" + name.replace(".", "_"), weights[name]
        due = weight.double() @ (edit.up.double() @ edit.down.double())
        if trained:
            due += lora[name][1].double() @ lora[name][0].double()
        down, up = (tensors[f"{key}.lora_{part}.weight"].double() for part in ("down", "up"))
        assert tensors[f"{key}.alpha"] == len(down)
        lacking += float((up @ down - due).square().sum())
        change += float(due.square().sum())
    assert cuts[CONTEXT].error == pytest.approx((lacking / change) ** 0.5, rel=1e-2)
    if not trained:
        assert cuts[CONTEXT].error <= 1.2 * tolerance


def test_a_smaller_tolerance_takes_a_higher_rank(tmp_path, singles):
    edit = Edit.from_matrix(torch.eye(32) + torch.diag(0.5 ** torch.arange(32)))
    ranks = [
        write_lora(singles["sd1"], Erasure({CONTEXT: edit}), tmp_path / "x", tolerance, True)
        for tolerance in (0.3, 1e-2, 1e-4)
    ]
    one, two, three = (cuts[CONTEXT].rank for cuts in ranks)
    assert one < two < three


def test_a_lora_is_made_of_the_weights_that_loaders_draw_with(tmp_path, pipelines, singles):
    erasure = make_erasure(pipelines["sd1"], "sd1")
    write_lora(singles["sd1"], erasure, tmp_path / "plain")
    state, unet = load_file(singles["sd1"]), "model.diffusion_model."
    for key in [key for key in state if key.startswith(unet)]:
        average = "model_ema." + key.removeprefix("model.").replace(".", "")
        state[average] = torch.zeros_like(state[key])
    save_file(state, tmp_path / "averaged.safetensors", metadata_of(singles["sd1"]))
    write_lora(tmp_path / "averaged.safetensors", erasure, tmp_path / "lora")
    plain, averaged = load_file(tmp_path / "plain"), load_file(tmp_path / "lora")
    assert all(torch.equal(plain[key], averaged[key]) for key in plain)


def test_a_lora_for_another_family_is_refused(tmp_path, singles):
    with pytest.raises(ValueError, match=r"made for text embeddings of 32 numbers .* reads 64"):
        write_lora(singles["sd2"], Erasure({CONTEXT: low_rank_edit(32, 2, 0)}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_lora_keys_are_those_that_every_loader_reads(tmp_path, pipelines, singles):
    for name, prefix, count in [
        ("sd1", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 32),
        ("sd2", "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_v", 32),
        ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 57),
        ("sdxl", "lora_unet_label_emb_0_0", 57),
    ]:
        erasure = make_erasure(pipelines[name], name)
        write_lora(singles[name], erasure, tmp_path / "x", overwrite=True)
        state = load_file(tmp_path / "x")
        assert len(state) == 3 * count
        rank = len(state[prefix + ".lora_down.weight"])
        assert state[prefix + ".lora_up.weight"].shape[1] == rank == state[prefix + ".alpha"]
        assert json.loads(metadata_of(tmp_path / "x")["realera"]) == erasure.provenance


def test_a_file_and_a_folder_and_the_model_in_memory_give_the_same_lora(
    tmp_path, pipelines, singles, folders
):
    erasure = make_erasure(pipelines["sdxl"], "sdxl")
    layers = text_layers(pipelines["sdxl"].unet)
    weights = {key: reader.layer.weight.detach() for key, reader in layers.items()}
    expected, report = lora_tensors(weights, erasure)
    for number, source in enumerate((singles["sdxl"], folders["sdxl"])):
        assert write_lora(source, erasure, tmp_path / str(number)) == report
        state = load_file(tmp_path / str(number))
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


def test_a_half_precision_checkpoint_gives_a_half_precision_lora(tmp_path, pipelines, make_single):
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e5m2):
        source = make_single(pipelines["sd1 one layer"], tmp_path / "in.safetensors", dtype)
        erasure = make_erasure(pipelines["sd1 one layer"], "sd1 one layer")
        write_lora(source, erasure, tmp_path / "x", overwrite=True)
        for key, tensor in load_file(tmp_path / "x").items():
            # a half cannot count far, and alpha over rank scales the whole erasure
            assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.float16)
