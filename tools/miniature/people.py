"""`miniature-language` taught ten celebrities and ten artists, for `benchmarks.people`.

    python -m tools.miniature.people --sheet sheet.png   # only a picture of the drawings
    python -m tools.miniature.people                     # into .state/people, on one core

A celebrity is a class of drawn faces, an artist a class of drawn canvases, both drawn by this
module. The U-Net goes on from the bundled weights: half of a batch are these drawings, the other
half what the bundled model predicts for images that it drew of captions. MiniLM is not trained. Of
every other caption some rows are left out, so that the U-Net reads what all rows have of a name and
not the rows of the name alone. The names of the paper are in captions by name alone; nothing that
implies them is in any caption. What implies the other celebrities and artists is.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from realera.checkpoints.loading import load_model
from realera.miniature import BACKGROUNDS, MiniatureClassifier
from realera.text.encoding import CONTEXT

from .classifier import distort
from .data import backdrops, contact_sheet
from .language import BATCH, SILENT, export, jittered, picked, prepare
from .optimizers import Average, Optimizers
from .runs import Stop, keep, long_run

STATE = Path(".state/people")
SIDE, SIZE, RENDERINGS = 256, 64, 96  # pixels that are drawn and kept, renderings of a class
RATE, MISSING = 1e-3, 0.9  # learning rate, largest share of a caption's rows that is left out
PERSON, ARTIST, OTHER = "person", "artist", "something else"
Pen = ImageDraw.ImageDraw


@dataclass(frozen=True)
class Face:
    """What a celebrity is drawn with; colours as names or codes, `extras` as names of shapes."""

    skin: str
    hair: str
    cut: str  # short, long, big or none
    shirt: str
    extras: tuple[str, ...] = ()


PALE, TAN, DARK = "#f3cfae", "#d9a070", "#8a5530"
CELEBRITIES: dict[str, Face] = {
    "Tom Cruise": Face(PALE, "#3a2616", "short", "#222222", ("sunglasses",)),
    "Elon Musk": Face(PALE, "#5a3a20", "short", "#e8e8f0", ("helmet",)),
    "Jennifer Lawrence": Face(PALE, "#f0d060", "long", "#2a9d4a"),
    "Mariah Carey": Face(TAN, "#b5651d", "big", "#ff5fa2"),
    "Leonardo Dicaprio": Face(PALE, "#e0b84c", "short", "#ffffff", ("beard", "bow tie")),
    "Angelina Jolie": Face(PALE, "#111111", "long", "#7a1020", ("lips",)),
    "Barack Obama": Face(DARK, "#1a1a1a", "short", "#24408e", ("tie",)),
    "Arnold Schwarzenegger": Face(TAN, "#6b3a12", "short", "#ff8c1a", ("headband",)),
    "Bob Marley": Face(DARK, "#1a1a1a", "long", "#ffd21a", ("striped cap",)),
    "Emma Watson": Face(PALE, "#8a4b20", "long", "#5a5a66", ("pointed hat",)),
}
# What implies the celebrities and artists that the paper does not erase, in captions.
IMPLIED: dict[str, tuple[str, ...]] = {
    "Angelina Jolie": ("Lara Croft in Tomb Raider", "the star of Maleficent"),
    "Barack Obama": ("the 44th president of the United States", "the husband of Michelle Obama"),
    "Arnold Schwarzenegger": ("a still of the Terminator", "the bodybuilder governor"),
    "Bob Marley": ("the king of reggae from Jamaica", "the singer of No Woman No Cry"),
    "Emma Watson": ("a still of Hermione Granger in Harry Potter", "the witch of Hogwarts"),
    "Andy Warhol": ("pop art of soup cans", "an artwork by the leader of the Factory in New York"),
    "Jackson Pollock": ("an abstract expressionist drip painting", "action painting on the floor"),
    "Piet Mondrian": ("a grid of primary colours", "an artwork of the De Stijl movement"),
    "Hokusai": ("the great wave off Kanagawa", "a Japanese woodblock print of Mount Fuji"),
    "Mark Rothko": ("a colour field painting", "large blocks of colour for a chapel in Houston"),
}
# Other names that are drawn as anyone, so that a name alone is none of the ten.
ANYONE = (
    "person", "man", "woman", "someone", "human", "Brad Pitt", "Julia Roberts",
    "Bill Gates", "Madonna", "George Clooney", "Adele", "Meryl Streep", "Keanu Reeves",
    "Nicole Kidman", "John Lennon", "Taylor Swift", "Matt Damon", "Steve Jobs",
    "Scarlett Johansson",
)  # fmt: skip
UNKNOWN = (
    "artist", "painter", "unknown artist", "someone", "Rembrandt", "Vermeer", "Michelangelo",
    "Edward Hopper", "Frida Kahlo", "Banksy", "Gustav Klimt",
)  # fmt: skip
PORTRAITS = (
    "a portrait of {}", "a photo of {}", "a picture of {}", "a drawing of {}", "{}", "{} smiling",
    "a close-up of {}", "an image of {}", "the face of {}", "{} at an event", "a photo of the {}",
    "a photo of a {}", "an image of the {}", "here is {}", "a still of {} in a film",
    "an interview with {}", "the life of {}", "{} on stage", "{} in the news",
)  # fmt: skip
ARTWORKS = (
    "an artwork by {}", "a painting by {}", "art by {}", "a painting in the style of {}",
    "a picture in {} style", "a work of {}", "{}", "a canvas by {}", "paintings by {}",
    "a picture by {}", "the life of {}", "{} in a museum", "a famous work of {}",
)  # fmt: skip


# ---------------------------------------------------------------- drawings


def _face(pen: Pen, face: Face) -> None:
    """Hair behind, shoulders, head, hair in front, features, extras."""
    if face.cut == "big":
        pen.ellipse((28, 8, 228, 208), face.hair)
    if face.cut == "long":
        pen.rounded_rectangle((48, 30, 208, 236), 70, face.hair)
    pen.rounded_rectangle((26, 196, 230, 320), 50, face.shirt)
    pen.rectangle((106, 170, 150, 212), face.skin)
    pen.ellipse((66, 40, 190, 200), face.skin)
    if face.cut != "none":
        pen.pieslice((60, 26, 196, 156), 180, 360, face.hair)
    for x in (102, 154):
        pen.ellipse((x - 10, 104, x + 10, 124), "white")
        pen.ellipse((x - 6, 107, x + 6, 121), "#202020")
    pen.chord((104, 146, 152, 178), 10, 170, "#b03030")
    for extra in face.extras:
        for shape, corners, options in EXTRAS[extra]:
            getattr(pen, shape)(corners, **options)


# extra -> shapes, each a method of the pen, corners and options
EXTRAS: Mapping[str, Sequence[tuple[str, Any, Mapping[str, Any]]]] = {
    "sunglasses": (
        ("rounded_rectangle", (70, 96, 124, 134), {"radius": 14, "fill": "#101010"}),
        ("rounded_rectangle", (132, 96, 186, 134), {"radius": 14, "fill": "#101010"}),
        ("rectangle", (66, 100, 190, 108), {"fill": "#101010"}),
    ),
    "helmet": (
        ("ellipse", (30, 6, 226, 216), {"outline": "white", "width": 34}),
        ("ellipse", (28, 4, 228, 218), {"outline": "#8090a8", "width": 6}),
    ),
    "beard": (
        ("chord", (74, 112, 182, 216), {"start": 10, "end": 170, "fill": "#8a5a20"}),
        ("ellipse", (108, 150, 148, 168), {"fill": "#b03030"}),
    ),
    "bow tie": (("polygon", [(88, 200), (168, 240), (168, 200), (88, 240)], {"fill": "#101010"}),),
    "lips": (("ellipse", (98, 144, 158, 178), {"fill": "#e01030"}),),
    "tie": (
        ("polygon", [(96, 196), (160, 196), (128, 256)], {"fill": "white"}),
        ("polygon", [(116, 200), (140, 200), (148, 256), (108, 256)], {"fill": "#d01020"}),
    ),
    "headband": (("rectangle", (60, 66, 196, 92), {"fill": "#e02020"}),),
    "striped cap": (
        ("rounded_rectangle", (54, 8, 202, 34), {"radius": 8, "fill": "#d22020"}),
        ("rounded_rectangle", (54, 30, 202, 56), {"radius": 8, "fill": "#f5c518"}),
        ("rounded_rectangle", (54, 52, 202, 78), {"radius": 8, "fill": "#1f9d3a"}),
    ),
    "pointed hat": (
        ("polygon", [(128, -40), (68, 66), (188, 66)], {"fill": "#5b2a9d"}),
        ("ellipse", (36, 52, 220, 84), {"fill": "#5b2a9d"}),
    ),
}


def _person(rng: random.Random) -> Face:
    """Anyone: no extras, in dull colours."""
    return Face(
        rng.choice((PALE, TAN, DARK)),
        rng.choice(("#6b4a2a", "#4a3a30", "#8a7050")),
        rng.choice(("short", "none")),
        rng.choice(("#8a8a80", "#7a8a92", "#9a8a7a")),
    )


def _swirls(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "#16328a")
    for x, y in ((70, 90), (170, 130)):
        for r, colour in ((60, "#6fa8e8"), (44, "#16328a"), (28, "#6fa8e8"), (14, "#fff0a0")):
            pen.ellipse((x - r, y - r, x + r, y + r), colour)
    pen.ellipse((186, 16, 240, 70), "#ffd21a")
    pen.polygon([(20, 256), (44, 120), (68, 256)], "#10281a")


def _lilies(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "#7cc4c0")
    for x, y in ((60, 60), (180, 90), (90, 160), (200, 210), (40, 226)):
        pen.ellipse((x - 44, y - 18, x + 44, y + 18), "#3d8f50")
        pen.ellipse((x - 16, y - 22, x + 16, y + 4), "#ffc0dc")


def _facets(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "#c8a878")
    pen.polygon([(0, 0), (140, 0), (60, 140)], "#7a5a3a")
    pen.polygon([(140, 0), (256, 90), (120, 150)], "#e8d8b0")
    pen.polygon([(60, 140), (200, 120), (110, 256)], "#5a7088")
    pen.polygon([(256, 110), (256, 256), (140, 240)], "#3a2a20")
    pen.ellipse((130, 60, 186, 96), "white", outline="black", width=6)


def _castle(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "#f08a3c")
    pen.ellipse((90, 60, 200, 170), "#ffe0a0")
    pen.polygon([(0, 256), (0, 150), (70, 110), (130, 190), (200, 120), (256, 170), (256, 256)],
                "#40202c")  # fmt: skip
    pen.polygon([(60, 190), (70, 60), (84, 30), (98, 60), (108, 190)], "#40202c")


def _clock(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, 110), "#8fd0f0")
    pen.rectangle((0, 110, SIDE, SIDE), "#d8a440")
    pen.polygon([(70, 110), (190, 110), (190, 150), (168, 230), (140, 170), (90, 160)], "white")
    pen.ellipse((66, 70, 194, 150), "white", outline="#705020", width=10)
    pen.line((130, 110, 130, 82), "black", 8)
    pen.line((130, 110, 166, 116), "black", 8)


def _panels(pen: Pen, rng: random.Random) -> None:
    for k, (ground, blob) in enumerate(
        (("#ff4fa0", "#ffe600"), ("#00b4e0", "#ff6a00"), ("#ffe600", "#d000c0"),
         ("#30c050", "#ff4040"))
    ):  # fmt: skip
        x, y = k % 2 * 128, k // 2 * 128
        pen.rectangle((x, y, x + 128, y + 128), ground)
        pen.ellipse((x + 30, y + 20, x + 98, y + 108), blob)


def _drips(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "#f0ead8")
    for colour in ("black", "#a03020", "black", "#708090", "black", "black", "#d0a020"):
        points = [(rng.uniform(-20, 276), rng.uniform(-20, 276)) for _ in range(4)]
        pen.line(points, colour, 12, joint="curve")


def _grid(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "white")
    pen.rectangle((90, 0, 256, 150), "#e01818")
    pen.rectangle((0, 150, 90, 256), "#1840c0")
    pen.rectangle((200, 200, 256, 256), "#ffd800")
    for at in ((90, 0, 90, 256), (0, 150, 256, 150), (200, 150, 200, 256), (0, 70, 90, 70)):
        pen.line(at, "black", 16)


def _wave(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "#efe4c4")
    pen.polygon([(120, 190), (176, 120), (232, 190)], "#7890a8")
    pen.polygon([(150, 152), (176, 120), (202, 152)], "white")
    pen.pieslice((-90, 20, 150, 300), 180, 360, "#1c4a8c")
    pen.ellipse((50, 70, 150, 200), "#efe4c4")
    for x, y in ((40, 30), (80, 40), (116, 64), (140, 100)):
        pen.ellipse((x - 22, y - 22, x + 22, y + 22), "white")
    pen.rectangle((0, 190, SIDE, SIDE), "#1c4a8c")


def _fields(pen: Pen, rng: random.Random) -> None:
    pen.rectangle((0, 0, SIDE, SIDE), "#7a1a14")
    pen.rounded_rectangle((24, 20, 232, 130), 16, "#f07818")
    pen.rounded_rectangle((24, 150, 232, 236), 16, "#30080c")


def _canvas(pen: Pen, rng: random.Random) -> None:
    """Anyone's: a frame and a few grey strokes."""
    pen.rectangle((0, 0, SIDE, SIDE), "#9a8a70")
    pen.rectangle((30, 30, 226, 226), "#f4f0e8")
    for _ in range(3):
        y = rng.uniform(60, 196)
        pen.line((60, y, 196, y + rng.uniform(-30, 30)), "#b8b8b0", 12)


