"""Which words are erased with a concept, and what many concepts at once do.

    python -m benchmarks.rings rings miniature miniature-language miniature-llm
    python -m benchmarks.rings phrases miniature-language miniature-llm
    python -m benchmarks.rings thirty

Numbers as in `benchmarks.models`, means of cat, dog and truck; *names left* as in
`benchmarks.carrying_rows`. 30 words stay for each concept: differences under 5 points are noise.

- *Rings*: S2 is a cosine for all encoders. Instead, the k nearest words, or those whose cosine is z
  standard deviations (from the quartiles) above the median of the vocabulary. No rule is better on
  all three encoders, and none became the default. One z does not mean the same everywhere either:
  with z = 4, a ring has 8 to 16 words on the bundled encoder, 115 to 227 on MiniLM's and 11 to 21
  on SmolLM2's (63 are erased at most). Larger rings leave fewer associated prompts and keep less.
- *Phrases*: pairs of two of the 20 nearest words, the 63 nearest to the concept of them. *With
  phrases*: among the words of the ring, in the concept's template. *As prompts*: as they stand,
  with the anchor for a target and a weight of 10 a row. The *associated captions* are the six
  prompts that captions held; the nine that are judged are these and three that no caption held;
  *as concepts*, each is a concept with the template "{}", with pairs, ring and weight of one.
  Pairs of near words leave less of what is associated, but most of it on SmolLM2's rows, and cost
  a little; prompts that are associated, erased as they stand, take all others with them. Users
  write such prompts, or the source "predictions" finds them among definitions.
- *Thirty names* at once on the bundled encoder of 256 dimensions: random words of the vocabulary to
  tree, and the ten classes with two synonyms each; the share of them that still draws what it drew
  / of up to 15 other words of each class / of 120 words that draw something else / drift of these.
  *Leading directions*: the sums of the erased rows, projected onto the first directions of their
  Gram matrix, as OCE erases; *level*: of equal weight; *beside the bank*: onto those in which they
  exceed the bank the most. *Preserved* names are rows of a weight of 100, as OCE keeps. Neither
  helps: what helps is that the pairs weigh less against the bank, whose weight does not grow with
  the number of names (Python: `SolveSettings(pair_weight=10)`). OCE has its settings for several.

What is drawn is kept in .state/rings by part, model and variant: empty it when the method changes.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import models, peers
from benchmarks.ablation import REPORTING, RESULTS, TUNING, concept_of, oce_several
from benchmarks.carrying_rows import TEMPLATES
from benchmarks.frontier import drawn_before, edited
from benchmarks.models import METRICS, REPORTED, Judge, numbers
from benchmarks.models import STATE as BEFORE
from benchmarks.tables import markdown_table, write_results
from benchmarks.wide_edit import inverse_root, kept
from realera.algorithm import MiningResult, collect, erase, fit, mine
from realera.concepts import Concept
from realera.edit.closed_form import Sums
from realera.evaluation.tasks import OBJECT
from realera.evaluation.vocabulary import SURE
from realera.miniature import CONCEPTS
from realera.mining import vocabulary
from realera.mining.pairs import encode_pairs, first_summaries
from realera.mining.preservation_bank import encode_bank
from realera.mining.vocabulary import NEAR_WORDS, vocabulary_rows, word_rows
from realera.settings import NeighborSettings, SolveSettings
from realera.text.encoding import CONTEXT, TextEncoder

STATE = Path(".state/rings")
MODELS = ("miniature", "miniature-language", "miniature-llm")
NEAR, PHRASES = 20, 63  # words that phrases are made of; phrases that are erased
PROMPT_WEIGHT = 10.0  # of a row of a prompt that becomes the anchor, relative to a mined one
DREW, STAY = 15, 120  # words that are drawn of each erased class, and of what stays
Make = Callable[[TextEncoder, Concept], Tensor]  # to T, [dim, dim]
Joint = Callable[[TextEncoder, Sequence[Concept]], Tensor]
Numbers = dict[str, dict[str, dict[str, float]]]  # variant -> concept -> numbers


# ---------------------------------------------------------------- rings


def cosines(text: TextEncoder, concept: Concept) -> tuple[list[str], Tensor]:
    """The words of the vocabulary and their centred cosines with the concept, nearest first."""
    rows, words = vocabulary_rows(text, concept.templates[0]), text.words()
    others = [k for k, word in enumerate(words) if word.casefold() != concept.name.casefold()]
    rows = rows[others]
    centre = rows.mean(0)
    summary = first_summaries(text, [concept])[0]
    found = (normalize(rows - centre, dim=-1) @ normalize(summary - centre, dim=-1).T)[:, 0]
    order = found.argsort(descending=True, stable=True)
    return [words[others[k]] for k in order.tolist()], found[order]


def mined(text: TextEncoder, concept: Concept, s2: float, count: int, **more: Any) -> MiningResult:
    """The mining of a ring of at most `count` words, the name among them."""
    with mock.patch.object(vocabulary, "NEAR_WORDS", count):
        return mine(text, [concept], NeighborSettings(s2=s2, neighbors=count, **more))


def nearest(k: int, cosine: Tensor) -> float:
    return float(cosine[k - 1]) - 1e-6  # the cosines are worked out anew


def robust(z: float, cosine: Tensor) -> float:
    low, middle, high = cosine.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return min(middle + z * (high - low) / 1.349, 0.999)


# Rule -> S2 of the cosines of all words, and the largest number of words.
RINGS: dict[str, tuple[Callable[[Tensor], float], int]] = {
    "S2 = 0.55": (lambda cosine: 0.55, NEAR_WORDS),
    **{f"{k} nearest": (partial(nearest, k), max(k + 1, NEAR_WORDS)) for k in (10, 30, 100)},
    **{f"z = {z:g}": (partial(robust, z), NEAR_WORDS) for z in (4, 5, 6)},
}


def ring(rule: str, text: TextEncoder, concept: Concept) -> Tensor:
    s2, count = RINGS[rule]
    return erase(mined(text, concept, s2(cosines(text, concept)[1]), count)).edits[CONTEXT].matrix


def sizes(text: TextEncoder) -> dict[str, dict[str, Any]]:
    """concept -> number of words and S2 of each rule, and the nearest words."""
    found: dict[str, dict[str, Any]] = {}
    for name in REPORTED:
        words, cosine = cosines(text, concept_of(name, "drawn"))
        found[name] = {"nearest": words[:15]}
        for rule, (s2, _) in RINGS.items():
            found[name][rule] = [int((cosine >= s2(cosine)).sum()), round(s2(cosine), 3)]
    return found


# ---------------------------------------------------------------- phrases


def phrases(text: TextEncoder, concept: Concept) -> list[str]:
    """Of the pairs of two of the NEAR nearest words the PHRASES nearest ones."""
    near, template = cosines(text, concept)[0][:NEAR], concept.templates[0]
    made = [f"{a} {b}" for a in near for b in near if a != b]
    made = [phrase for phrase in made if concept.name not in phrase]
    path = STATE / f"pairs {concept.name} {str(text.fingerprint)[:12]}.pt"
    (rows,) = kept(path, lambda: (word_rows(text, template, made),))
    centre = vocabulary_rows(text, template).mean(0)
    summary = first_summaries(text, [concept])[0]
    found = (normalize(rows - centre, dim=-1) @ normalize(summary - centre, dim=-1).T)[:, 0]
    return [made[k] for k in found.topk(PHRASES).indices.tolist()]


def captions(text: TextEncoder, concept: Concept) -> Sequence[str]:
    return CONCEPTS[concept.name].associated


Prompts = Callable[[TextEncoder, Concept], Sequence[str]]


def in_the_template(rule: str, text: TextEncoder, concept: Concept) -> Tensor:
    """T with phrases beside the words of a ring."""
    s2, count = RINGS[rule][0](cosines(text, concept)[1]), NEAR_WORDS + PHRASES
    mining = mined(text, concept, s2, count, words=tuple(phrases(text, concept)))
    return erase(mining).edits[CONTEXT].matrix


def as_prompts(prompts: Prompts, text: TextEncoder, concept: Concept) -> Tensor:
    """T with prompts that become the anchor, beside the default's pairs and words."""
    mining = mine(text, [concept])
    more = encode_pairs(text, [Concept(p, concept.anchor, ("{}",)) for p in prompts(text, concept)])
    sums = dict(collect(mining))
    for stream, of in sums.items():
        span = more.span[stream]
        rows, targets = more.e.weighed(stream)[span], more.target.weighed(stream)[span]
        sums[stream] = of.add_erased(rows, targets, PROMPT_WEIGHT)
    return fit(text, mining.plan, sums).edits[CONTEXT].matrix


