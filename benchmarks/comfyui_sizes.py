"""Seconds and memory of every stage in real ComfyUI at the true sizes of SD 1.5 and SDXL, on a CPU.

    COMFYUI_DIR=... COMFYUI_PYTHON=... python -m benchmarks.comfyui_sizes 2 5 3 --folder /big/disk

Writes a checkpoint of random fp16 weights in the family's true layout, then runs the example
workflows of those numbers over ComfyUI's HTTP interface, one more node at a time: what came before
is cached, so a request takes what its last node takes. Random weights say nothing of what is
erased; they say whether the layout loads, and what each stage costs. Drawing and training are
turned down to what a CPU can do (`SHORT`); the size of their pictures is in the table.

Beside what was taken, on the clock and in seconds of one core, stands the least there is to do:
the networks' operations at the speed of this machine's own float32 matrix product, and the bytes
of the files.
Prints a Markdown table. The large files are deleted at the end.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from realera.checkpoints.families import FAMILIES
from realera.mining import preservation_bank
from realera.storage.safetensors_file import writing
from tools.comfyui import Server, comfyui
from tools.layout import to_ldm

ROOT = Path(__file__).parent.parent
VOCABULARY = 32_901  # whole words of CLIP's vocabulary
WORD = 7  # tokens of "a photo of the {word}"
SHORT: dict[str, dict[str, Any]] = {
    "RealEraLoraAlign": {"steps": 2, "batch": 1, "preview_every": 0},
    "RealEraCompare": {"steps": 2, "seeds": 1},
}
# What makes ComfyUI run a node whose own outputs go nowhere: an output to look at.
LOOK = {
    "CheckpointLoaderSimple": 0,
    "RealEraNeighborSampler": 2,
    "RealEraBeyondSampler": 0,
    "RealEraClosedFormEdit": 3,
    "RealEraLoraAlign": 0,
    "RealEraApplyErasure": 0,
    "RealEraCompare": 3,
    "RealEraSaveErasure": 0,
    "RealEraSaveErasedCheckpoint": 0,
}


def parts(name: str) -> dict[str, Any]:
    """The family's networks with shapes and no weights."""
    family = FAMILIES[name]
    with torch.device("meta"):
        made: dict[str, Any] = {
            "unet": UNet2DConditionModel(**family["unet"]),
            "vae": AutoencoderKL(**family["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**family["text_encoder"])),
        }
        if "text_encoder_2" in family:
            config = CLIPTextConfig(**family["text_encoder_2"])
            made["text_encoder_2"] = CLIPTextModelWithProjection(config)
    return made


def write_random(name: str, path: Path) -> None:
    """A checkpoint of the family's layout in fp16, Gaussian, so that activations stay finite."""
    state = to_ldm({part: network.state_dict() for part, network in parts(name).items()})
    generator = torch.Generator().manual_seed(0)
    for key, shape in state.items():
        if key.endswith("position_ids"):
            state[key] = torch.arange(77)[None]
        elif shape.ndim > 1:
            scale = 0.02 if "embedding" in key else (0.5 / shape[0].numel()) ** 0.5
            state[key] = (scale * torch.randn(shape.shape, generator=generator)).half()
        else:
            state[key] = torch.full(shape.shape, float(key.endswith("weight"))).half()
    with writing(path, overwrite=False) as part:
        save_file(state, part)


# ------------------------------------------------------------------------ the least there is to do


def operations(network: nn.Module, *inputs: Any, **named: Any) -> float:
    """Floating-point operations of one pass, counted on shapes alone."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs, **named)
    return float(counter.get_total_flops())


def passes(name: str, side: int) -> dict[str, float]:
    """Operations of one pass: of the text encoders a token, of the others a picture of `side`."""
    made, size = parts(name), side // 8
    dim = FAMILIES[name]["unet"]["cross_attention_dim"]

    def blank(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    named: dict[str, Any] = {"encoder_hidden_states": blank(1, 77, dim)}
    if "text_encoder_2" in made:
        named["added_cond_kwargs"] = {"text_embeds": blank(1, 1280), "time_ids": blank(1, 6)}
    return {
        "unet": operations(made["unet"], blank(1, 4, size, size), blank(1), **named),
        "vae": operations(made["vae"].decoder, blank(1, 4, size, size)),
        "token": sum(
            operations(
                getattr(part, "text_model", part).encoder,
                inputs_embeds=blank(1, 77, part.config.hidden_size),
            )
            / 77
            for key, part in made.items()
            if key.startswith("text")
        ),
        "edit": sum(  # W T of every projection
            2.0 * weight.numel() * dim
            for key, weight in made["unet"].state_dict().items()
            if "attn2.to_k" in key or "attn2.to_v" in key
        ),
        "solve": 7 / 3 * dim**3,
    }


def least(node: dict[str, Any], cost: dict[str, float], told: str, bank: int) -> float:
    """Operations that a stage of the graph cannot do without."""
    inputs = node["inputs"]
    words = VOCABULARY if inputs.get("source") == "vocabulary" else 0
    preserved = len(inputs.get("preserve", "").splitlines())
    drawn = len(inputs.get("prompts", "").splitlines())
    again = inputs.get("gradient_checkpointing", False)
    return {
        "RealEraNeighborSampler": cost["token"] * WORD * words,
        "RealEraBeyondSampler": cost["token"] * 77 * preserved,
        "RealEraClosedFormEdit": cost["solve"]
        + cost["token"] * (77 * bank + WORD * len(told.splitlines())),
        # Teacher, student, gradient of the student's input; Eq. 9 has two pictures a prompt.
        "RealEraLoraAlign": cost["unet"] * 3 * (3 + again),
        "RealEraCompare": 2 * drawn * (cost["unet"] * 2 * inputs.get("steps", 0) + cost["vae"]),
        "RealEraSaveErasure": cost["edit"],
        "RealEraSaveErasedCheckpoint": cost["edit"],
    }.get(node["class_type"], 0.0)


# ------------------------------------------------------------------------ real ComfyUI


def seconds_of(process: "subprocess.Popen[bytes]") -> float:
    """Seconds of all cores that it has had so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(server: Server, graph: dict[str, Any]) -> tuple[dict[str, Any], float, float, float]:
    """A graph's outputs, its seconds on the clock and of all cores, and its peak of memory."""
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # forgets the peak so far
    started, worked = time.monotonic(), seconds_of(server.process)
    outputs, _ = server.run(graph, seconds=86_400)
    taken, worked = time.monotonic() - started, seconds_of(server.process) - worked
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return outputs, taken, worked, 1024 * float(peak)


def copy_pack(home: Path, bank: int) -> None:
    """This pack, with `bank` prompts in its bank."""
    pack = home / "custom_nodes/RealEra"
    for folder in ("nodes", "realera", "web"):
        shutil.copytree(ROOT / folder, pack / folder)
    shutil.copy(ROOT / "__init__.py", pack)
    path = pack / Path(preservation_bank.__file__).relative_to(ROOT)
    prompts = preservation_bank.bank_prompts()[:bank]
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", "utf-8")


def shortened(graph: dict[str, Any], source: str, prompts: int, side: int) -> dict[str, Any]:
    """A workflow that a CPU can run: `SHORT`, with blank latents for the anchors' images."""
    for name, node in list(graph.items()):
        inputs = node["inputs"]
        short = SHORT.get(node["class_type"], {})
        inputs |= {key: value for key, value in short.items() if key in inputs}
        if "source" in inputs:
            inputs["source"] = source
            concepts = len(inputs["concepts"].splitlines())
        if "prompts" in inputs:
            inputs["size"] = side
            inputs["prompts"] = "\n".join(inputs["prompts"].splitlines()[:prompts])
        if node["class_type"] == "RealEraLoraAlign":
            if "gradient_checkpointing" in inputs:
                inputs["gradient_checkpointing"] = True
            size = {"width": side, "height": side, "batch_size": concepts}
            graph["blank"] = {"class_type": "EmptyLatentImage", "inputs": size}
            graph[name]["inputs"]["latents"] = ["blank", 0]
    return graph


def closed_form_only(graph: dict[str, Any]) -> dict[str, Any]:
    """The workflow without its training and its pictures: what follows takes the edit itself."""
    (align,) = (k for k, node in graph.items() if node["class_type"] == "RealEraLoraAlign")
    edit = graph[align]["inputs"]["erasure"]
    left_out = ("RealEraLoraAlign", "RealEraCompare", "EmptyLatentImage")
    kept = {k: node for k, node in graph.items() if node["class_type"] not in left_out}
    for node in kept.values():
        for name, value in node["inputs"].items():
            if value == [align, 0]:
                node["inputs"][name] = edit
    return kept


def stages(graph: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every node of a workflow in order, and the graph up to it with something to look at."""
    done = {name: node for name, node in graph.items() if name == "blank"}
    for name, node in graph.items():
        if name == "blank":
            continue
        done[name] = node
        look = {"source": [name, LOOK[node["class_type"]]]}
        yield node, {**done, "look": {"class_type": "PreviewAny", "inputs": look}}


def rate(n: int = 2048) -> float:
    """Operations of a float32 matrix product in a second of one core."""
    a = torch.randn(n, n)
    a @ a
    start = time.process_time()
    for _ in range(5):
        a @ a
    return 5 * 2 * n**3 / (time.process_time() - start)


def measure(given: argparse.Namespace, number: int, folder: Path) -> None:
    """Prints the table's rows of one workflow."""
    (path,) = (ROOT / "workflows/api").glob(f"{number} *.json")
    graph = shortened(json.loads(path.read_text("utf-8")), given.source, prompts=2, side=given.side)
    if given.closed_form:
        graph = closed_form_only(graph)
    name = "sdxl" if "SDXL" in path.name else "sd1"
    (checkpoint,) = (
        node["inputs"]["ckpt_name"] for node in graph.values() if "ckpt_name" in node["inputs"]
    )
    home = folder / f"comfyui-{number}"
    file = folder / f"{name}.safetensors"
    if not file.exists():
        write_random(name, file)
    cost, speed = passes(name, given.side), rate()
    # SDXL's U-Net is stored in half precision; ComfyUI computes in float32 on a CPU all the same.
    arguments = ["--fp16-unet"] if name == "sdxl" else []
    copy_pack(home, given.bank)
    (home / "models/checkpoints").mkdir(parents=True)
    (home / "models/checkpoints" / checkpoint).symlink_to(file)
    with comfyui(home, *arguments) as server:
        for node, part in stages(graph):
            kind, before = node["class_type"], sum(_sizes(home / "output"))
            outputs, taken, worked, peak = run(server, part)
            told = str(outputs.get("look", {}).get("text", [""])[0])
            flops = least(node, cost, told, given.bank)
            wrote = sum(_sizes(home / "output")) - before
            read = file.stat().st_size if "heckpoint" in kind else 0
            print(
                f"| {path.stem} | {kind.removeprefix('RealEra')} | {taken:.1f} | {worked:.1f} "
                f"| {flops / speed:.1f} | {read / 1e9:.2f} | {wrote / 1e9:.2f} "
                f"| {peak / 1e9:.1f} |",
                flush=True,
            )
    shutil.rmtree(home)


def _sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workflows", type=int, nargs="+", choices=(2, 3, 5))
    parser.add_argument("--folder", type=Path, required=True, help="room for 25 GB")
    parser.add_argument("--source", default="vocabulary", help="of the neighbours")
    whole = len(preservation_bank.bank_prompts())
    parser.add_argument("--bank", type=int, default=whole, help="prompts of it")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--closed-form", action="store_true", help="no training, no pictures")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the server, deletes the files
    print(
        f"Source {given.source}, {given.bank} prompts in the bank, pictures of {given.side} "
        f"pixels, {rate() / 1e9:.0f} GFLOP/s a core.\n"
    )
    print("| workflow | stage | s | core s | least core s | GB read | GB written | peak GB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for number in given.workflows:
            measure(given, number, Path(folder))


if __name__ == "__main__":
    main()
