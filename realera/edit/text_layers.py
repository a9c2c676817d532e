"""The layers of a network that read the text, by stream, and their names in every layout.

Where text reaches the image only through layers that are linear in its rows, W T e is W applied to
T e. An erasure has one T for each stream, and this module alone lists the layers that read one.
Their *canonical* names are those of the single-file layout, which ComfyUI uses as well.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..text.encoding import CONTEXT, POOLED

FAMILIES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted(Path(__file__).parents[1].glob("families/*.json"))
}
# Families that no edit covers: the marks of each, as a family in `families/` has them for each
# layout, and the reason.
UNCOVERED: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("uncovered_families.json").read_text("utf-8")
)
SUPPORTED = ", ".join(family["title"] for family in FAMILIES.values())
# Transformers; those whose marks are the most layers come first, since others have some of them.
TRANSFORMERS = dict(
    sorted(
        ((name, family) for name, family in FAMILIES.items() if "readers" in family),
        key=lambda item: -len(item[1]["marks"]["single"]),
    )
)
LAYOUTS = ("single", "diffusers")
GUIDANCE = 7.5  # default guidance scale of a family


@dataclass(frozen=True)
class TextLayerKind:
    """A kind of layers that read a stream.

    pattern: regular expression of their canonical names
    sole_input: whether the stream is all that they read; else its columns come first, and the
        others stay as they are
    trained: whether the alignment trains a LoRA on them
    norm: canonical name of the RMS norm in front, where a network may have one
    offset: number that the norm adds to its weight
    """

    stream: str
    pattern: str
    sole_input: bool = True
    trained: bool = True
    norm: str | None = None
    offset: float = 0.0

    def fits(self, columns: int, dim: int) -> bool:
        """Whether a layer with `columns` inputs can read a stream of dimension `dim`."""
        return columns == dim if self.sole_input else columns >= dim


def _pattern(name: str) -> str:
    """Regular expression of a layer's name in a family's file, where * is the number of a block."""
    return re.escape(name).replace(r"\*", r"(\d{1,3})")


def _transformer_kinds() -> Iterable[TextLayerKind]:
    layers = [layer for family in TRANSFORMERS.values() for layer in family["readers"]]
    norms = {layer["single"]: layer["norm"] for layer in layers if "norm" in layer}
    for name, stream in {layer["single"]: layer["stream"] for layer in layers}.items():
        norm, trained = norms.get(name, {}), stream == CONTEXT
        yield TextLayerKind(
            stream,
            _pattern(name),
            trained=trained,
            norm=norm.get("single"),
            offset=norm.get("offset", 0.0),
        )


KINDS = (
    TextLayerKind(
        CONTEXT,
        (
            r"(?:(?:in|out)put_blocks\.\d{1,2}\.1|middle_block\.1)"
            r"\.transformer_blocks\.\d{1,2}\.attn2\.to_[kv]"
        ),
    ),
    # SDXL's pooled embedding is followed by the size embeddings.
    TextLayerKind(POOLED, r"label_emb\.0\.0", sole_input=False, trained=False),
    *_transformer_kinds(),
)
_DIFFUSERS = (
    r"(?P<block>down_blocks\.\d+|up_blocks\.\d+|mid_block)"
    r"\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)"
)


@dataclass(frozen=True)
class TextLayer:
    """A layer of a network that reads the text.

    name: canonical name
    path: name in the network
    norm: RMS norm in front, if there is one
    """

    name: str
    path: str
    layer: nn.Linear
    kind: TextLayerKind
    norm: nn.Module | None = None

    @property
    def gain(self) -> Tensor | None:
        """Gain of the norm in front (`gain_of`), float32 [in]."""
        if self.norm is None:
            return None
        (weight,) = self.norm.parameters()
        return gain_of(weight, self.kind.offset)


def gain_of(weight: Tensor, offset: float) -> Tensor:
    """Gain of an RMS norm as a divisor of the layer behind it, float32 [in].

    weight: weight of the norm; offset: number that the norm adds to it
    Where the sum is 0 the layer reads nothing, and the gain is 1.
    """
    gain = weight.detach().float() + offset
    return torch.where(gain == 0, 1.0, gain)


def text_layers(network: nn.Module) -> dict[str, TextLayer]:
    """Every layer that reads the text, canonical name -> layer, in the network's order.

    Looks through torch.compile's and peft's wrappers to the layer that holds the weight. Raises
    ValueError when no layer reads a context, or one that reads the text is no linear layer.
    """
    network = uncompiled_module(network)
    layers = {
        path.removeprefix("base_model.model."): getattr(layer, "base_layer", layer)
        for path, layer in network.named_modules()
    }
    names = canonical([*layers, *(name for name, _ in network.named_parameters(recurse=False))])
    paths = {name: path for path, name in names.items()}
    found, other, family = {}, [], family_in(network)
    for path, layer in layers.items():
        kind = text_layer_kind(names[path], family)
        if kind is not None and _is_linear(layer):
            norm = layers[paths[kind.norm]] if kind.norm in paths else None
            found[names[path]] = TextLayer(names[path], path, layer, kind, norm)
        elif kind is not None:
            other.append(path)
    if refusal := refusal_of(layers_in(network)):
        raise ValueError(f"{type(network).__name__} {refusal}")
    if not any(layer.kind.stream == CONTEXT for layer in found.values()):
        raise ValueError(
            f"{type(network).__name__} has no cross-attention projections attn2.to_k / attn2.to_v "
            f"and no other layer that is known to read the text: RealEra works on {SUPPORTED}"
        )
    bare = canonical(map(unwrapped, layers))
    for path, layer in layers.items():
        name = unwrapped(path)
        if name != path and _is_linear(layer) and text_layer_kind(bare[name]) is not None:
            raise ValueError(
                f"{path}, which reads the text, lies in a wrapper (torch.compile of a part, "
                "activation checkpointing, FSDP) and would stay unerased: give the network as it "
                "is without it"
            )
    if other:
        raise ValueError(
            f"{other[0]}, which reads the text, is a {type(layers[other[0]]).__name__} and no "
            "linear layer with a weight: it would stay unerased. Load the model in float16, "
            "bfloat16 or float32"
        )
    return found


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it has the attributes of an nn.Linear, as ComfyUI's quantised layers have."""
    return all(hasattr(layer, name) for name in ("in_features", "out_features", "weight"))