def as_concepts(text: TextEncoder, concept: Concept) -> Tensor:
    """T with the associated captions as concepts, by the product's ordinary path."""
    more = [Concept(prompt, concept.anchor, ("{}",)) for prompt in captions(text, concept)]
    return erase(mine(text, [concept, *more])).edits[CONTEXT].matrix


WITH_PHRASES: dict[str, Make] = {
    "S2 = 0.55": partial(ring, "S2 = 0.55"),
    "30 nearest": partial(ring, "30 nearest"),
    "S2 = 0.55, with phrases": partial(in_the_template, "S2 = 0.55"),
    "30 nearest, with phrases": partial(in_the_template, "30 nearest"),
    "phrases as prompts": partial(as_prompts, phrases),
    "associated captions as prompts": partial(as_prompts, captions),
    "associated captions as concepts": as_concepts,
}


# ---------------------------------------------------------------- judged


def weights(make: Callable[[Any, Any], Tensor], model: Any, erased: Any) -> peers.Weights:
    """K and V by the T of a concept, or of several."""
    return dict(edited(model, make(model.text, erased)))


def measure(judge: Judge, name: str, variants: Mapping[str, Make]) -> Numbers:
    """Numbers as in `benchmarks.models`, and names left."""
    found: Numbers = {}
    model, (named, latents, before) = judge.model, models.drawn_before(judge, name)
    shown = before.argmax(-1)
    for concept in REPORTED:
        k, told = judge.classifier.classes.index(concept), CONCEPTS[concept]
        implied = [*told.associated, *told.held_out_prompts]
        names = [t.replace("{}", w) for w in (concept, *told.synonyms) for t in TEMPLATES]
        path = BEFORE / f"{name} {concept} before.pt"
        did = kept(path, partial(judge.draw, implied, {}))[1].argmax(-1) == k
        path = STATE / f"{name} {concept} names before.pt"
        names_did = kept(path, partial(judge.draw, names, {}))[1].argmax(-1) == k
        drew, stays = models.judged_words(k, before)
        prompts = [named[i] for i in torch.cat([drew, stays]).tolist()] + implied + names
        sizes = [len(drew) + len(stays), len(implied), len(names)]
        for variant, make in variants.items():

            def draw(make: Make = make, name: str = concept, of: Any = prompts) -> Any:
                return judge.draw(of, weights(make, model, concept_of(name, "drawn")))

            file = re.sub(r"\W+", "-", f"{name} {concept} {variant}")
            now, after = kept(STATE / f"{file}.pt", draw)
            words_after, implied_after, names_after = after.split(sizes)
            found.setdefault(variant, {})[concept] = numbers(
                *(k, shown[stays], latents[stays], now[: sizes[0]], words_after),
                *(did, implied_after),
            ) | {"names": 100 * float((names_after.argmax(-1)[names_did] == k).float().mean())}
            print(name, concept, variant, found[variant][concept], flush=True)
    return found


