"""Every parameter of the method, checked where it is given.

Without torch, so that the command line and the nodes list them before anything slow is imported.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

Source = Literal["isotropic", "bank", "vocabulary"]
# The models that ship with the project: the miniature, and its transformer sibling, which reads by
# CLIP alone or by T5 as well.
BUNDLED = ("miniature", "miniature-dit", "miniature-dit-t5")
SOURCES: tuple[Source, ...] = ("isotropic", "bank", "vocabulary")
NOISE: tuple[Source, ...] = ("isotropic", "bank")  # those that take random steps
S1: dict[Source, float] = {"isotropic": 0.7, "bank": 0.7, "vocabulary": 1.0}
S2: dict[Source, float] = {"isotropic": 0.3, "bank": 0.3, "vocabulary": 0.55}
MAX_SUPPRESSION = 2.0
# Of the LoRA file: the share of |T - I| that it may leave out. Its images are then 0.05 % RMS from
# the whole edit's, at a fifth of the rank of 0.001 (`benchmarks/results/tolerance.json`).
TOLERANCE = 0.01


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


def option(
    default: Any, allowed: Range | None = None, sources: tuple[Source, ...] = SOURCES
) -> Any:
    """A field of a dataclass that `check_fields` checks.

    allowed: range of a number, None for texts and for True or False
    sources: sources of neighbours that use the parameter
    """
    return field(default=default, metadata={"allowed": allowed, "sources": sources})


def check_fields(given: Any) -> None:
    """Checks every field of a dataclass by its type, and the numbers by their ranges.

    given: an instance, in which lists become tuples and NumPy's numbers Python's
    Raises ValueError with field, value and what would work.
    """
    for parameter in fields(given):
        name, allowed = parameter.name, parameter.metadata.get("allowed")
        value = getattr(given, name)
        if parameter.type == tuple[str, ...]:
            checked: Any = texts(name, value)
        elif parameter.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} = {value!r}: it must be True or False")
            continue
        elif allowed is None or (value is None and parameter.default is None):  # None: automatic
            continue
        else:
            checked = allowed.check(name, value)
        object.__setattr__(given, name, checked)


def refuse_unused(given: Any, source: Source) -> None:
    """Raises ValueError for a parameter that is given and that the source does not use."""
    for parameter in fields(given):
        sources, value = parameter.metadata["sources"], getattr(given, parameter.name)
        if source not in sources and value != parameter.default:
            shown = ", ".join(value) if isinstance(value, tuple) else value
            raise ValueError(
                f"{parameter.name} = {shown}: source {source!r} does not use it; leave it out, or "
                f"choose {' or '.join(sources)}"
            )


@dataclass(frozen=True)
class NeighborSettings:
    """Parameters of Neighbor Sampler (Sec. 4.1; Alg. 1, l. 4-12); None is automatic.

    source: where neighbours come from: random directions (the paper's), steps towards everyday
        prompts, or words of the vocabulary
    neighbors: M, draws for each prompt; of the vocabulary, words for each concept
    s1, s2: largest and smallest cosine of a neighbour with e (Eq. 4), by source unless given
    d1: largest step from e (Eq. 3), in units of the context; unless given, the distance at which
        the expected cosine falls to s2
    d1_anchor: radius of the ball around e* that neighbours are mapped into, d1 / 10 unless given
    shared_noise: one v for all rows of a span instead of one for each row
    words: words, phrases and prompts to search beside the tokenizer's own vocabulary. Each takes
        the concept's place in its first template, so that all are compared alike; where that is
        "{}", a prompt stands as it is
    exclude: words that are not erased but preserved, in every template of the concepts
    seed: seed of the draws

    Raises ValueError for a value of another type or out of its range, for a parameter that the
    source does not use and for cosines that no draw can satisfy.
    """

    source: Source = option("vocabulary")
    neighbors: int = option(64, COUNT)
    s1: float | None = option(None, COSINE)
    s2: float | None = option(None, COSINE)
    d1: float | None = option(None, POSITIVE, NOISE)
    d1_anchor: float | None = option(None, POSITIVE, NOISE)
    # A bank prompt is one v for the whole span already.
    shared_noise: bool = option(False, sources=("isotropic",))
    words: tuple[str, ...] = option((), sources=("vocabulary",))
    exclude: tuple[str, ...] = option(())
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.source not in SOURCES:
            raise ValueError(f"source {self.source!r} is none of {', '.join(SOURCES)}")
        refuse_unused(self, self.source)
        (s2, s1), source = self.cosines, self.source
        if not -1.0 <= s2 < s1 <= 1.0:
            raise ValueError(
                f"S2 = {s2} and S1 = {s1}: a neighbour's cosine lies between them, so S2 must be "
                f"smaller; S2 = {S2[source]} and S1 = {S1[source]} are the defaults of {source!r}"
            )

    @property
    def cosines(self) -> tuple[float, float]:
        """S2 and S1, resolved."""
        s1 = S1[self.source] if self.s1 is None else self.s1
        s2 = S2[self.source] if self.s2 is None else self.s2
        return s2, s1


@dataclass(frozen=True)
class BeyondSettings:
    """Parameters of Beyond Sampler (Sec. 4.2; Alg. 1, l. 13-22); None is automatic.

    beyond: N, draws for each prompt; of the vocabulary, words for each concept
    beyond_s2: cosine with e below which beyond points lie, the neighbours' s2 unless given
    d2: largest step from e (Eq. 3), in units of the context; unless given, the distance at which
        the expected cosine falls to 0
    preserve: prompts that keep their outputs in every row
    beyond_seed: seed of the draws, derived from the neighbours' unless given

    Raises ValueError for a value of another type or out of its range.
    """

    beyond: int = option(16, COUNT)
    beyond_s2: float | None = option(None, COSINE)
    d2: float | None = option(None, POSITIVE, NOISE)
    preserve: tuple[str, ...] = option(())
    beyond_seed: int | None = option(None, SEED)

    def __post_init__(self) -> None:
        check_fields(self)

    def farthest(self, neighbor: NeighborSettings) -> float:
        """The cosine below which beyond points lie, resolved.

        Raises ValueError when points would be erased and preserved, and for a parameter that the
        neighbours' source does not use.
        """
        refuse_unused(self, neighbor.source)
        s2 = neighbor.cosines[0]
        farthest = s2 if self.beyond_s2 is None else self.beyond_s2
        if farthest > s2:
            raise ValueError(
                f"beyond points below S2 = {farthest} and neighbours from S2 = {s2} on: what lies "
                "between would be erased and preserved; choose the beyond points' S2 at most as "
                "large, or leave it auto"
            )
        return farthest


@dataclass(frozen=True)
class SolveSettings:
    """Parameters of the closed form (Eq. 7; Alg. 1, l. 24).

    lambda1: weight of what is preserved
    lambda2: weight of staying near the original, in units of the system's mean diagonal
    suppression: how strongly the prompts of the preservation bank are pushed off the concept
        direction and the mean of its mined words (`closed_form.solve`). 0: not at all; 1: their
        component along it becomes the bank's mean; more: beyond. Many words that draw a concept
        are in no ring but among these prompts
    pair_weight: weight of a row of an unperturbed pair, or of a prompt to preserve, where a drawn
        row has weight 1
    bank: whether everyday prompts keep their meaning (`mining.preservation_bank`)

    Raises ValueError for a value of another type or out of its range.
    """

    # The paper's λ1 is 0.1, of a Pre without a bank. λ2 keeps T from reaching exactness through
    # directions that no prompt uses: at 1e-4 mined words leave 6 % of what implies a concept and
    # move others as much, at 0.1 none.
    lambda1: float = option(1.0, Range(0))
    lambda2: float = option(0.1, POSITIVE)
    suppression: float = option(1.6, Range(0, MAX_SUPPRESSION))
    # Beside the bank T e = e* then holds to 2-6 % of |e - e*| for M = 0 to 16 (miniature).
    pair_weight: float = option(100.0, POSITIVE)
    bank: bool = option(True)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Settings:
    """Every parameter of Alg. 1, l. 1-24.

    Raises ValueError when those of neighbours and of beyond points contradict each other.
    """

    neighbor: NeighborSettings = NeighborSettings()
    beyond: BeyondSettings = BeyondSettings()
    solve: SolveSettings = SolveSettings()

    def __post_init__(self) -> None:
        self.beyond.farthest(self.neighbor)

    @staticmethod
    def of(**values: Any) -> "Settings":
        """From parameters by their names, as provenance has them. Raises TypeError for others."""
        parts: list[Any] = []
        for kind in (NeighborSettings, BeyondSettings, SolveSettings):
            names = [parameter.name for parameter in fields(kind) if parameter.name in values]
            parts.append(kind(**{name: values.pop(name) for name in names}))
        if values:
            raise TypeError(f"no settings are named {', '.join(values)}")
        return Settings(*parts)

    def flat(self) -> dict[str, Any]:
        """Name -> value of every parameter, as provenance has them."""
        return {**asdict(self.neighbor), **asdict(self.beyond), **asdict(self.solve)}


@dataclass(frozen=True)
class Training:
    """How the LoRA is trained; the paper's own values are steps 200 and learning rate 1e-5.

    rank: rank of the LoRA of every projection
    batch: prompts per step
    save_every: steps between two saved states
    gradient_checkpointing: whether activations are recomputed, for less memory and up to half more
        time; turned on where the free memory of a GPU is too small without it
    adversarial: number of contexts that are optimised between the steps to bring the concept back,
        and then aligned; 0 as in the paper
    """

    steps: int = option(200, POSITIVE_COUNT)
    rank: int = option(4, POSITIVE_COUNT)
    learning_rate: float = option(1e-4, POSITIVE)
    batch: int = option(4, POSITIVE_COUNT)
    seed: int = option(0, SEED)
    save_every: int = option(25, POSITIVE_COUNT)
    gradient_checkpointing: bool = option(False)
    adversarial: int = option(0, COUNT)

    def __post_init__(self) -> None:
        check_fields(self)
