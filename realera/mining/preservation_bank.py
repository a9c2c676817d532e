"""The preservation bank: everyday prompts, as one Gram matrix per stream of a text encoder.

Beyond points preserve directions; the bank preserves everyday prompts, except for their component
along a concept (`closed_form`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..concepts import Concept, holds_name
from ..edit.closed_form import BankGram, condensed
from ..edit.triangles import pack
from ..settings import Progress, quiet
from ..storage.cache import cached
from ..storage.safetensors_file import digest
from ..text.encoding import CONTEXT, Encoding, TextEncoder
from ..text.token_alignment import prompt_embeddings, prompt_summaries

BATCH = 32
ROWS = 2048  # in float64 at once: 250 MB of FLUX.2 dev
CONSTANT = (
    10.0  # times the median length of a prompt's rows: no row of the bank is longer than that
)
RELATED = 0.55  # smallest centred cosine of a prompt that is related to a concept


@dataclass(frozen=True)
class Bank:
    """Sums over the rows of all bank prompts, as one text encoder reads them.

    prompts: the prompts, the empty one first, which classifier-free guidance reads
    grams: stream -> Σ e eᵀ over the rows of all prompts, the padding of each as its mean row,
        packed (`triangles.pack`)
    means: stream -> mean of the prompt embeddings (`token_alignment.prompt_embeddings`), float32
        [parts, dim]
    summary: summary row of every prompt, [prompts, dim]
    dropped: prompts that are not preserved
    rows: stream -> rows of the dropped prompts, times the square roots of their weights
    """

    prompts: tuple[str, ...]
    grams: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    summary: Tensor
    dropped: tuple[str, ...] = ()
    rows: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def kept(self) -> dict[str, BankGram]:
        """stream -> the Gram matrix that Eq. 7 preserves, without the dropped prompts."""
        found = {}
        for stream, gram in self.grams.items():
            rows = map(condensed, self.rows.get(stream, ()))
            dropped = dict(zip(self.dropped, rows, strict=True))
            found[stream] = BankGram(gram, self.means[stream], dropped, self.name)
        return found

    @property
    def name(self) -> str:
        """Hash of the prompts and of the dimensions of the encoder, by which banks are compared."""
        return digest(self.prompts, {s: list(mean.shape) for s, mean in self.means.items()})


def bank_prompts() -> tuple[str, ...]:
    """The bundled prompts: about a thousand everyday things."""
    lines = Path(__file__).with_name("preservation_bank.txt").read_text("utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def encode_bank(
    text: TextEncoder,
    prompts: Sequence[str] | None = None,
    progress: Progress = quiet,
) -> Bank:
    """The bank of a text encoder, from the cache after the first call.

    prompts: prompts of the bank; default: `bank_prompts`
    progress: callback with (prompts done, total)
    """
    given = bank_prompts() if prompts is None else prompts
    prompts = ("", *dict.fromkeys(p for p in given if p))

    def encode() -> dict[str, Tensor]:
        grams: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        summary = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            encoding = text.encode(batch)
            limited = _without_long_rows(encoding).compact()  # FLUX.2 pads prompts to 512 rows
            for stream in limited:
                for part in limited.weighed(stream).flatten(0, 1).split(ROWS):
                    rows = part.cpu().double()
                    if stream not in grams:
                        grams[stream] = rows.new_zeros(rows.shape[1], rows.shape[1])
                    grams[stream].addmm_(rows.T, rows)
            embeddings = prompt_embeddings(text, batch, encoding)
            for stream, rows in embeddings.items():
                means[stream] = means.get(stream, 0.0) + rows.cpu().double().sum(0) / len(prompts)
            summary.append(embeddings[CONTEXT][:, 0].float().cpu())
            progress(start + len(batch), len(prompts))
        named = {f"gram.{stream}": pack(gram) for stream, gram in grams.items()}
        named |= {f"mean.{stream}": mean.float() for stream, mean in means.items()}
        return {"summary": torch.cat(summary), **named}

    made = cached("bank", [text.fingerprint, prompts, "compact"], encode)
    grams, means = (
        {key.removeprefix(kind): tensor for key, tensor in made.items() if key.startswith(kind)}
        for kind in ("gram.", "mean.")
    )
    return Bank(prompts, grams, means, made["summary"])


def drop_related_prompts(bank: Bank, text: TextEncoder, concepts: Sequence[Concept]) -> Bank:
    """The bank without the prompts that are related to a concept.

    A prompt is related when it contains the name, or when the centred cosine of its summary row
    with that of any concept prompt is at least RELATED.
    """
    prompts = [t.replace("{}", concept.name) for concept in concepts for t in concept.templates]
    centre = bank.summary.mean(0)
    bank_rows, closest = normalize(bank.summary - centre, dim=-1), torch.tensor(-1.0)
    for n in range(0, len(prompts), BATCH):
        batch = prompts[n : n + BATCH]
        summary = prompt_summaries(text, batch, text.encode(batch)).cpu()
        cosines = bank_rows @ normalize(summary - centre, dim=-1).T  # [bank prompts, prompts]
        closest = torch.maximum(closest, cosines.amax(1))
    close = (closest >= RELATED).tolist()
    dropped = tuple(
        prompt
        for prompt, near in zip(bank.prompts, close, strict=True)
        if prompt and (near or any(holds_name(prompt, c.name) for c in concepts))
    )
    if not dropped:
        return bank
    parts = (dropped[n : n + BATCH] for n in range(0, len(dropped), BATCH))
    encoded = Encoding.cat([_without_long_rows(text.encode(part)).compact() for part in parts])
    rows = {stream: encoded.weighed(stream).cpu() for stream in encoded}
    return replace(bank, dropped=dropped, rows=rows)


def _without_long_rows(encoding: Encoding) -> Encoding:
    """The encoding of prompts, in which no row outweighs all others.

    Language models put a row that is the same in every prompt, and a hundred times as long as any
    other, at the start. Rows longer than CONSTANT times the median of their prompt get the length
    of the median; otherwise the ridge, a share of the mean diagonal, would hinder every edit.
    """
    limited = {}
    for stream, rows in encoding.items():
        lengths = rows.norm(dim=-1)
        whole = encoding.weights.get(stream, torch.ones_like(lengths)) >= 1  # no padding
        median = lengths.where(whole, torch.nan).nanmedian(1, keepdim=True).values
        too_long = whole & (lengths > CONSTANT * median)
        limited[stream] = torch.where(
            too_long[..., None], rows * (median / lengths)[..., None], rows
        )
    return Encoding(limited, encoding.weights, encoding.repeats)