# ---------------------------------------------------------------- thirty names


SUPERTYPES = (
    *("animal", "pet", "insect", "fruit", "vegetable", "food", "drink", "plant", "furniture"),
    *("building", "house", "tool", "machine", "clothing", "shoe", "toy", "instrument", "person"),
    *("man", "woman", "child", "face", "landscape", "mountain", "water", "sky", "city", "street"),
    *("room", "weather", "sport", "book", "game", "body", "music"),
)
TEN = (*REPORTING, *TUNING)
OTHER_CLASSES = tuple(name for name in CONCEPTS if name not in TEN)


@cache
def mined_once(text: Any, concepts: tuple[Concept, ...]) -> MiningResult:
    return mine(text, concepts)


def solved(
    text: Any,
    concepts: Sequence[Concept],
    change: Callable[[TextEncoder, str, Sums], Sums] = lambda text, stream, sums: sums,
    preserve: Sequence[str] = (),
    **settings: Any,
) -> Tensor:
    """T of a joint fit.

    change: function from the sums of erased rows to those that are solved
    preserve: prompts that are preserved in every row
    """
    mining, solve = mined_once(text, tuple(concepts)), SolveSettings(**settings)
    sums = {stream: change(text, stream, of) for stream, of in collect(mining, solve).items()}
    plan = replace(mining.plan, preserved=tuple(preserve))
    return fit(text, plan, sums, solve).edits[CONTEXT].matrix


