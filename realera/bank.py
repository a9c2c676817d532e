"""The preservation bank: what everyday prompts mean, as one Gram matrix per text encoder.

Beyond points preserve directions, the bank preserves meanings: it keeps the gain of the edit at 1
on the manifold of real prompts.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from .concepts import Pairs, holds_name
from .diffusion import TextEncoder
from .files import writing

BATCH = 64


@dataclass(frozen=True)
class Bank:
    """Running sums over the rows of every bank prompt, as one text encoder reads them.

    prompts: the prompts, the empty one first (classifier-free guidance draws with it)
    gram: Σ e eᵀ over all rows of all prompts, float64 [dim, dim]
    ends: the end-of-text row of every prompt, [prompts, dim]
    dropped: rows of the prompts that are no longer counted, prompt -> [tokens, dim]
    pooled: the same for pooled embeddings (contexts of one row), or None
    """

    prompts: tuple[str, ...]
    gram: Tensor
    ends: Tensor
    dropped: dict[str, Tensor] = field(default_factory=dict)
    pooled: "Bank | None" = None


def bank_prompts() -> tuple[str, ...]:
    """The prompts that ship with the project, about a thousand everyday things."""
    lines = Path(__file__).with_name("bank.txt").read_text("utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def cache_folder() -> Path:
    """Where encoded banks are kept: $REALERA_CACHE, else ~/.cache/realera."""
    return Path(os.environ.get("REALERA_CACHE") or Path.home() / ".cache" / "realera")


def encode_bank(
    text: TextEncoder,
    prompts: Sequence[str] | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bank:
    """Encodes the bank once per text encoder; later calls read it from the cache folder.

    prompts: the project's own bank unless given. cache: a folder, `cache_folder()` unless given.
    progress is called with (prompts done, prompts in all).
    """
    prompts = ("", *dict.fromkeys(p for p in prompts or bank_prompts() if p))
    key = hashlib.sha256(json.dumps([text.fingerprint, prompts]).encode()).hexdigest()[:24]
    path = (cache or cache_folder()) / f"bank-{key}.safetensors"
    if path.exists():
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return _from_tensors(prompts, tensors)

    gram = pooled_gram = torch.zeros((), dtype=torch.float64)
    ends, pooled = [], []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        encoding = text.encode(batch)
        context = encoding.context.double().cpu()
        rows = context.flatten(0, 1)
        gram = gram + rows.T @ rows
        last = torch.tensor([len(ids) - 1 for ids in text.tokenize(batch)])
        last = last.clamp(max=context.shape[1] - 1)
        ends.append(context[torch.arange(len(batch)), last])
        if encoding.pooled is not None:
            pooled.append(encoding.pooled.double().cpu())
            pooled_gram = pooled_gram + pooled[-1].T @ pooled[-1]
        progress(start + len(batch), len(prompts))
    tensors = {"gram": gram, "ends": torch.cat(ends).float()}
    if pooled:
        tensors |= {"pooled_gram": pooled_gram, "pooled": torch.cat(pooled)}
    with writing(path, overwrite=True) as part:
        save_file(tensors, part)
    return _from_tensors(prompts, tensors)


def _from_tensors(prompts: tuple[str, ...], tensors: dict[str, Tensor]) -> Bank:
    pooled = None
    if "pooled" in tensors:
        pooled = Bank(prompts, tensors["pooled_gram"], tensors["pooled"].float())
    return Bank(prompts, tensors["gram"], tensors["ends"], pooled=pooled)


def spare_concepts(bank: Bank, text: TextEncoder, pairs: Pairs, limit: float) -> Bank:
    """The bank without the prompts that mean what is to be erased.

    A prompt is dropped when it names a concept, or when the centred cosine between its end-of-text
    row and that of any concept prompt is at least `limit`.
    """
    index = torch.arange(len(pairs.prompts), device=pairs.context.device)
    own = pairs.context[index, pairs.ends].cpu()  # [prompts, dim]
    centre = bank.ends.mean(0)
    cosine = normalize(bank.ends - centre, dim=-1) @ normalize(own - centre, dim=-1).T
    close = (cosine.amax(1) >= limit).tolist()  # of [bank prompts, prompts]
    dropped = [
        prompt
        for prompt, near in zip(bank.prompts, close, strict=True)
        if prompt and (near or any(holds_name(prompt, c.name) for c in pairs.concepts))
    ]
    if not dropped:
        return bank
    encoding = text.encode(dropped)
    rows = dict(zip(dropped, encoding.context.cpu(), strict=True))
    pooled = bank.pooled
    if pooled is not None and encoding.pooled is not None:
        ones = dict(zip(dropped, encoding.pooled.cpu()[:, None], strict=True))
        pooled = replace(pooled, dropped=ones)
    return replace(bank, dropped=rows, pooled=pooled)
