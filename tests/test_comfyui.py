"""The nodes in a real ComfyUI, over HTTP.

Runs when COMFYUI_DIR names a ComfyUI checkout; COMFYUI_PYTHON names an interpreter that has its
requirements and ours (this one unless set). The server gets folders of its own and our pack alone.
UPDATE_OBJECT_INFO=1 records the schemas for `test_nodes.py` instead of checking them.
"""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from realera.edit.erasure_file import load_erasure
from realera.evaluation.scorers import Clip
from realera.miniature import TRANSFORMER

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / "workflows/api"
SAVED = ROOT / "tests/data/workflows-0.2"
RECORDED = ROOT / "tests/object_info.json"
FILES = (
    "ckpt_name",
    "lora_name",
    "checkpoint",
    "erasure_name",
    "clip_folder",
)  # lists that differ by machine

pytestmark = pytest.mark.skipif(
    not os.environ.get("COMFYUI_DIR"), reason="COMFYUI_DIR is not set: no ComfyUI to test against"
)


def workflow(number):
    (path,) = WORKFLOWS.glob(f"{number} *.json")
    return json.loads(path.read_text("utf-8"))


def node_of(graph, kind):
    (name,) = [name for name, node in graph.items() if node["class_type"] == kind]
    return name, graph[name]["inputs"]


def short(graph, steps=6):
    """The workflow with a training that is only long enough to change something."""
    _, inputs = node_of(graph, "RealEraLoraAlign")
    inputs |= {"steps": steps, "images": 2, "learning_rate": 1e-3}
    _, inputs = node_of(graph, "RealEraCompare")
    inputs |= {"steps": 8, "seeds": 1}
    return graph


def stable(info):
    """Schemas without what differs from machine to machine."""
    keys = ("input", "output", "output_name", "output_tooltips", "display_name", "description")
    kept = {key: info.get(key) for key in (*keys, "category")}
    kept["input"].pop("hidden", None)
    for group in kept["input"].values():
        for name in FILES:
            if name in group:
                kind, *options = group[name]
                group[name] = [[] if isinstance(kind, list) else kind, *options]
                for option in options:
                    option.pop("options", None)
    return kept


def comparable(name, info, grows):
    """A schema as every release of ComfyUI tells it: of our nodes all but the lists of samplers and
    the inputs that grow, of ComfyUI's own what they are connected by."""
    inputs = {
        field: [kind, *options]
        for group in ("required", "optional")
        for field, (kind, *options) in info["input"].get(group, {}).items()
        if grows or kind != "COMFY_AUTOGROW_V3"
    }
    if not name.startswith("RealEra"):
        return {field: isinstance(kind, str) and kind for field, (kind, *_) in inputs.items()}
    for field in ("sampler", "scheduler"):
        if field in inputs:
            inputs[field][1] = {k: v for k, v in inputs[field][1].items() if k != "options"}
    return {**info, "input": inputs, "required": list(info["input"].get("required", {}))}


@pytest.fixture(scope="module")
def erased(server):
    """Workflow 1, run once: its graph and its outputs."""
    graph = short(workflow(1))
    _, saving = node_of(graph, "RealEraSaveErasure")
    saving["tolerance"] = 1e-5
    node_of(graph, "RealEraClosedFormEdit")[1]["check"] = 3
    outputs, _ = server.run(graph)
    return graph, outputs


def test_the_recorded_schemas_are_those_of_real_comfyui(server):
    live = json.loads(server.get("/object_info"))
    recorded = json.loads(RECORDED.read_text("utf-8"))
    names = recorded.keys() | {name for name in live if name.startswith("RealEra")}
    found = {name: stable(live[name]) for name in sorted(names)}
    if os.environ.get("UPDATE_OBJECT_INFO"):
        text = json.dumps(found, indent=1, ensure_ascii=False)
        RECORDED.write_text(text + "\n", "utf-8")
        recorded = json.loads(RECORDED.read_text("utf-8"))
    assert found.keys() == recorded.keys()
    grows = "more" in found["RealEraCompare"]["input"]["optional"]
    for name, info in found.items():
        due = comparable(name, recorded[name], grows)
        assert comparable(name, info, grows) == due


