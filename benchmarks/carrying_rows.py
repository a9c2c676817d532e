"""Which rows of a language model carry a concept, and what an edit of each draws.

    python -m benchmarks.carrying_rows miniature-dit-llm miniature-dit-z-image miniature-llm

Behind a chat template a causal model has rows that every prompt has, and each of them has read the
concept. *Rows of another prompt*: "a photo of the {}" of each thing that the models draw, with some
of its rows replaced by those of another thing's prompt; percent of the pictures that show the
prompt's thing and the other one.

*Names left*: percent of the concept's name and synonyms, in three templates, that draw it and still
do. *Edits*: residue, kept, drift and associated as in `benchmarks.models`, means of cat, dog and
truck. T is applied to all rows or to some of them; *three blocks* is T of each of the encoder's
layers alone (`wide_rows`), where a model reads several.

Words that draw the concept are few, and on miniature-dit-llm hardly one has to do with it (*about*,
*under*): the names say whether it is erased.

On miniature-llm, in Z-Image's form, the last row is read, but does not decide what a plain name
draws: exchanged, it changes none, and edited alone, it leaves all names and 42 % of the words;
edited with all others, it takes the names left from 20, 33 and 7 % to 7, 20 and 0 %.

miniature-dit-z-image is the transformer in that form: one layer, thus no blocks. There, too, the
prompt's rows carry the names: an edit of the last row alone leaves nearly all names, but 14 % of
the words, and the prompt's rows alone the reverse. Without suppression more is kept (90 against
73 %, drift 35 against 64) and more is left (names 0, 14 and 40 % against 0, 0 and 27 %).

What is drawn is kept in .state/carrying_rows: empty it when the method changes.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.ablation import RESULTS, concept_of
from benchmarks.models import OTHERS, REPORTED, WORDS, numbers, table_of
from benchmarks.tables import markdown_table, write_results
from benchmarks.wide_edit import SAMPLING, kept
from benchmarks.wide_rows import solve_blocks
from realera.algorithm import erase, mine
from realera.checkpoints.loading import load_model
from realera.edit import erasure
from realera.edit.closed_form import Edit, Sums, solve
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.tasks import OBJECT
from realera.evaluation.vocabulary import SURE, sample_words
from realera.miniature import CONCEPTS
from realera.pipelines.interface import Diffusion
from realera.settings import SolveSettings
from realera.text.encoding import CONTEXT, Encoding, TextEncoder

STATE = Path(".state/carrying_rows")
TEMPLATES = "a photo of the {}", "a drawing of a {}", "the {} on the table"
LANGUAGE_MODELS = "miniature-dit-llm", "miniature-dit-z-image", "miniature-llm"
Where = Callable[[Tensor, int], Tensor]  # rows behind each row, rows behind the prompt -> mask
ROWS: dict[str, Where] = {
    "all": lambda after, behind: after >= 0,
    "the last": lambda after, behind: after == 0,
    "all but the last": lambda after, behind: after > 0,
    "those behind the prompt": lambda after, behind: (after >= 0) & (after < behind),
    "the prompt's": lambda after, behind: after >= behind,
}
T = Callable[[Tensor], Tensor]  # rows to rows


def behind(text: TextEncoder) -> int:
    """Number of the template's rows behind a prompt."""
    (part,) = text.parts
    one, other = part.tokenize(["cat", "dog"])
    return next(n for n, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=True)) if a != b)


def rows_after(encoding: Encoding) -> Tensor:
    """Number of rows behind each row of a prompt, int64 [prompts, tokens]; negative for padding."""
    there = encoding.there(CONTEXT)
    return there.sum(1, keepdim=True) - 1 - torch.arange(there.shape[1])


def replaced(encoding: Encoding, rows: Tensor, where: Where, count: int) -> Encoding:
    """The encoding with other rows, [prompts, tokens, dim], in some places.

    count: number of rows behind the prompt
    """
    chosen = where(rows_after(encoding), count)[..., None]
    streams = {**encoding, CONTEXT: torch.where(chosen, rows, encoding[CONTEXT])}
    return Encoding(streams, encoding.weights)


class Judge:
    """Draws encodings and classifies them, all from one noise."""

    def __init__(self, name: str):
        self.model: Diffusion = load_model(name)
        self.text: Any = self.model.text  # LanguageText
        self.behind, self.empty = behind(self.text), self.text.encode([""])
        self.classifier = miniature_classifier()

    @torch.no_grad()
    def draw(self, encoding: Encoding, empty: Encoding) -> tuple[Tensor, Tensor]:
        """Latents [prompts, ...] and probabilities [prompts, classes]."""
        noise = torch.randn(
            1, *self.model.latent_shape, generator=torch.Generator().manual_seed(SAMPLING.seed)
        )
        guidance = SAMPLING.guidance_for(self.model.network)
        latents = torch.empty(encoding.prompts, *noise.shape[1:])
        for at in encoding.there(CONTEXT).sum(1).argsort().split(64):  # of like lengths
            part = encoding.take(at)
            drawn = self.model.sample(
                part, empty.like(part), noise.expand(len(at), -1, -1, -1), SAMPLING.steps, guidance
            )
            latents[at] = drawn.float()
        return latents, self.classifier.probabilities(self.model.decode(latents))

    def edited(self, encoding: Encoding, t: T, where: Where) -> tuple[Tensor, Tensor]:
        """As `draw`, after T in some rows of the prompts and of the empty prompt."""
        parts = (
            replaced(part, t(part[CONTEXT]), where, self.behind) for part in (encoding, self.empty)
        )
        return self.draw(*parts)