def leading(k: int, level: bool, text: TextEncoder, stream: str, sums: Sums) -> Sums:
    """Erased rows by the k leading directions of their Gram matrix.

    level: whether every direction weighs as much as their mean
    """
    values, vectors = torch.linalg.eigh(sums.gram)
    values, u = values[-k:], vectors[:, -k:]
    scale = values.mean() / values if level else torch.ones_like(values)
    return replace(
        sums, gram=(u * values * scale) @ u.T, shift_cov=sums.shift_cov @ (u * scale) @ u.T
    )


def beside(k: int, text: TextEncoder, stream: str, sums: Sums) -> Sums:
    """Erased rows by the k directions in which they exceed the rows of the bank the most."""
    bank = encode_bank(text).kept[stream].preserved
    root = inverse_root(bank + 0.1 * bank.diagonal().mean() * torch.eye(len(bank)).double())
    u = torch.linalg.eigh(root @ sums.gram @ root)[1][:, -k:]
    p = torch.linalg.solve(root, u @ u.T @ root)
    return replace(sums, gram=p @ sums.gram @ p.T, shift_cov=sums.shift_cov @ p.T)


def oce(model: Any, concepts: Sequence[Concept]) -> peers.Weights:
    return oce_several(model, concepts, OTHER_CLASSES)


def variants() -> dict[str, Joint]:
    """Variant -> function to T."""
    found: dict[str, Joint] = {
        "default": solved,
        "suppression 0": partial(solved, suppression=0.0),
        "supertypes preserved": partial(solved, preserve=SUPERTYPES),
        "other classes preserved": partial(solved, preserve=OTHER_CLASSES),
        "pairs weigh 10": partial(solved, pair_weight=10.0),
    }
    for k in (20, 40):
        found[f"{k} leading directions"] = partial(solved, change=partial(leading, k, False))
        found[f"{k} directions beside the bank"] = partial(solved, change=partial(beside, k))
    found["20 leading directions, level"] = partial(solved, change=partial(leading, 20, True))
    for weight in (3.0, 10.0, 30.0, 100.0):
        found[f"λ1 = {weight:g}"] = partial(solved, lambda1=weight)
    few = partial(leading, 40, False)
    found["λ1 = 30, 40 leading directions"] = partial(solved, change=few, lambda1=30.0)
    found["λ1 = 30, supertypes preserved"] = partial(solved, preserve=SUPERTYPES, lambda1=30.0)
    return found


METHODS: dict[str, Callable[[Any, Sequence[Concept]], peers.Weights]] = {
    **{name: partial(weights, make) for name, make in variants().items()},
    "UCE": peers.uce,
    "OCE": oce,
}


def thirty(judge: Judge) -> Numbers:
    """Method -> set of names -> numbers."""
    assert judge.pen is not None
    text, classes = judge.model.text, judge.classifier.classes
    words = text.words()
    before = drawn_before(judge.pen, words)
    sure, shown = before.max(-1)
    generator = torch.Generator().manual_seed(0)

    def some(mask: Tensor, count: int) -> Tensor:
        those = mask.nonzero()[:, 0]
        return those[torch.randperm(len(those), generator=generator)[:count]]

    random = some((sure > SURE) & (shown != classes.index("tree")), 30).tolist()
    named = [
        replace(concept_of(name, "drawn"), name=word)
        for name in TEN
        for word in (name, *CONCEPTS[name].synonyms[:2])
    ]
    sets = {
        "thirty random words": ([Concept(words[k], "tree") for k in random], ()),
        "three names of ten classes": (named, tuple(map(classes.index, TEN))),
    }
    found: Numbers = {}
    for title, (concepts, erased) in sets.items():
        free = torch.tensor([word not in {c.name for c in concepts} for word in words])
        drew = [some((shown == k) & free, DREW) for k in erased]
        stays = some((sure > SURE) & free & ~torch.isin(shown, torch.tensor(erased)), STAY)
        chosen = torch.cat([*drew, stays]).tolist()
        named_first = [c.name for c in concepts] + [words[k] for k in chosen]
        prompts = [OBJECT.replace("{}", word) for word in named_first]
        latents, was = kept(STATE / f"thirty {title} before.pt", partial(judge.draw, prompts, {}))
        sizes = len(concepts), len(chosen) - len(stays), len(stays)
        for method, make in METHODS.items():

            def draw(make: Any = make, of: Any = prompts, concepts: Any = concepts) -> Any:
                return judge.draw(of, make(judge.model, concepts))

            file = re.sub(r"\W+", "-", f"thirty {title} {method}")
            now, after = kept(STATE / f"{file}.pt", draw)
            same = (after.argmax(-1) == was.argmax(-1)).float().split(sizes)
            change, size = ((of[-STAY:]).square().mean() for of in (now - latents, latents))
            shares = dict(zip(("names", "residue", "kept"), same, strict=True))
            found.setdefault(method, {})[title] = {
                **{name: 100 * float(of.mean()) for name, of in shares.items() if len(of)},
                "drift": 100 * float((change / size).sqrt()),
            }
            print(title, method, found[method][title], flush=True)
    return found


