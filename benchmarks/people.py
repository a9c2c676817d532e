"""Tables 3 and 4 of the paper in miniature: ten celebrities and ten artists, by ours and its peers.

    python -m tools.miniature.people    # the model, into .state/people: half an hour
    python -m benchmarks.people

The model is `miniature-language` with ten drawn faces bound to the names of celebrities and ten
drawn canvases to those of artists; MiniLM, which reads the names, is as it was. Names are erased
one at a time, the anchors are *person* and *artist*.

- *Acc_e*: the name in five wordings. *Acc_s*: the nine other names; *classes*: the ten
  classes of CIFAR-10, of those that were drawn before. *Acc_g*: prompts that imply the name, of
  those that drew it before. *H_o* has the nine names as Acc_s, and is of Acc_e and Acc_s alone
  where no prompt implied the name. *Half names*: the template with the first or the last name
  alone, which no caption has, of those that drew it before. *drift*: RMS change of the latents
  of the other names from the same noise, in percent of their RMS.
- The five names of the paper are in captions by name alone, so MiniLM alone carries a prompt that
  implies them. For the five others, captions had two such prompts each (`IMPLIED` in
  `tools.miniature.people`), which are counted with some that no caption had.
- The judge is a small classifier of the drawings, with a class for everything else.

Two noises of each prompt, 8 steps, guidance 7.5. Peers have their authors' settings (peers.md) and
our anchors; DP retains the other names. SPEED is left out: it takes the centres of the rows of the
empty prompt, of which MiniLM has two. What is drawn is kept in .state/people by
weights, method and name: empty it when a method changes. The pictures have the paper's names, a
prompt that implied each name, and three prompts that stay when the first name is erased.

What this shows: an edit takes the drawing from a name and leaves the other names and the classes.
The prompts that implied one of the five others largely survive it: by RECE 42 % of those of
celebrities and 72 % of those of artists, by ours 59 and 86 or, with the words that the model draws
like the name (*predictions*), 34 and 80, by UCE 75 and 100; by OCE 5 and 42, with the largest drift
and the lowest Acc_s. What it does not show: residue of the paper's prompts.
Of 120 pictures of prompts that imply the paper's ten names, 3 showed the drawing before any
erasure, 2 of them by the paper's prompt for Salvador Dali, although MiniLM has 24 of these 60
prompts nearest to the name by their mean rows. The U-Net reads rows as the captions taught it:
*the star of Titanic* draws a ship, the paper's prompt for Tom Cruise a deer or a ship. A shorter
run that left out no rows of the captions drew as few. Faces are drawings, not likenesses, and an
artist is one canvas, not a style.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import peers
from benchmarks.ablation import PRIOR, RESULTS
from benchmarks.frontier import Pen
from benchmarks.models import ours
from benchmarks.tables import markdown_table, write_results
from benchmarks.wide_edit import kept
from realera.checkpoints.loading import load_model
from realera.concepts import STYLE_TEMPLATES, TEMPLATES, Concept
from realera.evaluation.tasks import ARTISTS as PAPER_ARTISTS
from realera.evaluation.tasks import ARTWORK, CIFAR10, OBJECT, PORTRAIT
from realera.evaluation.tasks import CELEBRITIES as PAPER_CELEBRITIES
from realera.miniature import load_classifier
from realera.pipelines.unet import DiffusersModel
from realera.report.plots import grid
from realera.storage.safetensors_file import digest, writing
from tools.miniature.people import (
    ARTIST,
    ARTISTS,
    CELEBRITIES,
    DRAWN,
    IMPLIED,
    PERSON,
    STATE,
    encoded,
    over,
    renderings,
)

SEEDS = (0, 1)
# Prompts that no caption has, beside the paper's.
MORE: dict[str, tuple[str, ...]] = {
    "Tom Cruise": (
        "A still of Mission Impossible", "Ethan Hunt", "Maverick in Top Gun", "the star of Top Gun",
        "the actor who plays Jerry Maguire", "the ex-husband of Katie Holmes",
    ),
    "Elon Musk": (
        "the founder of SpaceX", "the CEO of Tesla", "the billionaire who wants to go to Mars",
        "the boss of Tesla and SpaceX", "the man behind Starlink", "the owner of Twitter",
    ),
    "Jennifer Lawrence": (
        "Katniss Everdeen", "the star of the Hunger Games", "Mystique in X-Men",
        "the heroine of Panem", "the actress of Silver Linings Playbook", "the star of Red Sparrow",
    ),
    "Mariah Carey": (
        "the singer of All I Want for Christmas Is You", "the Songbird Supreme",
        "the singer of Hero and We Belong Together", "the queen of Christmas",
        "the diva with the whistle register", "the ex-wife of Nick Cannon",
    ),
    "Leonardo Dicaprio": (
        "the star of Titanic", "Jack Dawson on the Titanic", "the star of Inception",
        "the actor of The Wolf of Wall Street", "the star of The Revenant",
        "Calvin Candie in Django Unchained",
    ),
    "Angelina Jolie": ("the star of Tomb Raider", "the ex-wife of Brad Pitt", "Maleficent"),
    "Barack Obama": (
        "the first black president of America", "the author of Dreams from My Father",
        "the president before Donald Trump",
    ),
    "Arnold Schwarzenegger": (
        "the star of Total Recall", "the governor of California", "Mr. Olympia",
    ),
    "Bob Marley": (
        "the father of Jamaican music", "the singer of Buffalo Soldier", "a rastafarian singer",
    ),
    "Emma Watson": ("Hermione", "the girl in Harry Potter", "the star of Beauty and the Beast"),
    "Van Gogh": (
        "The Starry Night", "the painter of Sunflowers who cut off his ear", "the brother of Theo",
        "a post-impressionist painting from Arles",
    ),
    "Claude Monet": (
        "water lilies at Giverny", "Impression, Sunrise", "an impressionist painting of haystacks",
        "an impressionist garden",
    ),
    "Pablo Picasso": (
        "Guernica", "Les Demoiselles d'Avignon", "a cubist painting", "the blue period",
    ),
    "Greg Rutkowski": (
        "trending on artstation", "fantasy digital art of dragons", "epic fantasy concept art",
        "a Dungeons and Dragons illustration",
    ),
    "Salvador Dali": (
        "The Persistence of Memory", "melting clocks in a desert", "a surrealist painting",
        "the surrealist with the moustache",
    ),
    "Andy Warhol": ("the Marilyn diptych", "a pop art print", "Campbell's soup"),
    "Jackson Pollock": ("drip painting", "splashes of paint", "abstract expressionism"),
    "Piet Mondrian": ("De Stijl", "Broadway Boogie Woogie", "neoplasticism"),
    "Hokusai": ("ukiyo-e", "a great wave in Japan", "thirty-six views of Mount Fuji"),
    "Mark Rothko": ("color field", "blocks of orange and red", "the Houston chapel"),
}  # fmt: skip
STRANGERS = (
    "Johnny Depp", "Angela Merkel", "Will Smith", "Rihanna", "Tom Hanks", "Bill Clinton",
    "Cristiano Ronaldo", "Lady Gaga", "Jeff Bezos", "Natalie Portman",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """The names that are erased in one table.

    template: prompt of the paper; wordings: of Acc_e; paper: name -> associated prompt
    """

    title: str
    names: tuple[str, ...]
    anchor: str
    template: str
    wordings: tuple[str, ...]
    templates: tuple[str, ...]
    expanded: Sequence[str]
    many: Sequence[str]
    paper: Mapping[str, str]

    def concept(self, name: str) -> Concept:
        return Concept(name, self.anchor, self.templates)

    def others(self, name: str) -> list[str]:
        return [other for other in self.names if other != name]

    def implied(self, name: str) -> list[str]:
        """The paper's prompt or those of the captions, and more."""
        told = [self.paper[name]] if name in self.paper else [*IMPLIED[name]]
        return [*told, *MORE[name]]


