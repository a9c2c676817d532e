"""Which of the layers that read the text are edited: K and V, V alone, some blocks.

    python -m benchmarks.layers tuned       # every candidate on airplane, bird and ship
    python -m benchmarks.layers reported    # those that passed, on cat, dog and truck

The default multiplies K and V of every cross-attention by one T. A candidate leaves some as they
were, or multiplies K by the T of another suppression (1.6 by default). Numbers as in
`benchmarks.models`, on the three bundled U-Nets; *kept thing* and *in place* are percent of the
prompts of two things of `benchmarks.retention`, on the first: of those that drew the kept thing,
those that still do, and of those that drew the concept, those that then draw the kept thing.
*Without N* leaves out the layers of one attention, on the first U-Net alone.

The rule, written before anything was drawn: a candidate is reported when on the tuned concepts H_v
is not lower than the default's by more than 2 points on any U-Net, and drift is lower by 3 points
or more on each, or *in place* is higher by 10 or more; values alone are reported in any case. It
becomes the default when on the reported concepts H_v is not lower by more than 2 points on any
U-Net, and drift is lower by 5 or more on each, or *in place* is higher by 15 or more.

What is drawn is kept in .state/models and .state/retention.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor

from benchmarks import models, peers, retention
from benchmarks.ablation import REPORTING, RESULTS, TUNING
from benchmarks.models import METRICS, REPORTED
from benchmarks.tables import markdown_table, write_results
from realera.algorithm import MiningResult, erase, mine
from realera.concepts import Concept
from realera.pipelines.interface import Diffusion
from realera.settings import SolveSettings
from realera.text.encoding import CONTEXT, TextEncoder

MODELS = ("miniature", "miniature-language", "miniature-llm")
TUNED = ("airplane", "bird", "ship")
DEFAULT = SolveSettings().suppression


@dataclass(frozen=True)
class Candidate:
    """The layers that an erasure multiplies.

    keys, values: suppression of the T of K and of V; None: they stay as they were
    layers: regular expression of the names of the layers
    """

    keys: float | None = DEFAULT
    values: float | None = DEFAULT
    layers: str = ""

    def __call__(self, model: Diffusion, concept: Concept) -> peers.Weights:
        weights = {}
        for name, weight in peers.projections(model).items():
            strength = self.keys if name.endswith("to_k") else self.values
            if strength is not None and re.match(self.layers, name):
                weights[name] = weight @ matrix(model.text, concept, strength)
        return weights


@cache
def mined(text: TextEncoder, concept: Concept) -> MiningResult:
    return mine(text, [concept])


@cache
def matrix(text: TextEncoder, concept: Concept, suppression: float) -> Tensor:
    """T, float64 [dim, dim]."""
    settings = SolveSettings(suppression=suppression)
    return erase(mined(text, concept), settings).edits[CONTEXT].matrix.double()


LOWEST = r"input_blocks\.3|middle|output_blocks\.[01]\."
ATTENTIONS = (
    "input_blocks.1",
    "input_blocks.3",
    "middle_block",
    *map("output_blocks.{}".format, range(4)),
)
CANDIDATES = {
    "ours": Candidate(),
    "V alone": Candidate(keys=None),
    "K alone": Candidate(values=None),
    "K at suppression 0": Candidate(keys=0.0),
    "V alone, suppression 2.4": Candidate(keys=None, values=2.4),
    "V alone, suppression 3.2": Candidate(keys=None, values=3.2),
    "down and middle": Candidate(layers="input|middle"),
    "down and middle, V alone": Candidate(keys=None, layers="input|middle"),
    "up": Candidate(layers="output"),
    "lowest resolution": Candidate(layers=LOWEST),
    "lowest resolution, V alone": Candidate(keys=None, layers=LOWEST),
}
WITHOUT = {f"without {name}": Candidate(layers=f"(?!{re.escape(name)}\\.)") for name in ATTENTIONS}


def both_things(methods: Mapping[str, Candidate], names: Sequence[str]) -> dict[str, Any]:
    """Method -> percent of the prompts of two things."""

    def made(candidate: Candidate, model: Any, concepts: Sequence[Concept], others: Any) -> Any:
        return candidate(model, *concepts)

    task = retention.Retention({m: partial(made, of) for m, of in methods.items()})
    found = {}
    for method in methods:
        found[method] = task.in_one_prompt(method, names)
        print(method, found[method], flush=True)
    return found


def table_of(found: Mapping[str, Any]) -> str:
    """Means over the concepts of each model, and of the prompts of two things."""
    heads = ("residue", "kept", "H_v", "drift", "associated")
    table = [["", *heads, "kept thing", "in place", "residue/kept/drift by concept"]]
    for model, methods in found["models"].items():
        for method, of in methods.items():
            means = [sum(n[m] for n in of.values()) / len(of) for m in METRICS]
            both = found["two things"].get(method, {}) if model == "miniature" else {}
            cells = [*means, *([v for k, v in both.items() if "do ↓" not in k] or ["", ""])]
            each = ", ".join(
                "{} {:.0f}/{:.0f}/{:.0f}".format(c, *(n[m] for m in ("residue", "kept", "drift")))
                for c, n in of.items()
            )
            row = [c if isinstance(c, str) else f"{c:.1f}" for c in cells]
            table.append([f"{model}: {method}", *row, each])
    return markdown_table(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("tuned", "reported"))
    part = parser.parse_args().part
    methods: dict[str, Candidate] = CANDIDATES
    words, names = TUNED, TUNING
    path = RESULTS / "layers.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    found = stored[part] = {"models": {}, "two things": {}}
    for name in MODELS:
        some = {**methods, **WITHOUT} if name == "miniature" else methods
        found["models"][name] = models.measure(name, words, some)
        if name == "miniature":
            found["two things"] = both_things(methods, names)
        parts = ["# Which layers are edited", __doc__]
        parts += [line for title, of in stored.items() for line in (f"## {title}", table_of(of))]
        write_results(RESULTS / "layers", stored, "\n\n".join(parts))


if __name__ == "__main__":
    main()
