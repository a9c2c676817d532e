"""The parameters of the method and their ranges, checked at construction.

Imports no torch, so that the command line and the nodes list parameters without a slow import.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

Progress = Callable[[int, int], None]  # callback with (number done, total)
Source = Literal["isotropic", "bank", "vocabulary", "predictions"]
# Bundled models: a small U-Net, a small transformer with CLIP alone or with CLIP and T5, the U-Net
# with a sentence encoder and with a causal language model, and the transformer with the latter, in
# the form of FLUX.2 and in that of Z-Image.
BUNDLED = (
    "miniature",
    "miniature-dit",
    "miniature-dit-t5",
    "miniature-language",
    "miniature-llm",
    "miniature-dit-llm",
    "miniature-dit-z-image",
)
SOURCES: tuple[Source, ...] = ("isotropic", "bank", "vocabulary", "predictions")
NOISE: tuple[Source, ...] = ("isotropic", "bank")  # sources of random steps
WORDS: tuple[Source, ...] = ("vocabulary", "predictions")
S1: dict[Source, float] = {"isotropic": 0.7, "bank": 0.7, "vocabulary": 1.0, "predictions": 1.0}
S2: dict[Source, float] = {"isotropic": 0.3, "bank": 0.3, "vocabulary": 0.55, "predictions": 0.3}
# Largest share of the concept in the prediction of a beyond word
BEYOND_SHARE = 0.1
MAX_SUPPRESSION = 2.0
# Share of |T - I| that a LoRA file may leave out: images then differ by 0.05 % RMS from images of
# the whole edit, at a fifth of the rank that 0.001 takes (`benchmarks/results/tolerance.json`).
TOLERANCE = 0.01


def quiet(done: int, total: int) -> None:
    """Default progress callback: does nothing."""


@dataclass(frozen=True)
class Range:
    """The values of a numeric parameter; infinity and NaN are never allowed.

    least, most: bounds of the range
    open: whether the bounds themselves are excluded
    whole: whether the value must be an integer
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
        """The value as an int or a float. Raises ValueError when it is outside the range."""
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
    """The texts of a tuple or list. Raises ValueError for anything else, a single text among it,
    and for an empty text."""
    if isinstance(value, str):
        raise ValueError(
            f"{name} = {value!r} is a single text: it must be a tuple of texts, {name}=({value!r},)"
        )
    if not isinstance(value, tuple | list):
        raise ValueError(f"{name} = {value!r}: it must be a tuple of texts, as {name}=('a', 'b')")
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} = {value!r}: {text!r} is not a text with words: leave it out")
    return tuple(value)


def option(
    default: Any, allowed: Range | None = None, sources: tuple[Source, ...] = SOURCES
) -> Any:
    """A dataclass field for `check_fields`.

    allowed: range of a number; None for texts and booleans
    sources: sources of neighbours that use the parameter
    """
    return field(default=default, metadata={"allowed": allowed, "sources": sources})


