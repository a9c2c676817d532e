"""The node pack without ComfyUI: schemas, strings, help pages and workflows agree.

`object_info.json` is what real ComfyUI says about our nodes and those that the workflows use;
`test_comfyui.py` checks it against a running server.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from realera import (
    BeyondSettings,
    NeighborSettings,
    SolveSettings,
    erase,
    load_model,
    mine,
    parse_concepts,
)
from realera.edit.erasure import temporarily_erased
from realera.evaluation.scorers import miniature_classifier
from realera.pipelines.sampling import Sampling, sample_prompts
from realera.settings import SOURCES

ROOT = Path(__file__).parent.parent
INFO = json.loads((ROOT / "tests/object_info.json").read_text("utf-8"))
OURS = {name: info for name, info in INFO.items() if name.startswith("RealEra")}
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
# Examples as version 0.2 saved them, which must open for as long as nodes and sockets stay.
SAVED = sorted((ROOT / "tests/data/workflows-0.2").glob("*.json"))
BOTH = [*WORKFLOWS, *SAVED]
(BLUEPRINT,) = (ROOT / "subgraphs").glob("*.json")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FILES = (
    "ckpt_name",
    "lora_name",
    "checkpoint",
    "erasure_name",
    "clip_folder",
)  # lists that differ by machine


def inputs_of(info):
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            yield name, kind, options[0] if options else {}


def is_widget(kind):
    return isinstance(kind, list) or kind in WIDGETS


def widgets_of(kind_of_node):
    """(name, kind, options) of every widget in the order of widgets_values."""
    for name, kind, options in inputs_of(INFO[kind_of_node]):
        if is_widget(kind):
            yield name, kind, options
            if options.get("control_after_generate") or (
                name in ("seed", "noise_seed") and "control_after_generate" not in options
            ):
                yield None, "CONTROL", {}


def nodes_of(graph):
    """Nodes of a graph, those of subgraphs among them and not the hosts, which have no schema."""
    inside = graph.get("definitions", {}).get("subgraphs", [])
    hosts = {subgraph["id"] for subgraph in inside}
    nodes = [*graph["nodes"], *(node for subgraph in inside for node in subgraph["nodes"])]
    return [node for node in nodes if node["type"] not in hosts]


def expanded(graph):
    """A graph without subgraphs: nodes of one by the id of its host, as ComfyUI sends them.

    Returns links as (id, source, output, target, input, type), and nodes by id.
    """
    inside = {one["id"]: one for one in graph.get("definitions", {}).get("subgraphs", [])}
    nodes, links = {}, []
    hosts = {node["id"]: inside[node["type"]] for node in graph["nodes"] if node["type"] in inside}

    def path(host, number):
        return f"{host}:{number}"

    for node in graph["nodes"]:
        if node["id"] not in hosts:
            nodes[str(node["id"])] = node
    for host, subgraph in hosts.items():
        nodes |= {path(host, node["id"]): node for node in subgraph["nodes"]}
        outer = {link[4]: link for link in graph["links"] if link[3] == host}
        for link in subgraph["links"]:
            target = (path(host, link["target_id"]), link["target_slot"])
            if link["target_id"] == -20:
                continue
            if link["origin_id"] != -10:
                source = (path(host, link["origin_id"]), link["origin_slot"])
            elif link["origin_slot"] in outer:
                _, source_id, output, *_ = outer[link["origin_slot"]]
                source = (str(source_id), output)
            else:  # a widget of the host
                continue
            links.append((link["id"], *source, *target, link["type"]))
    for number, source, output, target, slot, kind in graph["links"]:
        if target in hosts:
            continue
        start = (str(source), output)
        if source in hosts:
            (link,) = (
                link
                for link in hosts[source]["links"]
                if (link["target_id"], link["target_slot"]) == (-20, output)
            )
            start = (path(source, link["origin_id"]), link["origin_slot"])
        links.append((number, *start, str(target), slot, kind))
    return links, nodes


def test_the_pack_can_be_imported_without_comfyui():
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert callable(pack.comfy_entrypoint)
    assert (ROOT / pack.WEB_DIRECTORY / "realera.js").is_file()


def test_the_registry_s_scanner_finds_every_node():
    """ComfyUI Manager reads node ids from calls of `Schema` in `define_schema`, without importing
    anything; "Install missing nodes" goes by them."""
    ids = set()
    for path in (ROOT / "nodes").glob("*.py"):
        for method in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(method, ast.FunctionDef) and method.name == "define_schema":
                for call in ast.walk(method):
                    if not isinstance(call, ast.Call):
                        continue
                    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                    if name == "Schema":
                        ids |= {
                            ast.literal_eval(keyword.value)
                            for keyword in call.keywords
                            if keyword.arg == "node_id"
                        }
    assert len(ids) == 13 and ids == OURS.keys()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_of_a_workflow_names_its_pack_in_the_registry_and_the_version(path):
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    name, version = (re.search(rf'^{key} = "(.+)"', text, re.M)[1] for key in ("name", "version"))
    for node in nodes_of(json.loads(path.read_text("utf-8"))):
        found = node["properties"]["cnr_id"], node["properties"]["ver"]
        if node["type"].startswith("RealEra"):
            assert found == (name, version)
        else:
            assert found[0] == "comfy-core" and found[1]


def test_the_script_has_a_name_of_its_own_and_changes_nothing_that_others_share():
    script = (ROOT / "web/realera.js").read_text("utf-8")
    for name in re.findall(r'registerExtension\(\{\s*name: "(.+)"', script):
        assert re.fullmatch(r"realera\.\w+", name)
    assert not re.search(r"\b(api|app|LiteGraph|LGraph\w*)(\.\w+|\.prototype)+ = ", script)
    assert not re.search(r"document\.(head|body)", script)
    assert not re.search(r"\b(eval|Function)\(|innerHTML|console\.log", script)


def test_the_script_knows_the_values_that_automatic_stands_for():
    script = (ROOT / "web/realera.js").read_text("utf-8")
    (cosines,) = re.findall(r"const COSINES = \{([^}]+)\};", script)
    found = {
        source: (float(s2), float(s1))
        for source, s2, s1 in re.findall(r"(\w+): \[([\d.]+), ([\d.]+)\]", cosines)
    }
    assert found == {source: NeighborSettings(source=source).cosines for source in SOURCES}
    (automatic,) = re.findall(r"const AUTOMATIC = \{(.+)\};", script)
    for name, value in re.findall(r"(\w+): (-?\d+)", automatic):
        for node in ("RealEraNeighborSampler", "RealEraBeyondSampler"):
            fields = {field: options for field, _, options in inputs_of(OURS[node])}
            assert name not in fields or fields[name]["default"] == int(value)


def said_in(path):
    """The texts of a Python file, with {} for what is put into them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                getattr(part, "value", "{}") if isinstance(part, ast.Constant) else "{}"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_what_is_translated_is_what_nodes_say_and_holds_the_same_values():
    script = (ROOT / "web/messages.js").read_text("utf-8")
    pairs = re.findall(r'\["(.+?)",\s+"(.+?)"\]', script)
    assert len(pairs) > 30
    names = ("concepts", "settings", "anchor_warnings", "anchor_suggestions")
    files = [ROOT / f"realera/{name}.py" for name in names]
    corpus = "\n".join(
        text for path in [*files, *ROOT.glob("nodes/*.py")] for text in said_in(path)
    )
    for english, chinese in pairs:
        for part in english.split("{}"):
            assert part.strip(" ,:;'") in corpus, english
        places = {int(place) for place in re.findall(r"\{(\d)\}", chinese)}
        assert places <= set(range(english.count("{}"))), english
        assert re.search("[\u4e00-\u9fff]", chinese)


