"""Which layers of a network read which stream of the text, and what every layout calls them.

Where text reaches the image only through layers that are linear in its rows, W T e is W applied to
T e: an erasure is one T a stream, and the layers that read it are listed here and nowhere else.
Names are *canonical* in the single-file layout, which is ComfyUI's too.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .models import CONTEXT, POOLED


@dataclass(frozen=True)
class Kind:
    """A kind of layers that read a stream.

    pattern: their canonical names; endings: how networks' own names of them end
    whole: they read nothing else; else the stream's columns come first and the others stay
    adapted: alignment trains a LoRA on them
    """

    stream: str
    pattern: re.Pattern[str]
    endings: tuple[str, ...]
    whole: bool
    adapted: bool

    def fits(self, columns: int, dim: int) -> bool:
        """Whether a layer of that many columns can read a stream of `dim` numbers."""
        return columns == dim if self.whole else columns >= dim


KINDS = (
    Kind(
        CONTEXT,
        re.compile(
            r"(?:(?:in|out)put_blocks\.\d{1,2}\.1|middle_block\.1)"
            r"\.transformer_blocks\.\d{1,2}\.attn2\.to_[kv]"
        ),
        (".attn2.to_k", ".attn2.to_v"),
        whole=True,
        adapted=True,
    ),
    # SDXL's pooled embedding is followed by the size embeddings.
    Kind(
        POOLED,
        re.compile(r"label_emb\.0\.0"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        whole=False,
        adapted=False,
    ),
)
_DIFFUSERS = re.compile(
    r"(?P<block>down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)"
)


@dataclass(frozen=True)
class Reader:
    """A layer of a network, by its canonical name and the network's own."""

    name: str
    path: str
    layer: nn.Linear
    kind: Kind


def readers(network: nn.Module) -> dict[str, Reader]:
    """Every layer that reads the text, canonical name -> layer, in the network's order.

    Looks through peft's wrappers to the layer that holds the weight. Raises ValueError when no
    layer reads a context.
    """
    endings = tuple(ending for kind in KINDS for ending in kind.endings)
    layers = {
        path.removeprefix("base_model.model."): getattr(layer, "base_layer", layer)
        for path, layer in network.named_modules()
        if path.endswith(endings)
    }
    found = {}
    for path, name in canonical(layers).items():
        kind = kind_of(name)
        if kind is not None:
            found[name] = Reader(name, path, layers[path], kind)
    if not any(reader.kind.stream == CONTEXT for reader in found.values()):
        raise ValueError(
            f"{type(network).__name__} has no cross-attention projections attn2.to_k / attn2.to_v: "
            "RealEra works on U-Nets of the Stable Diffusion 1.x, 2.x and SDXL families, not on "
            "transformers such as SD 3 or Flux"
        )
    return found


def adapted_readers(network: nn.Module) -> dict[str, Reader]:
    """The readers that a LoRA is trained on: the K and V projections."""
    return {name: reader for name, reader in readers(network).items() if reader.kind.adapted}


def kind_of(name: str) -> Kind | None:
    """What the layer with this canonical name reads, or None when it reads no text."""
    return next((kind for kind in KINDS if kind.pattern.fullmatch(name)), None)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Layer names of a U-Net, of either layout, as the single-file layout calls them.

    down_blocks.1.attentions.0.X -> input_blocks.4.1.X (two layers a block); names of other layers
    are left as they are. Give all readers at once: the number of layers a block is read off them.
    """
    names = list(names)
    found = [_DIFFUSERS.fullmatch(name) for name in names]
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


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """The inverse of `canonical`, for a whole set of canonical names."""
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