def swapped(judge: Judge, name: str) -> dict[str, tuple[float, float]]:
    """Rows that are replaced -> percent that show the prompt's thing, and the other prompt's."""
    classes = judge.classifier.classes
    names = [concept.name for concept in CONCEPTS.values()]
    prompts = [OBJECT.replace("{}", word) for word in names]
    (part,) = judge.text.parts
    length = {len(ids) for ids in part.tokenize(prompts)}
    assert len(length) == 1, "rows are replaced one by one"
    encoding, found = judge.text.encode(prompts), {}
    due = torch.tensor([classes.index(word) for word in names])
    for rows, where in {"none": lambda after, _: after < -99, **ROWS}.items():
        other = replaced(encoding, encoding[CONTEXT].roll(1, 0), where, judge.behind)
        path = STATE / f"{name} swapped {rows}.pt"
        shown = kept(path, partial(judge.draw, other, judge.empty))[1].argmax(-1)
        one, two = ((shown == of).float().mean() for of in (due, due.roll(1)))
        found[rows] = 100 * float(one), 100 * float(two)
        print(name, "swapped", rows, found[rows], flush=True)
    return found


def in_blocks(sums: Sums, *rest: Any) -> Edit:
    """As `solve`, of each of the encoder's layers alone; of the pooled number as it is."""
    return (solve if sums.dim == 1 else solve_blocks)(sums, *rest)


def transforms(judge: Judge, concept: str) -> dict[str, T]:
    """Name of an edit -> T."""
    mining, found = mine(judge.text, [concept_of(concept, "drawn")]), dict[str, T]()
    wide = len(judge.text.form.layers) > 1
    for blocks, how in {"": solve, **({", three blocks": in_blocks} if wide else {})}.items():
        for suppression in (SolveSettings().suppression, 0.0):
            with mock.patch.object(erasure, "solve", how):
                edits = erase(mining, SolveSettings(suppression=suppression)).edits
            found[f"suppression {suppression:g}{blocks}"] = edits[CONTEXT]
    return found


def measure(judge: Judge, name: str) -> dict[str, dict[str, dict[str, float]]]:
    """edit -> concept -> numbers."""
    found, classes = dict[str, dict[str, dict[str, float]]](), judge.classifier.classes
    words = judge.text.encode(
        [OBJECT.replace("{}", word) for word in sample_words(judge.text.words(), WORDS)]
    )
    latents, before = kept(STATE / f"{name} before.pt", partial(judge.draw, words, judge.empty))
    sure, shown = before.max(-1)
    for concept in REPORTED:
        k, told = classes.index(concept), CONCEPTS[concept]
        named = [t.replace("{}", w) for w in (concept, *told.synonyms) for t in TEMPLATES]
        implied = judge.text.encode([*told.associated, *told.held_out_prompts])
        names = judge.text.encode(named)
        path = STATE / f"{name} {concept} before.pt"
        did = kept(path, partial(judge.draw, implied, judge.empty))[1].argmax(-1) == k
        path = STATE / f"{name} {concept} names before.pt"
        named_did = kept(path, partial(judge.draw, names, judge.empty))[1].argmax(-1) == k
        drew = (shown == k).nonzero()[:, 0]
        stays = ((shown != k) & (sure > SURE)).nonzero()[:, 0]
        order = torch.randperm(len(stays), generator=torch.Generator().manual_seed(1))
        stays = stays[order[:OTHERS]]
        chosen = words.take(torch.cat([drew, stays]))
        edits = transforms(judge, concept)
        first = next(iter(edits))
        variants = [(edit, t, "all") for edit, t in edits.items()]
        variants += [(first, edits[first], rows) for rows in ROWS if rows != "all"]
        for edit, t, rows in variants:
            title = f"{edit}, {rows} rows" if rows == "all" else f"{edit}, rows: {rows}"

            def draw(
                t: T = t, of: tuple[Encoding, ...] = (chosen, implied), rows: str = rows
            ) -> Any:
                return tuple(x for e in of for x in judge.edited(e, t, ROWS[rows]))

            file = re.sub(r"\W+", "-", f"{name} {concept} {title}")
            now, after, _, implied_now = kept(STATE / f"{file}.pt", draw)
            path = STATE / f"{file} names.pt"
            named_now = kept(path, partial(judge.edited, names, t, ROWS[rows]))[1]
            found.setdefault(title, {})[concept] = numbers(
                k, shown[stays], latents[stays], now, after, did, implied_now
            ) | {"names": 100 * float((named_now.argmax(-1)[named_did] == k).float().mean())}
            print(name, concept, title, found[title][concept], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", choices=LANGUAGE_MODELS)
    path = RESULTS / "carrying_rows"
    stored = path.with_suffix(".json")
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    for name in parser.parse_args().models:
        judge = Judge(name)
        found[name] = {"rows": swapped(judge, name), "edits": measure(judge, name)}
    table = [["rows of another prompt", "shows the prompt's thing", "shows the other"]]
    for name, of in found.items():
        for rows, shares in of["rows"].items():
            table.append([f"{name}: {rows}", *(f"{share:.0f} %" for share in shares)])
    edits = {name: of["edits"] for name, of in found.items()}
    left = [["edit", *(f"names of {concept} left" for concept in REPORTED)]]
    for name, of_model in edits.items():
        for edit, by_concept in of_model.items():
            shares = [f"{by_concept[concept]['names']:.0f} %" for concept in REPORTED]
            left.append([f"{name}: {edit}", *shares])
    parts = ["# Rows that carry a concept", __doc__, markdown_table(table), markdown_table(left)]
    parts.append(table_of(edits))
    write_results(path, found, "\n\n".join(parts))


if __name__ == "__main__":
    main()
