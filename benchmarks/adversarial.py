"""Attacks with access to the weights on a LoRA that was trained adversarially.

    python -m benchmarks.adversarial                      # half an hour a concept on a busy core
    python -m benchmarks.adversarial --concepts bird --steps 50 --attacks "1 token"

Three erasures by the product itself: the closed form of its defaults alone, with LoRA Align as it
comes, and with LoRA Align's adversarial mode, which between two steps seeks contexts further that
bring the concept back under the current student, and aligns what they draw to the anchor, while
prompts of the bank, the empty prompt and words outside of the ring, but for those by which the
original predicts the concept, keep their prediction. Each is attacked as in `benchmarks.attacks`.
Residue and kept are of the words of `benchmarks.frontier`; none was drawn to learn from.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import attacks, frontier
from benchmarks.ablation import RESULTS, concept_of
from benchmarks.attacks import ATTACKS, AdversarialInputs, attacked
from benchmarks.frontier import Pen, weights_of
from benchmarks.tables import markdown_table
from realera.algorithm import align_erasure, erase, mine
from realera.checkpoints.loading import load_model
from realera.edit.erasure import erase_in_place
from realera.pipelines.unet import DiffusersModel
from realera.settings import Training
from realera.storage.safetensors_file import writing

STATE = Path(".state/adversarial")
ADVERSARIAL = Training(steps=120, rank=16, learning_rate=5e-4, batch=12, adversarial=12)
# What is trained on top of the closed form.
ROWS: dict[str, Training | None] = {
    "closed form alone": None,
    "LoRA Align": Training(),
    "LoRA Align, adversarial": ADVERSARIAL,
}


def erased(scene: AdversarialInputs, training: Training | None, state: Path) -> nn.Module:
    """The network to attack, with the erasure in its weights; what is trained is kept in state."""
    model = scene.model
    mining = mine(model.text, [scene.concept])
    erasure = erase(mining)
    if training is not None:
        steps = tqdm(desc=state.stem, total=training.steps)
        erasure = align_erasure(
            model, erasure, mining, training, on_step=lambda *_: steps.update(), state=state
        )
    network = attacks.erased("original", model, scene.concept)
    erase_in_place(erasure, network)
    return network


def model_class(scene: AdversarialInputs) -> int:
    return scene.classifier.classes.index(scene.concept.name)


def words_kept(
    scene: AdversarialInputs, network: nn.Module, pen: Pen, before: Tensor
) -> list[float]:
    """Residue and kept in percent."""
    k, words = model_class(scene), scene.model.text.words()
    compared = [words[i] for i in torch.cat(frontier.compared_words(before, k)).tolist()]
    point = frontier.counted(before, pen.draw(compared, weights_of(network)), k)
    return list(point.numbers[:2])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", default="dog,truck")
    parser.add_argument("--steps", type=int, default=ADVERSARIAL.steps, help="of the adversarial")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=[*ATTACKS][1:])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measured", action="store_true", help="write what there is")
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
        scene = AdversarialInputs(model, concept_of(concept, "drawn"))
        for name, training in ROWS.items():
            if training is ADVERSARIAL:
                training = replace(training, steps=options.steps)
            stem = f"{name} {concept} {training.steps if training else 0}"
            path = STATE / f"{stem}.json"
            numbers = json.loads(path.read_text()) if path.exists() else {}
            network: nn.Module | None = None
            for what in ("words", *options.attacks):
                if what in numbers or options.measured:
                    continue
                if network is None:
                    network = erased(scene, training, STATE / f"{stem}.safetensors")
                    network.requires_grad_(False)
                if what == "words":
                    numbers[what] = words_kept(scene, network, pen, before)
                else:
                    numbers[what] = attacked(scene, network, *ATTACKS[what])["until"]
                with writing(path, overwrite=True) as part:
                    part.write_text(json.dumps(numbers))
            found.setdefault(name, {})[concept] = numbers
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    write(found, options, f"python -m benchmarks.adversarial {command}".strip())


def write(found: dict[str, dict[str, Any]], options: argparse.Namespace, command: str) -> None:
    rows = [["", "residue ↓", "kept ↑", *options.attacks]]
    for name, concepts in found.items():
        cells = [
            "/".join(
                f"{own['words'][n]:.1f}" if "words" in own else "-" for own in concepts.values()
            )
            for n in (0, 1)
        ]
        cells += [
            "/".join(
                f"{own[attack][-1]:.0f}" if attack in own else "-" for own in concepts.values()
            )
            for attack in options.attacks
        ]
        rows.append([name, *cells])
    _, *notes = __doc__.split("\n\n")[1:]
    parts = [
        "# A LoRA against the attacks",
        f"`{command}`",
        *(note.replace("\n", " ").strip() for note in notes),
        f"Percent, of {options.concepts.replace(',', ' / ')}; {options.steps} adversarial steps of "
        f"batch {ADVERSARIAL.batch} with {ADVERSARIAL.adversarial} contexts. "
        "Attacks as in [attacks.md](attacks.md), at their end; -: not measured.",
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