def test_the_page_gets_the_script_the_help_the_strings_and_the_workflows(server):
    (script,) = [p for p in json.loads(server.get("/extensions")) if p.endswith("realera.js")]
    assert b"registerExtension" in server.get(script)
    help_page = script.replace("realera.js", "docs/RealEraCompare.md")
    assert server.get(help_page).startswith(b"# Compare")
    strings = json.loads(server.get("/i18n"))
    assert "RealEraCompare" in strings["zh"]["nodeDefs"]
    assert len(json.loads(server.get("/workflow_templates"))["RealEra"]) == 9


def test_the_cache_can_be_seen_limited_and_emptied_from_the_page(server):
    folder = server.home / "cache"
    shown = json.loads(server.get("/realera/cache"))
    assert shown["folder"] == str(folder)
    ours = folder / f"bank-{'0' * 24}.safetensors"
    others = folder / "mine.safetensors"
    for path in (ours, others):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1234")
    assert json.loads(server.get("/realera/cache"))["files"] == shown["files"] + 1

    def ask(method, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(server.address + "/realera/cache", data, method=method)
        return urllib.request.urlopen(request).status

    assert ask("POST", {"gigabytes": 9}) == 200
    for wrong in ({"gigabytes": "a lot"}, {"gigabytes": -1}, {}, []):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask("POST", wrong)
    assert ask("DELETE") == 200
    assert not ours.exists() and others.exists()
    others.unlink()


def test_workflow_1_leaves_a_lora_an_erasure_and_a_checkpoint(server, erased):
    name = "no-airplane_00001_.safetensors"
    for folder in ("loras", "erasures", "checkpoints"):
        assert (server.output / folder / name).is_file(), folder
    graph, outputs = erased
    compare, _ = node_of(graph, "RealEraCompare")
    assert server.pixels(outputs[compare]["images"][0]).std() > 10


def test_an_unchanged_graph_is_not_run_again_and_a_changed_concept_is(server, erased):
    graph = json.loads(json.dumps(erased[0]))
    _, cached = server.run(graph)
    assert cached == graph.keys()
    sampler, inputs = node_of(graph, "RealEraNeighborSampler")
    inputs["concepts"] = "ship -> sea"
    cut = {
        name: graph[name]
        for name in graph
        if graph[name]["class_type"] in ("RealEraBundledModel", "RealEraNeighborSampler")
    }
    outputs, cached = server.run(cut)
    loader, _ = node_of(graph, "RealEraBundledModel")
    assert loader in cached
    assert sampler not in cached
    assert outputs[sampler]["realera_geometry"], "a sampler runs alone, with nothing behind it"
    assert "was not trained to draw the anchor 'sea'" in outputs[sampler]["text"][-1]


def closed_form_only(graph, filename):
    """The workflow as far as its closed form, which is saved as an erasure file."""
    kinds = ("BundledModel", "NeighborSampler", "BeyondSampler", "ClosedFormEdit")
    kinds = [f"RealEra{kind}" for kind in kinds]
    graph = {name: node for name, node in graph.items() if node["class_type"] in kinds}
    edit, _ = node_of(graph, "RealEraClosedFormEdit")
    inputs = {"erasure": [edit, 1], "lora": False, "filename": filename}
    graph["save"] = {"class_type": "RealEraSaveErasure", "inputs": inputs}
    return graph


def test_inputs_with_a_default_may_be_left_out(server, erased):
    whole = json.loads(json.dumps(erased[0]))
    node_of(whole, "RealEraBeyondSampler")[1]["preserve"] = ""
    server.run(closed_form_only(whole, "whole"))
    bare = json.loads(json.dumps(whole))
    for node in bare.values():
        kept = ("concepts", "prompts", "checkpoint")
        inputs = node["inputs"].items()
        node["inputs"] = {k: v for k, v in inputs if isinstance(v, list) or k in kept}
    server.run(closed_form_only(bare, "bare"))
    one, other = (
        load_erasure(server.output / f"erasures/{name}_00001_.safetensors")
        for name in ("whole", "bare")
    )
    assert one.provenance["settings"] == other.provenance["settings"]
    assert one.provenance["concepts"] == other.provenance["concepts"]
    assert torch.equal(one.edits["context"].matrix, other.edits["context"].matrix)
    # The nodes that draw have defaults too; what they would take long for is told.
    node_of(bare, "RealEraLoraAlign")[1].update(steps=1, images=1)
    node_of(bare, "RealEraCompare")[1].update(steps=1, seeds=1)
    server.run(bare)
    for folder in ("loras", "erasures", "checkpoints"):
        assert (server.output / folder / "realera_00001_.safetensors").is_file()


def test_a_graph_and_the_command_line_with_its_settings_erase_alike(server, erased, tmp_path):
    """The text encoder is diffusers' there, so that numbers agree as far as the encoders do."""
    whole = load_erasure(server.output / "erasures/no-airplane_00001_.safetensors")
    settings = whole.provenance["settings"]
    command = [sys.executable, "-m", "realera", "erase", "miniature", "-c", "airplane -> tree"]
    command += ["--steps", "0", "-o", str(tmp_path / "made")]
    command += [part for prompt in settings["preserve"] for part in ("--preserve", prompt)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    other = load_erasure(tmp_path / "made/erasure.safetensors")
    assert other.provenance["concepts"] == whole.provenance["concepts"]
    assert other.provenance["settings"] == settings
    one, same = (erasure.edits["context"].matrix for erasure in (whole, other))
    assert (one - same).norm() / (one - torch.eye(len(one))).norm() < 1e-3


def test_a_lora_is_the_same_file_by_the_node_and_by_the_command_line(server, erased, tmp_path):
    node = server.output / "loras/no-airplane_00001_.safetensors"
    made = tmp_path / "lora.safetensors"
    realera = [sys.executable, "-m", "realera"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    erasure = server.output / "erasures/no-airplane_00001_.safetensors"
    command = [*realera, "apply", "miniature", str(erasure), str(made), "--lora"]
    subprocess.run([*command, "--tolerance", "1e-5"], check=True, env=environment)
    with safe_open(node, "pt") as one, safe_open(made, "pt") as other:
        assert one.metadata() == other.metadata()
        assert one.keys() == other.keys()
        for key in one.keys():  # noqa: SIM118
            # ComfyUI computes in float32 on a CPU, the checkpoint's own type is float16.
            pair = one.get_tensor(key), other.get_tensor(key)
            assert torch.allclose(*(tensor.float() for tensor in pair), atol=1e-3)
    completed = subprocess.run(
        [*realera, "info", str(node)], check=True, env=environment, capture_output=True, text=True
    )
    assert "airplane" in completed.stdout and "LoRA of" in completed.stdout


def test_a_node_says_what_it_found_and_where_it_saved(erased):
    graph, outputs = erased
    texts = {graph[name]["class_type"]: shown.get("text") for name, shown in outputs.items()}
    name = "no-airplane_00001_.safetensors"
    saved = [f"saved output/{folder}/{name}" for folder in ("loras", "erasures")]
    assert texts["RealEraSaveErasure"] == saved
    beside = name.replace(".safetensors", ".md")
    saved = [f"saved output/checkpoints/{file}" for file in (name, beside)]
    assert texts["RealEraSaveErasedCheckpoint"] == saved
    assert "are erased too" in texts["RealEraNeighborSampler"][0]
    assert "the CLIP is that of Stable Diffusion 1.x" in texts["RealEraNeighborSampler"][0]
    assert "are preserved" in texts["RealEraBeyondSampler"][0]
    assert "half of the way" in texts["RealEraClosedFormEdit"][0]
    assert "of the 3 words drawn (✓)" in texts["RealEraClosedFormEdit"][0]
    drawn = [row[4] for row in outputs[node_of(graph, "RealEraClosedFormEdit")[0]]["realera_scope"]]
    assert drawn[:3] == sorted(drawn[:3], reverse=True) and set(drawn[3:]) == {None}
    assert texts["RealEraLoraAlign"][0].startswith("6 steps")


def test_more_models_and_erasures_than_there_were_inputs_for(server, erased):
    info = json.loads(server.get("/object_info/RealEraCompare"))["RealEraCompare"]
    if "more" not in info["input"]["optional"]:
        pytest.skip("this ComfyUI has no inputs that grow")
    graph = model_graph()
    graph["compare"] = compare(["model", 0], ["applied", 0])
    inputs = graph["compare"]["inputs"] | {"prompts": "a photo of the dog", "steps": 2}
    inputs |= {name: ["model", 0] for name in ("third", "fourth", "fifth")}
    inputs |= {"more.sixth": ["model", 0], "more.seventh": ["applied", 0]}
    graph["compare"]["inputs"] = inputs | {"names": "a, b, c, d, e, f, g", "seeds": 1}
    inputs["classifier"] = ["model", 3]
    graph["compare"]["inputs"] = inputs
    graph["verdict"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 3]}}
    outputs, _ = server.run(graph)
    assert len(outputs["verdict"]["text"][0].splitlines()) == 7
    joined = {"first": ["erasure", 0], "second": ["erasure", 0], "more.fifth": ["erasure", 0]}
    graph = {"erasure": model_graph()["erasure"]}
    graph["merge"] = {"class_type": "RealEraMergeErasures", "inputs": joined}
    graph["save"] = {
        "class_type": "RealEraSaveErasure",
        "inputs": {"erasure": ["merge", 0], "lora": False, "filename": "thrice"},
    }
    server.run(graph)
    thrice = load_erasure(server.output / "erasures/thrice_00001_.safetensors")
    assert len(thrice.provenance["merged"]) == 3


def model_graph():
    return {
        "model": {"class_type": "RealEraBundledModel", "inputs": {"checkpoint": "bundled"}},
        "erasure": {
            "class_type": "RealEraLoadErasure",
            "inputs": {"erasure_name": "no-airplane_00001_.safetensors"},
        },
        "applied": {
            "class_type": "RealEraApplyErasure",
            "inputs": {
                "model": ["model", 0],
                "erasure": ["erasure", 0],
                "edit_strength": 1.0,
                "lora_strength": 1.0,
            },
        },
    }


def compare(before, after, prompts="a photo of the airplane\na photo of the dog", steps=8):
    inputs = {"before": before, "after": after, "clip": ["model", 1], "vae": ["model", 2]}
    inputs |= {"prompts": prompts, "names": "before, after", "seeds": 1, "seed": 0}
    inputs |= {"steps": steps, "cfg": 5.0, "size": 0, "sampler": "ddim"}
    return {"class_type": "RealEraCompare", "inputs": inputs | {"scheduler": "ddim_uniform"}}


def pairs(server, outputs, name="compare"):
    return [
        tuple(server.pixels(file) for file in image["files"])
        for image in outputs[name]["realera_images"]
    ]


def test_our_lora_in_lora_loader_draws_what_apply_erasure_draws(server, erased):
    graph = model_graph()
    graph["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {
            "model": ["model", 0],
            "lora_name": "no-airplane_00001_.safetensors",
            "strength_model": 1.0,
        },
    }
    graph["compare"] = compare(["applied", 0], ["lora", 0])
    outputs, _ = server.run(graph)
    for applied, loaded in pairs(server, outputs):
        assert abs(applied - loaded).mean() < 1.0  # of 255


