"""What a safetensors file holds that is no model: an adapter, a ControlNet, a part of a model."""

import re
from dataclasses import dataclass

from ..storage.safetensors_file import TensorFile
from .layouts import CONTROLNET, NETWORK, standard_key

# Kind of adapter -> ending of the name of one tensor a layer; where the kind has a rank, the
# tensor's first axis. Names as kohya, diffusers, peft, LyCORIS and ComfyUI write them.
_ADAPTERS = {
    "LoRA": r"[._]lora(?:_linear_layer)?[._](?:down|A)(?:\.default)?(?:\.weight)?",
    "LoHa": r"\.hada_w1_b",
    "LoKr": r"\.lokr_w2(?:_b)?",
    "OFT": r"\.oft_(?:blocks|diag)",
    "GLoRA": r"\.a1\.weight",
    "IA3": r"\.on_input",
    "difference of weights": r"\.(?:diff|w_norm)",
}
_RANKED = rf".+(?:{_ADAPTERS['LoRA']}|{_ADAPTERS['LoHa']}|\.lokr_w2_b)"
_NUNCHAKU = r".+\.wscales"
# What else is no model -> names that a tensor of it has and no tensor of a model.
_OTHERS = {
    "a network quantised by Nunchaku (SVDQuant)": _NUNCHAKU,
    "a ControlNet": (
        r"(?:controlnet_\w+|control_(?:add_embedding|layers|all_x_embedder)|input_hint_block|"
        r"zero_convs|lllite_\w+)\..+"
    ),
    "an IP-Adapter": r"(?:ip_adapter|image_proj)\..+",
    "a text encoder": (
        r"(?:(?:text_model|model|language_model|transformer)\.)*(?:encoder\.)?"
        r"(?:layers\.\d+\.self_attn|resblocks\.\d+\.attn|block\.\d+\.layer\.\d+\.SelfAttention)\..+"
    ),
    "a VAE": r"(?:decoder\.conv_in|decoder\.conv1)\.weight",
    "a textual inversion": r"emb_params|clip_[lg]|<.+>",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter file.

    kind: "LoRA", "LoHa", ...
    layers: number of layers that the adapter changes
    rank: largest rank of a layer, or None for a kind without ranks
    """

    kind: str
    layers: int
    rank: int | None


def adapter_of(file: TensorFile) -> Adapter | None:
    """The adapter in a file, or None.

    Names of tensors decide alone: no model has those of an adapter, and metadata may be missing.
    A network that Nunchaku quantised has a LoRA in every layer.
    """
    if any(re.fullmatch(_NUNCHAKU, key) for key in file.entries):
        return None
    keys = {
        kind: [key for key in file.entries if re.fullmatch(f".+{ending}", key)]
        for kind, ending in _ADAPTERS.items()
    }
    kind = max(keys, key=lambda kind: len(keys[kind]))  # a LoRA often holds biases as differences
    if not keys[kind]:
        return None
    ranks = [
        file.entries[key].shape[0]
        for key in keys[kind]
        if re.fullmatch(_RANKED, key) and file.entries[key].shape
    ]
    return Adapter(kind, len(keys[kind]), max(ranks, default=None))


def kind_of(file: TensorFile) -> str | None:
    """What a file holds that is no model, with an article ("a ControlNet"), or None."""
    if "realera_erasure" in file.metadata:
        return "a RealEra erasure"
    if adapter := adapter_of(file):
        return f"{'an' if adapter.kind in ('OFT', 'IA3') else 'a'} {adapter.kind}"
    for kind, name in _OTHERS.items():
        if any(re.fullmatch(name, key) for key in file.entries):
            return kind
    # With a U-Net in the same file, the file is a model.
    alone = not any(standard_key(key).startswith(NETWORK) for key in file.entries)
    if alone and any(key.startswith(CONTROLNET) for key in file.entries):
        return "a ControlNet"
    return None