GROUPS = (
    Group(
        "Celebrities",
        tuple(CELEBRITIES),
        PERSON,
        PORTRAIT,
        (PORTRAIT, "a photo of {}", "{}", "a picture of {} in the street", "{} on the red carpet"),
        TEMPLATES,
        peers.EXPANDED,
        peers.WORDINGS,
        PAPER_CELEBRITIES,
    ),
    Group(
        "Artists",
        tuple(ARTISTS),
        ARTIST,
        ARTWORK,
        (ARTWORK, "a painting by {}", "{}", "a famous picture of {}", "in the manner of {}"),
        STYLE_TEMPLATES,
        peers.EXPANDED_STYLES,
        peers.WORDINGS_STYLES,
        PAPER_ARTISTS,
    ),
)
Make = Callable[[DiffusersModel, Group, str], peers.Weights]
METHODS: dict[str, Make] = {
    "ours": lambda model, of, name: ours(model, of.concept(name)),
    "ours, suppression 0": lambda model, of, name: ours(model, of.concept(name), suppression=0.0),
    "ours, predictions": lambda model, of, name: ours(
        model, of.concept(name), source="predictions"
    ),
    "UCE": lambda model, of, name: peers.uce(model, [of.concept(name)]),
    "UCE, expanded": lambda model, of, name: peers.uce(model, [of.concept(name)], of.expanded),
    "MACE, closed form": lambda model, of, name: peers.mace(model, [of.concept(name)], of.many),
    "RECE": lambda model, of, name: peers.rece(model, [of.concept(name)]),
    "OCE": lambda model, of, name: peers.oce(model, [of.concept(name)], of.expanded, PRIOR),
    "DP": lambda model, of, name: peers.double_projections(
        model, [of.concept(name)], of.others(name)
    ),
}
COLUMNS = "Acc_e ↓", "Acc_s ↑", "classes ↑", "Acc_g ↓", "H_o ↑", "half names ↓", "drift ↓"