def test_the_saved_checkpoint_draws_what_apply_erasure_draws(server, erased):
    graph = model_graph()
    graph["saved"] = {
        "class_type": "RealEraBundledModel",
        "inputs": {"checkpoint": "no-airplane_00001_.safetensors"},
    }
    graph["compare"] = compare(["applied", 0], ["saved", 0])
    outputs, _ = server.run(graph)
    for applied, saved in pairs(server, outputs):
        assert abs(applied - saved).mean() < 1.0


def test_comfyuis_own_checkpoint_save_gives_a_working_file(server, erased):
    graph = model_graph()
    graph["save"] = {
        "class_type": "CheckpointSave",
        "inputs": {
            "model": ["applied", 0],
            "clip": ["model", 1],
            "vae": ["model", 2],
            "filename_prefix": "checkpoints/own",
        },
    }
    server.run(graph)
    del graph["save"]
    graph["saved"] = {
        "class_type": "RealEraBundledModel",
        "inputs": {"checkpoint": "own_00001_.safetensors"},
    }
    graph["compare"] = compare(["applied", 0], ["saved", 0])
    outputs, _ = server.run(graph)
    for applied, saved in pairs(server, outputs):
        assert abs(applied - saved).mean() < 1.0


def test_unplugging_an_erasure_brings_the_model_back(server, erased):
    graph = model_graph()
    graph["compare"] = compare(["model", 0], ["applied", 0], steps=7)
    first, _ = server.run(graph)
    graph["compare"] = compare(["model", 0], ["model", 0], steps=7)
    second, _ = server.run(graph)
    for (before, applied), (again, _) in zip(
        pairs(server, first), pairs(server, second), strict=True
    ):
        assert np.array_equal(before, again)
        assert not np.array_equal(before, applied)


