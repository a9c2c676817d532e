"""All that computes, on a device that is not the CPU (`pretend_device.py`): its results are the
CPU's to 1e-4.

They run in a process of their own: where a process knows the device, it is PyTorch's
accelerator: `python -m pytest -n0 -m pretend`, minutes. The ordinary suite runs IN_CI in one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from realera.algorithm import align_erasure, erase, mine
from realera.checkpoints.loading import load_model
from realera.cli import main
from realera.concepts import Concept
from realera.edit.erasure import Erasure
from realera.mining import definitions
from realera.mining.preservation_bank import bank_prompts
from realera.pipelines.transformer import TransformerModel, TransformerText
from realera.pipelines.unet import DiffusersModel, DiffusersText
from realera.settings import SOURCES, BeyondSettings, NeighborSettings, Training
from realera.text.encoding import CONTEXT, POOLED
from tests import pretend_device
from tests.tiny_transformers import tiny

ROOT = Path(__file__).parent.parent
# Seconds in all: the command line, and an alignment with network and text on two devices.
IN_CI = (
    "test_what_a_gpu_refuses_is_refused",
    "test_the_command_line_writes_on_the_device_what_it_writes_on_the_cpu[qwen_image-float32]",
    "test_a_cancelled_alignment_resumes_on_a_device_to_the_lora_of_the_cpu[sd3-plain]",
)
BUNDLED = ("miniature", "miniature-dit")
ON_COMMAND_LINE = {
    "miniature": "float16",
    "miniature-dit": "float32",
    "flux1": "bfloat16",
    "qwen_image": "float32",
}
CAT = [Concept("cat", "dog", ("a photo of the {}", "{} in the park"))]
NEAR, FAR = NeighborSettings(neighbors=2, s2=0.2), BeyondSettings(2, preserve=("a red house",))
SHORT = Training(steps=3, rank=1, batch=2, save_every=2)
WORDS = ["art", "cat", "dog", "house", "jet", "kitten", "park", "plane", "red", "tree"]


def test_a_process_with_a_device_that_refuses_what_a_gpu_refuses_computes_on_it():
    file = Path(__file__).relative_to(ROOT)
    chosen = [f"{file}::{test}" for test in IN_CI]
    command = [sys.executable, "-m", "pytest", "-n0", "-m", "pretend", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if reason := re.search(r"no pretend device: .*", done.stdout):
        pytest.skip(reason[0])
    assert f"{len(IN_CI)} passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Ten words, forty prompts of the bank and two steps a picture take the same path as all.

    Attention is computed by the same kernel on both devices.
    """
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr("realera.mining.preservation_bank.bank_prompts", lambda: bank_prompts()[:40])
        patch.setattr("realera.training.adversarial.PROMPTS", 16)
        for kind in (DiffusersModel, TransformerModel):

            def sample(self, rows, negative, noise, steps, guidance, full=kind.sample):
                return full(self, rows, negative, noise, 2, guidance)

            patch.setattr(kind, "sample", sample)
        # A folder does not say how small its model draws.
        shape = property(lambda _: (4, 8, 8), lambda *_: None)
        patch.setattr(TransformerModel, "latent_shape", shape, raising=False)
        for text in (DiffusersText, TransformerText):
            patch.setattr(text, "words", lambda _: WORDS)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory, folders):
    """Name -> what the command line calls the model: a folder, or the name of a bundled one."""
    home = tmp_path_factory.mktemp("families")

    def source(name):
        if name in BUNDLED:
            return name
        if name == "sdxl":
            return str(folders[name])
        if not (home / name).exists():
            tiny(name).save_pretrained(home / name)
        return str(home / name)

    return source


