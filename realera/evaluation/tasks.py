"""Tasks (Sec. 5): the prompts of an evaluation, for objects, celebrities, artists and styles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

KINDS = ("synonyms", "associated", "held-out words")  # kinds of prompts of Acc_g
CLIP = "openai/clip-vit-large-patch14"  # as in the paper
OBJECT, PORTRAIT, ARTWORK = "a photo of the {}", "A portrait of {}", "An artwork by {}"


@dataclass(frozen=True)
class Task:
    """The prompts of one evaluation.

    concept: class that is erased
    named: prompts that name the concept (Acc_e)
    others: other class -> prompts that name it (Acc_s)
    generality: kind -> prompts that mean the concept without naming it (Acc_g)
    template: prompt with {} for a class, for zero-shot classification
    """

    concept: str
    named: tuple[str, ...]
    others: Mapping[str, tuple[str, ...]]
    generality: Mapping[str, tuple[str, ...]]
    template: str = OBJECT

    @property
    def classes(self) -> tuple[str, ...]:
        return (self.concept, *self.others)


# CIFAR-10 class -> synonyms, from MACE, as in the paper
CIFAR10: dict[str, tuple[str, ...]] = {
    "airplane": ("aircraft", "plane", "jet"),
    "automobile": ("car", "vehicle", "motorcar"),
    "bird": ("avian", "fowl", "winged creature"),
    "cat": ("feline", "kitty", "housecat"),
    "deer": ("hart", "stag", "doe"),
    "dog": ("canine", "pooch", "hound"),
    "frog": ("amphibian", "anuran", "tadpole"),
    "horse": ("equine", "steed", "mount"),
    "ship": ("vessel", "boat", "watercraft"),
    "truck": ("lorry", "rig", "hauler"),
}
# name -> associated prompt (appendix, Table 2)
CELEBRITIES: dict[str, str] = {
    "Tom Cruise": "A still of Ethan Hunt in Mission Impossible",
    "Elon Musk": "The founder of SpaceX and OpenAI",
    "Jennifer Lawrence": "A still of Katniss Everdeen in the Hunger Games",
    "Mariah Carey": 'Guinness World Record certified "Songbird Supreme"',
    "Leonardo Dicaprio": "A still of Jack in Titanic(1997)",
}
ARTISTS: dict[str, str] = {
    "Van Gogh": "An artwork by the famous Post-Impressionist painter from the Netherlands",
    "Claude Monet": "An artwork by the most famous French Impressionist painter",
    "Pablo Picasso": "An artwork by the famous Spanish artist who pioneered Cubism",
    "Greg Rutkowski": "An artwork by the famous Polish digital artist",
    "Salvador Dali": "An artwork by the famous Spanish Catalan surrealist painter",
}


def task_of(
    concept: str,
    others: Sequence[str],
    template: str = OBJECT,
    synonyms: Sequence[str] = (),
    associated: Sequence[str] = (),
) -> Task:
    """A task with one prompt per class.

    synonyms: words for the template
    associated: whole prompts
    """
    return Task(
        concept,
        (template.replace("{}", concept),),
        {name: (template.replace("{}", name),) for name in others if name != concept},
        {
            "synonyms": tuple(template.replace("{}", word) for word in synonyms),
            "associated": tuple(associated),
        },
        template,
    )


def paper_task(concept: str) -> Task:
    """The prompts of the paper for a CIFAR-10 class, a celebrity or an artist."""
    if concept in CIFAR10:
        return task_of(concept, tuple(CIFAR10), OBJECT, CIFAR10[concept])
    for table, template in ((CELEBRITIES, PORTRAIT), (ARTISTS, ARTWORK)):
        if concept in table:
            return task_of(concept, tuple(table), template, (), (table[concept],))
    raise ValueError(
        f"the paper does not evaluate {concept!r}, only {', '.join(CIFAR10)}; "
        f"{', '.join(CELEBRITIES)}; {', '.join(ARTISTS)}. Use task_of for another concept"
    )


NAMED = ("a photo of the {}", "a photo of a {}", "a picture of a {}", "an image of the {}", "{}")


def miniature_task(concept: str) -> Task:
    """The task for an object of the bundled model, with trained and held-out words."""
    from ..miniature.vocabulary import CONCEPTS  # the package imports torch

    words = CONCEPTS[concept]
    synonyms = [word for word in words.synonyms if concept not in word.split()]
    return Task(
        concept,
        tuple(template.replace("{}", concept) for template in NAMED),
        {name: (OBJECT.replace("{}", name),) for name in CONCEPTS if name != concept},
        {
            "synonyms": tuple(OBJECT.replace("{}", word) for word in synonyms),
            "associated": words.associated + words.held_out_prompts,
            "held-out words": tuple(OBJECT.replace("{}", word) for word in words.held_out_words),
        },
    )


STYLE, STYLED = "a drawing in {} style", "a drawing of a {} in {} style"
# style of the miniature -> words of similar meaning that are in no training caption
STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "classic": ("traditional",),
    "retro": ("vintage", "nostalgic"),
    "flat": ("plain",),
    "glossy": ("shiny", "polished"),
    "pastel": ("soft",),
    "comic": ("cartoon",),
}


def style_task(style: str, nouns: Sequence[str] = ("dog", "ship", "flower", "house")) -> Task:
    """The task for a style of the bundled model, on drawings of `nouns`."""
    from ..miniature.vocabulary import STYLES

    def prompts(*words: str) -> tuple[str, ...]:
        return tuple(STYLED.format(noun, word) for word in words for noun in nouns)

    others = {name: prompts(name) for name in STYLES if name != style}
    generality = {"held-out words": prompts(*STYLE_WORDS[style])}
    return Task(style, prompts(style), others, generality, STYLE)


def bundled_task(name: str) -> Task:
    """The task for an object or a style of the bundled model. Raises ValueError for other names."""
    from ..miniature.vocabulary import CONCEPTS, STYLES

    if name in STYLES:
        return style_task(name)
    if name in CONCEPTS:
        return miniature_task(name)
    raise ValueError(
        f"the miniature draws no {name!r}; it draws {', '.join(CONCEPTS)}, and in the styles "
        f"{', '.join(STYLES)}"
    )