def test_a_cancelled_training_leaves_the_model_as_it_was_and_a_state_to_resume(server, erased):
    graph = model_graph()
    graph["compare"] = compare(["model", 0], ["model", 0], steps=6)
    before, _ = server.run(graph)
    training = json.loads(json.dumps(erased[0]))
    _, inputs = node_of(training, "RealEraLoraAlign")
    inputs |= {"steps": 100_000, "resume": "cancelled"}
    prompt = server.queue(training)
    state = server.output / "realera" / "cancelled.safetensors"
    end = time.monotonic() + 300
    while not state.is_file() and time.monotonic() < end:
        time.sleep(0.5)
    assert state.is_file()
    server.post("/interrupt")
    started = time.monotonic()
    entry = server.wait(prompt, 60)
    assert time.monotonic() - started < 30
    assert "execution_interrupted" in dict(entry["status"]["messages"])
    graph["compare"] = compare(["model", 0], ["applied", 0], steps=6)
    after, _ = server.run(graph)
    for (one, _), (other, _) in zip(pairs(server, before), pairs(server, after), strict=True):
        assert np.array_equal(one, other)


def frames(stream):
    """The messages of a web socket: (is it text, payload)."""
    while True:
        _, size = head = stream.read(2)
        if size > 125:
            size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
        yield head[0] & 15 == 1, stream.read(size)


