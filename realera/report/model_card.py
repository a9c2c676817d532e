"""The model card of an erased checkpoint, in the form of the Hugging Face Hub."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..checkpoints.families import Family, Files, open_network
from ..checkpoints.writing import CARD, erasure_notes
from ..edit.text_layers import TRANSFORMERS
from ..storage.safetensors_file import TensorFile, writing

LISTED = 100  # most concepts in a card
WORDS = 10  # words of the scope report in a card
ENTRIES = 20  # most entries of a list of settings in a card
WHOLE = ("first_stage_model.", "vae.")  # prefixes of keys that a network alone lacks
LIMITS = """\
An erasure is for those who type prompts: the concept's name, words near it and prompts that imply \
it are meant to draw the anchor.

Whoever holds the weights can bring a concept back. On RealEra's bundled model, 200 steps of \
gradient descent on free context rows did so in {rows} % of images; four words found by gradient, \
in place of the name, in {words} %. Training on pictures of the concept (LoRA, textual inversion, \
DreamBooth) can do so as well.

Image-to-image, inpainting and adapters that read images still see what they are given. A LoRA, \
textual inversion or other checkpoint that a user loads can draw the concept again. Behind a \
public server, put a detector as well.

An erasure does not undo the training: it changes what prompts draw."""
FREE_ROWS, GRADIENT_WORDS = 100, 23  # docs/limits.md, row "ours"


def card_path(checkpoint: str | os.PathLike[str], is_folder: bool) -> Path:
    """README.md in an erased folder; beside an erased file, its name with the ending .md."""
    path = Path(checkpoint)
    name = path.name.removesuffix(".safetensors") + ".md"
    return path / CARD if is_folder else path.with_name(name)


def write_card(
    checkpoint: str | os.PathLike[str], source: str | os.PathLike[str], overwrite: bool = False
) -> Path:
    """Writes the card of an erased checkpoint that stands alone. Returns the path of the card.

    Parameters as for `model_card`; raises FileExistsError as `output_file_path`.
    """
    path = card_path(checkpoint, Path(checkpoint).is_dir())
    with writing(path, overwrite) as part:
        part.write_text(model_card(checkpoint, source), "utf-8")
    return path


def model_card(
    checkpoint: str | os.PathLike[str],
    source: str | os.PathLike[str],
    pictures: Mapping[str, str] = {},
    measured: Sequence[str] = (),
    others: Mapping[str, str] = {},
) -> str:
    """The card of an erased checkpoint, from the metadata that `write_checkpoint` left in it.

    checkpoint: erased file or diffusers folder
    source: checkpoint file, diffusers folder or name of a bundled model that it was written from
    pictures: file name, relative to the card -> description of the picture
    measured: paragraphs and tables with what was measured, in Markdown
    others: name of a further file beside the card -> its contents
    """
    from huggingface_hub import ModelCardData  # a third of a second

    path, base = Path(checkpoint), Path(source).name
    family, files = open_network(path)
    notes = list(_flat(erasure_notes(files[0][0])))
    concepts = [concept for note in notes for concept in _concepts(note)]
    names = [_text(name) for name, _ in concepts]
    erased = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    data = ModelCardData(
        base_model=base,
        library_name="realera" if _bundled(files) else "diffusers",
        pipeline_tag="text-to-image",
        tags=["realera", "concept-erasure", "machine-unlearning", *_tags(family, files)],
    )
    sections = {
        "What is erased": _erased(concepts, notes),
        "What was measured": "\n\n".join([*_scope(notes), *measured]) or NOT_MEASURED,
        "What it withstands, and what not": LIMITS.format(rows=FREE_ROWS, words=GRADIENT_WORDS),
        "How to use it": _use(path, family, files),
        "How to make it again": _again(_last(files[0][0]), files, base),
    }
    if others:
        lines = [f"- [`{name}`]({quote(name)}): {what}" for name, what in others.items()]
        sections["Files"] = "\n".join(lines)
    sections["Licence"] = "That of the original model. The erasure adds no terms."
    shown = [f"![{what}]({quote(name)})\n\n*{what}*" for name, what in pictures.items()]
    family_name = "a bundled model of RealEra" if _bundled(files) else family.title
    title = f"{_text(base)} without {erased or 'a concept'}"
    intro = (
        f"**{_text(base)}** ({family_name}), erased by "
        "[RealEra](https://realerasing.github.io/RealEra/): prompts that name or imply "
        f"{erased or 'the concept'} are meant to draw an anchor instead. Only the layers that read "
        "the text differ from the original."
    )
    head = f"---\n{data.to_yaml()}\n---\n\n# {title}"
    body = [f"## {name}\n\n{content}" for name, content in sections.items()]
    return "\n\n".join([head, intro, *shown, *body]) + "\n"


NOT_MEASURED = (
    "Nothing yet. `realera evaluate` scores images by the original and the erased model, "
    "`realera scope --check 40` lists what changes with the concept."
)


def _flat(notes: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """The provenances, merged ones each; what is of another type in a stranger's file is left
    out."""
    for note in notes:
        if isinstance(note, Mapping):
            merged = note.get("merged")
            yield from _flat(merged) if isinstance(merged, list) else [note]


def _listed(note: Mapping[str, Any], key: str) -> list[Any]:
    found = note.get(key)
    return found if isinstance(found, list) else []


def _concepts(note: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and anchor of every concept of a provenance."""
    for concept in _listed(note, "concepts"):
        if isinstance(concept, Mapping):
            yield str(concept.get("name", "")), str(concept.get("anchor", ""))
        else:
            yield str(concept), ""


