"""Fonts for plots: DejaVu Sans, and system fonts for the characters that it lacks.

Characters that no font has are transcribed, so that a plot never shows empty boxes.
"""

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

BASE = "DejaVu Sans"  # comes with matplotlib
# Characters before and after which a line may break: kana, Chinese, Hangul, full-width forms.
WIDE = "\u3000-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"


# ---------------------------------------------------------------- which font has which characters


def drawable(path: str, characters: Iterable[str]) -> frozenset[str]:
    """The characters that the font has an outline for; none if the font cannot be read."""
    try:
        font = FT2Font(path)
        if not font.scalable:  # bitmap fonts have one size only
            return frozenset()
        known = [c for c in characters if font.get_char_index(ord(c))]
        # Colour fonts may have no outlines.
        return frozenset(c for c in known if c.isspace() or any(font.load_char(ord(c)).bbox))
    except (OSError, RuntimeError):
        return frozenset()


@lru_cache(maxsize=16)
def fonts_for(characters: frozenset[str]) -> dict[str, frozenset[str]]:
    """Font file -> characters to draw with it: DejaVu Sans, then as few other fonts as possible.

    Warns about characters that no font has.
    """
    base = str(findfont(BASE))
    found = {base: drawable(base, characters)}
    missing = characters - found[base]
    others: dict[str, frozenset[str]] = {}
    if missing:
        for path in sorted(filter(_has_glyphs, findSystemFonts()), key=_plain_first):
            others[path] = drawable(path, missing)
            if others[path] == missing:
                break
    while missing and others:
        best = max(others, key=lambda path: len(others[path] & missing))
        if not others[best] & missing:
            break
        found[best] = others[best] & missing
        missing -= found[best]
    if shown := [c for c in sorted(missing) if _transcription(c).strip()]:
        warnings.warn(
            f"no installed font has {' '.join(shown)}: plots show the names of the characters; "
            "install a font such as Noto Sans CJK or Noto Emoji",
            stacklevel=2,
        )
    return found


def _has_glyphs(path: str) -> bool:
    """False for LastResort of macOS, which has the same box for every character of a script."""
    return "LastResort" not in path


def _plain_first(path: str) -> tuple[bool, bool, str]:
    name = Path(path).stem
    return "Sans" not in name, "Regular" not in name, name


def _transcription(character: str) -> str:
    name, kind = unicodedata.name(character, ""), unicodedata.category(character)
    if character.isspace():
        return " "
    if kind == "Cf" or "VARIATION SELECTOR" in name:
        return ""
    if name.startswith(("HIRAGANA LETTER", "KATAKANA LETTER", "HANGUL SYLLABLE")):
        return name.split()[-1].lower()
    unnamed = not name or "IDEOGRAPH" in name
    return f"[U+{ord(character):04X}]" if unnamed else f"[{name.lower()}]"


# ---------------------------------------------------------------- texts of figures


def renderable(texts: Sequence[str]) -> list[str]:
    """The texts, with a transcription of the characters that no font has."""
    characters = frozenset("".join(texts))
    missing = characters.difference(*fonts_for(characters).values())
    return ["".join(_transcription(c) if c in missing else c for c in text) for text in texts]


def font_families(texts: Iterable[str]) -> list[str]:
    """Names of the fonts for the texts, in the order of fallback for matplotlib."""
    _, *others = fonts_for(frozenset("".join(texts)))
    for path in others:
        if path not in {font.fname for font in fontManager.ttflist}:
            fontManager.addfont(path)  # installed after matplotlib cached the list
    return [BASE, *(FontProperties(fname=path).get_name() for path in others)]


def assign_fonts(figure: Figure) -> None:
    """Sets the fonts of all texts of a figure, which must be `renderable`."""
    texts = figure.findobj(Text)
    families = font_families(text.get_text() for text in texts)
    for text in texts:
        text.set_fontfamily(families)


def width_of(texts: Iterable[str], size: float) -> Callable[[str], float]:
    """A function from a line of the texts to the width of the line in pixels.

    size: height of the font in pixels
    """
    renderer = FigureCanvasAgg(Figure(dpi=72)).get_renderer()
    font = FontProperties(family=font_families(texts), size=size)
    return lambda line: renderer.get_text_width_height_descent(line, font, ismath=False)[0]


def break_lines(
    text: str, width: float, width_of_line: Callable[[str], float], most: int = 3
) -> list[str]:
    """The text in at most `most` lines of at most `width` pixels; the rest becomes an ellipsis."""
    lines: list[str] = []
    for gap, piece in _pieces(text):
        longer = f"{lines[-1]}{gap}{piece}" if lines else piece
        if lines and width_of_line(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(piece)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + "…"]
    for k, line in enumerate(lines):
        while len(line) > 1 and width_of_line(line) > width:
            line = line.rstrip("…")[:-1] + "…"
        lines[k] = line
    return lines


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """(space in front within a line, piece): the pieces between which a line may break."""
    for word in text.split():
        for k, piece in enumerate(re.findall(f"[{WIDE}]|[^{WIDE}]+", word)):
            yield "" if k else " ", piece