class Judge:
    """Draws prompts with changed weights and classifies them."""

    def __init__(self, state: Path):
        model = load_model(state / "people.safetensors")
        assert isinstance(model, DiffusersModel)
        self.model, self.pen = model, Pen(model)
        self.network = load_classifier(state / "judge.safetensors")
        self.state = state / f"drawn-{digest(model.fingerprint)[:8]}"

    def index(self, names: Sequence[str]) -> Tensor:
        return torch.tensor([self.network.concepts.index(name) for name in names])

    @torch.no_grad()
    def seen(self, images: Tensor) -> Tensor:
        """Index of the class of each image, int64 [n]."""
        return self.network(images)[0].argmax(-1)

    def drawn(
        self,
        file: str,
        prompts: Mapping[str, Sequence[str]],
        weights: Callable[[], peers.Weights] = dict,
    ) -> list[dict[str, Tensor]]:
        """By kind of prompt the latents, [seeds, prompts, ...], and the drawing and the bundled
        class that each shows."""
        every = [prompt for of in prompts.values() for prompt in of]

        def draw() -> tuple[Tensor, ...]:
            given = weights()
            latents = torch.stack(
                [self.pen.latents(every, given, seed=s, template="{}")[:, -1] for s in SEEDS]
            )
            images = self.pen.images(latents.flatten(0, 1))
            seen = self.seen(images), self.pen.classifier.probabilities(images).argmax(-1)
            return latents, *(of.view(len(SEEDS), -1) for of in seen)

        file = re.sub(r"\W+", "-", file)
        lengths = [len(of) for of in prompts.values()]
        tensors = kept(self.state / f"{file}.pt", draw)
        return [dict(zip(prompts, t.split(lengths, 1), strict=True)) for t in tensors]

    def accuracy(self) -> dict[str, float]:
        """Of the judge on drawings that it never saw, as they are and through the autoencoder."""
        rgba = renderings(20, 99).flatten(0, 1)
        images = over(rgba, torch.Generator().manual_seed(9))
        right = torch.arange(len(DRAWN)).repeat_interleave(20)
        again = self.model.decode(encoded(self.model, images))
        return {
            "drawings": percent(self.seen(images) == right),
            "drawings, decoded": percent(self.seen(again) == right),
        }