@pytest.mark.parametrize("file", ["commands", "settings"])
def test_commands_and_settings_of_the_script_have_strings_in_every_locale(file):
    script = (ROOT / "web/realera.js").read_text("utf-8")
    due = {name.replace(".", "_") for name in re.findall(r'\bid: "(RealEra\.\w+)"', script)}
    found = {
        language: json.loads((ROOT / f"locales/{language}/{file}.json").read_text("utf-8"))
        for language in ("en", "zh")
    }
    assert found["en"].keys() == found["zh"].keys() <= due
    assert all(
        value for strings in found.values() for of in strings.values() for value in of.values()
    )


def test_a_stage_of_the_method_is_found_by_the_words_that_users_search_for():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "nodes").glob("*.py"))
    (words,) = re.findall(r"^ALIASES = (\[.+\])", source, re.M)
    due = {"concept", "erase", "remove", "forget", "unlearn", "safety", "censor", "ESD"}
    assert due == set(ast.literal_eval(words))
    found = re.findall(r'display_name="([\w -]+)",(?:(?!display_name).)*?\[\*ALIASES', source, re.S)
    assert sorted(found) == [
        "Apply Erasure",
        "Beyond Sampler",
        "Closed-Form Edit",
        "LoRA Align",
        "Neighbor Sampler",
    ]