def outputs(folder):
    """What is written of weights: name of the file -> its tensors."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def assert_close(tensor, same, name=""):
    """To 1e-4 of its norm: products of thin factors are summed in another order."""
    same = same.to(tensor.device)
    wrong = float((tensor - same).norm() / same.norm().clamp(min=1e-12))
    assert wrong <= 1e-4, (name, wrong)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        for key, tensor in tensors.items():
            tensor, same = tensor.float(), other[name][key].float()
            assert_close(tensor, same, (name, key))


@pytest.mark.pretend
@pytest.mark.parametrize(("name", "dtype"), ON_COMMAND_LINE.items())
def test_the_command_line_writes_on_the_device_what_it_writes_on_the_cpu(
    pretend, sources, tmp_path, monkeypatch, clip_folder, name, dtype
):
    """`erase` (scope, check, alignment, checkpoint, LoRA, pictures), `scope`, `evaluate` and
    `evaluate --vocabulary`."""
    source = sources(name)
    clip, prompts = ["--clip", str(clip_folder)], tmp_path / "prompts.txt"
    prompts.write_text("a photo of the cat\na dog\n", "utf-8")
    score, classify = (["--scorer", kind, *clip] for kind in ("clip-score", "clip"))
    classify = [] if name in BUNDLED else classify
    options = ["--neighbors", "2", "--beyond", "2", "--s2", "0.2", "--preserve", "a red house"]
    options += ["--steps", "2", "--batch", "2", "--rank", "2", "--check", "2"]
    made = {}
    for device in ("cpu", "pretend"):
        # What is drawn on one device is not read back on the other.
        monkeypatch.setenv("REALERA_CACHE", str(tmp_path / "cache" / device))
        on, out = ["--device", device, "--dtype", dtype], tmp_path / device
        pretend_device.census()
        assert main(["erase", source, "-c", "cat -> dog", *options, *on, "-o", str(out)]) == 0
        erasure = str(out / "erasure.safetensors")
        assert main(["scope", source, erasure, *on]) == 0
        on += ["-o", str(out / "report")]
        assert main(["evaluate", source, str(prompts), erasure, *score, *on]) == 0
        assert main(["evaluate", source, "cat", erasure, "--sample", "4", *classify, *on]) == 0
        assert bool(pretend_device.census()) == (device == "pretend")
        reports = [out / "report" / name for name in ("evaluation.json", "vocabulary.json")]
        made[device] = outputs(out), [json.loads(report.read_text("utf-8")) for report in reports]
    (files, reports), (same_files, same_reports) = made["cpu"], made["pretend"]
    assert_same(files, same_files)
    for report, same in zip(reports, same_reports, strict=True):
        assert [*report.values()] == [*same.values()]


@pytest.fixture(scope="module", params=["sdxl", "sd3", "z_image"])
def placed(pretend, sources, request):
    """The same model on the CPU, and with its network on one device and its text on another."""
    model, other = (load_model(sources(request.param)) for _ in range(2))
    for name, part in other.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.to("pretend:1" if name.startswith("text") else pretend)
    return model, other


@pytest.mark.pretend
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_mines_and_erases_on_a_device_as_on_the_cpu(placed, source, monkeypatch):
    few = definitions.wordnet_definitions()[:40]
    monkeypatch.setattr(definitions, "wordnet_definitions", lambda: few)
    if source == "bank" and not isinstance(placed[0].text, DiffusersText):
        pytest.skip("rows of a number that differs by prompt are not stepped towards the bank")
    near = replace(NEAR, source=source)
    far = replace(FAR, beyond=16) if source == "predictions" else FAR
    one, other = (erase(mine(model.text, CAT, near, far, model=model)) for model in placed)
    assert one.edits.keys() == other.edits.keys()
    for stream, edit in one.edits.items():
        assert not torch.equal(edit.matrix, torch.eye(edit.dim))
        assert_close(edit.matrix, other.edits[stream].matrix)
    jet = erase(mine(placed[0].text, [Concept("jet", "tree")], near, model=placed[0]))
    both = [Erasure.merge([erasure, jet]).edits[CONTEXT].matrix for erasure in (one, other)]
    assert_close(*both)


@pytest.mark.pretend
@pytest.mark.parametrize(
    ("adversarial", "thrifty"), [(0, False), (2, True)], ids=["plain", "adversarial, checkpointed"]
)
def test_a_cancelled_alignment_resumes_on_a_device_to_the_lora_of_the_cpu(
    placed, tmp_path, adversarial, thrifty
):
    training = replace(SHORT, adversarial=adversarial, gradient_checkpointing=thrifty)

    def cancel(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    loras = []
    for model in placed:
        mining = mine(model.text, CAT, NEAR, FAR)
        erasure, state = erase(mining), tmp_path / "state.safetensors"
        whole = align_erasure(model, erasure, mining, training, images=1)
        with pytest.raises(KeyboardInterrupt):
            align_erasure(model, erasure, mining, training, images=1, state=state, on_step=cancel)
        again = align_erasure(model, erasure, mining, training, images=1, state=state)
        state.unlink()
        assert all(
            torch.equal(*two)
            for layer, pair in whole.lora.items()
            for two in zip(pair, again.lora[layer], strict=True)
        )
        loras.append(whole.lora)
    on_cpu, on_device = loras
    assert all(b.abs().max() > 0 for _, b in on_cpu.values())
    assert on_device.keys() == on_cpu.keys()
    for layer, pair in on_cpu.items():
        for factor, same in zip(pair, on_device[layer], strict=True):
            assert_close(factor, same, layer)


@pytest.mark.pretend
def test_a_device_without_float64_computes_all_but_the_closed_form(placed):
    """As Apple's GPUs, whose float64 is the CPU's."""
    _, model = placed
    pretend_device.like("mps")
    try:
        mining = mine(model.text, CAT, NEAR, FAR)
        erasure = align_erasure(model, erase(mining), mining, SHORT, images=1)
    finally:
        pretend_device.like("cuda")
    assert erasure.edits[CONTEXT].matrix.isfinite().all() and erasure.lora
    assert (POOLED in erasure.edits) == (POOLED in mining.pairs.e)


@pytest.mark.pretend
def test_what_a_gpu_refuses_is_refused(pretend):
    here, there = torch.ones(2, device=pretend), torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        here + here.to("pretend:1")
    with pytest.raises(TypeError, match="can't convert"):
        here.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device=pretend, generator=torch.Generator())
    pretend_device.limit(pretend_device.memory()["now"] + 1000)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.empty(1001, dtype=torch.uint8, device=pretend)
    finally:
        pretend_device.limit(0)
    pretend_device.like("mps")
    try:
        with pytest.raises(TypeError, match="float64"):
            here.double()
    finally:
        pretend_device.like("cuda")


@pytest.mark.pretend
@pytest.mark.skipif(not os.environ.get("COMFYUI_DIR"), reason="COMFYUI_DIR is not set")
def test_comfyui_runs_every_node_on_the_device_in_every_mode_of_its_memory():
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), ROOT / "tests/comfyui_pretend.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("MODE ") for line in done.stdout.splitlines() if "MODE " in line]
    modes = [json.loads(line) for line in lines]
    assert len(modes) == 5, done.stderr[-3000:]
    assert not "".join(mode["failed"] for mode in modes)
    assert all(mode["operators"] > 10_000 for mode in modes)
