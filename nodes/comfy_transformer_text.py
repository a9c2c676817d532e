"""A CLIP of a transformer's family as the core's TextEncoder (`realera/text/encoding.py`).

Which encoders give the rows of a context, and how, is data (`realera/families/*.json`); templates
and padding are ComfyUI's own.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..realera.edit.text_layers import FAMILIES, TRANSFORMERS
from ..realera.text.encoding import CONTEXT, POOLED, EncoderPart, Encoding, whole_words
from ..realera.text.token_alignment import prompt_summaries, row_weights, unit
from .comfy_batches import batched_outputs, encode_tokens, first_sections, ready
from .comfy_text import PLAIN, ComfyText, clip_fingerprint, clip_summaries, ids_of, tokens_of


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
        """As ComfyUI encodes them; (brackets) carry no weight."""
        ready(self.clip)
        rows = zip(prompts, self._rows(prompts), strict=True)
        return Encoding.cat([self._encoding(prompt, *outputs) for prompt, outputs in rows])

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """Of the first part alone and without padding, which words need an eighth of."""
        part = self.present[0]
        names = [name for name in part["encoders"] if getattr(self.clip.cond_stage_model, name)]
        sections = self._tokens(part, prompts)
        vectors = any(isinstance(token, Tensor) for section in sections for token in section)
        if part["tokens"] != "l":
            return self._summary_of_text(part, sections)
        ready(self.clip)
        if vectors or names[0] != part["encoders"][0]:
            # What no id stands for; and how many columns are zeros in front is ComfyUI's to say.
            return torch.cat([prompt_summaries(self, [p], self.encode([p])).cpu() for p in prompts])
        rows = clip_summaries(self.clip, names, sections, part["reads"])
        ((context, _),) = self._rows([""])
        return torch.nn.functional.pad(rows, (0, context.shape[2] - rows.shape[1]))

    def _summary_of_text(self, part: dict[str, Any], sections: Sequence[list[Any]]) -> Tensor:
        """Of an encoder that reads as many tokens as there are: [prompts, dim], on the CPU."""
        (name,) = part["encoders"]
        encoder = getattr(self.clip.cond_stage_model, name)
        ready(self.clip)
        found = [torch.empty(0)] * len(sections)
        for number, (rows, *_) in batched_outputs(encoder, sections):
            rows = self._normed(rows[0].float())
            # As `token_alignment.prompt_summaries` has it: the last row, or the mean of all but
            # end-of-text.
            summary = rows[-1] if part["causal"] else rows[: max(1, len(rows) - 1)].mean(0)
            found[number] = summary.cpu()
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
        ready(self.clip)
        tokens = first_sections(self.clip, "", **self._plain)
        given = sum(len(tokens[part["tokens"]][0]) for part in self.present)
        ((context, _),) = self._rows([""])
        return given - context.shape[1]

    def _rows(self, prompts: Sequence[str]) -> list[tuple[Tensor, Any]]:
        """Context [1, tokens, dim] and pooled embedding [1, dim], or None, of each prompt."""
        tokens = [first_sections(self.clip, prompt, **self._plain) for prompt in prompts]
        found = []
        for context, pooled, *extra in encode_tokens(self.clip, tokens):
            mask = extra[0].get("attention_mask") if extra else None
            context = context.float()
            found.append((context if mask is None else context[:, mask[0] > 0], pooled))
        return found

    def _encoding(self, prompt: str, context: Tensor, pooled: Any) -> Encoding:
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
