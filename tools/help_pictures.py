"""Takes the pictures of the help pages, the README and the examples in a real ComfyUI.

COMFYUI_DIR, COMFYUI_PYTHON and COMFYUI_FRONTEND as for the tests; a Chromium as Playwright finds
one. Workflow 1 and its nodes are shown after a run of it, in classic rendering, other nodes as they
are added.
"""

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .comfyui import Server, comfyui

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / "workflows/1 erase an object (bundled model).json"
ALONE = {"LoadErasure": 290, "MergeErasures": 240, "ClipClassifier": 360, "NudeNet": 360}
SIDE = 512  # pixels of an example's picture
EDGE = 14  # pixels around a node
TITLE = 60  # pixels above a node: its title and its badge
SCALE = 0.75  # of the whole graph
BESIDE = (120, 140)  # pixels of the page's bars, left of the graph and above

SHOW = """([kind, width]) => {
    const { canvas, graph } = app;
    let node = graph._nodes.find((n) => n.comfyClass === kind);
    if (!node) {
        node = LiteGraph.createNode(kind);
        node.pos = [600 * graph._nodes.length, 3000];
        graph.add(node);
        node.setSize([width, Math.max(node.size[1], node.computeSize()[1])]);
    }
    canvas.links_render_mode = LiteGraph.HIDDEN_LINK;
    canvas.deselectAll?.();
    canvas.ds.scale = 1;
    canvas.ds.offset = [200 - node.pos[0], 200 - node.pos[1]];
    canvas.setDirty(true, true);
    const { x, y } = canvas.canvas.getBoundingClientRect();
    return [x + 200, y + 200, ...node.size];
}"""
FIT = """([left, top, scale]) => {
    const { canvas, graph } = app;
    const boxes = [...graph._groups, ...graph._nodes].map(({ pos, size }) => [...pos, ...size]);
    const x = Math.min(...boxes.map((box) => box[0])), y = Math.min(...boxes.map((box) => box[1]));
    const right = Math.max(...boxes.map((box) => box[0] + box[2]));
    const low = Math.max(...boxes.map((box) => box[1] + box[3]));
    const corner = canvas.canvas.getBoundingClientRect();
    canvas.deselectAll?.();
    canvas.ds.scale = scale;
    canvas.ds.offset = [(left - corner.x) / scale - x, (top - corner.y) / scale - y];
    canvas.setDirty(true, true);
    return [(right - x) * scale, (low - y) * scale];
}"""
RUN = """() => new Promise((resolve, reject) => {
    app.api.addEventListener('execution_success', () => resolve());
    app.api.addEventListener('execution_error', ({ detail }) => reject(detail.exception_message));
    app.queuePrompt(0);
})"""


def save(picture: Image.Image, path: Path) -> None:
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.name, picture.size, path.stat().st_size, flush=True)


def take_graph(page: Any) -> Image.Image:
    """The whole graph, below and beside what the page lays over the canvas."""
    wide, high = page.evaluate(FIT, [*BESIDE, SCALE])
    page.wait_for_timeout(3000)  # elements follow the canvas later
    clip = {"x": BESIDE[0] - EDGE, "y": BESIDE[1] - EDGE}
    shot = page.screenshot(clip={**clip, "width": wide + 2 * EDGE, "height": high + 2 * EDGE})
    return Image.open(io.BytesIO(shot))


def take(page: Any, kind: str, width: int) -> Image.Image:
    """A node at its full size, with what stands under it."""
    left, top, wide, high = page.evaluate(SHOW, [kind, width])
    page.wait_for_timeout(1500)  # elements follow the canvas later
    clip = {"x": left - EDGE, "y": top - TITLE, "width": wide + 2 * EDGE}
    shot = page.screenshot(clip={**clip, "height": TITLE + high + EDGE})
    return Image.open(io.BytesIO(shot))


