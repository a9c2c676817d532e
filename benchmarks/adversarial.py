"""Can a LoRA withstand who holds the weights? Trained against the attacks, it is attacked again.

    python -m benchmarks.adversarial                          # an hour and a half of one core
    python -m benchmarks.adversarial --concepts bird --steps 50 --attacks "1 token"

On top of the closed form of the defaults. Between two steps, contexts that bring the concept back
under the current student are sought further, half of them free rows and half of them embeddings of
one and four tokens (`benchmarks.attacks`); the step aligns what they draw to the anchor, and with
it words that draw the concept, while other words, prompts of the bank and the empty prompt keep
their prediction. The LoRA is on K and V alone, or on every matrix of the attention blocks:
self-attention, output and feed-forward too. Residue and kept are of the half of the vocabulary that
nothing was learned from, as `benchmarks.frontier` draws them.
"""

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from benchmarks import attacks, frontier
from benchmarks.ablation import RESULTS, concept_of
from benchmarks.attacks import ATTACKS, RATE, Scene, attacked
from benchmarks.frontier import Pen, weights_of
from benchmarks.peers import Weights
from benchmarks.tables import markdown_table
from realera.bank import bank_prompts
from realera.diffusers_model import DiffusersModel
from realera.evaluation.tasks import OBJECT
from realera.families.loading import load_model
from realera.files import writing
from realera.models import CONTEXT

STATE = Path(".state/adversarial")
RANK, LEARNING_RATE = 16, 5e-4
CONTEXTS, RENEWED = 8, 0.04  # that attack, and how often one of them begins anew
KEPT, OWN, BANK, SEARCHES = 28, 8, 8, 2  # words and prompts of a step, steps of the attacks in it
WEIGHT = 0.3  # of what is to go, where what is kept counts 1
LAYERS = {"K and V": ("attn2.to_k", "attn2.to_v"), "all of attention": ("transformer_blocks",)}


def lora(network: nn.Module, where: str, generator: torch.Generator) -> dict[str, Any]:
    """Weight -> (A, B)."""
    found = {}
    for name, weight in network.named_parameters():
        if weight.dim() == 2 and any(part in name for part in LAYERS[where]):
            a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            found[name] = (a.requires_grad_(), torch.zeros(len(weight), RANK).requires_grad_())
    return found


def contexts(scene: Scene, number: int, generator: torch.Generator) -> tuple[Tensor, Any]:
    """A context that attacks, from where it starts: what is sought, and the rows it is read as."""
    if number % 2:
        words = [scene.concept.name] * (1 if number % 4 == 1 else 4)
        x = scene.known(words)[None]
        x = x + 0.5 * x.std() * torch.randn(x.shape, generator=generator)
        return x.requires_grad_(), partial(scene.read, OBJECT, words)
    return scene.own.clone().requires_grad_(), lambda x: x


