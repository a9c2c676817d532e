"""The model card: valid, complete, and safe with the texts of strangers."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from realera.checkpoints.families import Family, family_of
from realera.checkpoints.writing import write_checkpoint
from realera.cli import main
from realera.edit.closed_form import Edit
from realera.edit.erasure import Erasure
from realera.edit.erasure_file import save_erasure
from realera.edit.text_layers import FAMILIES, TRANSFORMERS
from realera.report.model_card import (
    FREE_ROWS,
    GRADIENT_WORDS,
    _pipeline,
    model_card,
    write_card,
)

DOCS = Path(__file__).parent.parent / "docs"
CONCEPT = {"name": "fog", "anchor": "sun", "templates": ["{}"]}


def erasure_of(width: int, provenance: dict) -> Erasure:
    return Erasure({"context": Edit.from_matrix(torch.eye(width))}, provenance=provenance)


def written(folder: Path, provenance: dict) -> Path:
    """An erased file of Z-Image's network, with only the layers that tell the family."""
    source, path = folder / "z-image.safetensors", folder / "out.safetensors"
    shapes = {"cap_embedder.0.weight": (8,), "cap_embedder.1.weight": (4, 8), "x_pad_token": (1, 4)}
    shapes["context_refiner.0.attention.qkv.weight"] = (12, 4)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, source)
    write_checkpoint(source, erasure_of(8, provenance), path)
    return path


def test_a_card_says_what_docs_say_of_attacks():
    cells = re.search(r"^\| ours \|(.+)\|$", (DOCS / "limits.md").read_text("utf-8"), re.MULTILINE)
    _, _, rows, _, words, _ = map(int, cells[1].split("|"))
    assert (rows, words) == (FREE_ROWS, GRADIENT_WORDS)


def test_a_folder_has_the_card_in_place_of_the_readme_of_its_original(tmp_path, folders, pipelines):
    source, out = tmp_path / "base", tmp_path / "out"
    pipelines["sd1"].save_pretrained(source)
    (source / "README.md").write_text("the original")
    width = family_of(source).dim
    for overwrite in (False, True):  # the card is no stranger's file when a copy is replaced
        write_checkpoint(source, erasure_of(width, {"concepts": [CONCEPT]}), out, overwrite)
        assert not (out / "README.md").exists()
        assert write_card(out, source) == out / "README.md"
        card = ModelCard.load(out / "README.md")
        assert card.data.base_model == "base" and "| fog | sun |" in card.text
        assert len(re.findall(r"safetensors \| `[0-9a-f]{64}`", card.text)) == 1
    assert (source / "README.md").read_text() == "the original"


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_apply_that_was_stopped_before_the_card_writes_the_card_alone(
    tmp_path, folders, singles, layout, capsys
):
    if layout == "file":
        source = network = tmp_path / "base.safetensors"
        out, card = tmp_path / "out.safetensors", tmp_path / "out.md"
        shutil.copy(singles["sd1"], source)
    else:
        source, out = tmp_path / "base", tmp_path / "out"
        shutil.copytree(folders["sd1"], source)
        network, card = next(source.glob("unet/*.safetensors")), out / "README.md"
    erasure = tmp_path / "erasure.safetensors"
    save_erasure(erasure_of(family_of(source).dim, {"concepts": [CONCEPT]}), erasure)
    apply = ["apply", str(source), str(erasure), str(out)]
    assert main(apply) == 0
    text, made = card.read_text("utf-8"), out.stat()
    card.unlink()
    capsys.readouterr()

    assert main([*apply, "--edit-strength", "0.5"]) == 1
    content = bytearray(network.read_bytes())
    content[-4] ^= 1
    original = network.read_bytes()
    network.write_bytes(content)
    assert main(apply) == 1
    network.write_bytes(original)
    assert capsys.readouterr().err.count("exists") == 2 and not card.exists()

    assert main(apply) == 0
    assert card.read_text("utf-8") == text and out.stat().st_ino == made.st_ino
    assert main(apply) == 1


def test_a_network_alone_is_used_where_networks_are(tmp_path):
    text = model_card(written(tmp_path, {"concepts": [CONCEPT]}), "z-image.safetensors")
    assert "`models/diffusion_models`" in text and "ZImagePipeline" in text
    assert "z-image" in ModelCard(text).data.tags


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pipeline_that_a_card_names_is_in_diffusers(name):
    for pooled in (None, 8):
        pipeline = _pipeline(Family(name, "", 8, pooled, 9, torch.float32, {}))
        if name in TRANSFORMERS and "pipeline" not in TRANSFORMERS[name]:
            assert pipeline is None
        else:
            assert hasattr(diffusers, pipeline)


def test_texts_of_a_stranger_stay_texts(tmp_path):
    evil = "a|b\n# <script>alert(1)</script> ![x](https://evil)\n```\n---"
    provenance = {
        "concepts": [{**CONCEPT, "name": evil, "anchor": evil}, "old format"],
        "scope": [3, {"word": evil}],
        "settings": {"preserve": [evil], "exclude": 7},
        "merged": "no list",
    }
    text = model_card(written(tmp_path, provenance), tmp_path / "z: [1.safetensors")
    shown = text.replace(re.search(r"```json\n.+?\n```\n", text, re.DOTALL)[0], "")
    assert "<script>" not in shown and "![x]" not in shown and "| old format |" in shown
    assert not [line for line in shown.splitlines() if line.startswith(("# <", "```"))]
    assert ModelCard(text).data.base_model == "z: [1.safetensors"


def test_a_card_of_a_thousand_concepts_is_short(tmp_path):
    concepts = [{**CONCEPT, "name": f"fog {k}"} for k in range(1000)]
    text = model_card(written(tmp_path, {"merged": [{"concepts": concepts}]}), "z.safetensors")
    assert "fog 0, fog 1, fog 2 and 997 more" in text and "And 900 more" in text
    assert len(text) < 10_000
    assert json.loads(re.search(r"```json\n(.+?)\n```\n", text, re.DOTALL)[1])["merged"]