def unwrapped(name: str) -> str:
    """The name of a layer or tensor without what wrappers add: _orig_mod (torch.compile),
    _checkpoint_wrapped_module, _fsdp_wrapped_module. Parts of a network have no such names."""
    return re.sub(r"(?<![^.])_\w+\.(?=.)", "", name)


def uncompiled_module(network: nn.Module) -> nn.Module:
    """The network itself, where it is what `torch.compile(network)` returned."""
    return getattr(network, "_orig_mod", network)


def trained_layers(network: nn.Module) -> dict[str, TextLayer]:
    """The layers that a LoRA is trained on: those that read the context."""
    return {name: layer for name, layer in text_layers(network).items() if layer.kind.trained}


def text_layer_kind(name: str, family: str | None = None) -> TextLayerKind | None:
    """Kind of the layer with this canonical name, or None when it reads no text.

    family: of the transformer, where it is known: a reader's name is another layer's in others
    """
    if family is not None and not names_of_reader(name, family):
        return None
    return next((kind for kind in KINDS if re.fullmatch(kind.pattern, name)), None)


def transformer_of(layers: Mapping[str, int | None]) -> tuple[str, str] | None:
    """Family and layout of the transformer with these layers, or None when it is unknown.

    layers: name -> number of columns of the weight; None where that is no matrix or not known
    """
    for family, known in TRANSFORMERS.items():
        for layout, marks in known["marks"].items():
            if _has_marks(layers, marks):
                return family, layout
    return None


def refusal_of(layers: Mapping[str, int | None]) -> str | None:
    """Why no erasure is made for a network with these layers, "is FLUX.2: ..."; None for those of
    a family that RealEra covers or does not know.

    layers: as in `transformer_of`
    """
    for known in UNCOVERED:
        if any(_has_marks(layers, marks) for marks in known["marks"]):
            return f"is {known['title']}: {known['reason']}. RealEra works on {SUPPORTED}"
    return None


def _has_marks(layers: Mapping[str, int | None], marks: Iterable[str]) -> bool:
    """Whether these layers are those of a family with such marks.

    marks: "name", a layer that it has; "name:128", one that reads 128 numbers; "!" in front of one
        that it has not
    """

    def has(mark: str) -> bool:
        if mark.startswith("!"):
            return not has(mark[1:])
        name, _, columns = mark.partition(":")
        return name in layers and (not columns or layers[name] in (None, int(columns)))

    return all(map(has, marks))


