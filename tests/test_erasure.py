"""Erasures: merging, file formats, and application to networks."""

import copy
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realera.edit.closed_form import BankGram, Edit, Sums, solve
from realera.edit.erasure import Erasure, concepts_of, erase_in_place, temporarily_erased
from realera.edit.erasure_file import load_erasure, save_erasure
from realera.edit.text_layers import canonical, diffusers_names, text_layers, trained_layers
from realera.edit.triangles import pack, unpack
from realera.text.encoding import CONTEXT, POOLED
from tools import tiny

DIM, POOLED_DIM = 96, 64  # of the tiny SDXL
OLD_SUMS = ("erase", "moved", "preserve")
NAME, ADDED = "middle_block.1.transformer_blocks.0.attn2.to_k", "label_emb.0.0"


def random_sums(dim, seed):
    g = torch.Generator().manual_seed(seed)
    rows, targets = torch.randn(6, dim, generator=g), torch.randn(6, dim, generator=g)
    sums = replace(Sums.zeros(dim).add_erased(rows, targets), representatives=rows[:2])
    return sums.add_preserved(torch.randn(9, dim, generator=g), 0.2)


def random_bank(seed, dim=DIM):
    rows = torch.randn(200, dim, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    dropped = torch.randn(7, dim, generator=torch.Generator().manual_seed(seed)) / 10
    mean = rows[:1].float()
    return BankGram(pack(rows.T @ rows), mean, {f"a prompt about {seed}": dropped}, "a bank")


def random_erasure(seed=0, names=()):
    g = torch.Generator().manual_seed(seed)
    sums = {CONTEXT: random_sums(DIM, seed), POOLED: random_sums(POOLED_DIM, seed)}
    bank = {CONTEXT: random_bank(seed)}
    note = {"concepts": ["äirplane"], "seed": seed}
    erasure = Erasure.fit(sums, bank, 0.2, 1e-3, note, 0.6)
    lora = {n: (torch.randn(2, DIM, generator=g), torch.randn(32, 2, generator=g)) for n in names}
    return erasure.with_lora(lora, {"steps": 3}) if names else erasure


@pytest.fixture
def saved(tmp_path, pipelines):
    names = list(trained_layers(pipelines["sdxl"].unet))
    path = tmp_path / "erasure.safetensors"
    erasure = random_erasure(0, names[:4])
    save_erasure(erasure, path)
    return erasure, path


# --- what an erasure does to a weight ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_erased_weight_is_w_t_plus_b_a_in_the_weights_dtype(dtype):
    erasure = random_erasure(0, [NAME])
    weight = torch.randn(32, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = erasure.lora[NAME]
    for s, r in [(1.0, 1.0), (0.3, 0.0), (0.0, 2.0)]:
        t = torch.eye(DIM) + s * (erasure.edits[CONTEXT].matrix - torch.eye(DIM))
        expected = weight.double() @ t.double() + r * (b.double() @ a.double())
        got = erasure.erased_weight(NAME, weight, s, r)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-3 * float(s + r)
        )
    assert torch.equal(erasure.erased_weight(NAME, weight, 0.0, 0.0), weight)


def test_only_the_pooled_columns_of_the_added_embedding_change():
    erasure = random_erasure()
    weight = torch.randn(16, POOLED_DIM + 48, generator=torch.Generator().manual_seed(1))
    erased = erasure.erased_weight(ADDED, weight)
    assert torch.equal(erased[:, POOLED_DIM:], weight[:, POOLED_DIM:])
    expected = weight[:, :POOLED_DIM] @ erasure.edits[POOLED].matrix
    torch.testing.assert_close(erased[:, :POOLED_DIM], expected)


def test_an_erasure_of_another_family_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"96 numbers and middle_.*to_k reads 768"):
        random_erasure().erased_weight(NAME, torch.zeros(2, 768))