def take_all(server: Server, browser: Any) -> None:
    server.post("/settings/Comfy.TutorialCompleted", True)
    page = browser.new_page(viewport={"width": 1600, "height": 1500})
    page.goto(server.address)
    page.wait_for_function("() => window.app?.graph && app.extensionManager?.command")
    for setting in ("Comfy.VueNodes.Enabled", "Comfy.Minimap.Visible"):
        page.evaluate("id => app.extensionManager.setting.set(id, false)", setting)
    page.evaluate("graph => app.loadGraphData(graph)", json.loads(WORKFLOW.read_text("utf-8")))
    page.wait_for_timeout(2000)
    page.evaluate(RUN)
    page.evaluate("() => app.refreshComboInNodes()")  # what was saved can be loaded
    page.wait_for_timeout(2000)
    save(take_graph(page), ROOT / "docs/pictures/graph.png")
    shown = page.evaluate("() => app.graph._nodes.map((n) => n.comfyClass)")
    ours = [kind for kind in shown if kind and kind.startswith("RealEra")]
    for kind in [*ours, *(f"RealEra{name}" for name in ALONE)]:
        picture = take(page, kind, ALONE.get(kind.removeprefix("RealEra"), 0))
        save(picture, ROOT / "web/docs" / f"{kind}.png")


def square(picture: Image.Image) -> Image.Image:
    """A picture on a white square of SIDE pixels, as large as it fits."""
    made = Image.new("RGB", (SIDE, SIDE), "white")
    scale = SIDE / max(picture.size)
    width, height = (round(length * scale) for length in picture.size)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    made.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
    return made


def card(concepts: str) -> Image.Image:
    """Picture of an example whose checkpoint must be downloaded: concepts and their anchors.

    concepts: one `concept -> anchor` a line
    """
    made = Image.new("RGB", (SIDE, SIDE), "#f1d3d5")
    pen, lines, font = ImageDraw.Draw(made), concepts.splitlines(), ImageFont.load_default(42)
    pen.rectangle((SIDE / 2, 0, SIDE, SIDE), "#2f5d8f")
    for number, line in enumerate(lines):
        concept, anchor = (part.strip() for part in line.split("->"))
        left, right, middle = SIDE / 4, 3 * SIDE / 4, SIDE * (number + 1) / (len(lines) + 1)
        pen.text((left, middle), concept, "#9c2533", font, anchor="mm")
        half = pen.textlength(concept, font) / 2
        pen.line((left - half, middle, left + half, middle), "#9c2533", 4)
        pen.text((right, middle), anchor, "white", font, anchor="mm")
    return made


def tiles(server: Server, outputs: dict[str, Any]) -> Image.Image:
    """First and last image of every model of an example, a row for each model.

    outputs: what the nodes of the example have shown
    """
    if compared := [
        node["realera_images"] for node in outputs.values() if "realera_images" in node
    ]:
        columns = [compared[0][0]["files"], compared[0][-1]["files"]]
        if len(columns[0]) > 2:  # all prompts, for as many rows
            columns = [image["files"] for image in compared[0]]
        rows = list(zip(*columns, strict=True))
    else:
        rows = [tuple(node["images"][:2]) for node in outputs.values() if "images" in node]
    pixels = [np.concatenate([server.pixels(file) for file in row], axis=1) for row in rows]
    return Image.fromarray(np.concatenate(pixels).astype("uint8"))


def take_thumbnails(server: Server, numbers: str) -> None:
    """The squares that the template browser shows, from runs of the graphs.

    numbers: digits of the examples to take
    """
    for path in sorted(WORKFLOW.parent.glob("*.json")):
        if path.name[0] not in numbers:
            continue
        graph = json.loads((path.parent / "api" / path.name).read_text("utf-8"))
        nodes = {node["class_type"]: node["inputs"] for node in graph.values()}
        if "CheckpointLoaderSimple" in nodes:
            made = card(nodes["RealEraNeighborSampler"]["concepts"])
        else:
            # Alignment does not show at this size.
            nodes.get("RealEraLoraAlign", {}).update(steps=10, images=1, preview_every=0)
            outputs, _ = server.run(graph)
            made = square(tiles(server, outputs))
        made.save(path.with_suffix(".jpg"), quality=88, optimize=True)
        print(path.stem, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", default="", help="digits of the examples, such as 147, alone")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "custom_nodes").mkdir()
        (home / "custom_nodes/RealEra").symlink_to(ROOT)
        clip = home / "models/clip_vision/clip-vit-large-patch14"
        clip.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (clip / name).touch()  # its name is shown, no more
        found = shutil.which("chromium") or shutil.which("google-chrome")
        with comfyui(home) as server:
            if options.examples:
                return take_thumbnails(server, options.examples)
        with comfyui(home) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            take_all(server, browser)
            browser.close()


if __name__ == "__main__":
    main()
