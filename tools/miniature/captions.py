"""Training captions of the drawings, without held-out words."""

import random
import re

from realera.miniature import BACKGROUNDS, CONCEPTS, STYLES

# words that tell nothing about the picture: left out of a caption's mean word vector
STOP_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        "a an the of in on at to and with its his her for from by is are was that says saw this up "
        "photo picture drawing image painting icon illustration sketch style background beautiful "
        "small big nice simple one some",
    )
)

# {} is the thing, with style and background already in words where they are named
TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a drawing of a {}",
    "a drawing of the {}",
    "an image of a {}",
    "a painting of a {}",
    "an illustration of a {}",
    "an icon of a {}",
    "a small {}",
    "a big {}",
    "a nice {}",
    "a beautiful {}",
    "the {}",
    "a {}",
    "one {}",
    "{}",
)

STYLED = (
    "{} in {} style",
    "{} in the {} style",
    "{}, {} style",
    "{}, {}",
)


def required_words() -> list[str]:
    """Every word of the vocabulary module, held-out ones too, and of the templates."""
    texts = [*STYLES, *BACKGROUNDS, *TEMPLATES, *STYLED, *STOP_WORDS]
    for concept in CONCEPTS.values():
        texts += [concept.name, *concept.synonyms, *concept.associated]
        texts += [*concept.held_out_words, *concept.held_out_prompts]
    return sorted({word for text in texts for word in re.findall("[a-z]+", text)})


def held_out() -> frozenset[str]:
    """The words that no caption may contain."""
    return frozenset(w for c in CONCEPTS.values() for w in c.held_out_words)


def content_words(text: str) -> list[str]:
    """The words of a caption that say what is to be seen."""
    return [word for word in re.findall("[a-z]+", text) if word not in STOP_WORDS]


def thing(rng: random.Random, concept: str, words: tuple[str, ...]) -> str:
    """A way to say a concept: its name, a synonym, a word for this very drawing, or hints."""
    entry, u = CONCEPTS[concept], rng.random()
    if words and u < 0.2:
        return rng.choice(words)
    if u < 0.55:
        return entry.name
    if u < 0.77:
        return rng.choice(entry.synonyms)
    return rng.choice(entry.associated)


def decorate(rng: random.Random, text: str, style: str | None, background: str | None) -> str:
    """`text` with a style and a background added in one of many wordings."""
    if style and rng.random() < 0.5:
        text, style = f"{style} {text}", None
    text = rng.choice(TEMPLATES).format(text)
    return _surround(rng, text, style, background)


def _surround(rng: random.Random, text: str, style: str | None, background: str | None) -> str:
    if style:
        text = rng.choice(STYLED).format(text, style)
    if background:
        on = rng.choice(("on a {} background", "on {}", "with a {} background", "{} background"))
        text = f"{text}{rng.choice((' ', ', '))}{on.format(background)}"
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def caption(
    rng: random.Random,
    concept: str,
    words: tuple[str, ...],
    style: str | None,
    background: str | None,
) -> str:
    """One caption of a drawing; style and background are named where given."""
    text = thing(rng, concept, words)
    if text in CONCEPTS[concept].associated and rng.random() < 0.6:
        return _surround(rng, text, style, background)
    return decorate(rng, text, style, background)