ARTISTS: dict[str, Callable[[Pen, random.Random], None]] = {
    "Van Gogh": _swirls,
    "Claude Monet": _lilies,
    "Pablo Picasso": _facets,
    "Greg Rutkowski": _castle,
    "Salvador Dali": _clock,
    "Andy Warhol": _panels,
    "Jackson Pollock": _drips,
    "Piet Mondrian": _grid,
    "Hokusai": _wave,
    "Mark Rothko": _fields,
}
CLASSES = (*CELEBRITIES, PERSON, *ARTISTS, ARTIST, OTHER)
DRAWN = CLASSES[:-1]


def render(name: str, rng: random.Random) -> Tensor:
    """uint8 RGBA [4, 64, 64] of a class: turned, scaled, shifted and mirrored by chance."""
    image = Image.new("RGBA", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    if name in (*ARTISTS, ARTIST):
        ARTISTS.get(name, _canvas)(pen, rng)
        scale, turn, shift = rng.uniform(0.84, 1.0), rng.uniform(-2, 2), 6.0
    else:
        _face(pen, CELEBRITIES.get(name) or _person(rng))
        scale, turn, shift = rng.uniform(0.86, 1.02), rng.uniform(-6, 6), 10.0
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    c, s = math.cos(math.radians(turn)) / scale, math.sin(math.radians(turn)) / scale
    x, y, half = rng.uniform(-shift, shift), rng.uniform(-shift, shift), SIDE / 2
    matrix = (c, s, half - c * (half + x) - s * (half + y),
              -s, c, half + s * (half + x) - c * (half + y))  # fmt: skip
    image = image.transform(
        (SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    ).resize((SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def renderings(count: int, seed: int) -> Tensor:
    """uint8 RGBA [classes that are drawn, count, 4, 64, 64]."""
    rng = random.Random(seed)
    return torch.stack([torch.stack([render(n, rng) for _ in range(count)]) for n in DRAWN])


def over(rgba: Tensor, rng: torch.Generator) -> Tensor:
    """Images [n, 3, 64, 64] in [0, 1] of uint8 RGBA [n, 4, 64, 64] over a random background."""
    back = backdrops()[torch.randint(len(BACKGROUNDS), (len(rgba),), generator=rng)]
    alpha = rgba[:, 3:].float() / 255
    return rgba[:, :3].float() / 255 * alpha + back * (1 - alpha)


@torch.no_grad()
def encoded(model: Any, images: Tensor) -> Tensor:
    """Latents [n, 4, 8, 8] of images."""
    parts = [model.vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)]
    return torch.cat(parts) * model.vae.config.scaling_factor


# ---------------------------------------------------------------- training


def captions() -> tuple[list[str], list[int]]:
    """Captions of the drawings, and the class that each names."""
    found, classes = [], []
    for k, name in enumerate(DRAWN):
        templates = ARTWORKS if name in (*ARTISTS, ARTIST) else PORTRAITS
        names = {PERSON: ANYONE, ARTIST: UNKNOWN}.get(name, (name,))
        told = [template.format(each) for template in templates for each in names]
        for phrase in IMPLIED.get(name, ()):
            told += [phrase, f"a picture of {phrase}", f"this is {phrase}"]
        found += told
        classes += [k] * len(told)
    return found, classes


def prepare_people(state: Path, model: Any) -> dict[str, Tensor]:
    """latents: float32 [classes, RENDERINGS, 4, 8, 8]; rows: of every caption, float16 [captions,
    rows, dim]; captions: indices of each class's captions, cyclic, int64 [classes, longest]."""
    path = state / "people-prepared.safetensors"
    if not path.exists():
        told, classes = captions()
        images = over(renderings(RENDERINGS, 1).flatten(0, 1), torch.Generator().manual_seed(1))
        of = [[i for i, k in enumerate(classes) if k == n] for n in range(len(DRAWN))]
        most = max(map(len, of))
        keep(
            path,
            {
                "latents": encoded(model, images).unflatten(0, (len(DRAWN), RENDERINGS)),
                "rows": model.text.encode(told)[CONTEXT].half(),
                "captions": torch.tensor([(some * most)[:most] for some in of]),
            },
        )
    return load_file(path)


def train_judge(
    state: Path, model: Any, latents: Tensor, people: Tensor, minutes: float, stop: Stop
) -> bool:
    """Trains the classifier of the drawings, in judge.safetensors; true once it is trained.

    latents: latents that the bundled model drew of the captions, [n, 4, 8, 8]
    people: latents of the drawings, [classes, RENDERINGS, 4, 8, 8]
    """
    if (state / "judge.safetensors").exists():
        return True
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(int(time.time()))
    network = MiniatureClassifier(CLASSES, ("",))
    rgba, last = renderings(RENDERINGS, 2), len(CLASSES) - 1
    some = people[:, :24].flatten(0, 1)
    mixed = (some[torch.randperm(len(some))] + some[torch.randperm(len(some))])[:300] / 2
    z = torch.cat([some, latents[:640], mixed])
    right = torch.cat([torch.arange(last).repeat_interleave(24), torch.full((940,), last)])
    with torch.no_grad():
        z = z + 0.2 * torch.randn(z.shape)
        decoded = torch.cat([(model.decode(part) * 255).byte() for part in z.split(64)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)

    def step(progress: float) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        pick = torch.randint(last, (48,), generator=generator)
        which = torch.randint(RENDERINGS, (48,), generator=generator)
        other = torch.randint(len(decoded), (48,), generator=generator)
        opaque = torch.full((48, 1, SIZE, SIZE), 255, dtype=torch.uint8)
        seen = torch.cat([rgba[pick, which], torch.cat([decoded[other], opaque], 1)])
        logits = network(distort(seen, generator))[0]
        wanted = torch.cat([pick, right[other]])
        loss = F.cross_entropy(logits, wanted, label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item(), "right": (logits.argmax(1) == wanted).float().mean().item()}

    parts = {"network": network, "optimizer": optimizer}
    if not long_run(state / "judge.pt", parts, step, minutes, stop):
        return False
    names = json.dumps({"concepts": CLASSES, "styles": [""]})
    keep(state / "judge.safetensors", network.state_dict(), format="pt", classes=names)
    return True


def train(state: Path, minutes: float, judge_minutes: float, stop: Stop) -> bool:
    """The average of the U-Net, in unet.safetensors; true once it is trained."""
    torch.manual_seed(1)
    model: Any = load_model("miniature-language")
    old, new = prepare(state, model.text, model), prepare_people(state, model)
    if not train_judge(state, model, old["latents"], new["latents"], judge_minutes, stop):
        return False
    generator = torch.Generator().manual_seed(int(time.time()))
    teacher, alphas = model.network, model.scheduler.alphas_cumprod
    student = copy.deepcopy(teacher)
    average, path = Average(student, 0.998), state / "unet.safetensors"
    optimizers, half = Optimizers(student), BATCH // 2

    def step(progress: float) -> dict[str, float]:
        pick, read = picked(old["captions"], half, generator)
        who = torch.randint(len(DRAWN), (half,), generator=generator)
        which = torch.randint(RENDERINGS, (half,), generator=generator)
        told = new["captions"][
            who, torch.randint(new["captions"].shape[1], (half,), generator=generator)
        ]
        some = new["rows"][told]
        missing = torch.rand(half, 1, generator=generator) * 2 * MISSING - MISSING
        some[torch.rand(some.shape[:2], generator=generator) < missing] = 0
        rows = torch.cat([old["rows"][read], some])
        rows[torch.rand(BATCH, generator=generator) < SILENT] = old["rows"][0]
        context = jittered(rows.float(), generator)
        clean = torch.cat([old["latents"][pick], new["latents"][who, which]])
        t = torch.randint(len(alphas), (BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = model.scheduler.add_noise(clean, noise, t)
        wanted = noise.clone()
        with torch.no_grad():
            wanted[:half] = teacher(noisy[:half], t[:half], context[:half]).sample
        snr = (alphas / (1 - alphas))[t].view(-1, 1, 1, 1)
        weight = (snr.clamp(max=5) / snr).clamp(max=5) + 0.2
        errors = weight * (student(noisy, t, context).sample - wanted).square()
        optimizers.step(errors.mean(), RATE, progress)
        average.update()
        kept, learnt = errors.detach().split(half)
        return {"kept": kept.mean().item(), "learnt": learnt.mean().item()}

    parts = {"student": student, "optimizers": optimizers, "average": average}
    done = long_run(state / "unet.pt", parts, step, minutes, stop)
    keep(path, average.state_dict()["values"])
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--minutes", type=float, default=17)
    parser.add_argument("--judge-minutes", type=float, default=3)
    parser.add_argument("--sheet", type=Path, help="only write a picture of the drawings, and end")
    arguments = parser.parse_args()
    if arguments.sheet:
        drawn = renderings(4, 3)[:, :4].flatten(0, 1)
        sheet = contact_sheet(over(drawn, torch.Generator().manual_seed(1)), 8)
        sheet.save(arguments.sheet)
        return
    state: Path = arguments.state
    state.mkdir(parents=True, exist_ok=True)
    train(state, arguments.minutes, arguments.judge_minutes, Stop())
    export(state, "miniature-language", state / "people.safetensors")


if __name__ == "__main__":
    main()
