"""Words in plots are readable, with and without a font for their characters."""

import warnings

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from realera.report.fonts import break_lines, drawable, fonts_for, renderable, width_of
from realera.report.plots import grid, scope_picture
from realera.report.scope import WordEffect

WHITE = torch.ones(3, 8, 8)
RED = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8)


def font(path, characters, inked=True):
    """A font that draws each of the characters as a black square, or as nothing."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    empty = TTGlyphPen(None).glyph()
    names = {ord(c): f"u{ord(c):X}" for c in characters}
    build = FontBuilder(1000, isTTF=True)
    build.setupGlyphOrder([".notdef", *names.values()])
    build.setupCharacterMap(names)
    square = pen.glyph() if inked else empty
    build.setupGlyf({".notdef": empty, **dict.fromkeys(names.values(), square)})
    build.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    build.setupHorizontalHeader(ascent=900, descent=-100)
    build.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    build.setupOS2()
    build.setupPost()
    build.save(path)
    return str(path)


@pytest.fixture
def machine(monkeypatch):
    """Sets the fonts that the machine has beside matplotlib's own."""
    listed = list(font_manager.fontManager.ttflist)

    def fonts(*paths):
        fonts_for.cache_clear()
        monkeypatch.setattr("realera.report.fonts.findSystemFonts", lambda: list(paths))

    yield fonts
    fonts_for.cache_clear()
    font_manager.fontManager.ttflist[:] = listed


def ink(text):
    """Area of the text's dark pixels in a grid, in squares as high as the font, which is 40."""
    named, bare = (grid([[WHITE]], [name], size=400).convert("L").tobytes() for name in (text, ""))
    return (sum(p < 128 for p in named) - sum(p < 128 for p in bare)) / 40**2


def test_latin_needs_no_other_font(machine):
    machine("/nowhere/never-looked-at.ttf")
    (only,) = fonts_for(frozenset("a photo of the café → λ…"))
    assert "DejaVuSans" in only


def test_letters_come_from_a_font_of_the_machine_that_has_them(machine, tmp_path):
    cat = font(tmp_path / "Cats.ttf", "猫狐")
    both = font(tmp_path / "Both.ttf", "猫狗")
    fox = font(tmp_path / "Fox.ttf", "\U0001f98a")
    broken = tmp_path / "Broken.ttf"
    broken.write_bytes(b"no font")
    machine(str(broken), cat, both, fox)
    _, one = fonts_for(frozenset("a 猫狗"))
    assert one == both
    fonts = fonts_for(frozenset("猫狗\U0001f98a"))
    assert list(fonts)[1:] == [both, fox] and fonts[fox] == {"\U0001f98a"}
    assert renderable(["a 猫", "狗\U0001f98a"]) == ["a 猫", "狗\U0001f98a"]
    assert ink("猫狗") / 0.9**2 == pytest.approx(2, abs=0.2)


def test_a_font_with_nothing_to_show_for_a_letter_is_not_taken(machine, tmp_path):
    empty = font(tmp_path / "Empty.ttf", "猫", inked=False)
    last = font(tmp_path / "LastResort.ttf", "猫")
    assert not drawable(empty, "猫") and drawable(last, "猫")
    machine(empty, last)
    with pytest.warns(UserWarning, match="no installed font has 猫"):
        assert renderable(["猫"]) == ["[U+732B]"]


def test_without_a_font_words_are_transcribed(machine):
    machine()
    words = {
        "ネコ": "neko",
        "ねこ": "neko",
        "고양이": "goyangi",
        "猫": "[U+732B]",
        "a \U0001f98a\ufe0f photo": "a [fox face] photo",
        "x\u3000y": "x y",
        "plane": "plane",
    }
    with pytest.warns(UserWarning, match="has こ ね コ ネ 猫 고 양 이 \U0001f98a: .*Noto Sans CJK"):
        assert dict(zip(words, renderable([*words]), strict=True)) == words


@pytest.mark.parametrize("equipped", [True, False])
def test_no_picture_warns_of_a_missing_glyph_or_shows_the_same_for_two_words(
    machine, tmp_path, equipped
):
    machine(*[font(tmp_path / "Cats.ttf", "猫")] * equipped)

    def effects(word):
        return [WordEffect(word, "airplane", 0.5, 0.5, 0.5, word)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no installed font")
        for show in (
            lambda word: scope_picture(effects(word)),
            lambda word: grid([[RED]], [word], ["a"]),
            lambda word: grid([[RED]], ["a"], [word]),
        ):
            assert show("猫").tobytes() != show("狗").tobytes()
            assert show("plane").tobytes() == show("plane").tobytes()


def test_a_dollar_is_no_formula():
    words = ["$x$", "$", "cash $ and $ more", "a_b^c"]
    assert (
        scope_picture([WordEffect(word, "airplane", 0.5, 0.5, 0.5, word) for word in words]).width
        > 300
    )


def test_a_line_without_spaces_breaks_between_letters(machine, tmp_path):
    text = "一只猫坐在机场的跑道上看飞机"
    machine(font(tmp_path / "All.ttf", text))
    width = width_of([text, "a photo of the airplane…"], 20)
    lines = break_lines(text, 100, width)
    assert len(lines) == 3 and "".join(lines) == text
    assert all(width(line) <= 100 for line in lines)
    assert break_lines(f"a {text[:4]}", 100, width) == [f"a {text[:4]}"]
    assert break_lines("a photo of the airplane", 130, width) == ["a photo of", "the airplane"]
    assert break_lines(text * 2, 100, width)[-1].endswith("…")
