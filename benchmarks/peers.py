"""Baselines of the field, implemented from their papers.

- UCE, "Unified Concept Editing in Diffusion Models" (Gandikota et al., 2024), Eq. 7
- MACE, "Mass Concept Erasure in Diffusion Models" (Lu et al., 2024), Sec. 3.1: the closed form
- RECE, "Reliable and Efficient Concept Erasure" (Gong et al., 2024), Sec. 4
- SPEED, "Scalable, Precise, and Efficient Concept Erasure" (Li et al., 2025), Sec. 3
- OCE, "Orthogonal Concept Erasure for Diffusion Models" (Sun et al., 2026)
- DP, "Closed-Form Concept Erasure via Double Projections" (Zhang et al., 2026), Eq. 2-5
- ESD-x, "Erasing Concepts from Diffusion Models" (Gandikota et al., 2023), Eq. 7

Each is given what its authors give it, our anchors apart. The closed forms return new weights; how
far they agree with the authors' own functions is in results/peers.md.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from realera.concepts import Concept, holds_name
from realera.edit.text_layers import family_in, text_layers, trained_layers
from realera.pipelines.interface import Diffusion
from realera.text.encoding import BATCH, CONTEXT, EncoderPart, TextEncoder

Weights = dict[str, Tensor]  # canonical name of a K or V projection -> its weight [out, dim]

# UCE's expanded prompts, for objects and for styles
EXPANDED = ("{}", *(f"{kind} of {{}}" for kind in ("image", "photo", "portrait", "picture")))
EXPANDED += ("painting of {}",)
EXPANDED_STYLES = ("{}", *(f"{kind} by {{}}" for kind in ("painting", "art", "artwork", "picture")))
EXPANDED_STYLES += ("style of {}",)
# MACE erases in 30 wordings. These are in the manner of its own, not the same.
KINDS = "photo snapshot picture drawing sketch painting illustration rendering graphic portrait"
WORDINGS = tuple(
    wording.replace("KIND", kind)
    for kind in KINDS.split()
    for wording in ("A KIND of {}", "{} in a KIND", "A detailed KIND of the {} outside")
)
WORDINGS_STYLES = tuple(
    wording.replace("KIND", kind)
    for kind in KINDS.split()
    for wording in ("A KIND by {}", "A KIND in {} style", "{}, a famous KIND")
)


def write(weights: Weights, network: nn.Module) -> None:
    """Puts the weights into the network."""
    layers = text_layers(network)
    with torch.no_grad():
        for name, weight in weights.items():
            layers[name].layer.weight.copy_(weight)


def projections(model: Diffusion) -> dict[str, Tensor]:
    """Every K and V projection of the model, float64 [out, dim] on the CPU."""
    layers = trained_layers(model.network).items()
    return {name: reader.layer.weight.detach().double().cpu() for name, reader in layers}


def contexts(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """What the model reads of the prompts, float64 [prompts, tokens, dim]."""
    return text.encode(prompts)[CONTEXT].cpu().double()


def word_places(part: EncoderPart, prompts: Sequence[str]) -> list[range]:
    """The places of every prompt's own tokens among the rows: not those of the empty prompt."""
    (empty,) = part.tokenize([""])
    places = []
    for ids in part.tokenize(prompts):
        most = min(len(ids), len(empty))
        before = next((k for k in range(most) if ids[k] != empty[k]), most)
        after = next(
            (k for k in range(most - before) if ids[-1 - k] != empty[-1 - k]), most - before
        )
        places.append(range(part.first + before, part.first + min(len(ids), part.length) - after))
    return places


def last_words(text: TextEncoder, prompts: Sequence[str]) -> list[int]:
    """The place of every prompt's last word token."""
    return [places[-1] for places in word_places(text.parts[0], prompts)]


def last_rows(text: TextEncoder, prompts: Sequence[str], stream: str = CONTEXT) -> Tensor:
    """The last word token's row of every prompt, float64 [prompts * encoder parts, dim]."""
    return _rows_at(text, prompts, stream, lambda places: places[-1:])


def word_rows(text: TextEncoder, prompts: Sequence[str], stream: str = CONTEXT) -> Tensor:
    """The rows of all word tokens of every prompt, float64 [rows, dim]."""
    return _rows_at(text, prompts, stream, lambda places: places)


def _rows_at(
    text: TextEncoder, prompts: Sequence[str], stream: str, chosen: Callable[[range], range]
) -> Tensor:
    rows = text.encode(prompts)[stream].cpu().double()
    if rows.shape[1] == 1:  # a pooled embedding
        return rows[:, 0]
    places = [word_places(part, prompts) for part in text.parts]
    return torch.cat(
        [row[[*chosen(at)]] for of in places for row, at in zip(rows, of, strict=True)]
    )