def test_a_result_that_is_not_finite_is_refused():
    erasure = Erasure({CONTEXT: Edit.from_matrix(1e6 * torch.eye(4))})
    with pytest.raises(ValueError, match=r"would not be finite in torch\.float16"):
        erasure.erased_weight(NAME, torch.ones(2, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="to_k holds numbers that are not finite before"):
        erasure.erased_weight(NAME, torch.full((2, 4), torch.nan))


def test_apply_changes_exactly_the_erased_layers_and_applied_restores_them(pipelines):
    unet = copy.deepcopy(pipelines["sdxl"].unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    layers = text_layers(unet)
    erasure = random_erasure(0, list(trained_layers(unet)))
    with temporarily_erased(erasure, unet, 0.5, 2.0):
        changed = {
            n for n, tensor in unet.state_dict().items() if not torch.equal(tensor, before[n])
        }
        for name, reader in layers.items():
            expected = erasure.erased_weight(name, before[reader.path + ".weight"], 0.5, 2.0)
            assert torch.equal(reader.layer.weight, expected)
    assert changed == {reader.path + ".weight" for reader in layers.values()}
    assert "add_embedding.linear_1.weight" in changed
    assert all(torch.equal(tensor, before[n]) for n, tensor in unet.state_dict().items())
    erase_in_place(erasure, unet)
    assert not torch.equal(unet.state_dict()[next(iter(changed))], before[next(iter(changed))])


def test_a_refused_apply_leaves_the_unet_as_it_was(pipelines):
    unet = copy.deepcopy(pipelines["sd1"].unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(ValueError, match="edit of the pooled embedding, which this model does not"):
        erase_in_place(random_erasure(), unet)
    stray = {"input_blocks.9.1.transformer_blocks.0.attn2.to_k": (torch.ones(1, 32),) * 2}
    with pytest.raises(ValueError, match=r"LoRA for input_blocks\.9"):
        erase_in_place(Erasure({CONTEXT: Edit.from_matrix(torch.eye(32) * 2)}, stray), unet)
    with pytest.raises(ValueError, match="reads 32"):
        erase_in_place(Erasure({CONTEXT: Edit.from_matrix(torch.eye(48))}), unet)
    assert all(torch.equal(tensor, before[n]) for n, tensor in unet.state_dict().items())


@pytest.mark.parametrize("name", ["sd1", "sd1 one layer", "sd2", "sdxl"])
def test_canonical_names_are_those_of_the_single_file(pipelines, singles, name):
    layers, stored = text_layers(pipelines[name].unet), load_file(singles[name])
    for own, reader in layers.items():
        assert torch.equal(stored[f"model.diffusion_model.{own}.weight"], reader.layer.weight)
    assert canonical(layers) == {name: name for name in layers}
    assert diffusers_names(layers) == {name: reader.path for name, reader in layers.items()}


# --- saving and loading --------------------------------------------------------------------------


def test_an_erasure_comes_back_as_it_was_saved(saved):
    erasure, path = saved
    again = load_erasure(path)
    assert list(again.edits) == list(again.sums) == [CONTEXT, POOLED]
    assert again.lora.keys() == erasure.lora.keys()
    for name, pair in erasure.lora.items():
        assert all(torch.equal(x, y) for x, y in zip(again.lora[name], pair, strict=True))
    for stream, edit in erasure.edits.items():
        for part in ("up", "down"):
            assert torch.equal(getattr(again.edits[stream], part), getattr(edit, part))
        for part in ("triangle", "representatives"):
            sums, due = (getattr(of.sums[stream], part) for of in (again, erasure))
            assert torch.equal(sums, due)
    assert again.bank.keys() == {CONTEXT}
    bank, due = again.bank[CONTEXT], erasure.bank[CONTEXT]
    assert torch.equal(bank.triangle, due.triangle) and torch.equal(bank.mean, due.mean)
    assert bank.dropped.keys() == due.dropped.keys() and bank.name == due.name == "a bank"
    assert all(torch.equal(rows, due.dropped[prompt]) for prompt, rows in bank.dropped.items())
    assert again.sums_ids == erasure.sums_ids and len(again.sums_ids) == 1
    assert again.provenance == erasure.provenance
    assert (again.lambda1, again.lambda2, again.suppression) == (0.2, 1e-3, 0.6)


def test_the_same_erasure_is_the_same_bytes(saved, tmp_path):
    erasure, path = saved
    save_erasure(erasure, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_saving_never_overwrites_unasked(saved):
    erasure, path = saved
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        save_erasure(Erasure(erasure.edits), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
    save_erasure(Erasure(erasure.edits), path, overwrite=True)
    assert not load_erasure(path).sums


def far_apart(one, other) -> float:
    """|T - T'| over |T - I|."""
    change = (edit.up.double() @ edit.down.double() for edit in (one, other))
    one, other = change
    return float((one - other).norm() / one.norm())


def test_saved_sums_merge_to_the_joint_fit(tmp_path):
    parts = [random_erasure(seed, [NAME]) for seed in (1, 2, 3)]
    for number, part in enumerate(parts):
        save_erasure(part, tmp_path / f"{number}.safetensors")
    merged = Erasure.merge([load_erasure(tmp_path / f"{n}.safetensors") for n in range(3)])
    joint = random_sums(DIM, 1) + random_sums(DIM, 2) + random_sums(DIM, 3)
    bank = random_bank(1) | random_bank(2) | random_bank(3)
    assert far_apart(solve(joint, bank, 0.2, 1e-3, 0.6), merged.edits[CONTEXT]) < 2e-6
    weight = torch.zeros(32, DIM)
    added = sum(part.lora[NAME][1] @ part.lora[NAME][0] for part in parts)
    torch.testing.assert_close(merged.erased_weight(NAME, weight), added, atol=1e-5, rtol=1e-5)
    assert merged.provenance["merged"] == [part.provenance for part in parts]
    # The merged one can be merged again.
    four = Erasure.merge([merged, random_erasure(4)])
    expected = solve(joint + random_sums(DIM, 4), bank | random_bank(4), 0.2, 1e-3, 0.6)
    assert far_apart(expected, four.edits[CONTEXT]) < 2e-6


def test_erasures_that_cannot_be_merged_are_refused_with_the_reason():
    erasure = random_erasure()
    with pytest.raises(ValueError, match="without its sums"):
        Erasure.merge([erasure, Erasure(erasure.edits)])
    with pytest.raises(ValueError, match=r"λ1, λ2 and suppression are \(1\.0, 0\.1, 1\.6\)"):
        Erasure.merge([erasure, Erasure.fit(erasure.unpacked_sums(), erasure.bank)])
    with pytest.raises(ValueError, match="different model families"):
        Erasure.merge(
            [erasure, Erasure.fit({CONTEXT: random_sums(DIM, 1)}, None, 0.2, 1e-3, suppression=0.6)]
        )
    with pytest.raises(ValueError, match="one with a bank and one without"):
        Erasure.merge(
            [erasure, Erasure.fit(erasure.unpacked_sums(), None, 0.2, 1e-3, suppression=0.6)]
        )
    with pytest.raises(ValueError, match="nothing to merge"):
        Erasure.merge([])


def test_the_same_sums_are_not_counted_twice(tmp_path):
    one, other = random_erasure(1), random_erasure(2)
    save_erasure(one, tmp_path / "one.safetensors")
    save_erasure(Erasure.merge([one, other]), tmp_path / "both.safetensors")
    again, both = (load_erasure(tmp_path / f"{name}.safetensors") for name in ("one", "both"))
    for erasures in ([one, one], [one, other, again], [again, both], [both, both]):
        with pytest.raises(ValueError, match=r"number \d and \d hold the sums of the same erasure"):
            Erasure.merge(erasures)
    assert len(Erasure.merge([both, random_erasure(3)]).sums_ids) == 3


def test_what_one_erasure_preserves_another_may_not_erase():
    def named(seed, name, **settings):
        concept = {"name": name, "anchor": "ground", "templates": ["{}"]}
        note = {"concepts": [concept], "settings": settings}
        return replace(random_erasure(seed), provenance=note)

    ship, car = named(1, "ship"), named(2, "car", preserve=["a carpet"])
    merged = Erasure.merge([ship, car])
    assert [concept.name for concept in concepts_of(merged)] == ["ship", "car"]
    for settings in ({"preserve": ["a photo of a Ship"]}, {"exclude": ["ship"]}):
        with pytest.raises(ValueError, match="another erases 'ship'"):
            Erasure.merge([merged, named(3, "dog", **settings)])


@pytest.mark.parametrize(
    ("name", "anchor", "words"),
    [
        ("Dog", "tree", "two of the erasures erase 'dog'"),
        ("ship", "Dog", "erases 'Dog', which is the anchor of 'ship' in another"),
    ],
)
def test_what_one_list_of_concepts_may_not_hold_two_erasures_may_not(name, anchor, words):
    notes = [{"name": "dog", "anchor": "cat"}, {"name": name, "anchor": anchor}]
    erasures = [
        replace(random_erasure(seed), provenance={"concepts": [{**note, "templates": ["{}"]}]})
        for seed, note in enumerate(notes)
    ]
    with pytest.raises(ValueError, match=words):
        Erasure.merge(erasures)


@pytest.mark.parametrize(
    "note", [{"merged": [3]}, {"concepts": ["ship"]}, {"concepts": [{"name": "ship"}]}]
)
def test_a_provenance_that_does_not_name_the_concepts_is_explained(note):
    with pytest.raises(ValueError, match=r"provenance holds|does not say what it erases"):
        concepts_of(replace(random_erasure(), provenance=note))


@pytest.mark.parametrize(
    "note", [{"settings": [1]}, {"concepts": 3}, {"settings": {"preserve": None, "exclude": 5}}]
)
def test_a_strange_provenance_is_no_reason_not_to_merge(note):
    one, other = random_erasure(1), replace(random_erasure(2), provenance=note)
    assert Erasure.merge([one, other]).sums


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_of_an_older_format_loads_and_merges(number):
    """tests/data/erasure-N.safetensors, written by releases 0.1 and 0.2: T, sums, bank and LoRA of
    both streams, of small random numbers."""
    path = Path(__file__).parent / "data" / f"erasure-{number}.safetensors"
    stored, erasure = load_file(path), load_erasure(path)
    assert (erasure.lambda1, erasure.lambda2, erasure.suppression) == (
        0.2,
        1e-3,
        0.6 * (number == 2),
    )
    solved, sums = (0.2, 1e-3, erasure.suppression), {}
    for stream, prefix in ((CONTEXT, ""), (POOLED, "pooled_")):
        names = {1: (f"{prefix}edit", f"{prefix}sums."), 2: (f"edit.{stream}", f"sums.{stream}.")}
        edit, (name, sums_name) = erasure.edits[stream], names[number]
        due = stored[name] - torch.eye(edit.dim)
        assert (edit.up @ edit.down - due).norm() < 2e-6 * due.norm()
        erased, moved, preserved = (stored[f"{sums_name}{part}"] for part in OLD_SUMS)
        v = stored.get(f"{sums_name}concepts", torch.zeros(0, edit.dim))
        sums[stream] = Sums(erased + 0.2 * preserved, moved - erased, v)
        assert far_apart(solve(sums[stream], erasure.bank.get(stream), *solved), edit) < 2e-6
        found = erasure.unpacked_sums()[stream]
        assert (found.gram - sums[stream].gram).norm() < 1e-6 * found.gram.norm()
        assert torch.equal(found.representatives, v)
    gram = stored["sums.bank" if number == 1 else "kept.context.gram"]
    assert (unpack(erasure.bank[CONTEXT].triangle) - gram).norm() < 1e-6 * gram.norm()
    assert erasure.bank.keys() == {CONTEXT}
    assert list(erasure.bank[CONTEXT].dropped) == ["a prompt about 0"]
    assert len(erasure.lora) == 1 and erasure.provenance["seed"] == 0
    g = torch.Generator().manual_seed(1)
    rows, targets = torch.randn(2, 6, erasure.edits[CONTEXT].dim, generator=g)
    added = {s: Sums.zeros(e.dim) for s, e in erasure.edits.items()}
    added = {s: of.add_erased(rows[:, : of.dim], targets[:, : of.dim]) for s, of in added.items()}
    other = Erasure.fit(added, erasure.bank, 0.2, 1e-3, suppression=erasure.suppression)
    joint = solve(sums[CONTEXT] + added[CONTEXT], erasure.bank[CONTEXT], *solved)
    assert far_apart(joint, Erasure.merge([erasure, other]).edits[CONTEXT]) < 2e-6
    with pytest.raises(ValueError, match="sums of the same erasure"):
        Erasure.merge([erasure, erasure])


# --- a file from a stranger ----------------------------------------------------------------------


def rewritten(path, tensors=(), metadata=(), without=()):
    """The saved erasure with tensors and metadata changed."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        old = file.metadata()
    state = {k: v for k, v in load_file(path).items() if k not in without} | dict(tensors)
    save_file(state, path, old | dict(metadata))
    return path


SQUARE, TRIANGLE = torch.eye(DIM), DIM * (DIM + 1) // 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"stowaway": SQUARE}}, "'stowaway', which does not belong"),
        ({"tensors": {"lora.../../x.down": SQUARE}}, "is not the name of a cross-attention"),
        ({"tensors": {"lora.middle_block.1.attn2.to_k.down": SQUARE}}, "is not the name"),
        (
            {"tensors": {"edit.context.up": SQUARE.double()}},
            r"'edit.context.up' is F64 \[96, 96\], expected F32",
        ),
        ({"tensors": {"edit.context.up": torch.ones(DIM, DIM + 1)}}, r"down' is F32 .* \[97, 96\]"),
        ({"tensors": {"edit.context.up": torch.ones(2, 2, 2)}}, r"F32 \[2, 2, 2\]"),
        ({"tensors": {"edit.context.up": torch.ones(1, 21000)}}, r"F32 \[1, 21000\]"),
        (
            {"tensors": {"sums.context.triangle": torch.full((TRIANGLE,), torch.nan)}},
            "'sums.context.triangle' holds numbers that are not",
        ),
        ({"tensors": {"bank.context.triangle": SQUARE}}, r"triangle' is F32 \[96, 96\]"),
        ({"tensors": {"sums.context.triangle": torch.ones(15)}}, r"is F32 \[15\]"),
        ({"tensors": {"bank.context.dropped.0": torch.ones(7, 5)}}, r"0' is F32 \[7, 5\]"),
        ({"tensors": {"edit.other": SQUARE}}, "'edit.other', which does not belong"),
        ({"tensors": {"edit.context": SQUARE}}, "'edit.context', which does not belong"),
        ({"without": ["edit.context.up"]}, "lacks the edit of the context"),
        ({"without": ["edit.context.down"]}, "'edit.context.down'"),
        ({"without": ["sums.context.triangle"]}, "'sums.context"),
        ({"without": ["bank.context.triangle"]}, "'bank.context.triangle'"),
        ({"metadata": {"realera_erasure": "4"}}, "format is '4'"),
        ({"metadata": {"realera": "{not json"}}, "not a sound"),
        ({"metadata": {"realera": "[]"}}, "not a sound"),
        ({"metadata": {"realera": "[" * 100_000}}, "not a sound"),
        ({"metadata": {"realera": '{"provenance": 3}'}}, "provenance"),
    ],
)
def test_a_changed_erasure_file_is_refused(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        load_erasure(rewritten(saved[1], **changes))


def test_a_lora_of_the_wrong_shape_is_refused(saved):
    erasure, path = saved
    key = f"lora.{next(iter(erasure.lora))}"
    with pytest.raises(ValueError, match=r"down' is F32 \[2, 5\]"):
        load_erasure(rewritten(path, {key + ".down": torch.ones(2, 5)}))
    with pytest.raises(ValueError, match=r"up' is F32 \[32, 2\]"):
        load_erasure(rewritten(path, {key + ".down": torch.ones(3, DIM)}))
    with pytest.raises(ValueError, match=r"up'"):
        load_erasure(rewritten(path, without=[key + ".up"]))


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"edit": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "cut off"),
        ({"edit": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678", "corrupt"),
        ({"edit": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, b"1234", "does not fit"),
        (
            {"edit": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            b"12345678",
            "instead of 0",
        ),
        ({"edit": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b"", "shape"),
        ({"edit": {"dtype": "F32", "shape": [2**50, 2**50], "data_offsets": [0, 4]}}, b"", "shape"),
        ({"edit": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "'OBJ'"),
        ({"edit": 3}, b"", "corrupt"),
        ({"__metadata__": {"realera": 3}}, b"", "not text"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b"[" * 50_000, b"", "corrupt"),
        (b"\xff\xfe\xfd", b"", "corrupt"),
    ],
)
def test_a_malformed_header_is_refused_before_a_tensor_is_read(tmp_path, header, data, message):
    with pytest.raises(ValueError, match=message):
        load_erasure(raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 2**63) + b"{}", b"{}" * 100])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is empty|is text|not a safetensors file or was cut off"):
        load_erasure(path)


@pytest.mark.parametrize("size", [10, 5_000, -1])
def test_a_truncated_erasure_is_refused(saved, size):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="cut off"):
        load_erasure(path)


def test_a_network_in_which_a_wrapper_hides_layers_is_refused():
    """As checkpoint_wrapper and FSDP wrap blocks: the other blocks alone would be erased."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self._checkpoint_wrapped_module = module

    network = tiny.pipeline().unet
    network.down_blocks[0] = Wrapper(network.down_blocks[0])
    with pytest.raises(ValueError, match=r"_checkpoint_wrapped_module.* lies in a wrapper"):
        text_layers(network)
