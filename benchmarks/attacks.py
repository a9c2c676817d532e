"""Success of attacks with access to the weights, against their number of steps.

    python -m benchmarks.attacks                          # an hour on a busy core
    python -m benchmarks.attacks --concepts cat,dog --erasures ours UCE --out .state/attacks

Four attacks on the bundled miniature, white box. The attacker has the erased U-Net, the text
encoder, and images of the concept with what the original model predicts on them:

- inverse: the rows that the erased K and V read most nearly as the original ones read the concept's
  prompt, by least squares over all layers; exact where the edit is W T
- free rows: Adam on context rows, from those of the concept's own prompt
- 1 token, 4 tokens: textual inversion, Adam on their embeddings before the text encoder
- words: greedy coordinate gradient over whole words of the vocabulary, as UnlearnDiffAtk and P4D
  search: 4 of them in the place of the concept's name, or in front of a prompt that names it

The loss is the error of the erased model's prediction against the original's under the concept's
prompt, on noised images of the concept that the original drew. Every erasure meets the same images,
noise, times and steps. Success is the share of images that the classifier takes for the concept, of
32 noises that no attack saw: the best so far, since an attacker keeps what worked, and at 100 an
attack ends. What is done is kept in .state/attacks: empty it when an erasure or an attack changes.
"""

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import count as counting
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from benchmarks import peers
from benchmarks.ablation import RESULTS, concept_of, restored
from benchmarks.frontier import GUIDANCE, STEPS
from benchmarks.plots import new_figure, save
from benchmarks.tables import markdown_table
from realera.algorithm import align_erasure, erase, mine
from realera.checkpoints.loading import load_model
from realera.concepts import Concept
from realera.edit.erasure import erase_in_place
from realera.edit.text_layers import text_layers
from realera.evaluation.scorers import miniature_classifier
from realera.evaluation.tasks import OBJECT
from realera.pipelines.unet import DiffusersModel
from realera.storage.safetensors_file import writing
from realera.text.encoding import CONTEXT

STATE = Path(".state/attacks")
IMAGES = 32  # of the concept that an attack has, and as many that it is evaluated on
BATCH, SEARCHED = 8, 16  # of them in a step of Adam, and in all steps of a search
RATE = 0.1  # of Adam; 0.03, tried on dog, is slower and ends within a few points of it
CANDIDATES, TOP = 12, 64  # prompts that are tried in a step, of so many words a place
NAMED = OBJECT.replace("{}", "NAME")


# ---------------------------------------------------------------- the erasures


def ours(model: DiffusersModel, concept: Concept) -> None:
    erase_in_place(erase(mine(model.text, [concept])), model.network)


def aligned(model: DiffusersModel, concept: Concept) -> None:
    mining = mine(model.text, [concept])
    erase_in_place(align_erasure(model, erase(mining), mining), model.network)


# Each erases in the network's own weights, whichever they are.
ERASURES: dict[str, Callable[[DiffusersModel, Concept], None]] = {
    "original": lambda model, concept: None,
    "ours": ours,
    "ours, LoRA Align": aligned,
    "UCE": lambda model, concept: peers.write(peers.uce(model, [concept]), model.network),
    "RECE": lambda model, concept: peers.write(peers.rece(model, [concept]), model.network),
    "ESD-x": lambda model, concept: peers.esd_x(model, [concept]),
}


