"""The part of some MODELs that turns the rows of text encoders into the rows that layers read.

Krea 2's `txtfusion` combines the rows of twelve encoder layers into one, Anima's `llm_adapter`
returns a row for each token of T5. The layers that an erasure changes read these rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..realera.edit.text_layers import FAMILIES
from .comfy_batches import TOKENS, on_device
from .comfy_fingerprint import fingerprint
from .comfy_weights import stored_weights


class Front:
    """The part of a MODEL in front of the layers that read the text.

    model: MODEL
    family: name of its family, a file in `families/` with a "front" for ComfyUI: "module", name of
        the part; "layers", attribute with the number of layers side by side in a row of the
        encoder; "ids", condition with the tokens that the part also reads; "rows", number of rows
        that the network reads at least, with zeros behind the prompt
    """

    def __init__(self, model: Any, family: str) -> None:
        self.model, spec = model, FAMILIES[family]["comfyui"]["front"]
        self.name, self.ids, self.least = spec["module"], spec.get("ids"), spec.get("rows", 0)
        network = model.model.diffusion_model
        self.module = network.get_submodule(self.name)
        self.layers = getattr(network, spec["layers"]) if "layers" in spec else None

    @property
    def fingerprint(self) -> str | None:
        """Hash of the weights of the part with their patches."""
        prefix = f"diffusion_model.{self.name}."
        return fingerprint(
            {
                key: [weight, self.model.patches.get(key)]
                for key, weight in stored_weights(self.model, prefix).items()
            }
        )

    @torch.no_grad()
    def rows(self, contexts: Sequence[Tensor], extra: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """The rows of prompts, each float32 [1, rows, dim].

        contexts: rows of the encoders of each prompt, [1, tokens, width]
        extra: conditions beside them, as ComfyUI's encoders give them
        """
        comfy.model_management.load_models_gpu([self.model])
        base, device = self.model.model, self.model.load_device
        dtype = base.manual_cast_dtype or base.get_dtype()
        ids = [None if self.ids is None else conditions[self.ids] for conditions in extra]
        alike: dict[tuple[int, int], list[int]] = {}
        for number, (context, tokens) in enumerate(zip(contexts, ids, strict=True)):
            size = context.shape[1], 0 if tokens is None else len(tokens)
            alike.setdefault(size, []).append(number)
        rows: list[Tensor] = [torch.empty(0)] * len(contexts)
        with on_device(device):
            for (length, _), numbers in alike.items():
                for batch in torch.tensor(numbers).split(max(1, TOKENS // length)):
                    given = torch.cat([contexts[number] for number in batch])
                    if self.layers is not None:
                        given = given.unflatten(2, (self.layers, -1))
                    tokens = [torch.stack([ids[number] for number in batch])] if self.ids else []
                    made = self.module(given.to(device, dtype), *(t.to(device) for t in tokens))
                    for number, row in zip(batch.tolist(), made.float(), strict=True):
                        rows[number] = row[None]
        return rows

    def inputs(self, rows: Tensor) -> Tensor:
        """Input of the network, within `bypassed`, for rows [prompts, rows, dim] of the context."""
        if self.layers is not None:
            rows = rows.repeat(1, 1, self.layers)
        return torch.nn.functional.pad(rows, (0, 0, 0, max(0, self.least - rows.shape[1])))

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Context in which the part returns the rows that `inputs` got, unchanged."""
        if self.layers is None:  # the network skips the part when it gets no tokens
            yield
            return
        self.module.forward = lambda rows, *_, **__: rows[:, :, 0]
        try:
            yield
        finally:
            del self.module.forward
