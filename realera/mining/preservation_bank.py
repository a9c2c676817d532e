"""The preservation bank: what everyday prompts mean, as one Gram matrix a stream of an encoder.

Beyond points preserve directions, the bank preserves meanings: on the manifold of real prompts the
edit keeps all but what they have of a concept (`closed_form`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..concepts import Concept, holds_name
from ..edit.closed_form import BankGram, condensed
from ..edit.triangles import pack
from ..storage.cache import cached
from ..storage.safetensors_file import digest
from ..text.encoding import CONTEXT, Encoding, TextEncoder
from ..text.token_alignment import prompt_embeddings, prompt_summaries

BATCH = 64
ROWS = 8192  # in float64 at once: 268 MB of Flux
RELATED = 0.55  # centred cosine with a concept from which on a prompt means it


@dataclass(frozen=True)
class Bank:
    """Running sums over the rows of every bank prompt, as one text encoder reads them.

    prompts: the prompts, the empty one first (classifier-free guidance draws with it)
    grams: stream -> Σ w e eᵀ over all rows of all prompts, packed (`triangles.pack`)
    means: stream -> the mean of what stands for a prompt (`token_alignment.prompt_embeddings`),
    float32 [parts, dim]
    summary: of every prompt, the context row that has seen all of it, [prompts, dim]
    dropped: the prompts that are not counted; their rows: as encoded, times their weights' roots
    """

    prompts: tuple[str, ...]
    grams: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    summary: Tensor
    dropped: tuple[str, ...] = ()
    rows: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def kept(self) -> dict[str, BankGram]:
        """stream -> what Eq. 7 preserves of it."""
        return {
            stream: BankGram(
                gram,
                self.means[stream],
                {
                    p: condensed(r)
                    for p, r in zip(self.dropped, self.rows.get(stream, ()), strict=True)
                },
                self.name,
            )
            for stream, gram in self.grams.items()
        }

    @property
    def name(self) -> str:
        """A hash of the prompts and of the encoder's dimensions: by it, `BankGram`s are merged."""
        return digest(self.prompts, {s: list(mean.shape) for s, mean in self.means.items()})


def bank_prompts() -> tuple[str, ...]:
    """The prompts that ship with the project, about a thousand everyday things."""
    lines = Path(__file__).with_name("preservation_bank.txt").read_text("utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def encode_bank(
    text: TextEncoder,
    prompts: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bank:
    """Encodes the bank once per text encoder; later calls read it from the cache.

    prompts: the project's own bank unless given. progress is called with (prompts done, in all).
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
            for stream in encoding:
                for rows in encoding.weighed(stream).flatten(0, 1).split(ROWS):
                    some = rows.cpu().double()
                    grams[stream] = grams.get(stream, 0.0) + some.T @ some
            whole = prompt_embeddings(text, batch, encoding)
            for stream, rows in whole.items():
                means[stream] = means.get(stream, 0.0) + rows.cpu().double().sum(0) / len(prompts)
            summary.append(whole[CONTEXT][:, 0].float().cpu())
            progress(start + len(batch), len(prompts))
        named = {f"gram.{stream}": pack(gram) for stream, gram in grams.items()}
        named |= {f"mean.{stream}": mean.float() for stream, mean in means.items()}
        return {"summary": torch.cat(summary), **named}

    made = cached("bank", [text.fingerprint, prompts, "triangles"], encode)
    grams, means = (
        {key.removeprefix(kind): tensor for key, tensor in made.items() if key.startswith(kind)}
        for kind in ("gram.", "mean.")
    )
    return Bank(prompts, grams, means, made["summary"])


def drop_related_prompts(bank: Bank, text: TextEncoder, concepts: Sequence[Concept]) -> Bank:
    """The bank without the prompts that mean what is to be erased.

    A prompt is dropped when it names a concept, or when the centred cosine between its summary row
    and that of any concept prompt is at least RELATED.
    """
    prompts = [t.replace("{}", concept.name) for concept in concepts for t in concept.templates]
    centre = bank.summary.mean(0)
    bank_rows, closest = normalize(bank.summary - centre, dim=-1), torch.tensor(-1.0)
    for n in range(0, len(prompts), BATCH):
        some = prompts[n : n + BATCH]
        summary = prompt_summaries(text, some, text.encode(some)).cpu()
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
    encoded = Encoding.cat([text.encode(some).compact() for some in parts])
    rows = {stream: encoded.weighed(stream).cpu() for stream in encoded}
    return replace(bank, dropped=dropped, rows=rows)