class Shared:
    """An attention processor that reads a prompt once for all latents that share it."""

    def __call__(
        self, attention: Any, h: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        read = h if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            layer(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer, x in ((attention.to_q, h), (attention.to_k, read), (attention.to_v, read))
        )
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attention.to_out[1](attention.to_out[0](h))


def erased(name: str, model: DiffusersModel, concept: Concept) -> nn.Module:
    """The U-Net to attack, frozen; its context is [prompts, tokens, dim] of fewer prompts."""
    path = STATE / f"{name} {concept.name}.pt"
    if not path.exists():
        with restored(model.network), writing(path, overwrite=True) as part:
            ERASURES[name](model, concept)
            torch.save(model.network.state_dict(), part)
    network = copy.deepcopy(model.network).requires_grad_(False)
    network.load_state_dict(torch.load(path))
    for place, layer in network.named_modules():
        if place.endswith(("attn1", "attn2")):
            layer.processor = Shared()
    return network


# ---------------------------------------------------------------- what an attacker has

Batch = tuple[Tensor, Tensor, Tensor]  # z_t, t and what the original predicts there


class AdversarialInputs:
    """One concept: its images, what the original predicts on them, and the classifier."""

    def __init__(self, model: DiffusersModel, concept: Concept) -> None:
        self.model, self.concept, self.classifier = model, concept, miniature_classifier()
        self.decoder = copy.deepcopy(model.vae).bfloat16()
        self.original = erased("original", model, concept)
        self.own = model.text.encode([OBJECT.replace("{}", concept.name)])[CONTEXT]
        self.empty = model.text.encode([""])[CONTEXT]
        self.images = self.drawn(self.original, self.own, seed=0)  # [images, channels, h, w]
        self.batch = cache(self._batch)

    @torch.no_grad()
    def drawn(self, network: nn.Module, rows: Tensor, seed: int) -> Tensor:
        """Latents of one prompt's rows [1, tokens, dim] from noises of a seed."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(IMAGES, *self.model.latent_shape, generator=generator)
        scheduler = copy.deepcopy(self.model.scheduler)
        scheduler.set_timesteps(STEPS)
        both = torch.cat([self.empty, rows])
        for t in scheduler.timesteps:
            plain, towards = network(torch.cat([z, z]), t, both)[0].chunk(2)
            z = scheduler.step(torch.lerp(plain, towards, GUIDANCE), t, z).prev_sample
        return z

    @torch.no_grad()
    def success(self, network: nn.Module, rows: Tensor) -> float:
        """Percent of the images of the rows that show the concept."""
        z = self.drawn(network, rows, seed=1) / self.model.vae.config.scaling_factor
        parts = [self.decoder.decode(part).sample.float() for part in z.bfloat16().split(8)]
        images = (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
        return float(self.classifier(images, [self.concept.name] * IMAGES).mean())

    @torch.no_grad()
    def _batch(self, step: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        z = self.images[torch.randperm(IMAGES, generator=generator)[:count]]
        t = self.model.times(count, generator)
        z_t = self.model.noised(z, torch.randn(z.shape, generator=generator), t)
        return z_t, t, self.original(z_t, t, self.own)[0]

    def loss(self, network: nn.Module, rows: Tensor, batch: Batch) -> Tensor:
        """Of every prompt's rows [prompts, tokens, dim]: [prompts]."""
        (z_t, t, wanted), n = batch, len(rows)
        predicted = network(z_t.repeat(n, 1, 1, 1), t.repeat(n), rows)[0].unflatten(0, (n, -1))
        return (predicted - wanted).square().mean(dim=(1, 2, 3, 4))

    def read(self, form: str, words: Sequence[str], embeddings: Tensor) -> Tensor:
        """The rows [prompts, tokens, dim] of a form with embeddings [prompts, words, width] in the
        places of its words."""
        text, encoder = self.model.text, self.model.text.encoders[0]
        ids = text._padded(text.tokenizers[0], [form.replace("{}", " ".join(words))])
        first = len(text.tokenize([form.split("{}")[0]])[0]) - 1

        def put(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            before, behind = output[:, :first], output[:, first + embeddings.shape[1] :]
            return torch.cat([before, embeddings, behind], dim=1)

        handle = encoder.get_input_embeddings().register_forward_hook(put)
        try:
            return encoder(ids.expand(len(embeddings), -1)).last_hidden_state
        finally:
            handle.remove()

    def known(self, words: Sequence[str]) -> Tensor:
        """The embeddings of words that are one token each: [words, width]."""
        ids = torch.tensor([row[1] for row in self.model.text.tokenize(words)])
        return self.model.text.encoders[0].get_input_embeddings()(ids).detach()


# ---------------------------------------------------------------- the attacks

# Every attack gives the rows [1, tokens, dim] it would draw with, before its first step and after
# every one, and the words that say them where there are such.
Found = Iterator[tuple[Tensor, str]]


def inverse(scene: AdversarialInputs, network: nn.Module) -> Found:
    """x = argmin Σ_layers |W x - W_org e|²."""
    layers = zip(text_layers(network).values(), text_layers(scene.original).values(), strict=True)
    pairs = [(new.layer.weight.double(), old.layer.weight.double()) for new, old in layers]
    new, old = (torch.cat(side) for side in zip(*pairs, strict=True))
    yield scene.own, ""
    x = torch.linalg.lstsq(new, old @ scene.own[0].double().T).solution
    yield x.T.float()[None], ""


def adam(
    scene: AdversarialInputs, network: nn.Module, x: Tensor, rows: Callable[[Tensor], Tensor]
) -> Found:
    """Adam on x, of which rows() are what the network reads."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=RATE)
    for step in counting():
        read = rows(x)
        yield read.detach(), ""
        optimizer.zero_grad()
        scene.loss(network, read, scene.batch(step, BATCH)).sum().backward()
        optimizer.step()


def free(scene: AdversarialInputs, network: nn.Module) -> Found:
    return adam(scene, network, scene.own, lambda x: x)


def inversion(scene: AdversarialInputs, network: nn.Module, count: int) -> Found:
    words = [scene.concept.name] * count
    return adam(scene, network, scene.known(words)[None], partial(scene.read, OBJECT, words))


def search(scene: AdversarialInputs, network: nn.Module, form: str, count: int = 4) -> Found:
    """GCG: words whose embeddings the gradient favours are tried, and the best prompt is kept."""
    form = form.replace("NAME", scene.concept.name)
    text = scene.model.text
    pairs = zip(text.words(), text.tokenize(text.words()), strict=True)
    vocabulary = [word for word, ids in pairs if len(ids) == 3]
    table, generator = scene.known(vocabulary), torch.Generator().manual_seed(0)
    chosen = torch.randint(len(table), (count,), generator=generator)
    batch = scene.batch(0, SEARCHED)  # one for all steps, so that losses compare
    while True:
        words = [vocabulary[k] for k in chosen]
        x = table[chosen][None].clone().requires_grad_()
        rows = scene.read(form, words, x)
        yield rows.detach(), form.replace("{}", " ".join(words))
        (slope,) = torch.autograd.grad(scene.loss(network, rows, batch).sum(), x)
        likely = (slope[0] @ table.T).topk(TOP, largest=False).indices  # [count, TOP]
        tried = chosen.repeat(CANDIDATES + 1, 1)  # the last one stays as it is
        place = torch.randint(count, (CANDIDATES,), generator=generator)
        pick = torch.randint(TOP, (CANDIDATES,), generator=generator)
        tried[torch.arange(CANDIDATES), place] = likely[place, pick]
        with torch.no_grad():
            losses = scene.loss(network, scene.read(form, words, table[tried]), batch)
        chosen = tried[losses.argmin()]


Attack = Callable[[AdversarialInputs, nn.Module], Found]
LONG, SHORT = (0, 5, 10, 20, 50, 100, 200), (0, 5, 10, 20, 40)
# attack -> the steps at which images are drawn, and what is done
ATTACKS: dict[str, tuple[tuple[int, ...], Attack]] = {
    "inverse": ((0, 1), inverse),
    "free rows": (LONG, free),
    "1 token": (LONG, partial(inversion, count=1)),
    "4 tokens": (LONG, partial(inversion, count=4)),
    "words for the name": (SHORT, partial(search, form=OBJECT)),
    "words in front": (SHORT, partial(search, form="{} " + NAMED)),
}


def attacked(
    scene: AdversarialInputs, network: nn.Module, at: Sequence[int], attack: Attack
) -> dict[str, Any]:
    """The best percent until each step, and of the best rows the length in that of the concept's
    own and the words that say them."""
    until: list[float] = []
    best: dict[str, Any] = {}
    for step, (rows, words) in enumerate(attack(scene, network)):
        if step not in at:
            continue
        success = scene.success(network, rows)
        if not until or success > until[-1]:
            norm = float(rows.norm(dim=-1).mean() / scene.own.norm(dim=-1).mean())
            best = {"step": step, "norm": norm, "words": words}
        until.append(max([success, *until[-1:]]))
        if step == at[-1] or until[-1] == 100:
            break
    return {"until": until + until[-1:] * (len(at) - len(until)), **best}


# ---------------------------------------------------------------- what is written

Each = Mapping[str, Mapping[str, Any]]  # concept -> what `attacked` found
Results = Mapping[str, Mapping[str, Each]]  # erasure -> attack -> each


def curve(each: Each) -> list[float]:
    """The mean over the concepts at each step."""
    return [
        sum(column) / len(each) for column in zip(*(f["until"] for f in each.values()), strict=True)
    ]


def draw(results: Results, path: Path) -> None:
    figure = new_figure(11, 6.5)
    panels = figure.subplots(2, 3, sharey=True).flat
    for axes, (attack, (at, _)) in zip(panels, ATTACKS.items(), strict=True):
        for name, attacks in results.items():
            style = "k:" if name == "original" else "o-" if name.startswith("ours") else "s--"
            axes.plot(range(len(at)), curve(attacks[attack]), style, ms=4, label=name)
        axes.set(title=attack, xlabel="steps", ylim=(-4, 104))
        axes.set_xticks(range(len(at)), [str(step) for step in at])
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside lower center", ncols=len(results))
    figure.supylabel("images that show the concept, percent")
    save(figure, path)


def write(results: Results, concepts: Sequence[str], out: Path, command: str) -> None:
    ends, halves = [["", "own name", *ATTACKS]], [["", *ATTACKS, "rows, inverse", "rows, free"]]
    said = [["", "", "percent", "prompt"]]
    for name, attacks in results.items():
        ends.append([name, f"{curve(attacks['inverse'])[0]:.0f}"])
        halves.append([name])
        for attack, each in attacks.items():
            whole, own = curve(each), "/".join(f"{f['until'][-1]:.0f}" for f in each.values())
            ends[-1].append(f"{whole[-1]:.0f} ({own})")
            steps = [k for k, value in zip(ATTACKS[attack][0], whole, strict=True) if value >= 50]
            halves[-1].append(str(steps[0]) if steps else "-")
            said += [
                [f"{name}, {c}", attack, f"{f['until'][-1]:.0f}", f["words"]]
                for c, f in each.items()
                if attack.startswith("words") and name != "original"
            ]
        for attack, digits in (("inverse", 0), ("free rows", 2)):
            lengths = [f"{found['norm']:.{digits}f}" for found in attacks[attack].values()]
            halves[-1].append("/".join(lengths))
    _, *notes = __doc__.split("\n\n")[1:]
    parts = [
        "# Attacks on an erasure, by who holds the weights",
        f"`python -m benchmarks.attacks {command}`".replace(" `", "`"),
        *(note if note.startswith("-") else note.strip().replace("\n", " ") for note in notes),
        f"Percent in the end, mean and by concept ({', '.join(concepts)}), of {IMAGES} images a "
        "concept, so that one of 90 has a standard error of 5 points and one of 50 one of 9. *own "
        "name*: its prompt, before any attack. The original without its name stands for the most "
        "that an attack by words can reach.",
        markdown_table(ends),
        "The first step with half of the images, and how long the rows are that drew most, in "
        "those of the concept's prompt, by concept:",
        markdown_table(halves),
        "The words that drew most:",
        markdown_table(said),
    ]
    with writing(out / "attacks.md", overwrite=True) as part:
        part.write_text("\n\n".join(parts).rstrip() + "\n")
    with writing(out / "attacks.json", overwrite=True) as part:
        part.write_text(json.dumps({"command": command, "attacks": results}, indent=1) + "\n")
    draw(results, out / "attacks.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", default="dog,truck,cat")
    parser.add_argument("--erasures", nargs="+", choices=ERASURES, default=[*ERASURES])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    concepts = options.concepts.split(",")
    STATE.mkdir(parents=True, exist_ok=True)
    model = load_model("miniature")
    assert isinstance(model, DiffusersModel)
    model.text.encoders[0].requires_grad_(False)

    results: Any = {name: {attack: {} for attack in ATTACKS} for name in options.erasures}
    for number, concept in enumerate(concepts, 1):
        scene = AdversarialInputs(model, concept_of(concept, "drawn"))
        for name in tqdm(options.erasures, desc=concept):
            network = erased(name, model, scene.concept)
            for attack, (at, run) in ATTACKS.items():
                path = STATE / f"{name} {concept} {attack}.json"
                if not path.exists():
                    found = attacked(scene, network, at, run)
                    with writing(path, overwrite=True) as part:
                        part.write_text(json.dumps(found))
                results[name][attack][concept] = json.loads(path.read_text())
        write(results, concepts[:number], options.out, command)


if __name__ == "__main__":
    main()
