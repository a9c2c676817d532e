"""Safetensors files of every data type."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from realera.checkpoints.file_kinds import adapter_of
from realera.storage.safetensors_file import (
    BITS,
    DTYPES,
    digest,
    is_finite,
    open_tensors,
    write_tensors,
    writing,
)


def hand_made(path, dtype, shape, size):
    """A file of one tensor as any tool might write it."""
    header = {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@pytest.mark.parametrize("dtype", list(BITS))
def test_every_data_type_that_safetensors_knows_opens(tmp_path, dtype):
    path = hand_made(tmp_path / "x", dtype, [2, 4], BITS[dtype])
    with safe_open(path, "np") as theirs:  # their own reader agrees on the size
        assert list(theirs.keys()) == ["x"]
    file = open_tensors(path)
    assert file.entries["x"].dtype == dtype
    if dtype in DTYPES:
        assert file.read("x").shape == (2, 4)
    else:
        with pytest.raises(ValueError, match=f"'x' is {dtype}, which can only be copied"):
            file.read("x")


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [3], 1), ("F6_E2M3", [2], 1)])
def test_a_tensor_that_ends_within_a_byte_is_refused(tmp_path, dtype, shape, size):
    with pytest.raises(ValueError, match="does not fit"):
        open_tensors(hand_made(tmp_path / "x", dtype, shape, size))


def test_a_data_type_that_the_format_lacks_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"data type 'F3'; known are .*U16.*"):
        open_tensors(hand_made(tmp_path / "x", "F3", [8], 3))


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3))
def test_what_is_written_is_read(tmp_path_factory, dtype, shape):
    path = tmp_path_factory.mktemp("x") / "x"
    tensor = torch.randint(0, 2, shape).to(DTYPES[dtype])
    write_tensors(path, {"a.x": tensor, "a.y": tensor, "b": tensor}, {"by": "me"})
    file = open_tensors(path)
    assert torch.equal(file.read("a.x").float(), tensor.float())
    assert file.read("b").dtype == DTYPES[dtype]
    assert file.modules == {"a": ("x", "y"), "": ("b",)}


PAGE = "\n  <!DOCTYPE html>\n<html><head><title>Sign in</title>" + "x" * 300
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4265380512\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty: .* get it again"),
        (bytes(4096), "begins with zeros: .* never filled, get it again$"),
        (PAGE.encode(), "is a web page, not a model: .* Log in and download it again"),
        (POINTER.encode(), "is a Git LFS pointer, .* `git lfs pull`"),
        (b'{"error": "Access to this model is restricted"}', "is text, .*Access to this model"),
        (b"Entry not found", "is text, .*'Entry not found'. Get it again"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "is quantised in blocks .GGUF."),
        (b"PK\x03\x04" + bytes(40), "is a pickle"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is no model but an image$"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "is no model but an image$"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(40), "is no model but an archive: unpack it first$"),
        (b"\xff\xfe\x00\x99" * 20, "first 8 bytes announce a header of"),
    ],
    ids=[
        "empty",
        "zeros",
        "page",
        "pointer",
        "json",
        "text",
        "gguf",
        "pickle",
        "png",
        "jpeg",
        "7z",
        "unknown",
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_a_file_of_another_format_is_named(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {reason}" if reason[0] == "i" else reason):
        open_tensors(tmp_path / name)


def test_a_web_page_under_a_pickles_name_is_a_web_page(tmp_path):
    (tmp_path / "x.ckpt").write_text(PAGE)
    with pytest.raises(ValueError, match="is a web page"):
        open_tensors(tmp_path / "x.ckpt")


X = '"x":{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (X % ([1], 0, 4) + "," + X % ([1], 0, 4), 4, "a key occurs twice"),
        (X % ([1], 0, 4) + ',"__metadata__":{"n":1}', 4, "metadata is not text"),
        (X % ([-1], 0, 4), 4, r"'x' has the shape .-1,. at bytes 0 to 4"),
        (X % ("[true]", 0, 4), 4, r"'x' has the shape .True"),
        (X % ([1] * 9, 0, 4), 4, "'x' has the shape"),
        (X % ([2], 0, 4), 4, r"'x', F32 \[2\], does not fit bytes 0 to 4"),
        (X % ([1], 4, 8), 8, "'x' begins at byte 4"),
        (X % ([1], 0, 4), 3, "is cut off: its header"),
        (X % ([1], 0, 4), 5, "is corrupt: its header"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, header, data, reason):
    text = f"{{{header}}}".encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    with pytest.raises(ValueError, match=reason):
        open_tensors(tmp_path / "x")


@pytest.mark.parametrize("name", ["x", "x.ckpt"])
def test_a_file_without_tensors_opens_under_any_name(tmp_path, name):
    (tmp_path / name).write_bytes((2).to_bytes(8, "little") + b"{}")
    assert open_tensors(tmp_path / name).entries == {}


def test_a_digest_tells_values_types_shapes_and_nesting_apart():
    zeros = [torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), torch.ones(4)]
    lists = [[1, 2], [[1], 2], [1, [2]], [[1, 2]], [2, 1], (), [()], {"a": 1}, {"a": 2}, {"b": 1}]
    values = [*zeros, *lists, "a", 1, None]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(1, 2) != digest([1, 2]) and digest(zeros[2].T) == digest(zeros[2])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point])
def test_a_number_that_is_not_finite_is_found_in_every_type(dtype):
    values = torch.tensor([1.0, torch.nan, -1.0]).to(dtype)
    assert not is_finite(values) and is_finite(values[::2]) and is_finite(values[:0])


def test_a_file_is_written_into_folders_that_are_made_for_it(tmp_path):
    for overwrite in (False, True):
        with writing(tmp_path / "a" / "b" / "x", overwrite) as part:
            part.write_text(f"{overwrite}")
        assert (tmp_path / "a" / "b" / "x").read_text() == f"{overwrite}"
    assert len(list((tmp_path / "a" / "b").iterdir())) == 1


K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("names", "kind", "layers", "rank"),
    [
        (
            ["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight", "lora_unet_a.alpha"],
            "LoRA",
            1,
            4,
        ),
        (["lora_te_a.lora_down.weight", "lora_te_b.lora_down.weight"], "LoRA", 2, 4),
        ([f"{K}.lora_A.weight", f"{K}.lora_B.weight"], "LoRA", 1, 4),
        (["base_model.model.to_k.lora_A.default.weight"], "LoRA", 1, 4),
        ([f"{K}_lora.down.weight", f"{K}_lora.up.weight"], "LoRA", 1, 4),
        ([f"{K}.lora.down.weight"], "LoRA", 1, 4),
        (["text_encoder.a.to_k.lora_linear_layer.down.weight"], "LoRA", 1, 4),
        (
            ["transformer.blocks.0.attn.lora_A.weight", "transformer.blocks.0.dora_scale"],
            "LoRA",
            1,
            4,
        ),
        (["lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b"], "LoHa", 1, 4),
        (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2"], "LoKr", 1, None),
        (["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2_a", "lora_unet_a.lokr_w2_b"], "LoKr", 1, 4),
        (["lora_unet_a.oft_blocks"], "OFT", 1, None),
        (["lora_unet_a.diff", "lora_unet_a.diff_b"], "difference of weights", 1, None),
        (["a.lora_down.weight", "b.lora_down.weight", "norm.diff"], "LoRA", 2, 4),
        (["first_stage_model.encoder.conv_in.weight"], None, 0, None),
        (["cond_stage_model.logit_scale", "a.weight", "a.weight_scale"], None, 0, None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_adapters_of_every_tool_are_distinguished_from_checkpoints(
    tmp_path, names, kind, layers, rank
):
    save_file({name: torch.zeros(4, 6) for name in names}, tmp_path / "x")
    adapter = adapter_of(open_tensors(tmp_path / "x"))
    if kind is None:
        assert adapter is None
    else:
        assert (adapter.kind, adapter.layers, adapter.rank) == (kind, layers, rank)
