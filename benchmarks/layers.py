"""Which of the layers that read the text are edited: K and V, V alone, some blocks.

    python -m benchmarks.layers tuned       # every candidate on the five concepts of the tuned half
    python -m benchmarks.layers reported    # the best of them on cat, dog and truck

The default multiplies K and V of every cross-attention by one T. A candidate leaves some of them as
they were, or multiplies them by the T of another suppression (the default is 1.6). Numbers as in
`benchmarks.models`, on the three bundled U-Nets; *kept thing* and *in place* are percent of the
prompts of two things of `benchmarks.retention`, on the first U-Net: of those that drew the kept
thing, those that still do, and of those that drew the concept, those that then draw the kept thing.
*Lowest resolution*: input_blocks.3, middle_block, output_blocks.0 and 1. *Without N* leaves out the
layers of one attention, on the first U-Net alone.

The rule, written before anything was drawn: a candidate is reported when on the tuned concepts H_v
is not lower than the default's by more than 2 points on any U-Net, and drift is lower by 3 points
or more on each, or *in place* is higher by 10 or more; values alone are reported in any case. It
becomes the default when on the reported concepts H_v is not lower by more than 2 points on any
U-Net, and drift is lower by 5 or more on each, or *in place* is higher by 15 or more.

No candidate became the default. V alone and both candidates of the lowest resolution passed the
first test, by two prompts of 17. K at suppression 0 (*in place* higher by one prompt) and 0.8 in
input_blocks.3 (drift lower by 2.7 on the first U-Net) did not, and are reported beside them. K
hardly matters for words: with V alone, drift and *in place* are those of the default. Values alone
leave no room for a larger suppression either. From a picture of the concept, V alone draws it in
25 % of the images instead of 10 %: cats keep their faces. The layers of the lowest resolution alone
erase nearly as much and move what stays as far. A weaker suppression in some of them trades residue
for drift, as it does in all layers.

What is drawn is kept in .state/models and .state/retention.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import models, peers, retention
from benchmarks.ablation import REPORTING, RESULTS, TUNING
from benchmarks.tables import write_results
from realera.algorithm import erase, mine
from realera.concepts import Concept
from realera.pipelines.interface import Diffusion
from realera.settings import SolveSettings
from realera.text.encoding import CONTEXT

MODELS = ("miniature", "miniature-language", "miniature-llm")
HALVES = {"tuned": TUNING, "reported": REPORTING}
DEFAULT = SolveSettings().suppression
# Regular expression of the layers' names -> suppression of the T that multiplies them; the first
# that matches decides, and a layer that matches none stays as it was.
Candidate = Mapping[str, float]


def weights(of: Candidate, model: Diffusion, concept: Concept) -> peers.Weights:
    found = {}
    for name, weight in peers.projections(model).items():
        strength = next((s for pattern, s in of.items() if re.match(pattern, name)), None)
        if strength is not None:
            found[name] = weight @ matrix(model.text, concept, strength)
    return found


@cache
def ends(text: Any, concept: Concept) -> tuple[Tensor, Tensor]:
    """T at suppression 0 and 1, float64 [dim, dim]."""
    mining = mine(text, [concept])
    none, one = (erase(mining, SolveSettings(suppression=s)).edits[CONTEXT] for s in (0.0, 1.0))
    return none.matrix.double(), one.matrix.double()


def matrix(text: Any, concept: Concept, suppression: float) -> Tensor:
    """T, which is linear in the suppression, float64 [dim, dim]."""
    return torch.lerp(*ends(text, concept), suppression)


V, LOWEST = ".*to_v", r"input_blocks\.3|middle|output_blocks\.[01]\."
ATTENTIONS = (
    *("input_blocks.1", "input_blocks.3", "middle_block"),
    *(f"output_blocks.{k}" for k in range(4)),
)
CANDIDATES: dict[str, Candidate] = {
    "ours": {"": DEFAULT},
    "V alone": {V: DEFAULT},
    "K alone": {".*to_k": DEFAULT},
    "K at suppression 0": {".*to_k": 0.0, V: DEFAULT},
    "V alone, suppression 2.4": {V: 2.4},
    "V alone, suppression 3.2": {V: 3.2},
    "down and middle": {"input|middle": DEFAULT},
    "down and middle, V alone": {f"(input|middle){V}": DEFAULT},
    "up": {"output": DEFAULT},
    "lowest resolution": {LOWEST: DEFAULT},
    "lowest resolution, V alone": {f"({LOWEST}){V}": DEFAULT},
    "suppression 0": {"": 0.0},
    "suppression 0.8": {"": 0.8},
    "suppression 0 but in the lowest resolution": {LOWEST: DEFAULT, "": 0.0},
    "suppression 0 in the lowest resolution": {LOWEST: 0.0, "": DEFAULT},
    "suppression 0 in input_blocks.3": {r"input_blocks\.3": 0.0, "": DEFAULT},
    "suppression 0.8 in input_blocks.3": {r"input_blocks\.3": 0.8, "": DEFAULT},
}
WITHOUT: dict[str, Candidate] = {
    f"without {name}": {f"(?!{re.escape(name)}\\.)": DEFAULT} for name in ATTENTIONS
}
BEST = (
    *("ours", "V alone", "K at suppression 0", "lowest resolution", "lowest resolution, V alone"),
    "suppression 0.8 in input_blocks.3",
)


def retained(of: Candidate, model: Any, concepts: Sequence[Concept], names: Any) -> peers.Weights:
    return weights(of, model, *concepts)


def two_things(methods: Mapping[str, Candidate], part: str) -> dict[str, dict[str, float]]:
    """Method -> percent of the prompts of two things and, of those that are reported, of images."""
    task = retention.Retention({m: partial(retained, of) for m, of in methods.items()})
    found = {}
    for method in methods:
        found[method] = task.in_one_prompt(method, HALVES[part])
        if part == "reported":
            found[method] |= task.images(method)
        print(method, found[method], flush=True)
    return found


def tables(found: Mapping[str, Any]) -> str:
    return f"{models.table_of(found['models'])}\n\n{retention.table(found['two things'])}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=HALVES)
    part = parser.parse_args().part
    methods: dict[str, Candidate] = CANDIDATES
    words: Sequence[str] = TUNING
    if part == "reported":
        methods, words = {m: CANDIDATES[m] for m in BEST}, models.REPORTED
    path = RESULTS / "layers.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[part] = {"two things": two_things(methods, part), "models": {}}
    for name in MODELS:
        some = methods | (WITHOUT if (part, name) == ("tuned", "miniature") else {})
        make = {method: partial(weights, of) for method, of in some.items()}
        stored[part]["models"][name] = models.measure(name, words, make)
    parts = ["# Which layers are edited", __doc__]
    parts += [line for half, of in stored.items() for line in (f"## {half}", tables(of))]
    write_results(RESULTS / "layers", stored, "\n\n".join(parts))


if __name__ == "__main__":
    main()