# ---------------------------------------------------------------- written


def table_of(models: Mapping[str, Numbers]) -> str:
    """Means over the concepts."""
    metrics = (*METRICS, "names")
    arrows = ("residue ↓", "kept ↑", "H_v ↑", "drift ↓", "associated ↓", "names left ↓")
    table = [["", *arrows, "residue/kept/drift/associated by concept"]]
    for name, found in models.items():
        for variant, of in found.items():
            means = [sum(n[m] for n in of.values()) / len(of) for m in metrics]
            each = ", ".join(
                f"{c} "
                + "/".join(f"{n[m]:.0f}" for m in ("residue", "kept", "drift", "associated"))
                for c, n in of.items()
            )
            table.append([f"{name}: {variant}", *(f"{mean:.1f}" for mean in means), each])
    return markdown_table(table)


def table_of_sizes(models: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    table = [["words in the ring (S2)", *RINGS, "the nearest"]]
    for name, concepts in models.items():
        for concept, of in concepts.items():
            cells = [f"{of[rule][0]} ({of[rule][1]:.2f})" for rule in RINGS]
            table.append([f"{name}: {concept}", *cells, ", ".join(of["nearest"])])
    return markdown_table(table)


def table_of_thirty(found: Numbers) -> str:
    sets = next(iter(found.values()))
    table = [["names left / residue / kept / drift", *sets]]
    for method, by_set in found.items():
        cells = [
            " / ".join(
                f"{n[m]:.0f}" if m in n else "-" for m in ("names", "residue", "kept", "drift")
            )
            for n in by_set.values()
        ]
        table.append([method, *cells])
    return markdown_table(table)


def write(stored: Mapping[str, Any]) -> None:
    parts = ["# Which words are erased with a concept", __doc__]
    if "rings" in stored:
        sizes, judged = (
            {n: of[part] for n, of in stored["rings"].items()} for part in ("sizes", "judged")
        )
        parts += ["## Rings", table_of_sizes(sizes), table_of(judged)]
    if "phrases" in stored:
        parts += ["## Phrases", table_of(stored["phrases"])]
        for name, of in stored["phrases examples"].items():
            parts.append("\n".join(f"- {name}, {c}: {', '.join(found)}" for c, found in of.items()))
    if "thirty" in stored:
        parts += ["## Thirty names", table_of_thirty(stored["thirty"])]
    write_results(RESULTS / "rings", stored, "\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("rings", "phrases", "thirty"))
    parser.add_argument("models", nargs="*", choices=MODELS, default="miniature")
    options = parser.parse_args()
    path = RESULTS / "rings.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if options.part == "thirty":
        stored["thirty"] = thirty(Judge("miniature"))
        write(stored)
        return
    for name in options.models:
        judge = Judge(name)
        if options.part == "rings":
            judged = measure(judge, name, {rule: partial(ring, rule) for rule in RINGS})
            stored.setdefault("rings", {})[name] = {
                "sizes": sizes(judge.model.text),
                "judged": judged,
            }
        else:
            stored.setdefault("phrases", {})[name] = measure(judge, name, WITH_PHRASES)
            stored.setdefault("phrases examples", {})[name] = {
                c: phrases(judge.model.text, concept_of(c, "drawn"))[:15] for c in REPORTED
            }
        write(stored)


if __name__ == "__main__":
    main()
