"""A CLIP of a transformer's family as the core's TextEncoder (`realera/text/encoding.py`).

Which encoders give the rows of a context, and how, is data (`realera/families/*.json`); templates
and padding are ComfyUI's own.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..realera.edit.text_layers import FAMILIES, TRANSFORMERS
from ..realera.text.encoding import BATCH, CONTEXT, POOLED, EncoderPart, Encoding, whole_words
from ..realera.text.token_alignment import prompt_summaries, row_weights, unit
from .comfy_text import PLAIN, ComfyText, clip_fingerprint, clip_summaries, ids_of, ready, tokens_of


def text_of(clip: Any) -> "ComfyText | ComfyTransformerText":
    """The CLIP as a TextEncoder. Raises ValueError when it is of no family that we know."""
    # ComfyUI makes a class of its own for every file, with an underscore behind the name.
    classes = (kind.__name__ for kind in type(clip.cond_stage_model).__mro__)
    name = next(name for name in classes if not name.endswith("_"))
    for family, known in TRANSFORMERS.items():
        text = ComfyTransformerText(clip, family)
        if name in known["comfyui"]["clip"] and text.present:
            return text
    return ComfyText(clip)


class ComfyTransformerText:
    """A CLIP with its LoRAs, of the family with this name."""

    def __init__(self, clip: Any, family: str) -> None:
        self.clip, self.family, self.title = clip, family, FAMILIES[family]["title"]
        # Where ComfyUI has a template around the prompt, it reads no weights anyway.
        self._plain = {} if FAMILIES[family]["comfyui"].get("unweighted") else PLAIN

    @cached_property
    def present(self) -> list[dict[str, Any]]:
        """What the family's file says of the encoders that this CLIP has."""
        model = self.clip.cond_stage_model
        return [
            part
            for part in FAMILIES[self.family]["comfyui"]["parts"]
            if any(getattr(model, name, None) is not None for name in part["encoders"])
        ]

    @cached_property
    def parts(self) -> Sequence[EncoderPart]:
        parts, first = [], 0
        for part in self.present:
            read, rows = partial(self._tokenize, part), part.get("rows")
            parts.append(EncoderPart(read, part["reads"], part["causal"], first, rows))
            first += rows or 0
        return parts

    @cached_property
    def fingerprint(self) -> str | None:
        vocabularies = [self._tokenizer(part).tokenizer.get_vocab() for part in self.present]
        merged = {f"{n} {k}": v for n, own in enumerate(vocabularies) for k, v in own.items()}
        return clip_fingerprint(self.clip, merged)

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """As ComfyUI encodes them, one by one; (brackets) carry no weight."""
        self._load()
        return Encoding.cat([self._encode(prompt) for prompt in prompts])

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """Of the first part alone and without padding, which words need an eighth of."""
        part = self.present[0]
        names = [name for name in part["encoders"] if getattr(self.clip.cond_stage_model, name)]
        sections = self._tokens(part, prompts)
        vectors = any(isinstance(token, Tensor) for section in sections for token in section)
        if part["tokens"] != "l":
            return self._summary_of_text(part, sections)
        self._load()
        if vectors or names[0] != part["encoders"][0]:
            # What no id stands for; and how many columns are zeros in front is ComfyUI's to say.
            return torch.cat([prompt_summaries(self, [p], self._encode(p)).cpu() for p in prompts])
        rows = clip_summaries(self.clip, names, sections, part["reads"])
        return torch.nn.functional.pad(rows, (0, self._rows("")[0].shape[2] - rows.shape[1]))

    def _summary_of_text(self, part: dict[str, Any], sections: Sequence[list[Any]]) -> Tensor:
        """Of an encoder that reads as many tokens as there are: [prompts, dim], on the CPU."""
        (name,) = part["encoders"]
        encoder = getattr(self.clip.cond_stage_model, name)
        self._load()
        found = [torch.empty(0)] * len(sections)
        by_length = sorted(range(len(sections)), key=lambda i: len(sections[i]))
        for length, same in groupby(by_length, key=lambda i: len(sections[i])):
            chosen, block = list(same), max(1, BATCH * 77 // length)
            for start in range(0, len(chosen), block):
                comfy.model_management.throw_exception_if_processing_interrupted()
                some = chosen[start : start + block]
                batch = [[(token, 1.0) for token in sections[i]] for i in some]
                rows = encoder.encode_token_weights(batch)[0].float()  # one prompt after the other
                rows = self._normed(rows.unflatten(1, (len(some), -1))[0])
                # As `token_alignment.prompt_summaries` has it: the last row, or the mean of all
                # but end-of-text.
                own = rows[:, -1] if part["causal"] else rows[:, : max(1, length - 1)].mean(1)
                for i, row in zip(some, own.cpu(), strict=True):
                    found[i] = row
        return torch.stack(found)

    def words(self) -> list[str]:
        return whole_words(self._tokenizer(self.present[0]).tokenizer.get_vocab())

    def _tokenizer(self, part: dict[str, Any]) -> Any:
        """ComfyUI's tokenizer of a part: named "t5xxl", say, and "clip_l" of CLIP."""
        tokenizer, name = self.clip.tokenizer, part["tokens"]
        return getattr(tokenizer, name, None) or getattr(tokenizer, f"clip_{name}")

    def _tokens(self, part: dict[str, Any], prompts: Sequence[str]) -> list[list[Any]]:
        """All tokens of every prompt, with what the family puts around it and without padding."""
        tokenizer, name = self._tokenizer(part), part["tokens"]
        given = [self.clip.tokenize(p, return_word_ids=True, **self._plain)[name] for p in prompts]
        return [tokens_of(tokenizer, sections) for sections in given]

    def _tokenize(self, part: dict[str, Any], prompts: Sequence[str]) -> list[list[int]]:
        """`Part.tokenize`: without what the family cuts off in front."""
        return [ids_of(tokens)[self._cut :] for tokens in self._tokens(part, prompts)]

    @cached_property
    def _cut(self) -> int:
        """How many rows ComfyUI cuts off in front: those of what a template begins with."""
        self._load()
        tokens = self._sections("")
        given = sum(len(tokens[part["tokens"]][0]) for part in self.present)
        return given - self._rows("")[0].shape[1]

    def _sections(self, prompt: str) -> dict[str, list]:
        """The first section of each encoder; only CLIP's has others."""
        tokens = self.clip.tokenize(prompt, **self._plain)
        return {name: sections[:1] for name, sections in tokens.items()}

    def _rows(self, prompt: str) -> tuple[Tensor, Any]:
        """Context [1, tokens, dim] and pooled embedding [1, dim], or None."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        # As `clip.encode_from_tokens`, which looks for memory to free at every prompt.
        model = self.clip.cond_stage_model
        context, pooled, *more = model.encode_token_weights(self._sections(prompt))
        context, mask = context.float(), more[0].get("attention_mask") if more else None
        if mask is not None:
            context = context[:, mask[0] > 0]
        return context, pooled

    def _load(self) -> None:
        """The encoders where they are to compute, with what the CLIP says of them."""
        ready(self.clip)
        device = self.clip.patcher.load_device
        self.clip.cond_stage_model.set_clip_options({"execution_device": device})

    def _encode(self, prompt: str) -> Encoding:
        context, pooled = self._rows(prompt)
        streams = {CONTEXT: self._normed(context)}
        if any(reader["stream"] == POOLED for reader in FAMILIES[self.family]["readers"]):
            streams[POOLED] = pooled.float()[:, None]
        there = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        weights = row_weights(self.parts, [prompt], there)
        return Encoding(streams, {} if (weights == 1).all() else {CONTEXT: weights})

    def _normed(self, rows: Tensor) -> Tensor:
        """As what reads them has them: behind an RMS norm they are unit rows."""
        normed = any("norm" in reader for reader in FAMILIES[self.family]["readers"])
        return unit(rows) if normed else rows