def listen(server, graph):
    """Runs a graph as the page does; yields what it is told meanwhile: previews and messages."""
    with socket.create_connection(server.address.removeprefix("http://").split(":")) as line:
        line.sendall(
            b"GET /ws?clientId=test HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: " + base64.b64encode(bytes(16)) + b"\r\n\r\n"
        )
        stream = line.makefile("rb")
        while stream.readline().strip():
            pass
        prompt = server.post("/prompt", {"prompt": graph, "client_id": "test"})["prompt_id"]
        ends = {f"execution_{end}" for end in ("success", "error", "interrupted")}
        for text, content in frames(stream):
            if not text and content[:4] == bytes([0, 0, 0, 1]):  # a preview, after its format
                yield "preview", Image.open(io.BytesIO(content[8:])).convert("RGB")
            elif text:
                message = json.loads(content)
                yield message["type"], message["data"]
                if message["type"] in ends and message["data"]["prompt_id"] == prompt:
                    return


@pytest.mark.parametrize("kind", ["RealEraNeighborSampler", "RealEraLoraAlign"])
def test_cancel_is_heard_while_words_are_compared_and_anchors_are_drawn(server, erased, kind):
    graph = json.loads(json.dumps(erased[0]))
    asked = {"concepts": "truck -> tree", "templates": f"one {{}} for {kind}"}  # never read before
    node_of(graph, "RealEraNeighborSampler")[1].update(asked)
    node_of(graph, "RealEraLoraAlign")[1]["images"] = 256  # 64 drawings of 20 steps each
    node, _ = node_of(graph, kind)
    heard, last = 0, None
    for last, data in listen(server, graph):
        if last == "progress" and data["node"] == node:
            heard += 1
            if heard == 1:
                server.post("/interrupt")
    assert last == "execution_interrupted"
    assert heard < 100


