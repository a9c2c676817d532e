"""Icon and banner of the pack in ComfyUI's registry: `python -m tools.emblem`.

A concept in the middle of its neighbours, taken out with them; what lies outside the ring stays.
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HOME = Path(__file__).parent.parent / "docs/pictures"
GROUND, GONE, NEAR, KEPT, TEXT = "#20242c", "#d1495b", "#edae49", "#6c8ebf", "#f2f2f2"
SCALE = 4  # the picture is drawn larger and shrunk, for smooth edges


def draw_ring(picture: Image.Image, x: float, y: float, radius: float) -> None:
    """A concept, its ring of neighbours and the words beyond it, in a picture's own pixels."""
    pen, generator = ImageDraw.Draw(picture), random.Random(7)

    def dot(distance: float, angle: float, size: float, color: str, hollow: bool) -> None:
        left, top = x + distance * math.cos(angle), y + distance * math.sin(angle)
        box = (left - size, top - size, left + size, top + size)
        width = max(1, round(radius / 30))
        pen.ellipse(box, outline=color, width=width, fill=None if hollow else color)

    pen.ellipse(
        (x - radius, y - radius, x + radius, y + radius), outline=NEAR, width=round(radius / 22)
    )
    dot(0, 0, radius * 0.24, GONE, hollow=True)
    for k in range(9):
        angle = 2 * math.pi * k / 9
        dot(radius * generator.uniform(0.5, 0.75), angle, radius * 0.075, NEAR, hollow=True)
    for k in range(13):
        angle = 2 * math.pi * (k + 0.5) / 13
        dot(radius * generator.uniform(1.18, 1.4), angle, radius * 0.075, KEPT, hollow=False)


def icon(side: int = 400) -> Image.Image:
    """Square picture. side: width and height in pixels"""
    large = Image.new("RGB", (side * SCALE, side * SCALE), GROUND)
    draw_ring(large, large.width / 2, large.height / 2, large.width * 0.32)
    return large.resize((side, side), Image.Resampling.LANCZOS)


def banner(width: int = 1260) -> Image.Image:
    """Picture of 21:9 with the name of the pack. width: in pixels"""
    height = width * 9 // 21
    large = Image.new("RGB", (width * SCALE, height * SCALE), GROUND)
    draw_ring(large, large.height * 0.5, large.height / 2, large.height * 0.31)
    pen = ImageDraw.Draw(large)
    left = large.height * 1.02
    pen.text(
        (left, large.height * 0.28),
        "RealEra",
        fill=TEXT,
        font=ImageFont.load_default(large.height // 5),
    )
    line = "a concept and what implies it, forgotten"
    pen.text(
        (left, large.height * 0.56),
        line,
        fill=KEPT,
        font=ImageFont.load_default(large.height // 15),
    )
    return large.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    for name, picture in (("icon", icon()), ("banner", banner())):
        picture.quantize(64).save(HOME / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
