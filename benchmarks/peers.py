"""Small baselines of the field, written from their papers, to be measured beside RealEra.

Each changes the U-Net of a model in place.

- UCE, "Unified Concept Editing in Diffusion Models" (Gandikota et al., 2024), Eq. 7
- SPEED, "Scalable, Precise, and Efficient Concept Erasure" (Li et al., 2025), Sec. 3
- ESD-x, "Erasing Concepts from Diffusion Models" (Gandikota et al., 2023), Eq. 7
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from realera.bank import bank_prompts
from realera.concepts import Concept
from realera.diffusion import Diffusion, TextEncoder, projections


def last_rows(text: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """The last word token's row of every prompt, float64 [prompts, dim]."""
    last = torch.tensor([len(ids) - 2 for ids in text.tokenize(prompts)])
    context = text.encode(prompts).context.cpu().double()
    return context[torch.arange(len(prompts)), last.clamp(max=context.shape[1] - 2)]


@torch.no_grad()
def uce(model: Diffusion, concepts: Sequence[Concept], ridge: float = 0.5) -> None:
    """One row a concept, its last word, and a ridge that holds on to W_org; all K and V.

    min_W Σ |W e - W_org e*|² + ridge |W - W_org|²
    """
    e = last_rows(model.text, [concept.name for concept in concepts])
    target = last_rows(model.text, [concept.anchor for concept in concepts])
    eye = ridge * torch.eye(e.shape[1], dtype=e.dtype)
    for layer in projections(model.unet).values():
        w = layer.weight
        new = w.double().cpu() @ (target.T @ e + eye) @ torch.linalg.inv(e.T @ e + eye)
        w.copy_(new.to(w))


@torch.no_grad()
def speed(
    model: Diffusion,
    concepts: Sequence[Concept],
    retained: Sequence[str] | None = None,
    threshold: float = 0.1,
    augmentations: int = 10,
    seed: int = 0,
) -> None:
    """An update inside the null space of what is retained; V only, as in the authors' settings.

    Retained prompts (the bank's unless given) are those that the plain update would change more
    than the average one (IPF), and noisy copies of them along the direction that W sees least
    (DPA). The start row and the empty prompt's rows are kept exactly (IEC), here by the span of
    the latter's three leading directions.
    """
    names = [concept.name.casefold() for concept in concepts]
    retained = [
        prompt
        for prompt in (retained or bank_prompts())
        if not any(name in prompt.casefold() for name in names)
    ]
    e = last_rows(model.text, [concept.name for concept in concepts])
    target = last_rows(model.text, [concept.anchor for concept in concepts])
    others = last_rows(model.text, retained)
    empty = model.text.encode([""]).context[0].cpu().double()
    leading = torch.linalg.svd(empty[1:], full_matrices=False).Vh[:3]
    invariant = torch.cat([empty[:1], leading])  # [4, dim]
    # Eigenvalues are compared with their mean, which is 1 in SD 1.x, where the authors chose 0.1.
    threshold = threshold * float(others.square().mean())
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(e.shape[1], dtype=e.dtype)

    for name, layer in projections(model.unet).items():
        if not name.endswith("to_v"):
            continue
        w = layer.weight.double().cpu()
        plain = w @ (target - e).T @ e @ torch.linalg.inv(e.T @ e + eye)
        influence = (others @ plain.T).norm(dim=1)
        kept = others[influence > influence.mean()]
        unseen = torch.linalg.svd(w).Vh[-1]
        noise = torch.randn(augmentations, len(kept), 1, generator=generator, dtype=e.dtype)
        copies = (kept + noise * unseen).flatten(0, 1)
        influence = (copies @ plain.T).norm(dim=1)
        kept = torch.cat([kept, copies[influence > influence.mean()]])
        values, vectors = torch.linalg.eigh(kept.T @ kept / len(kept))
        free = vectors[:, values < threshold]  # [dim, k], the approximate null space
        # Inside it, the directions that the invariant rows have no part in.
        _, s, vh = torch.linalg.svd(invariant @ free)
        rank = int((s > 1e-9 * s.max()).sum()) if len(s) else 0
        free = free @ vh[rank:].T
        # min_Y |Y freeᵀ e - W (e* - e)|² + |Y|²
        own = e @ free  # [concepts, k]
        gram = own.T @ own + torch.eye(own.shape[1], dtype=e.dtype)
        change = w @ (target - e).T @ own @ torch.linalg.inv(gram) @ free.T
        layer.weight.copy_((w + change).to(layer.weight))


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
    """Fine-tunes all cross-attention so that the concept's prediction points away from it.

    The target is ε(∅) - guidance (ε(c) - ε(∅)) of the original model, at latents that the student
    draws of the concept, guided by 3. The anchor is not used: ESD has none.
    """
    teacher: Any = copy.copy(model)
    teacher.unet = copy.deepcopy(model.unet)  # ESD keeps two U-Nets
    trained = [p for name, p in model.unet.named_parameters() if ".attn2." in name]
    wanted = [parameter.requires_grad for parameter in model.unet.parameters()]
    encoding = model.text.encode([concept.name for concept in concepts])
    empty = model.text.encode([""])
    generator = torch.Generator().manual_seed(seed)
    try:
        model.unet.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, lr=learning_rate)
        for step in range(1, iterations + 1):
            pick = torch.randint(len(concepts), (batch,), generator=generator)
            own, without = encoding.rows(pick), empty.rows(torch.zeros_like(pick))
            # The paper denoises to t; a full, coarse run noised to t costs less and is much alike.
            z0 = model.sample(own, without, generator, max(1, steps // 4), 3.0)
            t = torch.randint(model.train_timesteps, (batch,), generator=generator).to(z0.device)
            z_t = model.add_noise(z0, torch.randn(z0.shape, generator=generator).to(z0), t)
            with torch.no_grad():
                towards = teacher.predict_noise(z_t, t, own)
                plain = teacher.predict_noise(z_t, t, without)
            loss = mse_loss(model.predict_noise(z_t, t, own), plain - guidance * (towards - plain))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            on_step(step, loss.item())
    finally:
        for parameter, grad in zip(model.unet.parameters(), wanted, strict=True):
            parameter.requires_grad_(grad)
            parameter.grad = None
