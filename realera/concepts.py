"""Concepts, anchors and the prompt templates that name them, from text or CSV; no tensors."""

import csv
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

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
COLUMNS = ("concept", "anchor", "templates", "leave out")  # of a CSV; the first is needed
ARROW = "->|→|=>|－>"
NO_ANCHOR = "anything but {}"  # stands for an anchor until one is suggested
NAMED = 3  # names that a sentence lists at most
COMMAS = "[,;，、；،]"  # of any script
# Invisible characters: soft hyphens, zero-width characters, direction overrides. Joiners between
# characters beyond ASCII are kept, since scripts and emoji need them.
UNSEEN = (
    r"[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
    r"|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)
# Letters of scripts that put no space between words: Thai to Khmer, kana, Chinese.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


# (name -> templates of the concepts without an anchor, names of all concepts) -> name -> anchor
Suggest = Callable[[Mapping[str, Sequence[str]], Sequence[str]], Mapping[str, str]]


@dataclass(frozen=True)
class Concept:
    """A concept c, the anchor c* drawn in its place, and the prompts that name it.

    Invisible characters are removed from both names, with a warning. Raises ValueError when a name
    is empty or contains an arrow, when the anchor equals the concept, and when the templates are
    not a tuple of texts with one `{}` each.

    name: concept to erase
    anchor: concept to draw instead
    templates: prompts with `{}` for the name; mined words use the first one
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
                    f"{given!r} contains an arrow: write one concept and one anchor per line or "
                    "option -c: 'cat -> tree' and 'dog -> flower'"
                )
            if unseen := sorted({f"U+{ord(found):04X}" for found in re.findall(UNSEEN, given)}):
                seen = re.sub(UNSEEN, "", given).strip()
                warnings.warn(
                    f"invisible characters ({', '.join(unseen)}) were removed from {seen!r}",
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
    """Whether the prompt contains the name as whole words ("car" is not in "carpet").

    In scripts without spaces between words, the name may stand anywhere.
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


def refuse_named(
    names: Sequence[str], exclude: Sequence[str], preserve: Sequence[str] = ()
) -> None:
    """Raises ValueError when a word to leave out or a prompt to preserve names a concept."""
    listed = [("the word to leave out", word) for word in exclude]
    listed += [("the prompt to preserve", prompt) for prompt in preserve]
    for what, prompt in listed:
        for name in names:
            if holds_name(prompt, name):
                raise ValueError(
                    f"{what} {prompt!r} names {name!r}, which is to be erased: remove it "
                    "from the list"
                )


def _joined(one: str, other: str) -> bool:
    """Whether two adjacent characters, of which one may be "", are letters of one word."""
    letter = rf"[^\W{UNSPACED}]"  # in a script with spaces between words
    return re.match(letter, one) is not None and re.match(letter, other) is not None


def first_of(names: Sequence[str]) -> str:
    """The first NAMED names, and how many more there are."""
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    *but_last, last = [*names[:NAMED], *more]
    return " and ".join([", ".join(but_last), last]) if but_last else last


def lines(text: str) -> list[str]:
    """The lines of a text that are not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file that are not blank. Raises ValueError when there is none.

    path: path of the file
    """
    try:
        found = lines(Path(path).read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not found:
        raise ValueError(f"{path} is empty: write one word, phrase or prompt per line")
    return found


def listed(text: str) -> list[str]:
    """The words of a list, one per line or separated by commas or semicolons of any script."""
    return lines(re.sub(COMMAS, "\n", text))


def parse_concepts(text: str, templates: Sequence[str] = TEMPLATES) -> tuple[Concept, ...]:
    """Reads `concept -> anchor` lines; see `concepts_in` for the errors.

    text: lines of concepts; lines that start with # are comments
    templates: prompts with {} for the name; default: `TEMPLATES`
    """
    return concepts_in(without_comments(text), templates)


def without_comments(text: str) -> list[str]:
    """The lines of a text, blank where they start with #."""
    return ["" if line.strip().startswith("#") else line for line in text.splitlines()]


def concepts_in(
    written: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> tuple[Concept, ...]:
    """Reads `concept -> anchor` lines. Blank lines are skipped; # is an ordinary character.

    Raises ValueError with the number of the line when it does not have exactly one arrow, when a
    concept is named twice or is the anchor of another, or when there is no concept.
    """
    templates, found = texts("templates", templates), list[tuple[int, Concept]]()
    for number, line in enumerate(map(str.strip, written), 1):
        if not line:
            continue
        name, *anchor = re.split(ARROW, line, maxsplit=1)
        if not anchor:
            raise ValueError(
                f"line {number}, {line!r}, has no '->': write 'concept -> anchor', "
                "for example 'airplane -> tree'"
            )
        try:
            found.append((number, Concept(name.strip(), anchor[0].strip(), templates)))
        except ValueError as error:
            raise ValueError(f"line {number}, {line!r}: {error}") from error
    if not found:
        raise ValueError(
            "no concept to erase: write 'concept -> anchor', one per line; in a text, a line that "
            "starts with # is a comment"
        )
    return _refuse_clashes(found)


def names_without_anchor(written: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The lines that name a concept and no anchor.

    Raises ValueError as `concepts_in`, except for these lines, and for a line with another arrow.
    """
    for number, line in enumerate(written, 1):
        if ">" in line and not re.search(ARROW, line):
            raise ValueError(
                f"line {number}, {line.strip()!r}, has no '->': write 'concept -> anchor', or the "
                "concept alone, which gets a suggested anchor"
            )
    names = [line.strip() for line in written if line.strip() and not re.search(ARROW, line)]
    concepts_in(with_anchors(written, {name: NO_ANCHOR.format(name) for name in names}), templates)
    return names


def names_in(written: Sequence[str]) -> list[str]:
    """The names of the concepts in lines `concept -> anchor` or `concept`."""
    return [re.split(ARROW, line)[0].strip() for line in written if line.strip()]


def with_anchors(written: Sequence[str], anchors: Mapping[str, str]) -> list[str]:
    """Lines as `concepts_in` reads them, from lines that may name a concept alone.

    anchors: concept -> anchor
    """
    return [
        f"{line.strip()} -> {anchors[line.strip()]}" if line.strip() in anchors else line
        for line in written
    ]


def _refuse_clashes(found: Sequence[tuple[int, Concept]]) -> tuple[Concept, ...]:
    """The concepts, of which none is named twice or is the anchor of another.

    found: line and concept
    """
    line_of: dict[str, int] = {}
    for line, concept in found:
        first = line_of.setdefault(concept.name.casefold(), line)
        if first != line:
            raise ValueError(
                f"line {line}: {concept.name!r} is in line {first} already: keep one of the two"
            )
    for line, concept in found:
        if other := line_of.get(concept.anchor.casefold()):
            raise ValueError(
                f"line {line}: the anchor {concept.anchor!r} of {concept.name!r} is itself to be "
                f"erased in line {other}: choose another anchor"
            )
    return tuple(concept for _, concept in found)


def read_concepts(
    path: str,
    templates: Sequence[str] = TEMPLATES,
    suggest: Suggest | None = None,
) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    """The concepts of a CSV file with the columns COLUMNS, and the words to leave out of all rings.

    Columns are separated by commas, semicolons or tabs, or as Excel's line "sep=;" says; templates
    and words to leave out within a cell by bars, "a photo of {}|{}".

    templates: templates of rows that have none
    suggest: callback that gives an anchor to the rows that have none; None: every row needs one

    Raises ValueError with the line of an unknown column, of a concept that is named twice, of an
    anchor that is to be erased and of a word to leave out that names a concept, before `suggest` is
    called.
    """
    templates = texts("templates", templates)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return _read_csv(file, templates, suggest)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def _read_csv(
    file: TextIO,
    templates: tuple[str, ...],
    suggest: Suggest | None,
) -> tuple[tuple[Concept, ...], tuple[str, ...]]:
    first = file.readline()
    named = re.fullmatch(r"sep=([,;\t|])\s*", first)
    if not named:
        file.seek(0)
    separator = named[1] if named else max(",;\t", key=first.count)
    rows, skipped = csv.DictReader(file, delimiter=separator), 1 if named else 0
    head = [name.strip().casefold().replace("_", " ") for name in rows.fieldnames or ()]
    while head and not head[-1]:  # spreadsheets add empty columns
        head.pop()
    wrong = [name for name in head if name not in COLUMNS]
    if wrong or "concept" not in head:
        what = f"the column {wrong[0]!r} is unknown" if wrong else "the column 'concept' is missing"
        raise ValueError(
            f"line {skipped + 1}: {what}: the first line names the columns, {', '.join(COLUMNS)}"
        )
    rows.fieldnames = head
    found: list[tuple[int, Concept]] = []
    missing: dict[str, tuple[str, ...]] = {}  # name -> templates of concepts without an anchor
    left_out: dict[str, int] = {}  # word -> line
    for row in rows:
        line = rows.line_num + skipped
        if any(row.pop(None, ())) or None in row.values():
            raise ValueError(
                f"line {line}: it does not have the {len(head)} columns of the first line: put "
                f'"quotes" around a text that contains {separator!r}'
            )
        if not any(text.strip() for text in row.values()):
            continue
        try:
            of_row = tuple(lines(row.get("templates", "").replace("|", "\n"))) or templates
            name, anchor = row["concept"].strip(), row.get("anchor", "").strip()
            unnamed = bool(suggest and name and not anchor)
            concept = Concept(name, NO_ANCHOR.format(name) if unnamed else anchor, of_row)
            found.append((line, concept))
            if unnamed:
                missing[concept.name] = of_row
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
        for word in lines(row.get("leave out", "").replace("|", "\n")):
            left_out.setdefault(word, line)
    if not found:
        raise ValueError(f"line {skipped + 1}: no concept follows: write one per line")
    concepts = _refuse_clashes(found)
    for word, line in left_out.items():
        for other, concept in found:
            if holds_name(word, concept.name):
                raise ValueError(
                    f"line {line}: the word to leave out {word!r} names the concept of line "
                    f"{other}: take it from one of the two"
                )
    if suggest and missing:
        anchors = suggest(missing, [concept.name for concept in concepts])
        concepts = _refuse_clashes(
            [(line, replace(c, anchor=anchors.get(c.name, c.anchor))) for line, c in found]
        )
    return concepts, tuple(left_out)
