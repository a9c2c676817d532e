"""A CLIP of a transformer's family as the core's TextEncoder (`realera/text/encoding.py`).

The encoders that make up the context are defined in `realera/families/*.json`; prompt templates and
padding follow ComfyUI.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..realera.edit.text_layers import FAMILIES, TRANSFORMERS, family_in
from ..realera.text.encoding import CONTEXT, POOLED, EncoderPart, Encoding, whole_words
from ..realera.text.token_alignment import prompt_summaries, row_weights, unit
from .comfy_batches import batched_outputs, encode_tokens, first_sections, ready
from .comfy_fingerprint import fingerprint
from .comfy_front import Front
from .comfy_text import PLAIN, ComfyText, clip_fingerprint, clip_summaries, ids_of, tokens_of


def text_of(clip: Any, model: Any = None) -> "ComfyText | ComfyTransformerText":
    """A CLIP as a TextEncoder.

    model: MODEL that the CLIP is for; needed where a part of it makes the rows, as in Krea 2

    Raises ValueError when the CLIP belongs to no supported family, and when the MODEL is missing or
    of another family.
    """
    # ComfyUI makes a class for every file, whose name ends in an underscore.
    classes = (kind.__name__ for kind in type(clip.cond_stage_model).__mro__)
    name = next(name for name in classes if not name.endswith("_"))
    for family, known in TRANSFORMERS.items():
        if name in known["comfyui"]["clip"]:
            text = ComfyTransformerText(clip, family)
            if text.present:
                if "front" in known["comfyui"]:
                    text.front = _front(model, family)
                return text
    return ComfyText(clip)


def _front(model: Any, family: str) -> Front:
    if model is None:
        title, part = FAMILIES[family]["title"], FAMILIES[family]["comfyui"]["front"]["module"]
        raise ValueError(
            f"the rows of {title} are made by {part}, a part of the MODEL, which a CLIP is "
            "without: connect the MODEL to Neighbor Sampler as well"
        )
    refuse_other_family(family, family_in(model.model.diffusion_model))
    return Front(model, family)


def refuse_other_family(text: str | None, network: str | None) -> None:
    """Raises ValueError when a CLIP and a MODEL belong to different families.

    text, network: names of their families, None for U-Nets
    """
    if text != network:
        unet = "SD 1.x, SD 2.x or SDXL"
        clip_title, model_title = (FAMILIES[f]["title"] if f else unet for f in (text, network))
        raise ValueError(
            f"the CLIP is for {clip_title} and the MODEL is {model_title}: connect the CLIP of the "
            "MODEL's own family, with all of its encoders; in CLIPLoader or DualCLIPLoader choose "
            "its type"
        )


class ComfyTransformerText:
    """A CLIP of a transformer family, with its LoRAs.

    family: name of the family
    """

    def __init__(self, clip: Any, family: str) -> None:
        self.clip, self.family, self.title = clip, family, FAMILIES[family]["title"]
        self.front: Front | None = None  # of a family whose rows a part of the MODEL makes
        # Tokenizers with a prompt template do not support attention weights, nor this argument.
        self._plain = {} if FAMILIES[family]["comfyui"].get("unweighted") else PLAIN

    @cached_property
    def present(self) -> list[dict[str, Any]]:
        """Encoder entries of the family's file that this CLIP contains."""
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
            causal, padded = part["causal"], part.get("padded", False)
            parts.append(EncoderPart(read, part["reads"], causal, first, rows, padded))
            first += rows or 0
        return parts

    @cached_property
    def fingerprint(self) -> str | None:
        vocabularies = [self._tokenizer(part).tokenizer.get_vocab() for part in self.present]
        merged = {
            f"{number} {token}": id
            for number, vocabulary in enumerate(vocabularies)
            for token, id in vocabulary.items()
        }
        encoders = clip_fingerprint(self.clip, merged)
        return encoders if self.front is None else fingerprint(encoders, self.front.fingerprint)

    def encode(self, prompts: Sequence[str]) -> Encoding:
        """Rows as ComfyUI gives them; (brackets) are read as letters, not as weights."""
        ready(self.clip)
        outputs = zip(prompts, self._rows(prompts), strict=True)
        return Encoding.cat([self._encoding(prompt, *output) for prompt, output in outputs])

    def summary(self, prompts: Sequence[str]) -> Tensor:
        """Summary rows; without `front`, from the first encoder only and without padding, in an
        eighth of the time."""
        if self.front is not None:
            return prompt_summaries(self, prompts, self.encode(prompts)).cpu()
        part = self.present[0]
        names = [name for name in part["encoders"] if getattr(self.clip.cond_stage_model, name)]
        sections = self._tokens(part, prompts)
        vectors = any(isinstance(token, Tensor) for section in sections for token in section)
        if part["tokens"] != "l":
            return self._summary_of_text(part, sections)
        ready(self.clip)
        if vectors or names[0] != part["encoders"][0]:
            # Vectors of textual inversions have no ids, and without CLIP-L ComfyUI decides how many
            # zero columns precede the rows.
            return torch.cat([prompt_summaries(self, [p], self.encode([p])).cpu() for p in prompts])
        rows = clip_summaries(self.clip, names, sections, part["reads"])
        ((context, _),) = self._rows([""])
        return torch.nn.functional.pad(rows, (0, context.shape[2] - rows.shape[1]))

    def _summary_of_text(self, part: dict[str, Any], sections: Sequence[list[Any]]) -> Tensor:
        """Summary rows by an encoder of any number of tokens, [prompts, dim] on the CPU."""
        (name,) = part["encoders"]
        encoder = getattr(self.clip.cond_stage_model, name)
        ready(self.clip)
        summaries = [torch.empty(0)] * len(sections)
        for number, (rows, *_) in batched_outputs(encoder, sections):
            rows = rows[0].float()
            if rows.ndim == 3:  # several hidden layers, concatenated along the feature axis
                rows = rows.movedim(0, 1).flatten(1)
            rows = self._normed(rows)
            # The last row, or the mean of all but end-of-text (`token_alignment.prompt_summaries`).
            summary = rows[-1] if part["causal"] else rows[: max(1, len(rows) - 1)].mean(0)
            summaries[number] = summary.cpu()
        return torch.stack(summaries)

    def words(self) -> list[str]:
        return whole_words(self._tokenizer(self.present[0]).tokenizer.get_vocab())

    def _tokenizer(self, part: dict[str, Any]) -> Any:
        """ComfyUI's tokenizer of a part: attribute "t5xxl", for example, or "clip_l" for CLIP."""
        tokenizer, name = self.clip.tokenizer, part["tokens"]
        return getattr(tokenizer, name, None) or getattr(tokenizer, f"clip_{name}")

    def _tokens(self, part: dict[str, Any], prompts: Sequence[str]) -> list[list[Any]]:
        """Tokens of every prompt with the template of the family, without padding."""
        tokenizer, name, options = self._tokenizer(part), part["tokens"], self._plain
        tokenized = (self.clip.tokenize(p, return_word_ids=True, **options) for p in prompts)
        return [tokens_of(tokenizer, sections[name]) for sections in tokenized]

    def _tokenize(self, part: dict[str, Any], prompts: Sequence[str]) -> list[list[int]]:
        """`EncoderPart.tokenize`, without the leading tokens whose rows ComfyUI removes."""
        return [ids_of(tokens)[self._cut :] for tokens in self._tokens(part, prompts)]

    @cached_property
    def _cut(self) -> int:
        """Number of rows of the template that ComfyUI cuts off in front."""
        ready(self.clip)
        tokens = first_sections(self.clip, "", **self._plain)
        total = sum(len(tokens[part["tokens"]][0]) for part in self.present)
        ((context, _),) = self._rows([""])
        return total - context.shape[1]

    def _rows(self, prompts: Sequence[str]) -> list[tuple[Tensor, Any]]:
        """Context [1, tokens, dim] and pooled embedding [1, dim], or None, of each prompt."""
        tokens = [first_sections(self.clip, prompt, **self._plain) for prompt in prompts]
        rows, conditions = [], []
        for context, pooled, *extra in encode_tokens(self.clip, tokens):
            # Some networks read padding, and so does the front of one.
            padded = self.front is not None or any(part.get("padded") for part in self.present)
            mask = extra[0].get("attention_mask") if extra and not padded else None
            context = context.float()
            rows.append((context if mask is None else context[:, mask[0] > 0], pooled))
            conditions.append(extra[0] if extra else {})
        if self.front is None:
            return rows
        contexts, pooled = zip(*rows, strict=True)
        return list(zip(self.front.rows(contexts, conditions), pooled, strict=True))

    def _encoding(self, prompt: str, context: Tensor, pooled: Any) -> Encoding:
        streams = {CONTEXT: self._normed(context)}
        if any(reader["stream"] == POOLED for reader in FAMILIES[self.family]["readers"]):
            streams[POOLED] = pooled.float()[:, None]
        present = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        weights = row_weights(self.parts, [prompt], present)
        return Encoding(streams, {} if (weights == 1).all() else {CONTEXT: weights})

    def _normed(self, rows: Tensor) -> Tensor:
        """Unit rows where the layer that reads them has an RMS norm in front, else unchanged."""
        normed = any("norm" in reader for reader in FAMILIES[self.family]["readers"])
        return unit(rows) if normed else rows