@pytest.mark.parametrize("name", OURS)
def test_every_input_and_output_explains_itself(name):
    info = OURS[name]
    assert info["category"] == "RealEra"
    assert info["description"].endswith(".")
    for field, _, options in inputs_of(info):
        assert options.get("tooltip", "").endswith("."), field
    for output, tooltip in zip(info["output_name"], info["output_tooltips"], strict=True):
        assert tooltip and tooltip.endswith("."), output


@pytest.mark.parametrize("name", OURS)
def test_every_number_has_a_range_that_holds_its_default(name):
    for field, kind, options in inputs_of(OURS[name]):
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], field
        if kind == "COMBO" and field not in FILES:
            assert options["default"] in options["options"], field


@pytest.mark.parametrize("name", OURS)
def test_every_node_has_a_help_page_with_a_picture_and_an_example(name):
    page = (ROOT / f"web/docs/{name}.md").read_text("utf-8")
    assert page.startswith(f"# {OURS[name]['display_name']}\n")
    assert "**Example.**" in page
    (picture,) = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert (ROOT / "web/docs" / picture).is_file()


def test_no_help_page_is_left_over():
    assert {path.stem for path in (ROOT / "web/docs").glob("*.md")} == OURS.keys()


def plain(text):
    """A string of a locale as the page shows it: vue-i18n writes {'x'} for a literal x."""
    return re.sub(r"\{'(.)'\}", r"\1", text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_string_of_a_node_is_in_the_locale(language):
    nodes = json.loads((ROOT / f"locales/{language}/nodeDefs.json").read_text("utf-8"))
    assert nodes.keys() == OURS.keys()
    for name, info in OURS.items():
        strings = nodes[name]
        assert strings["display_name"] and strings["description"]
        assert strings["inputs"].keys() == {field for field, _, _ in inputs_of(info)}, name
        assert strings["outputs"].keys() == {str(k) for k in range(len(info["output"]))}, name
        for entry in (*strings["inputs"].values(), *strings["outputs"].values()):
            for text in entry.values():
                assert text
                assert not re.search(r"[{}@|$]", re.sub(r"\{'.'\}", "", text)), text


def test_the_english_strings_are_those_of_the_schemas():
    nodes = json.loads((ROOT / "locales/en/nodeDefs.json").read_text("utf-8"))
    for name, info in OURS.items():
        assert plain(nodes[name]["display_name"]) == info["display_name"]
        assert plain(nodes[name]["description"]) == info["description"]
        for field, _, options in inputs_of(info):
            assert plain(nodes[name]["inputs"][field]["tooltip"]) == options["tooltip"]
        for k, tooltip in enumerate(info["output_tooltips"]):
            assert plain(nodes[name]["outputs"][str(k)]["tooltip"]) == tooltip


def test_the_page_speaks_of_nodes_and_widgets_that_exist():
    script = (ROOT / "web/realera.js").read_text("utf-8")
    assert set(re.findall(r"RealEra[A-Z]\w+", script)) <= OURS.keys()
    fields = {name: {field for field, _, _ in inputs_of(info)} for name, info in OURS.items()}
    # Wherever the script names a widget of a node: find("RealEraNeighborSampler", "leave_out").
    read = re.findall(r'"(RealEra\w+)", "(\w+)"', script)
    assert ("RealEraNeighborSampler", "leave_out") in read
    assert all(field in fields[name] for name, field in read)


def test_one_wire_leads_from_what_is_mined_to_what_is_trained():
    for name in ("BeyondSampler", "ClosedFormEdit", "LoraAlign"):
        wires = {field: kind for field, kind, _ in inputs_of(OURS[f"RealEra{name}"])}
        assert wires["mining"] == "REALERA_MINING"
        assert not {"neighbors", "beyond"} & wires.keys()


def test_only_wires_and_what_is_to_be_erased_or_drawn_must_be_given():
    due = {"concepts", "prompts", "checkpoint", *FILES}
    for name, info in OURS.items():
        for field, (kind, *_) in info["input"]["required"].items():
            assert field in due or not is_widget(kind), (name, field)


def test_every_anchor_that_we_show_is_one_that_the_model_draws_surely():
    shown = INFO["RealEraNeighborSampler"]["input"]["required"]["concepts"][1]["default"]
    assert shown == "airplane -> tree"
    ours = [path for home in ("realera", "nodes") for path in (ROOT / home).glob("*.py")]
    for path in [*WORKFLOWS, *(ROOT / "web/docs").rglob("*.md"), *ours]:
        assert "-> ground" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_preview_picture_and_a_note(path):
    assert path.with_suffix(".jpg").is_file()
    nodes = json.loads(path.read_text("utf-8"))["nodes"]
    assert any(node["type"] == "MarkdownNote" and node["widgets_values"][0] for node in nodes)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_is_small_enough_to_be_read_on_a_small_screen(path):
    """ComfyUI fits an example to three quarters of the page, and draws no text below 8/14."""
    graph = json.loads(path.read_text("utf-8"))
    corners = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    width = max(x + w for x, _, w, _ in corners) - min(x for x, *_ in corners)
    height = max(y + h for _, y, _, h in corners) - min(y for _, y, *_ in corners) + 30  # title
    assert 0.75 * min(1366 / (width + 20), 768 / (height + 20)) >= 8 / 14
    assert all(re.match(r"\d · ", group["title"]) for group in graph["groups"] if group["title"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_note_of_an_example_says_what_to_press_what_one_sees_and_how_long_it_takes(path):
    nodes = json.loads(path.read_text("utf-8"))["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    assert "**Run**" in note
    assert re.search("You will see|has a row for each model", note)
    assert re.search("minute|seconds", note)


@pytest.mark.parametrize("path", BOTH, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_the_links_of_a_workflow_fit_the_schemas(path):
    links, nodes = expanded(json.loads(path.read_text("utf-8")))
    linked = {target: set() for target in nodes}
    for number, source, output, target, slot, kind in links:
        start, end = nodes[source], nodes[target]["inputs"][slot]
        assert INFO[start["type"]]["output"][output] == kind
        assert end["link"] == number
        assert ":" in source + target or number in start["outputs"][output]["links"]
        due = {name: kind for name, kind, _ in inputs_of(INFO[nodes[target]["type"]])}
        assert due[end["name"]] == kind
        linked[target].add(end["name"])
    for number, node in nodes.items():
        if node["type"] != "MarkdownNote":
            for name, (kind, *_) in INFO[node["type"]]["input"]["required"].items():
                assert is_widget(kind) or name in linked[number], f"{node['type']}.{name} is loose"


@pytest.mark.parametrize("path", BOTH, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_the_widgets_of_a_workflow_fit_the_schemas(path):
    for node in nodes_of(json.loads(path.read_text("utf-8"))):
        if node["type"] == "MarkdownNote":
            continue
        widgets = list(widgets_of(node["type"]))
        assert len(widgets) == len(node["widgets_values"]), node["type"]
        for (name, kind, options), value in zip(widgets, node["widgets_values"], strict=True):
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], (node["type"], name)
            elif kind == "BOOLEAN":
                assert isinstance(value, bool)
            elif name not in FILES and (isinstance(kind, list) or kind == "COMBO"):
                assert value in (kind if isinstance(kind, list) else options["options"])


@pytest.mark.parametrize("path", BOTH, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_the_api_form_of_a_workflow_is_the_same_graph(path):
    links, nodes = expanded(json.loads(path.read_text("utf-8")))
    expected = {}
    for number, node in nodes.items():
        if node["type"] == "MarkdownNote":
            continue
        values = zip(widgets_of(node["type"]), node["widgets_values"], strict=True)
        inputs = {name: value for (name, _, _), value in values if name}
        for _, source, output, target, slot, _ in links:
            if target == number:
                inputs[node["inputs"][slot]["name"]] = [source, output]
        expected[number] = {"class_type": node["type"], "inputs": inputs}
    api = json.loads((path.parent / "api" / path.name).read_text("utf-8"))
    for node in api.values():
        node.pop("_meta", None)
    assert api == expected


def test_what_the_nodes_import_of_the_core_loads_no_slow_library():
    """ComfyUI imports the pack at every start; these take up to seconds."""
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "nodes").glob("*.py"))
    modules = {
        f"realera{folder}"
        for folder in re.findall(r"^from \.\.realera([\w.]+) import", sources, re.M)
    }
    for folder, names in re.findall(
        r"^from \.\.realera(\.report|) import ([\w, ]+)", sources, re.M
    ):
        modules |= {f"realera{folder}.{name}" for name in names.split(", ")}
    assert len(modules) > 8
    script = f"import sys, {', '.join(sorted(modules))}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"diffusers", "transformers", "peft", "matplotlib"} & set(done.stdout.split())


def test_the_blueprint_is_the_subgraph_of_example_0_with_four_inputs_outside():
    blueprint = json.loads(BLUEPRINT.read_text("utf-8"))
    example = json.loads(next(p for p in WORKFLOWS if p.name[0] == "0").read_text("utf-8"))
    assert blueprint["definitions"] == example["definitions"]
    (subgraph,), (host,) = blueprint["definitions"]["subgraphs"], blueprint["nodes"]
    assert host["type"] == subgraph["id"] and host["title"] == subgraph["name"] == BLUEPRINT.stem
    assert [node["type"].removeprefix("RealEra") for node in subgraph["nodes"]] == [
        "NeighborSampler",
        "BeyondSampler",
        "ClosedFormEdit",
        "ApplyErasure",
    ]
    widgets = [end["name"] for end in host["inputs"] if "widget" in end]
    assert widgets == ["concepts", "leave_out", "preserve", "edit_strength"]
    assert {end["type"] for end in host["inputs"] if "widget" not in end} == {"MODEL", "CLIP"}
    # Frontends find an inner widget by the place of its input among all of them.
    for node in subgraph["nodes"]:
        due = [name for name, kind, _ in inputs_of(INFO[node["type"]]) if is_widget(kind)]
        assert [end["name"] for end in node["inputs"] if "widget" in end] == due
    inner = {node["id"] for node in subgraph["nodes"]}
    assert not inner & {node["id"] for node in example["nodes"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_picture_of_a_workflow_is_square(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.width == picture.height >= 400


def test_icon_and_banner_have_the_shapes_that_the_registry_asks_for():
    sizes = []
    for name in ("icon", "banner"):
        with Image.open(ROOT / f"docs/pictures/{name}.png") as picture:
            sizes.append(picture.size)
    assert sizes == [(400, 400), (1260, 540)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_example_writes_gigabytes_at_every_run(path):
    for node in json.loads(path.read_text("utf-8"))["nodes"]:
        if node["type"] == "RealEraSaveErasedCheckpoint":
            bundled = node["widgets_values"][0].startswith("bundled")
            assert bundled or node["mode"] == 2  # muted


def test_workflow_7_shows_what_each_stage_is_for():
    """Its own settings, on the core: mining takes away what implies the concept, and beyond points
    give back what mining takes with it."""
    (path,) = (path for path in WORKFLOWS if path.name.startswith("7 "))
    graph = json.loads((path.parent / "api" / path.name).read_text("utf-8"))
    edit = SolveSettings(
        bank=graph["8"]["inputs"]["bank"], suppression=graph["8"]["inputs"]["away"]
    )
    m, n = graph["4"]["inputs"]["count"], graph["5"]["inputs"]["count"]
    concepts = parse_concepts(graph["4"]["inputs"]["concepts"])
    prompts = graph["11"]["inputs"]["prompts"].splitlines()
    model, classifier = load_model("miniature"), miniature_classifier()

    def seen():
        latents = torch.cat(
            list(sample_prompts(model, prompts, Sampling(steps=10, one_noise=True)))
        )
        return [line.split()[0] for line in classifier.describe(model.decode(latents), prompts)]

    def after(neighbors, beyond):
        near, far = NeighborSettings(neighbors=neighbors), BeyondSettings(beyond=beyond)
        erasure = erase(mine(model.text, concepts, near, far), edit)
        with temporarily_erased(erasure, model.network):
            return seen()

    assert seen() == ["airplane", "airplane", "ship", "dog"]
    assert after(0, 0) == ["tree", "airplane", "ship", "dog"]
    mined = after(m, 0)
    assert mined[:3] == ["tree", "tree", "tree"] and mined[3] == "dog"
    beyond = after(m, n)
    assert beyond[0] == "tree" and beyond[1] != "airplane" and beyond[2:] == ["ship", "dog"]