def _tags(family: Family, files: Files) -> list[str]:
    """The family as a tag of the hub: "stable-diffusion-xl"."""
    if _bundled(files):
        return []
    return [re.sub(r"[^a-z0-9.]+", "-", family.title.casefold().removesuffix(" 1.x"))]


def _text(text: str) -> str:
    """A text of a user or a stranger's file that Markdown shows as it is, on one line."""
    for sign in "\\`*_|[]<>#":
        text = text.replace(sign, {"<": "&lt;", ">": "&gt;"}.get(sign, "\\" + sign))
    return " ".join(text.split())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---------------------------------------------------------------- the sections


def _erased(concepts: Sequence[tuple[str, str]], notes: Sequence[Mapping[str, Any]]) -> str:
    if not concepts:
        return "The erasure does not say it."
    rows = [[_text(name), _text(anchor)] for name, anchor in concepts[:LISTED]]
    parts = [_table(["concept", "drawn instead (anchor)"], rows)]
    if len(concepts) > LISTED:
        parts.append(f"And {len(concepts) - LISTED} more: `realera info` lists all.")
    settings = [note["settings"] for note in notes if isinstance(note.get("settings"), Mapping)]
    for key, what in (("preserve", "Preserved prompts"), ("exclude", "Words left out")):
        entries = [_text(str(entry)) for each in settings for entry in _listed(each, key)]
        if entries:
            more = f" and {len(entries) - ENTRIES} more" if len(entries) > ENTRIES else ""
            parts.append(f"{what}: {'; '.join(entries[:ENTRIES])}{more}.")
    return "\n\n".join(parts)


