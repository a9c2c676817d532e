"""Muon for every weight of two or more dimensions, AdamW for the rest, and their average."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalize(matrix: Tensor) -> Tensor:
    """Roughly U V^T of the singular value decomposition of [rows, columns]; five Newton-Schulz
    steps of the quintic (3.4445, -4.7750, 2.0315) of Jordan et al., 2024."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(
            x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions; steps have the size that AdamW's would have at `lr`.

    dtype: to orthogonalise in; bfloat16 is exact enough, and four times as fast where the processor
    multiplies it.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                velocity = state["momentum"]
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(velocity, group["momentum"]).reshape(len(p), -1)
                scale = 0.2 * max(update.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                step = orthogonalize(update.to(self.dtype)).to(p.dtype)
                p.add_(step.view_as(p), alpha=-group["lr"] * scale)


class Optimizers:
    """Muon for matrices and convolutions, AdamW for the rest, as one."""

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        self.muon = Muon([p for p in trained if p.ndim > 1], lr=0.0, dtype=dtype)
        self.adam = torch.optim.AdamW(
            [p for p in trained if p.ndim < 2], lr=0.0, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.trained, self.steps = trained, 0

    def step(self, loss: Tensor, rate: float, progress: float) -> None:
        """Backward, clip, and one update at `rate` times warm-up (100 steps) and cosine decay."""
        rate *= min(1.0, (self.steps + 1) / 100) * (
            0.02 + 0.49 * (1 + math.cos(math.pi * progress))
        )
        for optimizer in (self.muon, self.adam):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.muon.step()
        self.adam.step()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.steps = state["steps"]


class Average:
    """Exponential moving average of a module's parameters, warmed up over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.source = list(module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in self.source]

    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.source], 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "values": dict(zip(self.names, self.values, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state["values"][name])