def test_previews_show_the_training_and_leave_the_lora_as_it_is(server, erased):
    graph = json.loads(json.dumps(erased[0]))
    align, inputs = node_of(graph, "RealEraLoraAlign")
    keep = {"RealEraBundledModel", "RealEraNeighborSampler", "RealEraBeyondSampler"}
    keep |= {"RealEraClosedFormEdit", "RealEraLoraAlign"}
    graph = {name: node for name, node in graph.items() if node["class_type"] in keep}
    graph["save"] = {
        "class_type": "RealEraSaveErasure",
        "inputs": {"erasure": [align, 0], "lora": False, "erasure_file": True},
    }
    graph["save"]["inputs"] |= {"filename": "watched", "tolerance": 1e-3}
    inputs["preview_every"] = 2
    messages = list(listen(server, graph))
    assert messages[-1][0] == "execution_success"
    steps = [data["step"] for kind, data in messages if kind == "realera.step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    previews = [np.asarray(data, np.int16) for kind, data in messages if kind == "preview"][-3:]
    assert all(picture.std() > 10 for picture in previews)
    assert not np.array_equal(previews[0], previews[-1])
    plain, watched = (
        load_file(server.output / "erasures" / f"{name}_00001_.safetensors")
        for name in ("no-airplane", "watched")
    )
    assert plain.keys() == watched.keys()
    assert all(np.array_equal(plain[key], watched[key]) for key in plain)


def test_compare_says_what_clip_sees(server, clip_folder):
    shutil.copytree(clip_folder, server.home / "models/clip_vision/tiny")
    graph = model_graph()
    del graph["erasure"], graph["applied"]
    classifier = {
        "clip_folder": "tiny",
        "classes": "airplane\ndog",
        "template": "a photo of the {}",
    }
    graph["scorer"] = {"class_type": "RealEraClipClassifier", "inputs": classifier}
    graph["compare"] = compare(["model", 0], ["model", 0])
    graph["compare"]["inputs"]["classifier"] = ["scorer", 0]
    graph["verdict"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 3]}}
    outputs, _ = server.run(graph)
    images = [
        torch.from_numpy(image).movedim(-1, 0) / 255
        for pair in pairs(server, outputs)
        for image in pair
    ]
    clip = Clip(clip_folder)
    texts = ["a photo of the airplane", "a photo of the dog"]
    scale = clip.model.logit_scale.exp().item()
    due = (scale * clip(torch.stack(images), texts)).softmax(-1)
    seen = [line.rsplit(": ", 1)[1].split() for line in outputs["verdict"]["text"][0].splitlines()]
    # Told model by model, while the pairs are told prompt by prompt.
    for (name, percent, _), chances in zip(seen, due[[0, 2, 1, 3]], strict=True):
        assert name == ["airplane", "dog"][int(chances.argmax())]
        assert abs(int(percent) - 100 * chances.max()) < 1.5
    graph["scorer"]["inputs"]["classes"] = ""
    outputs, _ = server.run(graph)
    prompts = graph["compare"]["inputs"]["prompts"].splitlines()
    scores = 100 * clip(torch.stack(images), prompts).clamp(min=0)[[0, 2, 1, 3], [0, 1, 0, 1]]
    for line, score in zip(outputs["verdict"]["text"][0].splitlines(), scores, strict=True):
        stated = line.rsplit(": CLIP score ", 1)[1]
        assert abs(float(stated) - score) < 0.15


def test_nudenet_counts_or_says_how_to_install_it(server):
    graph = model_graph()
    del graph["erasure"], graph["applied"]
    graph["scorer"] = {"class_type": "RealEraNudeNet", "inputs": {"threshold": 0.6}}
    graph["compare"] = compare(["model", 0], ["model", 0])
    graph["compare"]["inputs"]["classifier"] = ["scorer", 0]
    graph["verdict"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 3]}}
    entry = server.wait(server.queue(graph))
    if entry["status"]["status_str"] == "error":  # ComfyUI's environment need not have it
        assert "pip install nudenet" in server.error(entry)
    else:
        lines = entry["outputs"]["verdict"]["text"][0].splitlines()
        assert lines and all(line.endswith(": nothing explicit") for line in lines)


