"""Letters for pictures: DejaVu Sans, and for what it lacks a font of this machine that has it.

What no font has is transcribed, so that a picture never shows empty boxes in place of a word.
"""

import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageDraw, ImageFont

BASE = "DejaVu Sans"  # comes with matplotlib
# Scripts that may be broken between any two letters: kana, Chinese, Hangul, full-width forms.
WIDE = "\u3000-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"


# ---------------------------------------------------------------- which font has what


def drawable(path: str, characters: Iterable[str]) -> frozenset[str]:
    """Those of the characters that the font has an outline for; none if it cannot be read."""
    try:
        font = FT2Font(path)
        if not font.scalable:  # coloured bitmaps have one size only
            return frozenset()
        known = [c for c in characters if font.get_char_index(ord(c))]
        # Coloured fonts may keep their outlines elsewhere, and have nothing that we could draw.
        return frozenset(c for c in known if c.isspace() or any(font.load_char(ord(c)).bbox))
    except (OSError, RuntimeError):
        return frozenset()


@lru_cache(maxsize=16)
def fonts_for(characters: frozenset[str]) -> dict[str, frozenset[str]]:
    """Font file -> the characters that it is to draw: DejaVu Sans, then as few as it takes.

    What no font of this machine has is in none, and a warning says so.
    """
    base = str(findfont(BASE))
    found = {base: drawable(base, characters)}
    missing = characters - found[base]
    others: dict[str, frozenset[str]] = {}
    if missing:
        for path in sorted(filter(_honest, findSystemFonts()), key=_plain_first):
            others[path] = drawable(path, missing)
            if others[path] == missing:
                break
    while missing and others:
        best = max(others, key=lambda path: len(others[path] & missing))
        if not others[best] & missing:
            break
        found[best] = others[best] & missing
        missing -= found[best]
    if told := [c for c in sorted(missing) if _spelled(c).strip()]:
        warnings.warn(
            f"no font of this machine has {' '.join(told)}: pictures show names in "
            "their place until one is installed, such as Noto Sans CJK or Noto Emoji",
            stacklevel=2,
        )
    return found


def _honest(path: str) -> bool:
    """Whether a font has no picture of a box for every character that there is."""
    return "LastResort" not in path


def _plain_first(path: str) -> tuple[bool, bool, str]:
    name = Path(path).stem
    return "Sans" not in name, "Regular" not in name, name


def transcribed(text: str, missing: Iterable[str]) -> str:
    """The text with the sound, name or number of every character that is missing."""
    return "".join(_spelled(c) if c in missing else c for c in text)


def _spelled(character: str) -> str:
    name, kind = unicodedata.name(character, ""), unicodedata.category(character)
    if character.isspace():
        return " "
    if kind == "Cf" or "VARIATION SELECTOR" in name:
        return ""
    if name.startswith(("HIRAGANA LETTER", "KATAKANA LETTER", "HANGUL SYLLABLE")):
        return name.split()[-1].lower()
    unnamed = not name or "IDEOGRAPH" in name
    return f"[U+{ord(character):04X}]" if unnamed else f"[{name.lower()}]"


# ---------------------------------------------------------------- letters in figures and in grids


def legible(texts: Sequence[str]) -> list[str]:
    """The texts with what no font of this machine has transcribed."""
    characters = frozenset("".join(texts))
    missing = characters.difference(*fonts_for(characters).values())
    return [transcribed(text, missing) for text in texts]


def letter(figure: Figure) -> None:
    """Gives the texts of a figure, which must be legible, the fonts that they need."""
    texts = figure.findobj(Text)
    base, *others = fonts = fonts_for(frozenset("".join(text.get_text() for text in texts)))
    for path in others:
        if path not in {font.fname for font in fontManager.ttflist}:
            fontManager.addfont(path)  # installed since matplotlib's list was made
    families = [BASE, *(FontProperties(fname=path).get_name() for path in others)]
    for text in texts:
        if not fonts[base].issuperset(text.get_text()):
            text.set_fontfamily(families)


class Letters:
    """Lines of text of one size in pixels, drawn with as many fonts as they need.

    texts: what will be written
    """

    def __init__(self, texts: Iterable[str], size: int):
        characters = frozenset("".join(texts))
        fonts = fonts_for(characters)
        self.missing = characters.difference(*fonts.values())
        self.line = int(size * 1.3)  # from one line to the next
        self._base, *_ = opened = [ImageFont.truetype(path, size) for path in fonts]
        self._font = {
            c: font for font, has in zip(opened, fonts.values(), strict=True) for c in has
        }

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """The text cut where its font changes."""
        runs: list[tuple[ImageFont.FreeTypeFont, str]] = []
        for character in text:
            font = self._font.get(character, self._base)
            if runs and runs[-1][0] is font:
                runs[-1] = font, runs[-1][1] + character
            else:
                runs.append((font, character))
        return runs

    def spelled(self, text: str) -> str:
        """The text as it can be drawn."""
        return transcribed(text, self.missing)

    def length(self, text: str) -> float:
        """Pixels."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def write(self, pen: ImageDraw.ImageDraw, x: float, y: float, text: str, anchor: str) -> None:
        """anchor: Pillow's, left, middle or right and ascender or middle: "ma", "rm" and so on"""
        x -= self.length(text) * {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]]
        ascent, descent = self._base.getmetrics()
        y += ascent if anchor[1] == "a" else (ascent - descent) / 2
        for font, run in self._runs(text):
            pen.text((x, y), run, "black", font, anchor="ls")
            x += font.getlength(run)

    def broken(self, text: str, width: int, lines: int = 3) -> list[str]:
        """Text in at most `lines` lines of at most `width` pixels, the rest as an ellipsis."""
        out: list[str] = []
        for gap, piece in _pieces(self.spelled(text)):
            longer = f"{out[-1]}{gap}{piece}" if out else piece
            if out and self.length(longer) <= width:
                out[-1] = longer
            else:
                out.append(piece)
        if len(out) > lines:
            out = [*out[: lines - 1], out[lines - 1] + "…"]
        for k, line in enumerate(out):
            while len(line) > 1 and self.length(line) > width:
                line = line.rstrip("…")[:-1] + "…"
            out[k] = line
        return out


def _pieces(text: str) -> Iterable[tuple[str, str]]:
    """Where a line may be broken: (what stands before a piece on the same line, the piece)."""
    for word in text.split():
        for k, piece in enumerate(re.findall(f"[{WIDE}]|[^{WIDE}]+", word)):
            yield "" if k else " ", piece
