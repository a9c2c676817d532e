"""What to forget and what to draw instead: concepts, anchors and the prompts that name them.

Text only: nothing here knows a tokenizer or a tensor.
"""

import csv
import re
import unicodedata
import warnings
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
ARROW = "->|→|=>|－>"
COMMAS = "[,;，、；،]"  # of any script
# What no eye sees: soft hyphens, zero-width characters, overrides of the direction. Joiners stay
# where scripts and emoji need them, between characters beyond ASCII.
UNSEEN = (
    r"[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
    r"|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
# Letters of scripts that put no space between words: Thai to Khmer, kana, Chinese.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@dataclass(frozen=True)
class Concept:
    """A concept c, the anchor c* drawn in its place, and the prompts that name it.

    Characters that nobody sees are left out of both names, with a warning. Raises ValueError when a
    name is empty or holds an arrow, the anchor is the concept, templates are no tuple of texts, or
    one has not exactly one `{}`.
    """

    name: str
    anchor: str
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", texts("templates", self.templates))
        for field, given in (("name", self.name), ("anchor", self.anchor)):
            if not isinstance(given, str):
                raise ValueError(f"a concept and its anchor are texts, got {given!r}")
            if re.search(ARROW, given):
                raise ValueError(
                    f"{given!r} holds an arrow: name one concept and one anchor each, in a line or "
                    "an option -c of their own: 'cat -> tree' and 'dog -> flower'"
                )
            seen = re.sub(UNSEEN, "", given)
            if seen != given:
                seen = seen.strip()
                hidden = ", ".join(
                    sorted({f"U+{ord(found):04X}" for found in re.findall(UNSEEN, given)})
                )
                warnings.warn(
                    f"{seen!r} held characters that nobody sees ({hidden}): they are left out",
                    stacklevel=3,
                )
                object.__setattr__(self, field, seen)
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
    return lines(re.sub(COMMAS, "\n", text))


def parse_concepts(text: str, templates: Sequence[str] = TEMPLATES) -> tuple[Concept, ...]:
    """`concepts_in` the lines of a text, where lines that start with # are comments."""
    return concepts_in(
        ["" if line.strip().startswith("#") else line for line in text.splitlines()], templates
    )


def concepts_in(
    written: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> tuple[Concept, ...]:
    """Reads `concept -> anchor` lines; blank ones are skipped, and # is a character like any other.

    Raises ValueError that names the line when one has no arrow or two, when a concept is named
    twice or is another's anchor, or when there is none.
    """
    templates, concepts = texts("templates", templates), dict[str, Concept]()
    for number, line in enumerate(map(str.strip, written), 1):
        if not line:
            continue
        halves = [part.strip() for part in re.split(ARROW, line, maxsplit=1)]
        if len(halves) < 2:
            raise ValueError(
                f"line {number}, {line!r}, has no '->': write 'concept -> anchor', "
                "for example 'airplane -> tree'"
            )
        try:
            concept = Concept(halves[0], halves[1], templates)
        except ValueError as error:
            raise ValueError(f"line {number}, {line!r}: {error}") from error
        if concept.name.casefold() in concepts:
            raise ValueError(
                f"line {number} names {concept.name!r} a second time; keep one anchor for it"
            )
        concepts[concept.name.casefold()] = concept
    if not concepts:
        raise ValueError(
            "no concept to erase: write one 'concept -> anchor' a line; in a text, a line that "
            "starts with # is a comment"
        )
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

    Between its columns stand commas, semicolons or tabs, or what Excel's line "sep=;" names.
    Templates and words to leave out stand between bars, "a photo of {}|{}"; `templates` where a row
    has none. Raises ValueError that names the line of a wrong column, of a concept that is named
    twice, of an anchor that is another line's concept and of a word to leave out that is one.
    """
    templates = texts("templates", templates)
    found: dict[str, tuple[int, Concept]] = {}  # by folded name: its line and itself
    left_out: dict[str, int] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            named = re.fullmatch(r"sep=([,;\t|])\s*", first)
            before_head = 1 if named else 0
            if not named:
                file.seek(0)
            comma = named[1] if named else max(",;\t", key=first.count)
            rows = csv.DictReader(file, delimiter=comma)
            head = [name.strip().casefold().replace("_", " ") for name in rows.fieldnames or ()]
            while head and not head[-1]:  # spreadsheets fill up with empty columns
                head.pop()
            wrong = [name for name in head if name not in COLUMNS]
            if wrong or not {"concept", "anchor"} <= set(head):
                what = f"the column {wrong[0]!r} is unknown" if wrong else "a column is missing"
                raise ValueError(
                    f"{path}, line {before_head + 1}: {what}: the first line names the columns, "
                    f"{', '.join(COLUMNS)}; concept and anchor are needed"
                )
            rows.fieldnames = head
            for row in rows:
                line = rows.line_num + before_head
                if any(row.pop(None, ())) or None in row.values():
                    raise ValueError(
                        f"{path}, line {line}: it has not the {len(head)} columns of the first "
                        f'line: put "quotes" around a text that holds {comma!r}'
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