def refusals(server, graph):
    """Id of a node -> what ComfyUI refused of it before it ran anything."""
    try:
        answer = server.post("/prompt", {"prompt": graph})
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
    found = answer["node_errors"].items()
    return {node: {error["details"] for error in of["errors"]} for node, of in found}


@pytest.mark.parametrize(
    ("node", "values", "reason"),
    [
        ("RealEraNeighborSampler", {"concepts": "dog > cat"}, "write 'concept -> anchor'"),
        ("RealEraNeighborSampler", {"templates": "a photo"}, "exactly once"),
        ("RealEraNeighborSampler", {"leave_out": "dog, airplane"}, "is to be erased"),
        ("RealEraNeighborSampler", {"s1": 0.2, "s2": 0.5}, "S2 must be smaller"),
        ("RealEraNeighborSampler", {"s1": 7.0}, "finite number in [-1, 1]"),
        ("RealEraCompare", {"prompts": "\n"}, "no prompt to draw"),
        ("RealEraLoraAlign", {"resume": "../escaped"}, "leads out of"),
        ("RealEraSaveErasure", {"filename": "../../escaped"}, "leads out of"),
        ("RealEraSaveErasure", {"lora": False, "erasure_file": False}, "nothing to save"),
        ("RealEraSaveErasedCheckpoint", {"filename": ".safetensors"}, "name is empty"),
    ],
)
def test_an_input_that_cannot_work_is_refused_before_anything_runs(server, node, values, reason):
    graph = short(workflow(1))
    name, inputs = node_of(graph, node)
    inputs |= values
    assert any(reason in detail for detail in refusals(server, graph)[name])
    server.post("/interrupt")  # of the outputs that need nothing of it
    assert not list(server.home.parent.rglob("escaped*"))


def test_a_concept_alone_gets_a_suggested_anchor_and_the_node_says_so(server):
    graph = workflow(1)
    name, inputs = node_of(graph, "RealEraNeighborSampler")
    inputs["concepts"] = "# mine\nship"
    (model,) = (key for key, node in graph.items() if node["class_type"] == "RealEraBundledModel")
    outputs, _ = server.run({key: graph[key] for key in (model, name)})
    [[concept, anchors]] = outputs[name]["realera_suggestions"]
    assert concept == "ship" and len(anchors) == 5
    assert f"no anchor was named: ship -> {anchors[0]}" in " ".join(outputs[name]["text"])
    assert outputs[name]["realera_geometry"][0]["concepts"] == [["ship", anchors[0]]]


def test_a_lora_without_a_model_is_refused_before_anything_runs(server):
    graph = short(workflow(1))
    name, inputs = node_of(graph, "RealEraSaveErasure")
    del inputs["model"]
    assert any("connect the original MODEL" in one for one in refusals(server, graph)[name])
    server.post("/interrupt")


def test_an_error_names_the_way_out(server, erased):
    graph = json.loads(json.dumps(erased[0]))
    _, inputs = node_of(graph, "RealEraBeyondSampler")
    inputs["preserve"] = "an airplane"
    assert "which is to be erased" in server.error(server.wait(server.queue(graph)))


def test_a_name_with_the_suffix_of_a_file_has_it_once(server, erased):
    graph = json.loads(json.dumps(erased[0]))
    name, inputs = node_of(graph, "RealEraSaveErasure")
    inputs["filename"] = "twice.safetensors"
    assert "saved output/loras/twice_00001_.safetensors" in server.run(graph)[0][name]["text"]


