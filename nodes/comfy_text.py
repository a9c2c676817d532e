"""A CLIP as the core's TextEncoder (`realera/text/encoding.py`)."""

import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..realera.edit.text_layers import FAMILIES, SUPPORTED
from ..realera.storage.safetensors_file import raw_bytes
from ..realera.text.encoding import CONTEXT, POOLED, EncoderPart, Encoding, whole_words
from ..realera.text.packed_encoding import PackedPrompts, last_rows
from ..realera.text.token_alignment import prompt_summaries
from .comfy_batches import encode_tokens, first_sections, ready
from .comfy_fingerprint import added_to, fingerprint
from .comfy_weights import stored_weights

# Text encoders of U-Nets, by ComfyUI's names -> family.
ENCODERS = {frozenset("l"): "sd1", frozenset("h"): "sd2", frozenset("lg"): "sdxl"}
SYNTAX = ("\\(", "\\)", "embedding:")  # prompts with these need ComfyUI's parser
PLAIN = {"disable_weights": True}  # parentheses are literal, not attention weights


class ComfyText:
    """The CLIP of a U-Net, with its LoRAs and its clip skip."""

    family: str | None = None

    def __init__(self, clip: Any) -> None:
        unet = ENCODERS.get(frozenset(clip.tokenize("")))
        if unet is None:
            kind = type(clip.cond_stage_model).__name__.strip("_")
            raise ValueError(
                f"the text encoder {kind} belongs to no supported model: connect the CLIP of one "
                f"of {SUPPORTED}, and in CLIPLoader or DualCLIPLoader choose its type"
            )
        self.clip = clip
        self.title = FAMILIES[unet]["title"]

    @property
    def _tokenizer(self) -> Any:
        """ComfyUI's tokenizer of the first encoder."""
        tokenizer = self.clip.tokenizer
        return getattr(tokenizer, getattr(tokenizer, "clip", "clip_l"), None)

    @property
    def parts(self) -> Sequence[EncoderPart]:
        return [EncoderPart(self.tokenize, int(self._tokenizer.max_length))]

    @cached_property
    def fingerprint(self) -> str | None:
        return clip_fingerprint(self.clip, self._tokenizer.tokenizer.get_vocab())

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids with start and end-of-text, not truncated; vectors of textual inversions have
        negative ids."""
        plain = [prompt for prompt in prompts if not any(mark in prompt for mark in SYNTAX)]
        ids = self._tokenizer.tokenizer(plain)["input_ids"] if plain else []
        plain_ids = dict(zip(plain, ids, strict=True))
        return [plain_ids.get(prompt) or self._parse(prompt) for prompt in prompts]

    def _parse(self, prompt: str) -> list[int]:
        """Token ids of a prompt in ComfyUI's syntax."""
        tokenized = self.clip.tokenize(prompt, return_word_ids=True, **PLAIN)
        return ids_of(*(tokens_of(self._tokenizer, sections) for sections in tokenized.values()))

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """Rows of the first 77 tokens; (brackets) are read as letters, not as weights."""
        ready(self.clip)
        tokens = [first_sections(self.clip, prompt, **PLAIN) for prompt in prompts]
        outputs = encode_tokens(self.clip, tokens)
        streams = {CONTEXT: torch.cat([context for context, *_ in outputs]).float()}
        if "g" in tokens[0]:  # SDXL's U-Net reads the pooled embedding as well
            streams[POOLED] = torch.stack([pooled for _, pooled, *_ in outputs]).float()
        return Encoding(streams)

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """End-of-text rows, [prompts, dim] on the CPU."""
        ids = self.tokenize(prompts)
        if any(token < 0 for row in ids for token in row):  # of textual inversions
            return prompt_summaries(self, prompts, self.encode(prompts)).cpu()
        model = self.clip.cond_stage_model
        names = [name for name in ("clip_l", "clip_h", "clip_g") if hasattr(model, name)]
        return clip_summaries(self.clip, names, ids, self.parts[0].length)

    def words(self) -> list[str]:
        """Whole words of the tokenizer's vocabulary, letters only, sorted."""
        return whole_words(self._tokenizer.tokenizer.get_vocab())


def clip_fingerprint(clip: Any, vocabulary: Mapping[str, int]) -> str | None:
    """Hash of everything that decides an embedding; None where a node added what has no hash.

    vocabulary: token -> id
    """
    return fingerprint(
        [kind.__name__ for kind in type(clip.cond_stage_model).__mro__],
        clip.layer_idx,
        clip.tokenizer_options,
        clip.patcher.patches,
        added_to(clip.patcher),
        dict(sorted(stored_weights(clip.patcher).items())),
        repr(sorted(vocabulary.items())),
    )


def tokens_of(tokenizer: Any, sections: Sequence[Sequence[tuple]]) -> list[Any]:
    """Tokens of a prompt with start and end, without padding: ids, or vectors of a textual
    inversion.

    sections: tokens as ComfyUI gives them, (token, weight, number of the word)
    """
    tokens = [token for section in sections for token, _, word in section if word > 0]
    start = [] if tokenizer.start_token is None else [tokenizer.start_token]
    end = [] if tokenizer.end_token is None else [tokenizer.end_token]
    return [*start, *tokens, *end]


def ids_of(tokens: Sequence[Any], *others: Sequence[Any]) -> list[int]:
    """Token ids; vectors of textual inversions are represented by negative checksums.

    others: tokens of the same prompt for further encoders, whose vectors are part of the checksum
    """
    vectors = [[t for t in row if isinstance(t, Tensor)] for row in (tokens, *others)]
    groups = zip_longest(*vectors, fillvalue=torch.empty(0))
    checksums = (-1 - zlib.crc32(b"".join(map(raw_bytes, group))) for group in groups)
    return [next(checksums) if isinstance(token, Tensor) else token for token in tokens]


def clip_summaries(
    clip: Any, names: Sequence[str], ids: Sequence[Sequence[int]], length: int
) -> Tensor:
    """End-of-text rows of CLIP encoders, concatenated along the feature axis, [prompts, dim] on
    the CPU.

    names: attributes of the encoders in `clip.cond_stage_model`
    ids: token ids of the prompts, with start and end-of-text
    length: number of tokens that the encoders read
    """
    ready(clip)
    device = clip.patcher.load_device
    encoders = [getattr(clip.cond_stage_model, name) for name in names]

    def read(packed: PackedPrompts) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return torch.cat([_rows(encoder, packed, device) for encoder in encoders], dim=-1).cpu()

    return last_rows(ids, length, read)


def _rows(encoder: Any, packed: PackedPrompts, device: torch.device) -> Tensor:
    """Rows of an SDClipModel for packed prompts, [sequences, tokens, dim]."""
    text = encoder.transformer.text_model
    x = encoder.transformer.get_input_embeddings()(packed.ids.to(device), out_dtype=torch.float32)
    weight = text.embeddings.position_embedding.weight
    x = x + comfy.ops.cast_to(weight[packed.positions.to(weight.device)], x.dtype, x.device)
    hidden = encoder.layer == "hidden"
    last, between = text.encoder(x, packed.mask(x), encoder.layer_idx if hidden else None)
    if not hidden:
        return text.final_layer_norm(last)
    return text.final_layer_norm(between) if encoder.layer_norm_hidden_state else between
