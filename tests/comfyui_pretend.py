"""The nodes in ComfyUI on the pretend device, in several modes; run by ComfyUI's interpreter.

ComfyUI takes the device for DirectML's while it is imported, and for a GPU with half precision
from then on. Prints one line a mode, `MODE {"mode": …, "failed": traceback or "", …}`.
"""

# ruff: noqa: E402 (ComfyUI reads its arguments while it is imported)

import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pretend_device

ROOT, HOME = Path(__file__).parent.parent, Path(tempfile.mkdtemp())
ASKED, sys.argv = sys.argv[1:], [sys.argv[0], "--directml", "--use-pytorch-cross-attention"]
sys.path.insert(0, os.environ["COMFYUI_DIR"])
os.environ["REALERA_CACHE"] = str(HOME / "cache")
DEVICE = pretend_device.install()
sys.modules["torch_directml"] = SimpleNamespace(
    device=lambda *_: DEVICE, device_name=lambda _: "pretend"
)
import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_management as management
import utils.install_util  # noqa: F401 (ComfyUI's, before another module takes the name)

GIB = 2**30


def free_memory(device=None, torch_free_too=False):
    return (8 * GIB, 0) if torch_free_too else 8 * GIB


management.directml_enabled = False
management.get_torch_device = lambda: DEVICE
management.get_total_memory = management.get_free_memory = free_memory
management.should_use_fp16 = management.should_use_bf16 = lambda *_, **__: True
management.vram_state = management.VRAMState.NORMAL_VRAM

import folder_paths
import torch
from server import PromptServer

spec = importlib.util.spec_from_file_location(
    "RealEra", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
sys.modules["RealEra"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["RealEra"])

from RealEra.nodes import align, bundled, compare, edit, files, mining
from RealEra.nodes.schema import BUNDLED

folder_paths.set_output_directory(str(HOME / "output"))
folder_paths.set_temp_directory(str(HOME / "temp"))
PromptServer.instance = SimpleNamespace(
    send_sync=lambda *_: None,
    send_progress_text=lambda *_: None,
    client_id=None,
    last_prompt_id=None,
    last_node_id=None,
)
STATES = management.VRAMState
MODES = {  # name of the mode -> arguments of ComfyUI, state of the memory
    "--gpu-only": (["gpu_only"], STATES.HIGH_VRAM),
    "--novram": (["novram"], STATES.NO_VRAM),
    "--fp16-intermediates": (["fp16_intermediates"], STATES.NORMAL_VRAM),
    "--fp8_e4m3fn-unet": (["fp8_e4m3fn_unet"], STATES.NORMAL_VRAM),
    "normal": ([], STATES.NORMAL_VRAM),
}


def run(node, **inputs):
    """What a node returns for these inputs and its defaults."""
    hidden = SimpleNamespace(unique_id=None, prompt=None, extra_pnginfo=None)
    prepared = type(node.__name__, (node,), {"hidden": hidden})
    return prepared.execute(**inputs).args


def graph(done):
    """Five nodes, Save, Apply and Compare; appends to `done` the name of each that ran."""
    model, clip, vae, classifier, _ = run(bundled.BundledModel)
    done.append("Bundled Model")
    given = {"source": "isotropic", "count": 2}
    found, *_ = run(mining.NeighborSampler, clip=clip, concepts="airplane -> tree", **given)
    done.append("Neighbor Sampler")
    found, *_ = run(mining.BeyondSampler, mining=found, count=1)
    done.append("Beyond Sampler")
    given = {"model": model, "mining": found}
    _, erasure, *_ = run(edit.ClosedFormEdit, **given, bank=False, check=1)
    done.append("Closed-Form Edit with check")
    given |= {"erasure": erasure, "steps": 2, "images": 1, "batch": 1, "preview_every": 1}
    if management.vram_state == STATES.NO_VRAM:
        try:
            run(align.LoraAlign, **given)
        except ValueError as refusal:
            assert "start it without --novram" in str(refusal)
            done.append("LoRA Align refuses")
    else:
        erasure, *_ = run(align.LoraAlign, **given)
        assert erasure.lora and all(b.isfinite().all() for _, b in erasure.lora.values())
        done.append("LoRA Align with preview")
    run(files.SaveErasure, erasure=erasure, model=model)
    done.append("Save Erasure")
    run(files.SaveErasedCheckpoint, erasure=erasure, checkpoint=BUNDLED)
    done.append("Save Erased Checkpoint")
    after, *_ = run(edit.ApplyErasure, model=model, erasure=erasure)
    done.append("Apply Erasure")
    given = {"before": model, "after": after, "clip": clip, "vae": vae, "classifier": classifier}
    _, first, second, verdict = run(
        compare.Compare, **given, prompts="an airplane", seeds=1, steps=2
    )
    assert first.isfinite().all() and not torch.equal(first, second) and verdict
    done.append("Compare")
    assert len(done) == 9
    return model


def main():
    for mode, (arguments, state) in MODES.items():
        if ASKED and mode not in ASKED:
            continue
        management.vram_state = state
        for name in arguments:
            setattr(management.args, name, True)
        pretend_device.census()
        done, failed, weight, began = [], "", "", time.process_time()
        try:
            with torch.inference_mode():
                network = graph(done).model.diffusion_model
            weight = str(next(network.parameters()).dtype)
        except Exception:
            failed = traceback.format_exc()
        for name in arguments:
            setattr(management.args, name, False)
        management.unload_all_models()
        result = {"mode": mode, "ran": done, "failed": failed, "weights": weight}
        result["operators"] = sum(pretend_device.census().values())
        result["seconds"] = round(time.process_time() - began, 1)
        print("MODE", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
