"""Which kind of adapter a file holds: the ways in which tools write a LoRA and its kin."""

import re
from dataclasses import dataclass

from ..storage.safetensors_file import TensorFile

# One tensor a layer, kind -> how its name ends after the layer's; where a rank is known, its first
# axis counts it. Names as kohya, diffusers, peft, LyCORIS and ComfyUI write them.
_KINDS = {
    "LoRA": r"[._]lora(?:_linear_layer)?[._](?:down|A)(?:\.default)?(?:\.weight)?",
    "LoHa": r"\.hada_w1_b",
    "LoKr": r"\.lokr_w2(?:_b)?",
    "OFT": r"\.oft_(?:blocks|diag)",
    "GLoRA": r"\.a1\.weight",
    "IA3": r"\.on_input",
    "difference of weights": r"\.(?:diff|w_norm)",
}
_RANKED = rf".+(?:{_KINDS['LoRA']}|{_KINDS['LoHa']}|\.lokr_w2_b)"


@dataclass(frozen=True)
class Adapter:
    """What a LoRA file holds.

    kind: "LoRA", "LoHa" and so on; layers: how many it changes; rank: the largest, None where the
    kind has none
    """

    kind: str
    layers: int
    rank: int | None


def adapter_of(file: TensorFile) -> Adapter | None:
    """The adapter that a file holds, by its keys alone; None when it holds none.

    A checkpoint has none of these names, so whatever metadata a tool wrote or left out plays no
    part.
    """
    found = {
        kind: [key for key in file.entries if re.fullmatch(f".+{ending}", key)]
        for kind, ending in _KINDS.items()
    }
    kind = max(found, key=lambda kind: len(found[kind]))  # biases and norms often go along as diffs
    if not found[kind]:
        return None
    ranks = [
        file.entries[key].shape[0]
        for key in found[kind]
        if re.fullmatch(_RANKED, key) and file.entries[key].shape
    ]
    return Adapter(kind, len(found[kind]), max(ranks, default=None))