def trained(scene: Scene, where: str, steps: int, before: Tensor) -> nn.Module:
    """The erased network. before: what the words drew, [words, classes]."""
    model, generator = scene.model, torch.Generator().manual_seed(0)
    start = attacks.erased("ours", model, scene.concept)
    network, layers = copy.deepcopy(start).bfloat16(), lora(start, where, generator)
    weights = [w for pair in layers.values() for w in pair]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    original = {name: w.bfloat16() for name, w in scene.original.named_parameters()}

    def merged() -> Weights:
        new = {name: start.get_parameter(name) + b @ a for name, (a, b) in layers.items()}
        return {name: new.get(name, w).bfloat16() for name, w in start.named_parameters()}

    def predict(read: Weights, z_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return functional_call(network, read, (z_t.bfloat16(), t, rows.bfloat16()))[0].float()

    def some(count: int, among: int) -> Tensor:
        return torch.randint(among, (count,), generator=generator)

    def noised(z: Tensor) -> tuple[Tensor, Tensor]:
        t = model.times(len(z), generator)
        return model.noised(z, torch.randn(z.shape, generator=generator), t), t

    words, learned, bank = model.text.words(), frontier.halves(len(before)), bank_prompts()
    drew = before.argmax(-1) == model_class(scene)
    own, others = ((mask & learned).nonzero()[:, 0].tolist() for mask in (drew, ~drew))
    anchor = model.text.encode([OBJECT.replace("{}", scene.concept.anchor)])[CONTEXT]
    shown = torch.cat([scene.images, scene.drawn(scene.original, anchor, seed=2)])
    attacking = [contexts(scene, number, generator) for number in range(CONTEXTS)]
    searches = [torch.optim.Adam([x], lr=RATE) for x, _ in attacking]

    for _ in tqdm(range(steps), desc=f"{scene.concept.name}, {where}", leave=False):
        read = merged()
        fixed = {name: w.detach() for name, w in read.items()}
        for number in (torch.rand(CONTEXTS, generator=generator) < RENEWED).nonzero()[:, 0]:
            attacking[number] = contexts(scene, int(number), generator)
            searches[number] = torch.optim.Adam([attacking[number][0]], lr=RATE)
        for _ in range(SEARCHES):
            z_t, t = noised(scene.images[some(3 * CONTEXTS, len(scene.images))])
            with torch.no_grad():
                wanted = predict(original, z_t, t, scene.own)
            rows = torch.cat([read_as(x) for x, read_as in attacking])
            (predict(fixed, z_t, t, rows) - wanted).square().mean((1, 2, 3)).sum().backward()
            for search in searches:
                search.step()
                search.zero_grad()
        kept = [OBJECT.replace("{}", words[others[k]]) for k in some(KEPT, len(others))]
        kept += [*(bank[k] for k in some(BANK - 2, len(bank))), "", ""]
        gone = [OBJECT.replace("{}", words[own[k]]) for k in some(OWN - 2, len(own))]
        gone += 2 * [OBJECT.replace("{}", scene.concept.name)]
        rows = model.text.encode([*kept, *gone])[CONTEXT]
        target = torch.cat([rows[: len(kept)], anchor.expand(len(gone), -1, -1)])
        z_t, t = noised(shown[some(len(rows), len(shown))])
        z_a, t_a = noised(scene.images[some(3 * CONTEXTS, len(scene.images))])
        found = torch.cat([read_as(x) for x, read_as in attacking]).detach()
        with torch.no_grad():
            goal, goal_a = predict(original, z_t, t, target), predict(original, z_a, t_a, anchor)
        error = (predict(read, z_t, t, rows) - goal).square().mean((1, 2, 3))
        against = (predict(read, z_a, t_a, found) - goal_a).square().mean()
        loss = error[: len(kept)].mean() + WEIGHT * (error[len(kept) :].mean() + against)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    done = copy.deepcopy(start)
    done.load_state_dict({name: w.detach().float() for name, w in merged().items()}, strict=False)
    return done


def model_class(scene: Scene) -> int:
    return scene.judge.classes.index(scene.concept.name)


def measured(
    scene: Scene, network: nn.Module, pen: Pen, before: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Residue and kept on unseen words, and what each attack reaches."""
    k, words = model_class(scene), scene.model.text.words()
    asked = [words[i] for i in torch.cat(frontier.asked(before, k)).tolist()]
    point = frontier.counted(before, pen.draw(asked, weights_of(network)), k)
    residue, kept, _ = frontier.rates(*point.unseen)
    network.requires_grad_(False)
    reached = {name: attacked(scene, network, *ATTACKS[name])["until"] for name in names}
    return {"residue": residue, "kept": kept, "attacks": reached}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", default="dog,truck")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=[*ATTACKS][1:])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for folder in (STATE, attacks.STATE, frontier.STATE):
        folder.mkdir(parents=True, exist_ok=True)
    model = load_model("miniature")
    assert isinstance(model, DiffusersModel)
    model.text.encoders[0].requires_grad_(False)
    pen = Pen(model)
    before = frontier.drawn_before(pen, model.text.words())
    found: dict[str, dict[str, Any]] = {}
    for concept in options.concepts.split(","):
        scene = Scene(model, concept_of(concept, "drawn"))
        for where in ("", *LAYERS):
            path = STATE / f"{where or 'closed form'} {concept} {options.steps}.json"
            if not path.exists():
                network = attacks.erased("ours", model, scene.concept)
                if where:
                    network = trained(scene, where, options.steps, before)
                numbers = measured(scene, network, pen, before, options.attacks)
                with writing(path, overwrite=True) as part:
                    part.write_text(json.dumps(numbers))
            found.setdefault(where, {})[concept] = json.loads(path.read_text())
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    write(found, options, f"python -m benchmarks.adversarial {command}".strip())


def write(found: dict[str, dict[str, Any]], options: argparse.Namespace, command: str) -> None:
    rows = [["", "residue ↓", "kept ↑", *options.attacks]]
    for where, concepts in found.items():
        cells = [
            "/".join(f"{numbers[key]:.1f}" for numbers in concepts.values())
            for key in ("residue", "kept")
        ]
        cells += [
            "/".join(f"{numbers['attacks'][name][-1]:.0f}" for numbers in concepts.values())
            for name in options.attacks
        ]
        rows.append([f"LoRA on {where}" if where else "closed form alone", *cells])
    _, *notes = __doc__.split("\n\n")[1:]
    parts = [
        "# A LoRA against the attacks",
        f"`{command}`",
        *(note.replace("\n", " ").strip() for note in notes),
        f"Percent, of {options.concepts.replace(',', ' / ')}; {options.steps} steps of training. "
        "Attacks as in [attacks.md](attacks.md), at their end.",
        markdown_table(rows),
    ]
    for name, text in (
        ("adversarial.md", "\n\n".join(parts).rstrip() + "\n"),
        ("adversarial.json", json.dumps({"command": command, "found": found}, indent=1) + "\n"),
    ):
        with writing(options.out / name, overwrite=True) as part:
            part.write_text(text)


if __name__ == "__main__":
    main()