def _scope(notes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first words of the scope reports, as a table."""
    rows = []
    for effect in [e for note in notes for e in _listed(note, "scope")[:WORDS]]:
        try:
            image = effect.get("image_moved")
            drawn = "" if image is None else f"{image:.2f}"
            numbers = [f"{effect[k]:.2f}" for k in ("closeness", "moved", "share_to_anchor")]
            rows.append([_text(effect["word"]), _text(effect["concept"]), *numbers, drawn])
        except (TypeError, LookupError, AttributeError, ValueError):  # a stranger's file
            continue
    if not rows:
        return []
    head = ["word", "concept", "closeness", "moved", "toward the anchor", "image moved"]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    legend = (
        "The words that change most. Closeness: cosine with the concept. Moved: how far the "
        "embedding of the word moves, over its length. Toward the anchor: 1 for the concept "
        "itself. Image moved, where words were drawn: 1 is as far as from the concept to the "
        "anchor."
    )
    return [legend, _table(head, rows)]


def _bundled(files: Files) -> bool:
    """Whether a model carries its configuration, as RealEra's bundled models do."""
    return "config" in files[0][0].metadata


def _use(path: Path, family: Family, files: Files) -> str:
    """Instructions for ComfyUI, A1111 and Forge, and diffusers."""
    name = _text(path.name)
    if _bundled(files):
        return (
            '- **Python**: `realera.load_model("' + path.name + '")`.\n'
            "- **ComfyUI**: put the file into `models/checkpoints` and open it in *Bundled Model*. "
            "No other loader recognises a model this small."
        )
    if path.is_dir():
        return (
            f'- **diffusers**: `DiffusionPipeline.from_pretrained("{path.name}")`.\n'
            "- **ComfyUI, A1111, Forge** read single files: `realera apply` erases from the "
            "single file of the same model, or makes a LoRA file (`--lora`) that they load at "
            "strength 1."
        )
    whole = any(key.startswith(WHOLE) for key in files[0][0].entries)
    pipeline = _pipeline(family)
    folder = "checkpoints" if whole else "diffusion_models"
    loader = "Load Checkpoint" if whole else "Load Diffusion Model"
    lines = [
        f"- **ComfyUI**: put `{name}` into `models/{folder}` and open it with *{loader}*.",
        "- **A1111, Forge**: put it into `models/Stable-diffusion`. The file has the layout, names "
        "and data types of the original: what draws with the original draws with it.",
    ]
    if pipeline is None:
        lines.append("- **diffusers** has no pipeline that was tried with this family.")
    elif whole:
        lines.append(f'- **diffusers**: `{pipeline}.from_single_file("{path.name}")`.')
    else:
        lines.append(
            f"- **diffusers**: the file is the network alone; load it where a {pipeline} takes the "
            "original's."
        )
    return "\n".join(lines)


def _pipeline(family: Family) -> str | None:
    """Name of the diffusers class of the pipeline, None for a family that ComfyUI alone draws."""
    if family.name in TRANSFORMERS:
        pipeline = TRANSFORMERS[family.name].get("pipeline")
        return None if pipeline is None else str(pipeline["class"])
    xl = "XL" if family.pooled else ""
    return f"StableDiffusion{xl}{'Inpaint' if family.in_channels == 9 else ''}Pipeline"


def _again(note: Any, files: Files, base: str) -> str:
    """Settings and hashes."""
    note = note if isinstance(note, Mapping) else {}
    origins = [_last(file).get("from") for file, _ in files]
    rows = [
        [_text(str(origin.get("file"))), f"`{_text(str(origin.get('sha256')))}`"]
        for origin in origins
        if isinstance(origin, Mapping)
    ]
    strengths = [f"{note.get(f'{part}_strength', 1.0)}" for part in ("edit", "lora")]
    settings = _short({k: v for k, v in note.items() if k not in ("scope", "from", "source")})
    return "\n\n".join(
        [
            f"`realera apply` of the erasure file to {_text(base)}, at strengths {strengths[0]} "
            f"(edit) and {strengths[1]} (LoRA), gives this checkpoint byte for byte. The original:",
            _table(["file", "SHA-256"], rows),
            "The erasure was made with:",
            f"```json\n{json.dumps(settings, indent=1, ensure_ascii=False)}\n```",
        ]
    )


def _last(file: TensorFile) -> Mapping[str, Any]:
    """The note of the last erasure of a file."""
    notes = erasure_notes(file)
    return notes[-1] if notes and isinstance(notes[-1], Mapping) else {}


def _short(value: Any) -> Any:
    """JSON with long lists cut."""
    if isinstance(value, Mapping):
        return {key: _short(entry) for key, entry in value.items()}
    if isinstance(value, list):
        more = [f"and {len(value) - ENTRIES} more"] if len(value) > ENTRIES else []
        return [*map(_short, value[:ENTRIES]), *more]
    return value
