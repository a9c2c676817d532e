"""Every parameter of the method, checked where it is given.

Apart from the code that uses them, and without torch: the command line and the nodes list them
before anything slow is imported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

Source = Literal["isotropic", "bank", "vocabulary"]
# The models that ship with the project: the miniature, and its transformer sibling, which reads by
# CLIP alone or by T5 as well.
BUNDLED = ("miniature", "miniature-dit", "miniature-dit-t5")
SOURCES: tuple[Source, ...] = ("isotropic", "bank", "vocabulary")
S1: dict[Source, float] = {"isotropic": 0.7, "bank": 0.7, "vocabulary": 1.0}
S2: dict[Source, float] = {"isotropic": 0.3, "bank": 0.3, "vocabulary": 0.55}
MOST_AWAY = 2.0
# Of the LoRA file: the share of |T - I| that it may leave out. Its images are then 0.05 % RMS from
# the whole edit's, at a fifth of the rank of 0.001 (`benchmarks/results/tolerance.json`).
TOLERANCE = 0.01
USED_BY: dict[str, tuple[Source, ...]] = {
    "words": ("vocabulary",),
    "shared_noise": ("isotropic",),  # a bank prompt is one v for the whole span already
    "d1": ("isotropic", "bank"),
    "d1_anchor": ("isotropic", "bank"),
    "d2": ("isotropic", "bank"),
}


@dataclass(frozen=True)
class Range:
    """The numbers that a parameter may have; infinity and NaN never are among them.

    least, most: the ends, which belong to it unless open
    whole: whether integers alone are meant
    """

    least: float = -math.inf
    most: float = math.inf
    open: bool = False
    whole: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        left, right = "()" if self.open else "[]"
        if self.most < math.inf:
            return f"{kind} in {left}{self.least:g}, {self.most:g}{right}"
        if self.least > -math.inf:
            return f"{kind}, {'larger than' if self.open else 'at least'} {self.least:g}"
        return kind

    def check(self, name: str, value: Any) -> Any:
        """The number as an int or a float. Raises ValueError, with the name, for anything else."""
        fits = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        try:
            if fits:
                number = int(value) if self.whole else float(value)
                within = self.least <= number <= self.most
                at_end = self.open and number in (self.least, self.most)
                if math.isfinite(number) and within and not at_end:
                    return number
        except OverflowError:  # an integer that no float holds
            pass
        raise ValueError(f"{name} = {value!r}: it must be {self}")


COUNT = Range(0, whole=True)
POSITIVE_COUNT = Range(1, whole=True)
SEED = Range(0, 2**64 - 1, whole=True)
POSITIVE = Range(0, open=True)
COSINE = Range(-1, 1)
STRENGTHS = Range()
TOLERANCES = Range(0, 1, open=True)


def texts(name: str, value: object) -> tuple[str, ...]:
    """The texts of a tuple or list. Raises ValueError for a single text, which would be taken
    letter by letter, and for a text that is empty."""
    if isinstance(value, str):
        raise ValueError(
            f"{name} = {value!r} is one text where a tuple of texts is due: with a comma, "
            f"{name}=({value!r},), it is one"
        )
    if not isinstance(value, tuple | list):
        raise ValueError(f"{name} = {value!r}: it must be a tuple of texts, as {name}=('a', 'b')")
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{name} = {value!r} holds {text!r} where a text is due: leave it out or write "
                "words"
            )
    return tuple(value)


def check_fields(given: Any, ranges: Mapping[str, Range]) -> None:
    """Checks every field of a dataclass by its type, and the numbers by their ranges.

    given: an instance, in which lists become tuples and NumPy's numbers Python's
    ranges: field -> what it may be. Raises ValueError with field, value and what would work.
    """
    for field in fields(given):
        name, value = field.name, getattr(given, field.name)
        if field.type == tuple[str, ...]:
            checked: Any = texts(name, value)
        elif field.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} = {value!r}: it must be True or False")
            continue
        elif name not in ranges or (value is None and field.default is None):  # None: automatic
            continue
        else:
            checked = ranges[name].check(name, value)
        object.__setattr__(given, name, checked)


RANGES = {
    **dict.fromkeys(("neighbors", "beyond"), COUNT),
    **dict.fromkeys(("s1", "s2", "beyond_s2"), COSINE),
    **dict.fromkeys(("d1", "d1_anchor", "d2"), POSITIVE),
    "lambda1": Range(0),
    "lambda2": POSITIVE,
    "away": Range(0, MOST_AWAY),
    "pair_weight": POSITIVE,
    "bank_limit": Range(-1),
    **dict.fromkeys(("seed", "beyond_seed"), SEED),
}
TRAINING_RANGES = {
    **dict.fromkeys(("steps", "rank", "batch", "save_every"), POSITIVE_COUNT),
    "learning_rate": POSITIVE,
    "seed": SEED,
    "adversarial": COUNT,
}


@dataclass(frozen=True)
class Settings:
    """Every parameter of Alg. 1, l. 1-24; None is automatic.

    source: where neighbours come from: random directions (the paper's), steps towards everyday
        prompts, or words
    neighbors, beyond: M and N, draws a prompt; of the vocabulary, words a concept
    s1, s2: a neighbour's cosine with e lies in [s2, s1] (Eq. 4), by source unless given
    beyond_s2: a beyond point's lies below this, below s2 unless given
    d1, d1_anchor, d2: radii (Eq. 3), in units of the context; unless given, the distances at which
        the expected cosine falls to s2 and to 0, and d1 / 10 around the anchor
    shared_noise: one v for all rows of a span instead of one a row
    words: words, phrases and prompts to search beside the tokenizer's own vocabulary. Each takes
        the concept's place in its first template, so that all are compared alike; where that is
        "{}", a prompt stands as it is
    exclude: words that are not to be erased; preserve: prompts that must keep their meaning
    lambda1, lambda2: weights of Eq. 7; λ2 in units of the system's mean diagonal
    away: how far the bank's prompts go away from the concept and, where words are mined, from the
        mean of its ring, by how much they have of either (`closed_form.solve`): 0, nowhere; 1, what
        they have of it is made the bank's mean; more: beyond that. For the words that draw a
        concept and lie in no ring around it
    pair_weight: what a row of an unperturbed pair, or of a prompt to preserve, counts, where a
        drawn row counts 1
    bank: keep what everyday prompts mean; bank_limit: leave out those whose centred cosine with a
        concept is at least this
    seed: of the neighbours; beyond_seed: of the beyond points, which go on with the neighbours'
        draws unless given

    Raises ValueError for a value of another type or out of its range, for an option that the source
    does not use and for a range that no draw can satisfy.
    """

    source: Source = "vocabulary"
    neighbors: int = 64
    beyond: int = 16
    s1: float | None = None
    s2: float | None = None
    beyond_s2: float | None = None
    d1: float | None = None
    d1_anchor: float | None = None
    d2: float | None = None
    shared_noise: bool = False
    words: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    preserve: tuple[str, ...] = ()
    # The paper's λ1 is 0.1, of a Pre without a bank. λ2 keeps T from reaching exactness through
    # directions that no prompt uses: at 1e-4 mined words leave 6 % of what implies a concept and
    # move others as much, at 0.1 none.
    lambda1: float = 1.0
    lambda2: float = 0.1
    away: float = 1.6
    # Beside the bank T e = e* then holds to 2-6 % of |e - e*| for M = 0 to 16 (miniature).
    pair_weight: float = 100.0
    bank: bool = True
    bank_limit: float = 0.55
    seed: int = 0
    beyond_seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, RANGES)
        if self.source not in SOURCES:
            raise ValueError(f"source {self.source!r} is none of {', '.join(SOURCES)}")
        for name, users in USED_BY.items():
            value = getattr(self, name)
            if (
                self.source not in users
                and value is not None
                and value is not False
                and value != ()
            ):
                shown = ", ".join(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"{name} = {shown}: source {self.source!r} does not use it; leave it out, or "
                    f"choose {' or '.join(users)}"
                )
        (s2, s1), source = self.cosines, self.source
        if not -1.0 <= s2 < s1 <= 1.0:
            raise ValueError(
                f"S2 = {s2} and S1 = {s1}: a neighbour's cosine lies between them, so S2 must be "
                f"smaller; S2 = {S2[source]} and S1 = {S1[source]} are the defaults of {source!r}"
            )
        if self.farthest > s2:
            raise ValueError(
                f"beyond points below S2 = {self.farthest} and neighbours from S2 = {s2} on: what "
                "lies between would be erased and preserved; choose the beyond points' S2 at most "
                "as large, or leave it auto"
            )

    @property
    def cosines(self) -> tuple[float, float]:
        """S2 and S1, resolved."""
        s1 = S1[self.source] if self.s1 is None else self.s1
        s2 = S2[self.source] if self.s2 is None else self.s2
        return s2, s1

    @property
    def farthest(self) -> float:
        """The cosine below which beyond points lie, resolved."""
        return self.cosines[0] if self.beyond_s2 is None else self.beyond_s2


@dataclass(frozen=True)
class Training:
    """How the LoRA is trained; the paper's own values are steps 200 and learning rate 1e-5.

    rank: of every projection's LoRA; batch: prompts a step; save_every: steps between two states;
    gradient_checkpointing: less memory and up to half more time, the same LoRA but for rounding
    adversarial: contexts that are sought between the steps, by gradient, to bring the concept back,
        and then aligned; 0: none, as in the paper
    """

    steps: int = 200
    rank: int = 4
    learning_rate: float = 1e-4
    batch: int = 4
    seed: int = 0
    save_every: int = 25
    gradient_checkpointing: bool = False
    adversarial: int = 0

    def __post_init__(self) -> None:
        check_fields(self, TRAINING_RANGES)