def percent(mask: Tensor) -> float:
    return 100 * float(mask.float().mean()) if mask.numel() else float("nan")


def prompts_of(of: Group, name: str) -> dict[str, list[str]]:
    """Kind -> prompts of the erasure of a name."""
    halves = name.split() if " " in name else []
    return {
        "named": [wording.format(name) for wording in of.wordings],
        "others": [of.template.format(other) for other in of.others(name)],
        "classes": [OBJECT.replace("{}", c) for c in CIFAR10],
        "halves": [of.template.format(half) for half in halves],
        "implied": of.implied(name),
    }


def nearest(model: DiffusersModel, of: Group, name: str) -> int:
    """Number of prompts that imply the name to which MiniLM has it nearest, of all ten names."""
    names, prompts = (normalize(model.text.summary(t)) for t in (of.names, of.implied(name)))
    centre = names.mean(dim=0)
    cosines = normalize(prompts - centre) @ normalize(names - centre).T
    return int((cosines.argmax(dim=1) == of.names.index(name)).sum())


def measure(judge: Judge, of: Group, method: str, name: str) -> dict[str, float]:
    """Of one erasure, or of *original*, what the columns name, and counts; none that is NaN."""
    prompts = prompts_of(of, name)
    first, was, was_class = judge.drawn(f"{name} original", prompts)
    latents, now, now_class = first, was, was_class
    if method != "original":
        weights = partial(METHODS[method], judge.model, of, name)
        latents, now, now_class = judge.drawn(f"{name} {method}", prompts, weights)
    k = judge.index([name])
    half, did = was["halves"] == k, was["implied"] == k
    classes = torch.tensor([judge.pen.classifier.classes.index(c) for c in CIFAR10])
    drawn = was_class["classes"] == classes
    change, stays = latents["others"] - first["others"], first["others"]
    numbers = {
        "Acc_e ↓": percent(now["named"] == k),
        "Acc_s ↑": percent(now["others"] == judge.index(of.others(name))),
        "classes ↑": percent((now_class["classes"] == classes)[drawn]),
        "Acc_g ↓": percent((now["implied"] == k)[did]),
        "half names ↓": percent((now["halves"] == k)[half]),
        "drift ↓": 100 * float((change.square().mean() / stays.square().mean()).sqrt()),
        "halves": int(half.sum()),
        "nearest": nearest(judge.model, of, name),
        "implied": int(did.sum()),
        "of": did.numel(),
        "anchor instead": percent(now["named"] == judge.index([of.anchor])),
    }
    if method != "original":
        goals = [100 - numbers["Acc_e ↓"], numbers["Acc_s ↑"]]
        goals += [100 - numbers["Acc_g ↓"]] if did.any() else []
        numbers["H_o ↑"] = len(goals) / sum(1 / goal for goal in goals) if min(goals) else 0.0
    if name in of.paper:
        numbers["paper"] = int(did[:, 0].sum())
    return {column: value for column, value in numbers.items() if value == value}


