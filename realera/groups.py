"""Algorithm 1 for more concepts than one memory, or one machine, holds.

Eq. 7 reads nothing but sums, and the sums of different concepts add up: a group of concepts is
encoded, summed and dropped. What a group must know of all others is settled before, in names alone:
which word is nearest to which concept, and which words are drawn. So the sums, and T, are those of
a joint fit but for rounding.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .algorithm import (
    MiningResult,
    collect,
    fit,
    preserved_prompts,
    quiet,
    training_inputs,
    version_of,
)
from .concepts import Concept
from .edit.closed_form import Sums
from .edit.erasure import Erasure, Lora
from .mining.pairs import encode_pairs
from .mining.preservation_bank import bank_prompts
from .mining.vocabulary import WordAssignment, assign_words, drawn, neighbourhood_of
from .pipelines.interface import Diffusion
from .settings import Settings, Training
from .storage.safetensors_file import digest, keep_tensors, open_tensors
from .text.encoding import BATCH, TextEncoder
from .text.token_alignment import prompt_summaries
from .training.loop import align

AT_ONCE = 4  # concepts in memory: with 80 words each 0.2 GB in SDXL
PARTS = ("erase", "moved", "preserve", "concepts")
FOLDER = ".realera-groups"  # in the output folder, for what a run that was stopped goes on from
FILE = re.compile(  # whole, or hidden and unfinished as `safetensors_file.beside` names it
    r"(?:(?:group|alignment)-\d{5,}|erasure)\.safetensors"
    r"|\.(?:(?:group|alignment)-\d{5,}|erasure)\.safetensors\.[0-9a-f]{8}-\d+\.realera-tmp"
)

Progress = Callable[[int, int], None]
Words = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Group:
    """Some concepts, and the words that are theirs in a joint fit; names alone, so that it travels.

    near, far, outside: number of a concept and a word, concept by concept, as
    `vocabulary.WordAssignment` has
        them
    neighbors, beyond: which of them were drawn, concept by concept
    contested: words inside the rings of several concepts of the whole, which went to the nearest
    """

    concepts: tuple[Concept, ...]
    near: Words
    far: Words
    outside: Words
    neighbors: tuple[int, ...]
    beyond: tuple[int, ...]
    contested: tuple[str, ...] = ()

    def part(self, start: int, stop: int) -> "Group":
        """The concepts from number `start` to before `stop`."""

        def words(listed: Words, chosen: Sequence[int]) -> tuple[Words, tuple[int, ...]]:
            first, last = (bisect_left(listed, n, key=lambda word: word[0]) for n in (start, stop))
            begin, end = (bisect_left(chosen, n, key=lambda k: listed[k][0]) for n in (start, stop))
            own = tuple((number - start, word) for number, word in listed[first:last])
            return own, tuple(k - first for k in chosen[begin:end])

        near, neighbors = words(self.near, self.neighbors)
        far, beyond = words(self.far, self.beyond)
        outside, _ = words(self.outside, ())
        return Group(self.concepts[start:stop], near, far, outside, neighbors, beyond)

    def parts(self, size: int) -> list["Group"]:
        """In groups of `size` concepts."""
        return [self.part(n, n + size) for n in range(0, len(self.concepts), size)]


@dataclass(frozen=True)
class PartialSums:
    """What a group gives to the whole; parts add up.

    sums: stream -> its sums; summary: of its prompts, [prompts, dim], as `Pairs` has it
    """

    sums: Mapping[str, Sums]
    summary: Tensor

    def __add__(self, other: "PartialSums") -> "PartialSums":
        sums = {stream: own + other.sums[stream] for stream, own in self.sums.items()}
        return PartialSums(sums, torch.cat([self.summary, other.summary]))


@dataclass(frozen=True)
class Job:
    """One run, as every process that works on it must know it.

    run: what decides every number of it, hashed: release, encoder, bank and settings
    state: the folder that the parts that are done lie in
    """

    model: str
    dtype: str | None
    device: str
    settings: Settings
    run: str
    state: Path


def run_of(text: TextEncoder, settings: Settings) -> str:
    """What the numbers of a run are decided by, beside its concepts."""
    return digest(version_of("realera"), text.fingerprint, bank_prompts(), asdict(settings))


def whole(
    text: TextEncoder,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    progress: Progress = quiet,
) -> Group:
    """All concepts with the words around them, chosen and drawn as `algorithm.mine` does.

    Raises ValueError when the neighbours are no words: random steps are drawn one after the other.
    """
    if settings.source != "vocabulary":
        raise ValueError(
            f"source {settings.source!r} draws the steps of all concepts one after the other, in "
            "one process: name the concepts with -c, or leave the source at 'vocabulary'"
        )
    preserved_prompts(text, concepts, settings)  # raises before anything slow
    firsts = [concept.templates[0].replace("{}", concept.name) for concept in concepts]
    some = (firsts[n : n + BATCH] for n in range(0, len(firsts), BATCH))
    own = torch.cat(
        [prompt_summaries(text, prompts, text.encode(prompts)).cpu() for prompts in some]
    )
    choice = assign_words(text, concepts, own, settings, progress)
    generator = torch.Generator().manual_seed(settings.seed)
    numbers = range(len(concepts))

    def draw(words: Words, count: int) -> tuple[int, ...]:
        whose = torch.tensor([number for number, _ in words], dtype=torch.int64)
        return tuple(drawn(whose, count, generator, numbers).tolist())

    neighbors = draw(choice.near, settings.neighbors)
    if settings.beyond_seed is not None:
        generator.manual_seed(settings.beyond_seed)
    beyond = draw(choice.far, settings.beyond)
    found = choice.near, choice.far, choice.outside
    return Group(tuple(concepts), *found, neighbors, beyond, choice.contested)


def mine_group(text: TextEncoder, group: Group, settings: Settings) -> MiningResult:
    """The group's share of a joint mining; the prompts to preserve are nobody's."""
    pairs = encode_pairs(text, group.concepts)
    nowhere = torch.zeros_like(pairs.summary[pairs.first])
    choice = WordAssignment(group.near, group.far, group.outside, {}, nowhere)
    ring = neighbourhood_of(text, pairs, settings, choice)
    near = ring.mined(ring.near, torch.tensor(group.neighbors, dtype=torch.int64))
    far = ring.mined(ring.far, torch.tensor(group.beyond, dtype=torch.int64))
    return MiningResult(text, ring, near, replace(far, target=far.e), settings, torch.empty(0))


def sum_group(text: TextEncoder, group: Group, settings: Settings) -> PartialSums:
    """Alg. 1, l. 1-23 of a group: encoded, summed and dropped AT_ONCE concepts at a time."""
    minings = (mine_group(text, some, settings) for some in group.parts(AT_ONCE))
    return reduce(add, (PartialSums(collect(mining), mining.pairs.summary) for mining in minings))


def part_of(text: TextEncoder, job: Job, number: int, group: Group) -> PartialSums:
    """`sum_group`, read back from the job's folder where it was done before.

    Raises ValueError when this process, or the file that lies there, is of another run.
    """
    here = run_of(text, job.settings)
    if here != job.run:
        raise ValueError(
            "a worker has another release of realera, another text encoder or another bank than "
            "the process that started the run: install the same on all machines, and let "
            f"{job.model} name the same file everywhere"
        )
    path, made_by = job.state / f"group-{number:05d}.safetensors", digest(job.run, asdict(group))
    if path.exists():
        return _read_part(path, made_by)
    part = sum_group(text, group, job.settings)
    tensors = {"summary": part.summary.contiguous()}
    for stream, sums in part.sums.items():
        tensors |= {f"{stream}.{name}": getattr(sums, name) for name in PARTS}
    keep_tensors(path, tensors, {"run": made_by}, "if this run is interrupted, it is summed again")
    return part


def clear(state: Path) -> None:
    """Removes the files of a job from its folder, and the folder unless something else is there."""
    for path in state.iterdir():
        if FILE.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
    with suppress(OSError):
        state.rmdir()


def _read_part(path: Path, made_by: str) -> PartialSums:
    file = open_tensors(path)
    if file.metadata.get("run") != made_by:
        raise ValueError(
            f"{path} is of another run (other concepts, settings, model, bank or release): remove "
            f"{path.parent} to start afresh, or choose another --out"
        )
    streams = dict.fromkeys(key.rpartition(".")[0] for key in file.entries if key != "summary")
    sums = {s: Sums(*(file.read(f"{s}.{name}") for name in PARTS)) for s in streams}
    return PartialSums(sums, file.read("summary"))


def erase_groups(
    text: TextEncoder,
    group: Group,
    part: PartialSums,
    settings: Settings,
    source: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> Erasure:
    """The closed form (l. 24) of all parts and of what is preserved, once."""
    sums = dict(part.sums)
    prompts = preserved_prompts(text, group.concepts, settings)
    for n in range(0, len(prompts), BATCH):
        e = text.encode(prompts[n : n + BATCH])
        for stream in e:
            rows = e.weighed(stream).flatten(0, 1)
            sums[stream] = sums[stream].preserving(rows, settings.pair_weight)
    return fit(text, sums, group.concepts, part.summary, settings, source, progress)


def align_group(
    model: Diffusion,
    erasure: Erasure,
    group: Group,
    settings: Settings,
    training: Training,
    state: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Lora:
    """Alg. 1, l. 25-30 of a group's concepts, on top of the closed form of all.

    The LoRAs of all groups, each trained without the others, go onto the erasure together.
    """
    mining = mine_group(model.text, group, settings)
    lesson = training_inputs(model, mining, erasure, training)
    return align(model, lesson, training, on_step=on_step, state=state)