def layers_in(network: nn.Module) -> dict[str, int | None]:
    """The layers of a network as `transformer_of` takes them, without the wrappers of peft."""
    modules = {
        path.removeprefix("base_model.model."): getattr(layer, "base_layer", layer)
        for path, layer in uncompiled_module(network).named_modules()
    }
    parameters = (name for name, _ in network.named_parameters(recurse=False))
    columns = {path: getattr(layer, "in_features", None) for path, layer in modules.items()}
    return dict.fromkeys(parameters) | columns


def family_in(network: nn.Module) -> str | None:
    """Family of a transformer, by its layers; None for a U-Net."""
    found = transformer_of(layers_in(network))
    return None if found is None else found[0]


def guidance_of(network: nn.Module) -> float:
    """Classifier-free guidance for sampling; 1 where guidance is an input of the network (FLUX.1
    dev) or the network was distilled to need none (Z-Image Turbo)."""
    family = family_in(network)
    return float(FAMILIES[family].get("guidance", GUIDANCE) if family else GUIDANCE)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Name of a layer in either layout -> canonical name.

    down_blocks.1.attentions.0.X -> input_blocks.4.1.X (two layers a block); names of layers that
    read no text map to themselves.

    names: all layers of a network; the family follows from them
    """
    names = list(names)
    transformer = transformer_of(dict.fromkeys(names))
    if transformer is not None:
        return {name: _canonical_name(name, *transformer) for name in names}
    found = [re.fullmatch(_DIFFUSERS, name) for name in names]
    downs = [int(m["layer"]) for m in found if m and m["block"].startswith("down")]
    stride = max(downs, default=1) + 2  # the layers of a block and its down- or upsampler

    def rename(name: str, match: re.Match[str] | None) -> str:
        if name == "add_embedding.linear_1":
            return "label_emb.0.0"
        if match is None:
            return name
        block, layer, rest = match["block"], int(match["layer"]), match["rest"]
        side, _, number = block.rpartition(".")
        if side == "down_blocks":
            return f"input_blocks.{int(number) * stride + layer + 1}.1.{rest}"
        if side == "up_blocks":
            return f"output_blocks.{int(number) * stride + layer}.1.{rest}"
        return f"middle_block.1.{rest}"

    return {name: rename(name, match) for name, match in zip(names, found, strict=True)}


def _canonical_name(name: str, family: str, layout: str) -> str:
    """Canonical name of a transformer's text layer or its norm; other names stay."""
    for reader in TRANSFORMERS[family]["readers"]:
        for names in (reader, reader.get("norm", {})):
            if layout in names and (match := re.fullmatch(_pattern(names[layout]), name)):
                return _filled(names["single"], match)
    return name


def names_of_reader(name: str, family: str) -> dict[str, str]:
    """Layout -> name in it, of a transformer's text layer; {} where no layer of the family has the
    name.

    name: canonical name
    """
    for reader in TRANSFORMERS[family]["readers"]:
        if match := re.fullmatch(_pattern(reader["single"]), name):
            return {key: _filled(reader[key], match) for key in LAYOUTS if key in reader}
    return {}


def _filled(name: str, match: re.Match[str]) -> str:
    """A name in a family's file with the number of the block of a `_pattern` that matched."""
    return name.replace("*", match[1]) if "*" in name else name


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> name in diffusers' layout, for all text layers of a U-Net."""
    names = list(names)
    blocks = {int(n.split(".")[1]) for n in names if n.startswith("input_blocks")}
    # Layers with attention follow each other; a downsampler's number is the gap between blocks.
    run, stride = 0, 2
    for number in range(max(blocks, default=0) + 1):
        run = run + 1 if number in blocks else 0
        stride = max(stride, run + 1)

    def rename(name: str) -> str:
        side, number, _, rest = name.split(".", 3)
        if side == "input_blocks":
            block, layer = divmod(int(number) - 1, stride)
            return f"down_blocks.{block}.attentions.{layer}.{rest}"
        if side == "output_blocks":
            block, layer = divmod(int(number), stride)
            return f"up_blocks.{block}.attentions.{layer}.{rest}"
        return "mid_block.attentions.0." + name.split(".", 2)[2]

    return {
        name: "add_embedding.linear_1" if name == "label_emb.0.0" else rename(name)
        for name in names
    }