def check_fields(given: Any) -> None:
    """Checks the fields of a dataclass instance: types, and ranges of numbers.

    Converts lists to tuples and NumPy numbers to Python numbers, in place. Raises ValueError with
    the name, the value and what would work.
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
    """Raises ValueError for a parameter that is not at its default and that the source ignores."""
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

    source: source of neighbours: random directions as in the paper (isotropic), steps towards
        everyday prompts (bank), words that the text encoder has near the concept (vocabulary), or
        words and definitions that the model draws like the concept (predictions); default:
        "vocabulary"
    neighbors: number of neighbours M, per prompt; with words, per concept, and for source
        "predictions" as many definitions; default: 64
    s1, s2: largest and smallest cosine of a neighbour with the row e of the concept (Eq. 4); with
        source "predictions", share of the concept in the prediction of a word
        (`mining.predictions`); default: by source (`S1`, `S2`)
    d1: largest step from e (Eq. 3), in units of the context; default: distance at which the
        expected cosine falls to s2
    d1_anchor: radius of the ball around e* that neighbours are mapped into; default: d1 / 10
    shared_noise: whether all rows that depend on the concept share one random direction v (Eq. 5);
        otherwise each row has a separate one; default: False
    words: words, phrases and prompts to search besides the vocabulary of the tokenizer. Each
        replaces the concept in its first template; with the template "{}" a prompt is used as is
    exclude: words to preserve instead of erasing them, in every template of the concepts
    seed: seed of the draws; default: 0

    Raises ValueError for a value of another type or out of its range, for a parameter that the
    source does not use and for cosines that no draw can satisfy.
    """

    source: Source = option("vocabulary")
    neighbors: int = option(64, COUNT)
    s1: float | None = option(None, COSINE)
    s2: float | None = option(None, COSINE)
    d1: float | None = option(None, POSITIVE, NOISE)
    d1_anchor: float | None = option(None, POSITIVE, NOISE)
    # With source "bank", a prompt is one v for the whole span anyway.
    shared_noise: bool = option(False, sources=("isotropic",))
    words: tuple[str, ...] = option((), sources=WORDS)
    exclude: tuple[str, ...] = option(())
    seed: int = option(0, SEED)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.source not in SOURCES:
            raise ValueError(f"source = {self.source!r}: it must be one of {', '.join(SOURCES)}")
        refuse_unused(self, self.source)
        (s2, s1), source = self.cosines, self.source
        if not -1.0 <= s2 < s1 <= 1.0:
            raise ValueError(
                f"S2 = {s2} and S1 = {s1}: cosines of neighbours lie between them, so S2 must be "
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

    beyond: number of beyond points N, per prompt; with source "vocabulary", per concept; with
        "predictions", 0 for none and the default for all; default: 16
    beyond_s2: cosine with e below which beyond points lie; default: s2 of the neighbours; with
        source "predictions", share of the concept, default: BEYOND_SHARE
    d2: largest step from e (Eq. 3), in units of the context; default: distance at which the
        expected cosine falls to 0
    preserve: prompts whose outputs are preserved in every row
    beyond_seed: seed of the draws; default: derived from the seed of the neighbours

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

        Raises ValueError when a point could be both erased and preserved, and for a parameter that
        the source of the neighbours does not use.
        """
        refuse_unused(self, neighbor.source)
        if neighbor.source == "predictions" and self.beyond not in (0, type(self).beyond):
            raise ValueError(
                f"beyond = {self.beyond}: source 'predictions' preserves all beyond words; leave "
                "it out, or give 0 for none"
            )
        s2 = neighbor.cosines[0]
        automatic = min(s2, BEYOND_SHARE) if neighbor.source == "predictions" else s2
        farthest = automatic if self.beyond_s2 is None else self.beyond_s2
        if farthest > s2:
            raise ValueError(
                f"S2 = {farthest} of the beyond points is larger than S2 = {s2} of the neighbours: "
                "points between them would be both erased and preserved; choose it at most as "
                "large, or leave it auto"
            )
        return farthest


@dataclass(frozen=True)
class SolveSettings:
    """Parameters of the closed form (Eq. 7; Alg. 1, l. 24).

    lambda1: weight λ1 of preserved rows; default: 1
    lambda2: weight λ2 of |W - W_org|², in units of the mean diagonal of the system; default: 0.1
    suppression: strength with which the component of everyday prompts along the concept and its
        mined words is suppressed (`closed_form.solve`). 0: none; 1: the component becomes that of
        the bank's mean; default: 1.6
    pair_weight: weight of a row of an unperturbed pair or of a prompt to preserve, relative to a
        mined row; default: 100
    bank: whether everyday prompts (`mining.preservation_bank`) and the other thing in a prompt with
        the concept (`mining.pairs.composed`) are preserved; default: True

    Raises ValueError for a value of another type or out of its range.
    """

    # The paper has λ1 = 0.1, for a Pre without a bank. λ2 keeps T from fitting the pairs exactly
    # along directions that no prompt uses: with λ2 = 1e-4, 6 % of the prompts that imply a concept
    # survive, and unrelated words change as much; with 0.1, no such prompt survives.
    lambda1: float = option(1.0, Range(0))
    lambda2: float = option(0.1, POSITIVE)
    suppression: float = option(1.6, Range(0, MAX_SUPPRESSION))
    # With the bank, T e = e* then holds to 2-6 % of |e - e*| for M = 0 to 16 (miniature).
    pair_weight: float = option(100.0, POSITIVE)
    bank: bool = option(True)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Settings:
    """Every parameter of Alg. 1, l. 1-24.

    Raises ValueError when neighbours and beyond points contradict each other.
    """

    neighbor: NeighborSettings = NeighborSettings()
    beyond: BeyondSettings = BeyondSettings()
    solve: SolveSettings = SolveSettings()

    def __post_init__(self) -> None:
        self.beyond.farthest(self.neighbor)

    @staticmethod
    def of(**values: Any) -> "Settings":
        """Settings from the names and values in a provenance. Raises TypeError for other names."""
        parts: list[Any] = []
        for kind in (NeighborSettings, BeyondSettings, SolveSettings):
            names = [parameter.name for parameter in fields(kind) if parameter.name in values]
            parts.append(kind(**{name: values.pop(name) for name in names}))
        if values:
            raise TypeError(f"no settings are named {', '.join(values)}")
        return Settings(*parts)

    def flat(self) -> dict[str, Any]:
        """Name -> value of every parameter, as in a provenance."""
        return {**asdict(self.neighbor), **asdict(self.beyond), **asdict(self.solve)}


@dataclass(frozen=True)
class Training:
    """Parameters of the alignment (Alg. 1, l. 25-30); the paper has a learning rate of 1e-5.

    steps: number of training steps; default: 200
    rank: rank of the LoRA of each layer; default: 4
    learning_rate: learning rate of AdamW; default: 1e-4
    batch: number of prompts per step; default: 4
    seed: seed of the LoRA and of all draws; default: 0
    save_every: number of steps between saved states; default: 25
    gradient_checkpointing: whether activations are recomputed: less memory, up to half more time;
        turned on automatically if the free memory of a GPU is too small; default: False
    adversarial: number of adversarial contexts, optimised between steps to recover the concept and
        then aligned; default: 0, as in the paper
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