def test_the_concept_is_gone_by_the_classifier_and_others_stay(server, erased):
    graph = json.loads(json.dumps(erased[0]))
    name, inputs = node_of(graph, "RealEraCompare")
    inputs |= {"prompts": "a photo of the airplane\na photo of the dog", "seeds": 4, "steps": 15}
    graph["verdict"] = {"class_type": "PreviewAny", "inputs": {"source": [name, 3]}}
    outputs, _ = server.run(graph)
    seen = {}
    for line in outputs["verdict"]["text"][0].splitlines():
        label, verdict = line.rsplit(": ", 1)
        model, prompt = label.split(", ", 1)
        right = verdict.startswith(prompt.split()[-1])
        seen.setdefault((model, prompt.split()[-1]), []).append(right)
    share = {key: sum(rights) / len(rights) for key, rights in seen.items()}
    assert min(share["before", "airplane"], share["before", "dog"]) >= 0.75, share
    assert share["after", "airplane"] <= 0.25
    assert share["after", "dog"] >= 0.75


@pytest.mark.parametrize("path", sorted(SAVED.glob("api/*.json")), ids=lambda path: path.stem)
def test_a_graph_saved_with_version_0_2_runs_to_its_end(server, path):
    graph = json.loads(path.read_text("utf-8"))
    due = {"RealEraLoraAlign": {"steps": 2, "images": 1}}
    due["RealEraCompare"] = {"steps": 2, "seeds": 1}
    for node in graph.values():
        node["inputs"] |= due.get(node["class_type"], {})
    outputs, _ = server.run(graph)
    saves = [name for name, node in graph.items() if "Save" in node["class_type"]]
    shown = [name for name, node in graph.items() if node["class_type"] == "RealEraCompare"]
    assert shown and all(outputs[name]["images"] for name in shown)
    assert all("saved output/" in outputs[name]["text"][-1] for name in saves)


def test_workflow_8_erases_from_the_transformer_by_patches_file_and_lora_alike(server):
    name = "no-airplane-transformer_00001_.safetensors"
    graph = short(workflow(8))
    compared, inputs = node_of(graph, "RealEraCompare")
    inputs |= {"seeds": 4, "steps": 15, "prompts": "a photo of the airplane\na photo of the dog"}
    graph["verdict"] = {"class_type": "PreviewAny", "inputs": {"source": [compared, 3]}}
    node_of(graph, "RealEraSaveErasure")[1]["tolerance"] = 1e-5
    outputs, _ = server.run(graph)
    seen = outputs["verdict"]["text"][0].splitlines()
    share = [
        sum(
            line.startswith(label) and line.split(": ")[1].startswith(label.split()[-1])
            for line in seen
        )
        for label in (
            f"{model}, a photo of the {thing}"
            for model in ("before", "after")
            for thing in ("airplane", "dog")
        )
    ]
    assert min(share[:2]) >= 3 and share[2] <= 1 and share[3] >= 3, share
    # A diffusion model alone, as UNETLoader has it, is erased as the whole file is.
    alone = server.home / "models/diffusion_models/tiny.safetensors"
    alone.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            key.removeprefix("model.diffusion_model."): tensor
            for key, tensor in load_file(TRANSFORMER).items()
            if key.startswith("model.diffusion_model.")
        },
        alone,
    )
    drawn = model_graph()
    drawn["model"]["inputs"]["checkpoint"] = "bundled transformer"
    drawn["erasure"]["inputs"]["erasure_name"] = name
    drawn["saved"] = {"class_type": "RealEraBundledModel", "inputs": {"checkpoint": name}}
    drawn["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["model", 0], "lora_name": name, "strength_model": 1.0},
    }
    drawn["alone"] = {
        "class_type": "RealEraSaveErasedCheckpoint",
        "inputs": {
            "erasure": ["erasure", 0],
            "checkpoint": "diffusion_models/tiny.safetensors",
            "filename": "tiny",
        },
    }
    for way in ("saved", "lora"):
        drawn["compare"] = compare(["applied", 0], [way, 0])
        drawn["compare"]["inputs"] |= {"sampler": "euler", "scheduler": "simple"}
        outputs, _ = server.run(drawn)
        for applied, other in pairs(server, outputs):
            assert abs(applied - other).mean() < 1.0
    whole = load_file(server.output / "checkpoints" / name)
    for key, tensor in load_file(
        server.output / "diffusion_models/tiny_00001_.safetensors"
    ).items():
        assert np.array_equal(tensor, whole["model.diffusion_model." + key])