def filled(concepts: Sequence[Concept], wordings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every concept in every wording, and every anchor in the same wordings."""
    pairs = [
        (w.replace("{}", c.name), w.replace("{}", c.anchor)) for c in concepts for w in wordings
    ]
    return [prompt for prompt, _ in pairs], [anchor for _, anchor in pairs]


def without(retained: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """Those of the retained names or prompts that hold no concept."""
    return [text for text in retained if not any(holds_name(text, c.name) for c in concepts)]


def solved(
    e: Tensor, target: Tensor, ridge: float, kept: Tensor | None = None, keep: float = 0.0
) -> Tensor:
    """T [dim, dim] of all methods except SPEED, W = W_org T for every weight.

    T minimises Σ |T e - e*|² + keep Σ |T k - k|² + ridge |T - I|² over rows e, e* and rows k of
    `kept`, and W_org T is then the minimum over W for every W_org.
    """
    held = ridge * torch.eye(e.shape[1], dtype=e.dtype)
    if kept is not None:
        held = held + keep * kept.T @ kept
    return (target.T @ e + held) @ torch.linalg.inv(e.T @ e + held)


def uce(
    model: Diffusion,
    concepts: Sequence[Concept],
    wordings: Sequence[str] = ("{}",),
    ridge: float = 0.5,
) -> Weights:
    """Maps the row of the last word in every wording to that of the anchor, with a ridge."""
    prompts, anchors = filled(concepts, wordings)
    if family_in(model.network) is not None:
        return _uce_transformer(model, prompts, anchors, ridge)
    t = solved(last_rows(model.text, prompts), last_rows(model.text, anchors), ridge)
    return {name: w @ t for name, w in projections(model).items()}


def _uce_transformer(
    model: Diffusion, prompts: Sequence[str], anchors: Sequence[str], ridge: float
) -> Weights:
    """As UCE's authors do for FLUX.1: the last word's row of every encoder in the layer that reads
    the context, the pooled embedding in the one that reads it. Their targets hold the bias twice,
    which costs them one bias an edited row; here they do not."""
    weights = {}
    for name, reader in text_layers(model.network).items():
        e, target = (last_rows(model.text, p, reader.kind.stream) for p in (prompts, anchors))
        weights[name] = reader.layer.weight.detach().double().cpu() @ solved(e, target, ridge)
    return weights


def mace(
    model: Diffusion, concepts: Sequence[Concept], wordings: Sequence[str], ridge: float = 10.0
) -> Weights:
    """Closed-form refinement: maps the rows *around* the concept to those around the anchor.

    These are the rows of the words before and after in every wording, and of end-of-text and
    padding. MACE trains a LoRA for the rows of the concept, which is not done here.
    """
    e, target = around(model.text, *filled(concepts, wordings))
    t = solved(e, target, ridge)
    return {name: w @ t for name, w in projections(model).items()}


def around(
    text: TextEncoder, prompts: Sequence[str], anchors: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Rows of the words that each prompt and its anchor prompt have in common, [n, dim] each."""
    e, target = [], []
    both_rows = contexts(text, prompts), contexts(text, anchors)
    both_ids = (text.parts[0].tokenize(p) for p in (prompts, anchors))
    for rows, anchor_rows, a, b in zip(*both_rows, *both_ids, strict=True):
        shorter = min(len(a), len(b))
        before = next((k for k in range(shorter) if a[k] != b[k]), shorter)
        after = next((k for k in range(shorter - before) if a[-1 - k] != b[-1 - k]), 0)
        count = len(rows) - max(len(a), len(b)) + after  # to the end of the longer one
        e += [rows[:before], rows[len(a) - after :][:count]]
        target += [anchor_rows[:before], anchor_rows[len(b) - after :][:count]]
    return torch.cat(e), torch.cat(target)


def rece(
    model: Diffusion,
    concepts: Sequence[Concept],
    epochs: int = 1,
    regular: float = 0.1,
) -> Weights:
    """As UCE; then embeddings that still draw the concept are found and erased as well.

    The edited W reads e' = argmin Σ_layers |W e' - W_org e|² + regular |e'|² as e, so e' is erased
    from W like e; the rows of the empty prompt are preserved.
    """
    prompts, anchors = filled(concepts, ("{}",))
    weights, empty = projections(model), contexts(model.text, [""])[0]
    rows, anchor_rows = contexts(model.text, prompts), contexts(model.text, anchors)
    lasts = last_words(model.text, prompts), last_words(model.text, anchors)
    e, target = [], []  # from the last word on
    for concept, anchor, first, second in zip(rows, anchor_rows, *lasts, strict=True):
        count = len(concept) - max(first, second)
        e.append(concept[first:][:count])
        target.append(anchor[second:][:count])
    t = solved(torch.cat(e), torch.cat(target), 0.5, empty, 1.0)
    gram = torch.stack([w.T @ w for w in weights.values()]).sum(0)
    eye = regular * torch.eye(len(gram), dtype=gram.dtype)
    for _ in range(epochs):
        back = torch.linalg.inv(t.T @ gram @ t + eye) @ t.T @ gram
        found = rows.flatten(0, 1) @ back.T
        t = t @ solved(found, anchor_rows.flatten(0, 1), 0.1, empty, 0.1)
    return {name: w @ t for name, w in weights.items()}


def speed(
    model: Diffusion,
    concepts: Sequence[Concept],
    retained: Sequence[str],
    threshold: float = 0.1,
    augmentations: int = 10,
    seed: int = 0,
) -> Weights:
    """An update inside the null space of what is retained; V only, as in the authors' settings.

    Of the retained names or prompts those count that the plain update would change more than the
    average one (IPF), and noisy copies of them along the direction that W sees least (DPA). The
    empty prompt's start row and three centres of its others are kept exactly (IEC).
    """
    free_of = without(retained, concepts)
    prompts, anchors = filled(concepts, ("{}",))
    share = len(concepts) ** -0.5  # concepts are averaged, not summed
    e, target = share * last_rows(model.text, prompts), share * last_rows(model.text, anchors)
    others, empty = last_rows(model.text, free_of), contexts(model.text, [""])[0]
    invariant = torch.cat([empty[:1], centres(empty[1:], 3)])  # [4, dim]
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(e.shape[1], dtype=e.dtype)
    edited = {}
    for name, w in projections(model).items():
        if not name.endswith("to_v"):
            continue
        plain = w @ (target - e).T @ e @ torch.linalg.inv(e.T @ e + eye)
        kept = others
        if augmentations:
            kept = above_mean(others, plain)
            unseen = torch.linalg.svd(w).Vh[-1]
            noise = torch.randn(augmentations, len(kept), 1, generator=generator, dtype=e.dtype)
            kept = torch.cat([kept, above_mean((kept + noise * unseen).flatten(0, 1), plain)])
        values, vectors = torch.linalg.eigh(kept.T @ kept / len(kept))
        free = vectors[:, values < threshold]  # [dim, k], the approximate null space
        # Inside it, the directions that the invariant rows have no part in.
        _, s, vh = torch.linalg.svd(invariant @ free)
        rank = int((s > 1e-9 * s.max()).sum()) if len(s) else 0
        free = free @ vh[rank:].T
        # min_Y |Y freeᵀ e - W (e* - e)|² + |Y|²
        seen = e @ free  # [concepts, k]
        gram = seen.T @ seen + torch.eye(seen.shape[1], dtype=e.dtype)
        edited[name] = w + w @ (target - e).T @ seen @ torch.linalg.inv(gram) @ free.T
    return edited


def above_mean(rows: Tensor, update: Tensor) -> Tensor:
    """The rows that the update changes more than it does on average."""
    influence = (rows @ update.T).norm(dim=1)
    return rows[influence > influence.mean()]


def centres(rows: Tensor, count: int, rounds: int = 100) -> Tensor:
    """k-means of rows [n, dim], begun at rows that are evenly spaced: [count, dim]."""
    found = rows[torch.arange(count) * len(rows) // count]
    for _ in range(rounds):
        nearest = torch.cdist(rows, found).argmin(1)
        new = torch.stack([rows[nearest == k].mean(0) for k in range(count)])
        if torch.equal(new, found):
            break
        found = new
    return found


def oce(
    model: Diffusion,
    concepts: Sequence[Concept],
    wordings: Sequence[str],
    prior: Sequence[str],
    retained: Sequence[str] = (),
    erase: float = 2000.0,
    general: float = 10.0,
    retain: float = 0.0,
    ridge: float = 10.0,
) -> Weights:
    """W = Q W_org with Q orthogonal; of U-Nets V only, as in the authors' settings.

    Q maximises tr QᵀM (Procrustes), M = W_org (general C + retain Σ k kᵀ + ridge I) W_orgᵀ
    - erase G (I - G*): G and G* project onto the span of what W_org reads of the last words of the
    concepts and of the anchors, C is the second moment of all rows of the prompts of `prior`, k are
    the last words of `retained`.
    """
    text: Any = model.text
    prompts, anchors = filled(concepts, wordings)
    kept = without(retained, concepts)
    edited = {}
    for name, reader in text_layers(model.network).items():
        if name.endswith("to_k"):
            continue
        stream, w = reader.kind.stream, reader.layer.weight.detach().double().cpu()
        rows = last_rows(text, prompts, stream)
        anchor_rows = last_rows(text, [*dict.fromkeys(anchors)], stream)
        span, guide = (torch.linalg.qr(normalize(w @ of.T, dim=0)).Q for of in (rows, anchor_rows))
        held = general * second_moment(text, tuple(prior), stream)
        held = held + ridge * torch.eye(w.shape[1], dtype=w.dtype)
        if kept:
            k = last_rows(text, kept, stream)
            held = held + retain * k.T @ k
        erased = span @ (span.T - span.T @ guide @ guide.T)
        u, _, vh = torch.linalg.svd(w @ held @ w.T - erase * erased)
        turn = u @ vh
        if torch.linalg.det(turn) < 0:
            turn[:, -1] *= -1
        edited[name] = turn @ w
    return edited


@cache
def second_moment(text: Any, prompts: tuple[str, ...], stream: str) -> Tensor:
    """Mean of e eᵀ over all rows of the prompts except padding, float64 [dim, dim]."""
    rows = []
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        encoded = text.encode(some)[stream].cpu().double()
        if encoded.shape[1] == 1:  # a pooled embedding
            rows.append(encoded[:, 0])
            continue
        for part in text.parts:
            counts = [len(ids) for ids in part.tokenize(some)]
            pairs = zip(encoded[:, part.first :], counts, strict=True)
            rows += [of[: min(count, part.length)] for of, count in pairs]
    found = torch.cat(rows)
    return found.T @ found / len(found)


def double_projections(
    model: Diffusion,
    concepts: Sequence[Concept],
    retained: Sequence[str],
    directions: int | None = None,
) -> Weights:
    """Maps every row of a concept to its projection, and moves nothing that is retained.

    The row goes to its projection onto the span of the rows of all anchors, or to the only such row
    (Eq. 2); the update lies in the left null space of the rows of `retained` (Eq. 4 and 5), or
    of their leading singular directions. A row in the span of these is not moved.

    directions: number of these directions; default: all
    """
    anchors = [*dict.fromkeys(concept.anchor for concept in concepts)]
    kept_names, names = without(retained, concepts), [concept.name for concept in concepts]
    edits: dict[str, Tensor] = {}
    edited = {}
    for name, reader in text_layers(model.network).items():
        stream = reader.kind.stream
        if stream not in edits:
            guides, kept, rows = (
                word_rows(model.text, of, stream) for of in (anchors, kept_names, names)
            )
            _, s, vh = torch.linalg.svd(kept, full_matrices=False)
            held = vh[s > 1e-6][:directions]
            t = torch.eye(rows.shape[1], dtype=rows.dtype)
            for row in rows:
                target = guides[0]
                if len(guides) > 1:
                    target = guides.T @ torch.linalg.pinv(guides @ guides.T) @ guides @ row
                seen = row - held.T @ held @ row
                if seen.norm() <= 1e-6 * row.norm():
                    continue
                t = t + torch.outer(t @ (target - row), seen) / (seen @ seen)
            edits[stream] = t
        edited[name] = reader.layer.weight.detach().double().cpu() @ edits[stream]
    return edited


def esd_x(
    model: Diffusion,
    concepts: Sequence[Concept],
    iterations: int = 200,
    learning_rate: float = 1e-4,
    batch: int = 4,
    guidance: float = 1.0,
    steps: int = 20,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Fine-tunes all cross-attention, in place, so that the concept's prediction points away.

    The target is ε(∅) - guidance (ε(c) - ε(∅)) of the original model, at latents that the student
    draws of the concept, guided by 3. The anchor is not used: ESD has none.
    """
    teacher: Any = copy.copy(model)
    teacher.network = copy.deepcopy(model.network)  # ESD keeps two U-Nets
    trained = [p for name, p in model.network.named_parameters() if ".attn2." in name]
    wanted = [parameter.requires_grad for parameter in model.network.parameters()]
    encoding = model.text.encode([concept.name for concept in concepts])
    empty = model.text.encode([""])
    generator = torch.Generator().manual_seed(seed)
    try:
        model.network.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, lr=learning_rate)
        for step in range(1, iterations + 1):
            pick = torch.randint(len(concepts), (batch,), generator=generator)
            own = encoding.take(pick)
            without = empty.like(own)
            # The paper denoises to t; a full, coarse run noised to t costs less and is much alike.
            noise = torch.randn(batch, *model.latent_shape, generator=generator)
            z0 = model.sample(own, without, noise, max(1, steps // 4), 3.0)
            t = model.times(batch, generator)
            z_t = model.noised(z0, torch.randn(z0.shape, generator=generator).to(z0), t)
            with torch.no_grad():
                towards = teacher.predict(z_t, t, own)
                plain = teacher.predict(z_t, t, without)
            loss = mse_loss(model.predict(z_t, t, own), plain - guidance * (towards - plain))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            on_step(step, loss.item())
    finally:
        for parameter, grad in zip(model.network.parameters(), wanted, strict=True):
            parameter.requires_grad_(grad)
            parameter.grad = None