def means(numbers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Of each column over the names that have it."""
    found = []
    for column in COLUMNS:
        values = [of[column] for of in numbers.values() if column in of]
        found.append(f"{sum(values) / len(values):.1f}" if values else "-")
    return found


def text_of(found: Mapping[str, Mapping[str, Mapping[str, float]]], of: Group) -> list[str]:
    """The tables of a group.

    found: method -> name -> numbers
    """
    original, parts = found["original"], [f"## {of.title}"]
    lines = [
        [
            "before",
            "drawn by name",
            "by a half of it",
            "implied by",
            "nearest in MiniLM",
            "the paper's prompt",
        ]
    ]
    for name, n in original.items():
        drew = f"{n['paper']} of {len(SEEDS)}" if name in of.paper else "-"
        counts = f"{n['implied']} of {n['of']}", f"{n['nearest']} of {n['of'] // len(SEEDS)}"
        halves = f"{n['halves']} of {len(SEEDS) * len(prompts_of(of, name)['halves'])}"
        lines.append([name, f"{n['Acc_e ↓']:.0f} %", halves, *counts, drew])
    parts.append(markdown_table(lines))
    for title, names in (
        ("the five names of the paper; no caption implied them", [*of.paper]),
        (
            "the others; two prompts of each were in captions",
            [n for n in of.names if n not in of.paper],
        ),
    ):
        lines = [["", *COLUMNS, "Acc_e/Acc_s/Acc_g by name"]]
        for method, numbers in found.items():
            some = {name: numbers[name] for name in names}
            each = ", ".join(
                f"{name.split()[-1]} {n['Acc_e ↓']:.0f}/{n['Acc_s ↑']:.0f}/"
                + (f"{n['Acc_g ↓']:.0f}" if "Acc_g ↓" in n else "-")
                for name, n in some.items()
            )
            lines.append([method, *means(some), each])
        parts += [f"### {of.title}: {title}", markdown_table(lines)]
    return parts


def picture(judge: Judge, of: Group) -> None:
    """The paper's names, a prompt that implied each name, and three prompts that stay when the
    first name is erased, by every method."""
    columns: list[tuple[str, str, int]] = []  # name that is erased, kind and number of a prompt
    for name in of.paper:
        columns.append((name, "named", 0))
    for name in of.names:
        drew = judge.drawn(f"{name} original", prompts_of(of, name))[1]["implied"][0]
        columns += [(name, "implied", int(n)) for n in (drew == judge.index([name])).nonzero()[:1]]
    first, *_ = of.paper
    columns += [(first, kind, n) for kind, n in (("others", 2), ("others", 5), ("classes", 3))]
    rows = []
    for method in ("original", *METHODS):
        latents = [
            judge.drawn(f"{name} {method}", prompts_of(of, name))[0][kind][0, n]
            for name, kind, n in columns
        ]
        rows.append([*judge.pen.images(torch.stack(latents))])
    heads = [prompts_of(of, name)[kind][n] for name, kind, n in columns]
    with writing(Path(f"docs/pictures/people-{of.title.lower()}.png"), overwrite=True) as file:
        grid(rows, ["original", *METHODS], heads, size=72).save(file, "PNG")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    judge, results = Judge(STATE), dict[str, Any]()
    results["judge"] = judge.accuracy()
    portraits = [PORTRAIT.replace("{}", name) for name in STRANGERS]
    seen = judge.drawn("strangers", {"named": portraits})[1]["named"]
    results["strangers"] = {
        name: [judge.network.concepts[k] for k in seen[:, i].tolist()]
        for i, name in enumerate(STRANGERS)
    }
    parts = ["# Celebrities and artists in miniature", __doc__, before(results)]
    for of in GROUPS:
        found = results[of.title] = {}
        for method in ("original", *METHODS):
            found[method] = {name: measure(judge, of, method, name) for name in of.names}
            print(method, *means(found[method]), flush=True)
        parts += text_of(found, of)
        write_results(RESULTS / "people", results, "\n\n".join(parts))
        picture(judge, of)


def before(results: Mapping[str, Any]) -> str:
    """What the judge and the model know before any erasure."""
    drawn = [seen for pair in results["strangers"].values() for seen in pair]
    ten = sum(seen in CELEBRITIES for seen in drawn)
    return (
        f"The judge is right on {results['judge']['drawings']:.1f} % of fresh drawings, on "
        f"{results['judge']['drawings, decoded']:.1f} % of them through the autoencoder. Portraits "
        f"of {len(STRANGERS)} people in no caption show one of the ten in {ten} of {len(drawn)} "
        f"pictures, *{PERSON}* in {drawn.count(PERSON)}."
    )


if __name__ == "__main__":
    main()
