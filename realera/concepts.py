"""What to forget and what to draw instead: concepts, anchors and the prompts that name them.

Text only: nothing here knows a tokenizer or a tensor.
"""

import csv
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .settings import texts

TEMPLATES = (
    "a photo of the {}",
    "a photo of a {}",
    "a picture of {}",
    "an image of the {}",
    "{}",
)
STYLE_TEMPLATES = (
    "an artwork by {}",
    "a painting in the style of {}",
    "a picture in {} style",
    "art by {}",
    "{}",
)
COLUMNS = ("concept", "anchor", "templates", "leave out")  # of a CSV file; the first two are needed
# Letters of scripts that put no space between words: Thai to Khmer, kana, Chinese.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@dataclass(frozen=True)
class Concept:
    """A concept c, the anchor c* drawn in its place, and the prompts that name it.

    Raises ValueError when a name is empty, the anchor is the concept, templates are no tuple of
    texts, or one has not exactly one `{}`.
    """

    name: str
    anchor: str
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", texts("templates", self.templates))
        for part in (self.name, self.anchor):
            if not isinstance(part, str):
                raise ValueError(f"a concept and its anchor are texts, got {part!r}")
        if not self.name.strip() or not self.anchor.strip():
            raise ValueError(
                f"a concept and its anchor need a text each, got {self.name!r} -> {self.anchor!r}"
            )
        if self.name.strip().casefold() == self.anchor.strip().casefold():
            raise ValueError(
                f"the anchor of {self.name!r} is the concept itself: name what to draw instead, "
                "for example 'airplane -> tree'"
            )
        if not self.templates:
            raise ValueError(f"concept {self.name!r} has no template; 'a photo of the {{}}' is one")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(
                    f"template {template!r} needs the concept's place {{}} exactly once, "
                    "as in 'a photo of the {}'"
                )


def holds_name(prompt: str, name: str) -> bool:
    """Whether the prompt holds the name as words of its own ("car", not "carpet").

    Where words have no spaces between them, wherever the name stands.
    """
    prompt, name = unicodedata.normalize("NFC", prompt), unicodedata.normalize("NFC", name.strip())
    prompt, name = prompt.casefold(), name.casefold()
    at = prompt.find(name)
    while at >= 0:
        before, after = prompt[at - 1 : at], prompt[at + len(name) :][:1]
        if not _joined(before, name[:1]) and not _joined(name[-1:], after):
            return True
        at = prompt.find(name, at + 1)
    return False


def _joined(one: str, other: str) -> bool:
    """Whether two neighbours, or an end and nothing, are letters of one word."""
    letter = rf"[^\W{UNSPACED}]"  # of a word that ends where a space is
    return re.match(letter, one) is not None and re.match(letter, other) is not None


def lines(text: str) -> list[str]:
    """The lines of a text that hold something."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_lines(path: str) -> list[str]:
    """The lines of a text file that hold something. Raises ValueError when none does."""
    try:
        found = lines(Path(path).read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no word: write one word, phrase or prompt a line")
    return found


def listed(text: str) -> list[str]:
    """The words of a list, one a line or between commas or semicolons of any script."""
    return lines(re.sub("[,;，、；،]", "\n", text))


def parse_concepts(text: str, templates: Sequence[str] = TEMPLATES) -> tuple[Concept, ...]:
    """Reads `concept -> anchor` lines; blank lines and lines that start with # are skipped.

    Raises ValueError that names the line when one has no arrow, when a concept is named twice or
    is another's anchor, or when there is none.
    """
    templates, concepts = texts("templates", templates), dict[str, Concept]()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, arrow, anchor = (
            part.strip() for part in re.sub("→|=>|－>", "->", line).partition("->")
        )
        if not arrow:
            raise ValueError(
                f"line {number}, {line!r}, has no '->': write 'concept -> anchor', "
                "for example 'airplane -> tree'"
            )
        if name.casefold() in concepts:
            raise ValueError(f"line {number} names {name!r} a second time; keep one anchor for it")
        concepts[name.casefold()] = Concept(name, anchor, templates)
    if not concepts:
        raise ValueError("no concept to erase: write one 'concept -> anchor' a line")
    for concept in concepts.values():
        if concept.anchor.casefold() in concepts:
            raise ValueError(
                f"the anchor {concept.anchor!r} of {concept.name!r} is itself to be erased: choose "
                "another anchor"
            )
    return tuple(concepts.values())


def read_concepts(
    path: str, templates: Sequence[str] = TEMPLATES
) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """The concepts of a CSV file with the columns COLUMNS, and the words to leave out of all rings.

    Templates and words to leave out stand between bars, "a photo of {}|{}"; `templates` where a row
    has none. Raises ValueError that names the line of a wrong column, of a concept that is named
    twice, of an anchor that is another line's concept and of a word to leave out that is one.
    """
    templates = texts("templates", templates)
    found: dict[str, tuple[int, Concept]] = {}  # by folded name: its line and itself
    left_out: dict[str, int] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            head = [name.strip().casefold().replace("_", " ") for name in rows.fieldnames or ()]
            wrong = [name for name in head if name not in COLUMNS]
            if wrong or not {"concept", "anchor"} <= set(head):
                what = f"the column {wrong[0]!r} is unknown" if wrong else "a column is missing"
                raise ValueError(
                    f"{path}, line 1: {what}: the first line names the columns, "
                    f"{', '.join(COLUMNS)}; concept and anchor are needed"
                )
            rows.fieldnames = head
            for row in rows:
                line = rows.line_num
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {line}: it has not the {len(head)} columns of the first "
                        'line: put "quotes" around a text that holds a comma'
                    )
                cells = {name: text.strip() for name, text in row.items()}
                if not any(cells.values()):
                    continue
                own = [text.strip() for text in cells.get("templates", "").split("|")]
                try:
                    some = tuple(filter(None, own)) or templates
                    concept = Concept(cells["concept"], cells["anchor"], some)
                except ValueError as error:
                    raise ValueError(f"{path}, line {line}: {error}") from error
                before = found.setdefault(concept.name.casefold(), (line, concept))
                if before[0] != line:
                    raise ValueError(
                        f"{path}, line {line}: {concept.name!r} stands in line {before[0]} "
                        "already: keep one of the two"
                    )
                for word in filter(None, map(str.strip, cells.get("leave out", "").split("|"))):
                    left_out.setdefault(word, line)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not found:
        raise ValueError(f"{path} holds no concept: write one a line below the columns' names")
    for line, concept in found.values():
        other = found.get(concept.anchor.casefold())
        if other is not None:
            raise ValueError(
                f"{path}, line {line}: the anchor {concept.anchor!r} is itself to be erased in "
                f"line {other[0]}: choose another anchor"
            )
    for word, line in left_out.items():
        for other_line, concept in found.values():
            if holds_name(word, concept.name):
                raise ValueError(
                    f"{path}, line {line}: the word to leave out {word!r} names the concept of "
                    f"line {other_line}: take it from one of the two"
                )
    return tuple(concept for _, concept in found.values()), tuple(left_out)
