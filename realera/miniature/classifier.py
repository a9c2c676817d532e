"""The CNN that classifies the miniature's images; it takes the place of CLIP in Acc_e, s and g."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class MiniatureClassifier(nn.Module):
    """Images [n, 3, 64, 64] in [0, 1] to logits (concept [n, concepts], style [n, styles])."""

    def __init__(self, concepts: tuple[str, ...], styles: tuple[str, ...]) -> None:
        super().__init__()
        self.concepts, self.styles = concepts, styles
        widths = (3, 32, 64, 128, 192)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 4 if i == 3 else 3, stride=2, padding=1) for i, o in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.mix = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.mix_norm = nn.BatchNorm2d(widths[-1])
        self.concept = nn.Linear(widths[-1], len(concepts))
        self.style = nn.Linear(widths[-1], len(styles))

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps at 32, 16, 8 and 4 pixels, for a perceptual loss."""
        h, maps = images * 2 - 1, []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(norm(conv(h)))
            maps.append(h)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        last = self.features(images)[-1]
        pooled = (last + F.relu(self.mix_norm(self.mix(last)))).mean(dim=(2, 3))
        return self.concept(pooled), self.style(pooled)
