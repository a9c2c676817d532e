"""The text encoders of the bundled transformer: CLIP as in SD 3, and T5."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from ..pipelines.fingerprint import Fingerprint
from ..pipelines.unet import DiffusersText
from ..text.encoding import CONTEXT, POOLED, EncoderPart, Encoding
from ..text.token_alignment import prompt_summaries, row_weights

WIDTH = 512  # dim of a context row; rows of CLIP have half of it


class MiniatureTransformerText(DiffusersText):
    """The context is CLIP's rows, padded with zeros to WIDTH, followed by T5's rows where there is
    a T5; the pooled embedding is CLIP's end-of-text row.

    clip: text encoder of the bundled U-Net
    t5: transformers' T5EncoderModel, or None
    """

    family = "sd3"

    def __init__(self, clip: DiffusersText, t5: Any = None):
        super().__init__(clip.tokenizers, clip.encoders)
        self.t5, self._with_t5 = t5, Fingerprint()

    @property
    def parts(self) -> Sequence[EncoderPart]:
        (clip,) = super().parts
        first = EncoderPart(clip.tokenize, clip.length, True, 0, clip.length)
        second = EncoderPart(self._t5_ids, clip.length, False, clip.length)
        return [first] if self.t5 is None else [first, second]

    @property
    def fingerprint(self) -> str:
        t5 = [] if self.t5 is None else [self.t5]
        return self._with_t5.of(t5, super().fingerprint, WIDTH)

    def encode(self, prompts: Sequence[str]) -> Encoding:
        clip = super().encode(prompts)
        pooled = prompt_summaries(self, prompts, clip)[:, None]
        context = pad(clip[CONTEXT], (0, WIDTH - clip[CONTEXT].shape[-1]))
        if self.t5 is None:
            return Encoding({CONTEXT: context, POOLED: pooled})
        context = torch.cat([context, self._t5_rows(prompts)], dim=1)
        there = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        weights = {CONTEXT: row_weights(self.parts, prompts, there)}
        return Encoding({CONTEXT: context, POOLED: pooled}, weights)

    def summary(self, prompts: Sequence[str]) -> Tensor:
        rows = super().summary(prompts)
        return pad(rows, (0, WIDTH - rows.shape[-1]))

    def _t5_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """CLIP's tokens without start-of-text, which T5 does not have."""
        return [ids[1:] for ids in self.tokenize(prompts)]

    @torch.no_grad()
    def _t5_rows(self, prompts: Sequence[str]) -> Tensor:
        """T5's rows, [prompts, 77, 512]; padding is attended to, as in SD 3."""
        length, config = self.tokenizers[0].model_max_length, self.t5.config
        rows = []
        for ids in self._t5_ids(prompts):
            ids = [*ids[: length - 1], ids[-1]] if len(ids) > length else ids
            rows.append([*ids, *[config.pad_token_id] * (length - len(ids))])
        parts = torch.tensor(rows, device=self.device).split(64)
        return torch.cat([self.t5(input_ids=ids).last_hidden_state.float() for ids in parts])


def load_t5(path: Path) -> Any:
    """The T5EncoderModel of a file whose embedding is a factor [tokens, n] times a matrix."""
    from transformers import T5Config, T5EncoderModel

    state = {name: tensor.float() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])["text_encoder_3"]
    embedding = state.pop("shared.factor") @ state.pop("shared.matrix")
    names = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor
    model = T5EncoderModel(T5Config(**config))
    model.load_state_dict(state | dict.fromkeys(names, embedding))
    return model.train(False)
